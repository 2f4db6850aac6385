//! Owns the signals of the process: requests to end, and SIGHUP. A separate thread waits for the requests, so that they
//! end the process even if all other threads are blocked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Signals within this time after the first count as the same request. `timeout` and terminals send one signal to the
/// process and one to its group.
const SAME: Duration = Duration::from_secs(1);

/// Time that the process has after the second request before it is killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The requests to end the process: SIGINT and SIGTERM since the creation of this value. [`LAST_WORDS`] after the
/// second request the process is killed.
#[derive(Debug)]
pub struct Signals {
    requests: mpsc::Receiver<()>,
    is_over: Arc<AtomicBool>,
}

impl Signals {
    /// Starts to listen. A request that arrives before [`Signals::next`] is kept. Fails if the handlers or the thread
    /// cannot be created.
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
            // The thread runs until the process ends.
            std::future::pending::<()>().await;
        }
    }
}

/// The SIGHUP signals since the creation of this value. From then on SIGHUP does not end the process.
#[derive(Debug)]
pub struct Hangups(Signal);

impl Hangups {
    /// Starts to listen. A signal that arrives before [`Hangups::next`] is kept.
    pub fn new(runtime: &tokio::runtime::Runtime) -> io::Result<Self> {
        let _within = runtime.enter();
        signal(SignalKind::hangup()).map(Self)
    }

    /// Resolves on the next signal. Several signals in quick succession may count as one. Cancel safe.
    pub async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            // The runtime is shutting down.
            std::future::pending::<()>().await;
        }
    }
}

/// After the drop nobody receives requests, so the first further request is enough to kill the process.
impl Drop for Signals {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

struct Watch {
    interrupt: Signal,
    terminate: Signal,
    to: mpsc::Sender<()>,
    /// Whether [`Signals`] was dropped.
    is_over: Arc<AtomicBool>,
}

impl Watch {
    async fn run(mut self) {
        self.signal().await;
        let first = Instant::now();
        // Before the request is passed on: its receiver may drop [`Signals`] at once, and still needs time to end.
        let nobody_receives = self.is_over.load(Ordering::Relaxed);
        // The channel is full only if nobody receives. Then the kill below ends the process.
        let _ = self.to.try_send(());
        if !nobody_receives {
            self.signal().await;
            while first.elapsed() < SAME {
                self.signal().await;
            }
            let _ = self.to.try_send(());
        }
        tokio::time::sleep(LAST_WORDS).await;
        // `exit` would wait for locks that blocked threads hold.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }

    async fn signal(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
