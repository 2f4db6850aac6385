//! Owns the events that a plugin has put off: each becomes an entry of the log when it is due.

use std::sync::Arc;
use std::time::Duration;

use redb::ReadableTable as _;
use tokio_util::sync::CancellationToken;

use crate::commit::{Commit, CommitError};
use crate::entry::Kind;
use crate::log::EventLog;
use crate::store::{RETRIES, Store, StoreError};
use crate::time::Timestamp;

/// Retries that become entries together.
const TOGETHER: usize = 256;

/// The task that waits for them.
#[derive(Debug)]
pub struct Retries {
    /// Where they wait.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Whose time counts.
    pub log: Arc<EventLog>,
}

impl Retries {
    /// Waits until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                let pause = match self.release().await {
                    Ok(pause) => pause,
                    Err(CommitError::Closed) => return,
                    Err(error) => {
                        tracing::error!("cannot read the retries: {error}");
                        Duration::from_secs(1)
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.commit.retries.notified() => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Makes entries of what is due; returns how long nothing else is.
    async fn release(&self) -> Result<Duration, CommitError> {
        let now = self.log.now();
        let Due { retries, next } = due(&self.store, now)?;
        if retries.is_empty() {
            return Ok(next
                .map_or(Duration::from_secs(60), |at| at.since(now))
                .max(Duration::from_millis(10)));
        }
        let (keys, entries): (Vec<_>, Vec<_>) = retries.into_iter().unzip();
        self.commit.append_and_write(entries, move |write| forget(write, &keys)).await?;
        Ok(Duration::ZERO)
    }
}

/// What waits to be handled again and is due, at most so much together, and when the next is.
pub struct Due {
    /// Each with its key.
    pub retries: Vec<((u64, u64), Kind)>,
    /// When the first falls due that is not among them.
    pub next: Option<Timestamp>,
}

/// The retries that are due at `now`.
pub fn due(store: &Store, now: Timestamp) -> Result<Due, StoreError> {
    let table = store.snapshot()?.table(RETRIES)?;
    let mut retries = Vec::new();
    for row in table.iter()? {
        let (key, kind) = row?;
        let (at, number) = key.value();
        if at > now.0 || retries.len() == TOGETHER {
            return Ok(Due { retries, next: Some(Timestamp(at)) });
        }
        retries.push(((at, number), Kind::from_bytes(kind.value())?));
    }
    Ok(Due { retries, next: None })
}

/// Removes retries that have become entries.
pub fn forget(write: &redb::WriteTransaction, keys: &[(u64, u64)]) -> Result<(), StoreError> {
    let mut table = write.open_table(RETRIES)?;
    keys.iter().try_for_each(|key| table.remove(*key).map(drop).map_err(StoreError::from))
}
