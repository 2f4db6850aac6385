//! Owns the restart of a host after a failure of its store. It receives the options of a host and keeps it running:
//! it drops everything that was not committed, and starts a new host on the same state directory, with back-off.

use std::sync::Arc;
use std::time::Duration;

use dim_model::backoff::Backoff;
use dim_model::error_chain::chain;
use dim_model::time::Timestamp;
use dim_store::Absent;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Host, HostError, Options};

/// The maximum time to wait until callers release a host that has failed.
const LET_GO: Duration = Duration::from_secs(5);

/// The maximum time that a start waits until all plugins are loaded.
const PATIENCE: Duration = Duration::from_secs(2);

/// The state of a supervised host.
#[derive(Clone, Debug)]
pub enum Standing {
    /// The host runs.
    Running(Arc<Host>),
    /// The host has failed and is being restarted.
    Down {
        /// The reason of the failure.
        reason: String,
        /// The time of the failure.
        since: Timestamp,
    },
}

/// A host that restarts after a failure.
#[derive(Debug)]
pub struct Supervised {
    options: Options,
    standing: watch::Sender<Standing>,
}

impl Supervised {
    /// Starts a host, whose slow plugins may be loaded later. Returns an error if this first start fails;
    /// [`Supervised::run`] handles later failures.
    pub async fn start(mut options: Options) -> Result<Arc<Self>, HostError> {
        options.disk = Some(Arc::default());
        let host = begin(options.clone()).await?;
        // A missing database is an error from now on, because the first start made it.
        options.absent = Absent::Refused;
        Ok(Arc::new(Self { options, standing: watch::Sender::new(Standing::Running(host)) }))
    }

    /// Returns the current state.
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Runs the host until `stop` is cancelled, then shuts it down.
    pub async fn run(&self, stop: CancellationToken) {
        while let Standing::Running(host) = self.standing() {
            let failure = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                reason = host.failure() => Some(reason),
            };
            let Some(reason) = failure else { return host.shutdown().await };
            tracing::error!("the host restarts: {reason}");
            self.standing.send_replace(Standing::Down { reason, since: Timestamp::wall() });
            host.shutdown().await;
            let mut options = self.options.clone();
            // A reload may have changed the config since the start.
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
            options.clock.sleep(backoff.next_pause()).await;
            match begin(options.clone()).await {
                Ok(host) => {
                    tracing::info!("the host runs again");
                    self.standing.send_replace(Standing::Running(host));
                    return;
                }
                Err(error) => tracing::error!("cannot restart the host yet: {}", chain(&error)),
            }
        }
    }
}

/// Starts a host. Returns once its plugins are loaded, or after [`PATIENCE`], so that loaded plugins do not wait for
/// slow compilations.
async fn begin(options: Options) -> Result<Arc<Host>, HostError> {
    let host = Host::begin(options).await?;
    let loaded = host.clone();
    let mut loading = tokio::spawn(async move {
        tokio::select! {
            biased;
            () = loaded.life.ended.cancelled() => Ok(()),
            outcome = loaded.load() => outcome,
        }
    });
    if let Ok(outcome) = tokio::time::timeout(PATIENCE, &mut loading).await {
        outcome.expect("loading does not panic")?;
        return Ok(host);
    }
    tracing::info!(left = host.loading().len(), "the host runs while plugins are compiled");
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

/// Waits until callers release a host, because it holds the lock of its state directory.
async fn let_go(host: Arc<Host>) {
    let last = async {
        while Arc::strong_count(&host) > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(LET_GO, last).await.is_err() {
        tracing::warn!("callers still use the host that failed");
    }
}
