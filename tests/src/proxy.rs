//! A proxy between a host and a daemon that injects faults of networks and daemons.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The fault that the proxy injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    None,
    /// Closes all connections and refuses new ones, as if the daemon were stopped.
    Stopped,
    /// Keeps all connections open and forwards nothing, as if the daemon were suspended.
    Frozen,
    /// Answers two requests out of three with 500.
    Refusing,
    /// Closes each connection after up to 2 s.
    Cutting,
    /// Delays all data by up to 1 s.
    Slow,
    /// Drops one in ten messages of subscriptions.
    Losing,
    /// Drops all messages of subscriptions.
    LosingAll,
}

/// A running proxy, which ends on drop.
pub struct FaultProxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    _serving: JoinSet<()>,
}

/// The state that connections share.
#[derive(Clone)]
struct Shared {
    target: SocketAddr,
    fault: watch::Receiver<Fault>,
    random: Arc<Mutex<StdRng>>,
}

impl FaultProxy {
    /// Starts a proxy in front of the daemon at `target`. `seed` determines the faults and is printed.
    pub async fn start(target: SocketAddr, seed: u64) -> Self {
        println!("fault proxy: seed {seed}");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let fault = watch::Sender::new(Fault::None);
        let random = Arc::new(Mutex::new(StdRng::seed_from_u64(seed)));
        let shared = Shared { target, fault: fault.subscribe(), random };
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { return };
                        connections.spawn(shared.clone().serve(stream));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { address, fault, _serving: serving }
    }

    /// Returns the multiaddr of the proxy.
    pub fn api(&self) -> String {
        format!("/ip4/127.0.0.1/tcp/{}", self.address.port())
    }

    /// Sets the fault from now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

impl Shared {
    fn up_to(&self, most: Duration) -> Duration {
        let mut random = self.random.lock().expect("no one panics while holding the random");
        most.mul_f64(random.random_range(0.0..1.0))
    }

    fn one_in(&self, count: u32) -> bool {
        self.random.lock().expect("no one panics while holding the random").random_range(0..count) == 0
    }

    async fn serve(self, from: TcpStream) {
        let fault = *self.fault.borrow();
        match fault {
            Fault::Stopped => return,
            Fault::Refusing if !self.one_in(3) => return refuse(from).await,
            // Keeps the connection open until the fault changes.
            Fault::Frozen => return self.clone().until_other(fault).await,
            _ => {}
        }
        let Ok(to) = TcpStream::connect(self.target).await else { return };
        let ((asks, answered), (answers, asked)) = (from.into_split(), to.into_split());
        let is_subscription = AtomicBool::new(false);
        tokio::select! {
            () = self.forward_requests(asks, asked, &is_subscription) => {}
            () = self.forward_answers(answers, answered, &is_subscription) => {}
            () = self.broken() => {}
        }
    }

    /// Resolves when the fault closes the connection.
    async fn broken(&self) {
        let mut changes = self.fault.clone();
        loop {
            let fault = *changes.borrow_and_update();
            let cut = async {
                match fault {
                    Fault::Stopped | Fault::Refusing => {}
                    Fault::Cutting => tokio::time::sleep(self.up_to(Duration::from_secs(2))).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = cut => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn until_other(mut self, fault: Fault) {
        let _ = self.fault.wait_for(|now| *now != fault).await;
    }

    async fn forward_requests(
        &self,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        is_subscription: &AtomicBool,
    ) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            // A client sends a request on an idle connection, so it begins at the start of what is read.
            let is_sub = buffer[..length].starts_with(b"POST /api/v0/pubsub/sub");
            is_subscription.fetch_or(is_sub, Ordering::Relaxed);
            self.delay().await;
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    async fn forward_answers(
        &self,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        is_subscription: &AtomicBool,
    ) {
        let mut buffer = vec![0; 64 << 10];
        let mut chunks = Chunks::default();
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            self.delay().await;
            let data = if is_subscription.load(Ordering::Relaxed) {
                chunks.add(&buffer[..length]);
                let fault = *self.fault.borrow();
                chunks.take(|| match fault {
                    Fault::Losing => self.one_in(10),
                    _ => fault == Fault::LosingAll,
                })
            } else {
                buffer[..length].to_vec()
            };
            if to.write_all(&data).await.is_err() {
                return;
            }
        }
    }

    /// Delays data as the fault says.
    async fn delay(&self) {
        let fault = *self.fault.borrow();
        match fault {
            Fault::Frozen => self.clone().until_other(fault).await,
            Fault::Slow => tokio::time::sleep(self.up_to(Duration::from_secs(1))).await,
            _ => {}
        }
    }
}

/// The answer to a subscription: headers, and chunks that are messages (RFC 9112, section 7.1).
#[derive(Default)]
struct Chunks {
    data: Vec<u8>,
    has_headers: bool,
}

impl Chunks {
    fn add(&mut self, data: &[u8]) {
        self.data.extend_from_slice(data);
    }

    /// Takes the complete parts, without the chunks for which `loses` returns true.
    fn take(&mut self, mut loses: impl FnMut() -> bool) -> Vec<u8> {
        let mut taken = Vec::new();
        while let Some(length) = self.part() {
            let part: Vec<u8> = self.data.drain(..length).collect();
            let is_message = self.has_headers;
            self.has_headers = true;
            if !(is_message && loses()) {
                taken.extend(part);
            }
        }
        taken
    }

    /// The length of the next part, if it is complete.
    fn part(&self) -> Option<usize> {
        let end_of =
            |end: &[u8]| self.data.windows(end.len()).position(|it| it == end).map(|at| at + end.len());
        if !self.has_headers {
            return end_of(b"\r\n\r\n");
        }
        let head = end_of(b"\r\n")?;
        let size = std::str::from_utf8(&self.data[..head - 2]).expect("a size in hex");
        let length = head + usize::from_str_radix(size, 16).expect("a size in hex") + 2;
        (self.data.len() >= length).then_some(length)
    }
}

/// Answers a request with an error, like a failing daemon.
async fn refuse(mut stream: TcpStream) {
    let mut request = vec![0; 64 << 10];
    let _ = stream.read(&mut request).await;
    let body = r#"{"Message":"the proxy says no","Code":0,"Type":"error"}"#;
    let answer = format!(
        "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(answer.as_bytes()).await;
}
