//! Owns how long the event log is kept: by size and age, and never past what a plugin has yet to
//! read.

use std::sync::Arc;
use std::time::Duration;

use redb::ReadableTable;
use tokio_util::sync::CancellationToken;

use crate::commit::{Commit, CommitError};
use crate::config::LogConfig;
use crate::log::{Offset, decode_chunk};
use crate::store::{self, CURSORS, LOG, META, Snapshot, Store, StoreError};
use crate::time::Timestamp;

/// How often the log is looked at.
const EVERY: Duration = Duration::from_secs(30);

/// Rows that are removed in one transaction, so that it stays short.
const ROWS: usize = 512;

/// The task that trims the log.
#[derive(Debug)]
pub struct Retention {
    /// Where the log lies.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// What is kept.
    pub log: LogConfig,
}

impl Retention {
    /// Trims until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                tokio::time::sleep(EVERY).await;
                loop {
                    match self.trim().await {
                        Ok(removed) if removed == ROWS => {}
                        Ok(_) => break,
                        Err(CommitError::Closed) => return,
                        Err(error) => {
                            tracing::error!("cannot trim the log: {error}");
                            break;
                        }
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Removes the oldest rows that are beyond what is kept; returns how many.
    async fn trim(&self) -> Result<usize, CommitError> {
        let rows = self.expendable(&self.store.snapshot()?, Timestamp::wall())?;
        let count = rows.len();
        if count > 0 {
            self.commit.write_later(move |write| store::trim_log(write, &rows)).await?;
        }
        Ok(count)
    }

    /// The first rows of the log that no one needs: a row ends where the next one begins.
    fn expendable(&self, snapshot: &Snapshot, now: Timestamp) -> Result<Vec<u64>, StoreError> {
        let read_by_all = snapshot
            .table(CURSORS)?
            .iter()?
            .try_fold(u64::MAX, |least, row| Ok::<_, StoreError>(least.min(row?.1.value().0)))?;
        let table = snapshot.table(LOG)?;
        let mut excess = store::log_bytes(&snapshot.table(META)?)?.saturating_sub(self.log.max_bytes);
        let oldest = Duration::from_secs(self.log.max_age_hours.saturating_mul(3600));
        let mut rows = table.iter()?.peekable();
        let mut expendable = Vec::new();
        while let Some(row) = rows.next() {
            let (first, chunk) = row?;
            let Some(Ok((next, _))) = rows.peek() else { break };
            let too_old = || -> Result<bool, StoreError> {
                let entries = decode_chunk(bytes::Bytes::copy_from_slice(chunk.value()))?;
                Ok(entries.last().is_some_and(|last| now.since(last.time) > oldest))
            };
            if Offset(next.value()) > Offset(read_by_all)
                || (excess == 0 && !too_old()?)
                || expendable.len() == ROWS
            {
                break;
            }
            excess = excess.saturating_sub(chunk.value().len() as u64);
            expendable.push(first.value());
        }
        Ok(expendable)
    }
}
