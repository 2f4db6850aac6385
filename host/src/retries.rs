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
        let (due, next) = self.due(now)?;
        if due.is_empty() {
            return Ok(next
                .map_or(Duration::from_secs(60), |at| at.since(now))
                .max(Duration::from_millis(10)));
        }
        let (keys, entries): (Vec<_>, Vec<_>) = due.into_iter().unzip();
        let remove = move |write: &redb::WriteTransaction| {
            let mut table = write.open_table(RETRIES)?;
            for key in keys {
                table.remove(key)?;
            }
            Ok(())
        };
        self.commit.append_and_write(entries, remove).await?;
        Ok(Duration::ZERO)
    }

    #[expect(clippy::type_complexity, reason = "rows with their keys, and the next time")]
    fn due(&self, now: Timestamp) -> Result<(Vec<((u64, u64), Kind)>, Option<Timestamp>), StoreError> {
        let table = self.store.snapshot()?.table(RETRIES)?;
        let mut due = Vec::new();
        for row in table.iter()? {
            let (key, kind) = row?;
            let (at, number) = key.value();
            if at > now.0 || due.len() == TOGETHER {
                return Ok((due, Some(Timestamp(at))));
            }
            due.push(((at, number), Kind::from_bytes(kind.value())?));
        }
        Ok((due, None))
    }
}
