//! Owns what the user asks a program to end with. A thread of its own listens, so that a program whose other threads
//! are all blocked can be ended too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Signals within this time of the first count as one: `timeout` and a terminal send one to the process and one to
/// its group.
const SAME: Duration = Duration::from_secs(1);

/// How long the program may take to end after the second request, before it is killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ctrl-C and SIGTERM, from when this is made on. The second request kills the process if nothing else ends it.
#[derive(Debug)]
pub struct Signals {
    requests: mpsc::Receiver<()>,
    is_over: Arc<AtomicBool>,
}

impl Signals {
    /// Listens from now on: whoever is asked to end meanwhile hears of it.
    pub fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let within = runtime.enter();
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        drop(within);
        let (to, requests) = mpsc::channel(2);
        let is_over = Arc::new(AtomicBool::new(false));
        let watch = Watch { interrupt, terminate, to, is_over: is_over.clone() };
        std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(watch.run()))?;
        Ok(Self { requests, is_over })
    }

    /// Resolves on the next request. Cancel safe.
    pub async fn next(&mut self) {
        if self.requests.recv().await.is_none() {
            // The thread never ends before the process does.
            std::future::pending::<()>().await;
        }
    }
}

/// SIGHUP, from when this is made on: it does not end the process any more.
#[derive(Debug)]
pub struct Hangups(Signal);

impl Hangups {
    /// Listens from now on; one that comes before [`Hangups::next`] is not lost.
    pub fn new(runtime: &tokio::runtime::Runtime) -> io::Result<Self> {
        let _within = runtime.enter();
        signal(SignalKind::hangup()).map(Self)
    }

    /// Resolves on the next one; several at once may be one. Cancel safe.
    pub async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            // The runtime ends.
            std::future::pending::<()>().await;
        }
    }
}

/// What is left is to end: it must not take a second request.
impl Drop for Signals {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

struct Watch {
    interrupt: Signal,
    terminate: Signal,
    to: mpsc::Sender<()>,
    /// Nobody waits for requests any more.
    is_over: Arc<AtomicBool>,
}

impl Watch {
    async fn run(mut self) {
        self.signal().await;
        let first = Instant::now();
        // Full only if nobody listens; then the end below comes.
        let _ = self.to.try_send(());
        if !self.is_over.load(Ordering::Relaxed) {
            self.signal().await;
            while first.elapsed() < SAME {
                self.signal().await;
            }
            let _ = self.to.try_send(());
        }
        tokio::time::sleep(LAST_WORDS).await;
        // Not `exit`, which waits for what the blocked threads hold.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }

    async fn signal(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
