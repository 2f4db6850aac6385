//! Owns a host that goes on after its store has failed: what was not committed is dropped, nothing is
//! acknowledged, and a host is started again on what is on the disk, with back-off.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Host, HostError, Options};
use crate::backoff::Backoff;
use crate::cause::chain;
use crate::store::Absent;
use crate::time::Timestamp;

/// How long callers of a host that has failed may hold on to it.
const LET_GO: Duration = Duration::from_secs(5);

/// How long a start waits for all plugins to be loaded.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a supervised host stands.
#[derive(Clone, Debug)]
pub enum Standing {
    /// It runs.
    Running(Arc<Host>),
    /// It has failed and is started again.
    Down {
        /// Why.
        reason: String,
        /// Since when.
        since: Timestamp,
    },
}

/// A host that is started again when it fails.
#[derive(Debug)]
pub struct Supervised {
    options: Options,
    standing: watch::Sender<Standing>,
}

impl Supervised {
    /// Starts a host, some of whose plugins may be loaded later. An error of this first start is the caller's;
    /// [`Supervised::run`] sees to what comes later.
    pub async fn start(mut options: Options) -> Result<Arc<Self>, HostError> {
        options.room = Some(Arc::default());
        let host = begin(options.clone()).await?;
        // It was made just now.
        options.absent = Absent::Refused;
        Ok(Arc::new(Self { options, standing: watch::Sender::new(Standing::Running(host)) }))
    }

    /// How the host stands now.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Keeps the host running until `stop` is cancelled, then shuts it down.
    pub async fn run(&self, stop: CancellationToken) {
        while let Standing::Running(host) = self.standing() {
            let failure = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                reason = host.failure() => Some(reason),
            };
            let Some(reason) = failure else { return host.shutdown().await };
            tracing::error!("the host is started again: {reason}");
            self.standing.send_replace(Standing::Down { reason, since: Timestamp::wall() });
            host.shutdown().await;
            let mut options = self.options.clone();
            // It may have been read again since the start.
            options.config = (*host.config.now()).clone();
            let_go(host).await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.start_again(options) => {}
            }
        }
    }

    async fn start_again(&self, options: Options) {
        let mut backoff = Backoff::new();
        loop {
            tokio::time::sleep(backoff.next()).await;
            match begin(options.clone()).await {
                Ok(host) => {
                    tracing::info!("the host runs again");
                    self.standing.send_replace(Standing::Running(host));
                    return;
                }
                Err(error) => tracing::error!("the host does not start again yet: {}", chain(&error)),
            }
        }
    }
}

/// Starts a host; returns once its plugins are loaded, or after [`PATIENCE`]: what is ready by then is not held
/// up by what is still compiled.
async fn begin(options: Options) -> Result<Arc<Host>, HostError> {
    let host = Host::begin(options).await?;
    let loaded = host.clone();
    let mut loading = tokio::spawn(async move {
        tokio::select! {
            biased;
            () = loaded.ended.cancelled() => Ok(()),
            outcome = loaded.load() => outcome,
        }
    });
    if let Ok(outcome) = tokio::time::timeout(PATIENCE, &mut loading).await {
        outcome.expect("loading does not panic")?;
        return Ok(host);
    }
    tracing::info!(left = host.loading().len(), "goes on while plugins are compiled");
    let waiting = host.clone();
    tokio::spawn(async move {
        match loading.await.expect("loading does not panic") {
            Ok(()) => {
                tracing::info!(took = ?waiting.start_took().unwrap_or_default(), "all plugins are loaded");
            }
            Err(error) => waiting.give_up(chain(&error)),
        }
    });
    Ok(host)
}

/// Waits until callers have let go of a host: it holds the lock of its state directory.
async fn let_go(host: Arc<Host>) {
    let last = async {
        while Arc::strong_count(&host) > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(LET_GO, last).await.is_err() {
        tracing::warn!("callers still hold on to the host that failed");
    }
}
