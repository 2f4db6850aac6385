//! Owns the schedule of retries: each retry becomes an entry of the log when it is due.

use std::sync::Arc;
use std::time::Duration;

use dim_model::entry::Kind;
use dim_model::time::Timestamp;
use redb::ReadableTable as _;
use tokio_util::sync::CancellationToken;

use crate::commit::{Commit, CommitError};
use crate::event_log::EventLog;
use crate::{RETRIES, Store, StoreError};

/// Most retries that become entries together.
const TOGETHER: usize = 256;

/// The task that waits for retries.
#[derive(Debug)]
pub struct Retries {
    /// The store with the retries.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The log, for the time.
    pub log: Arc<EventLog>,
}

impl Retries {
    /// Appends due retries until `stop` is cancelled.
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

    /// Appends the retries that are due; returns the time until the next one.
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

/// The due retries, at most 256, and the time of the next one.
pub struct Due {
    /// The retries with their keys.
    pub retries: Vec<((u64, u64), Kind)>,
    /// The time of the first retry that is not included.
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
