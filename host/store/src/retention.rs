//! Owns the retention of the event log, of superseded documents and of dead letters: by size and age. It keeps
//! the entries that a plugin has yet to read, unless the plugin is too far behind.

mod rollback_data;

use std::collections::BTreeSet;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bytes::Bytes;
use dim_model::entry::{Offset, decode_chunk};
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use redb::ReadableTable;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::commit::{Commit, CommitError};
use crate::disk_monitor::{DiskMonitor, Quota};
use crate::documents::{self, Superseded};
use crate::plugin_registry;
use crate::{LOG, META, Snapshot, Store, StoreError, dead_letters};

/// The section `store.log` of the config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Largest size of the log in bytes, default 1 GiB. The oldest entries beyond it are removed, up to the
    /// lowest cursor of a plugin, unless that plugin is further behind than `limits.queue-bytes`.
    pub max_bytes: u64,
    /// Longest age of entries, default 7 days; a bare number is in hours. Older entries are removed, up to the lowest
    /// cursor of a plugin.
    #[serde(alias = "max_age_hours", with = "dim_model::time::in_hours")]
    pub max_age: Duration,
    /// Largest size, in bytes, of the documents that names have pointed to before, default 256 MiB. They are
    /// kept as long as the entries from that time. Beyond it the oldest are removed, up to the lowest cursor of
    /// a plugin; older entries can be handled again, but cannot read these documents.
    pub max_document_bytes: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { max_bytes: 1 << 30, max_age: Duration::from_secs(168 * 3_600), max_document_bytes: 256 << 20 }
    }
}

/// The interval of the checks.
const EVERY: Duration = Duration::from_secs(1);

/// Free space of the disk, in bytes, below which a host that has failed at a removal does not try again. A
/// removal itself needs space, so it would fail repeatedly.
const HOPELESS: u64 = 1 << 20;

/// Most rows that one transaction removes, to keep it short.
const ROWS: usize = 512;

/// The retention of rollback data.
#[derive(Clone, Copy, Debug)]
pub struct Undo {
    /// The longest age.
    pub time: Duration,
    /// The largest size for all plugins together, in bytes.
    pub bytes: u64,
}

/// The task that applies the retention.
#[derive(Clone, Debug)]
pub struct Retention {
    /// The store to trim.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The retention of the log.
    pub kept: LogConfig,
    /// The retention of rollback data.
    pub undo: Undo,
    /// The quota of dead letters.
    pub letters: dead_letters::Quota,
    /// The quota of the store, which requires further removals when space is short.
    pub quota: Quota,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
    /// The plugins that the log waits for.
    pub awaited: Awaited,
    /// The size of the log that waits for them when the log is too large, in bytes.
    pub queue_bytes: u64,
}

/// The plugins that the log waits for, including those that could not be loaded; without disabled and removed ones.
pub type Awaited = Arc<RwLock<BTreeSet<PluginName>>>;

impl Retention {
    /// Applies the retention until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                match self.trim().await {
                    Ok(()) => {}
                    Err(CommitError::Closed) => return,
                    Err(error) => tracing::error!("cannot trim the log: {error}"),
                }
                tokio::time::sleep(EVERY).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn trim(&self) -> Result<(), CommitError> {
        // An earlier removal is known to have succeeded only after its sync.
        if self.disk.has_failed_at_removing() && self.look(|this, _| this.store.free()).await? < HOPELESS {
            return Ok(());
        }
        self.disk.set_removing(true);
        // First, because a shortage of space also frees the log from waiting for probations.
        self.trim_marks().await?;
        while self.trim_entries().await? == ROWS {}
        while self.trim_documents().await? == ROWS {}
        self.trim_letters().await?;
        self.disk.set_removing(false);
        Ok(())
    }

    async fn trim_entries(&self) -> Result<usize, CommitError> {
        let rows = self.look(|this, snapshot| this.expendable_rows(snapshot, Timestamp::wall())).await?;
        let count = rows.len();
        if count > 0 {
            self.commit.write(move |write| crate::event_log_rows::trim(write, &rows)).await?;
        }
        Ok(count)
    }

    async fn trim_documents(&self) -> Result<usize, CommitError> {
        let gone = self.look(|this, snapshot| this.expendable_documents(snapshot)).await?;
        let count = gone.len();
        if count > 0 {
            self.commit.write(move |write| documents::forget(write, &gone)).await?;
        }
        Ok(count)
    }

    /// Removes the dead letters that are too old. The commit that adds letters removes those beyond the quota.
    async fn trim_letters(&self) -> Result<(), CommitError> {
        let (kept, now) = (self.letters, Timestamp::wall());
        if self.look(move |_, snapshot| dead_letters::has_old(snapshot, &kept, now)).await? {
            self.commit.write(move |write| dead_letters::put(write, &[], &kept, now)).await?;
        }
        Ok(())
    }

    /// Searches for removable data, off the async threads.
    async fn look<R: Send + 'static>(
        &self,
        find: impl FnOnce(&Self, &Snapshot) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let this = self.clone();
        let found = tokio::task::spawn_blocking(move || find(&this, &this.store.snapshot()?)).await;
        Ok(found.expect("looking does not panic")?)
    }

    /// The offset before which each plugin has handled everything with confirmed code, and the lowest offset
    /// that a probation still needs.
    fn handled_by_all(&self, snapshot: &Snapshot) -> Result<(Offset, Offset), StoreError> {
        let awaited = self.awaited.read().expect("no one panics while holding the awaited").clone();
        let last = plugin_registry::furthest_behind(snapshot, &awaited)?;
        let last = last.map_or(Offset(u64::MAX), |(cursor, _)| cursor);
        let last =
            crate::catch_ups::first_deferred(snapshot, &awaited)?.map_or(last, |first| last.min(first));
        let watched = rollback_data::held_by_probations(snapshot, &awaited)?;
        Ok((last.min(watched), watched))
    }

    /// The number of bytes that must be removed because space is short.
    fn excess(&self, snapshot: &Snapshot) -> Result<u64, StoreError> {
        self.quota.excess(&self.store, snapshot, &self.disk.reclaimable)
    }

    /// The first rows of the log that no plugin needs, or that are too old for the plugins that need them. A
    /// row ends at the beginning of the next one.
    fn expendable_rows(&self, snapshot: &Snapshot, now: Timestamp) -> Result<Vec<u64>, StoreError> {
        let (handled, watched) = self.handled_by_all(snapshot)?;
        let table = snapshot.table(LOG)?;
        let held = crate::event_log_rows::bytes(&snapshot.table(META)?)?;
        let mut excess = held.saturating_sub(self.kept.max_bytes).max(self.excess(snapshot)?);
        // The size of the log from the current row on.
        let mut left = held;
        let oldest = self.kept.max_age;
        let mut rows = table.iter()?.peekable();
        let mut expendable = Vec::new();
        while let Some(row) = rows.next() {
            let (first, chunk) = row?;
            let Some(Ok((next, _))) = rows.peek() else { break };
            let too_old = || -> Result<bool, StoreError> {
                let entries = decode_chunk(Bytes::copy_from_slice(chunk.value()))?;
                Ok(entries.last().is_some_and(|last| now.since(last.time) > oldest))
            };
            let next = Offset(next.value());
            let is_needed = next > handled && (excess == 0 || left <= self.queue_bytes || next > watched);
            if is_needed || (excess == 0 && !too_old()?) || expendable.len() == ROWS {
                break;
            }
            let bytes = chunk.value().len() as u64;
            (excess, left) = (excess.saturating_sub(bytes), left.saturating_sub(bytes));
            expendable.push(first.value());
        }
        Ok(expendable)
    }

    /// The documents of removed entries, and the oldest of those beyond the maximum size.
    fn expendable_documents(&self, snapshot: &Snapshot) -> Result<Vec<Superseded>, StoreError> {
        let (handled, _) = self.handled_by_all(snapshot)?;
        let log_start = snapshot.table(LOG)?.first()?.map_or(0, |(first, _)| first.value());
        let held = documents::superseded_bytes(snapshot)?;
        let mut excess = held.saturating_sub(self.kept.max_document_bytes).max(self.excess(snapshot)?);
        let mut expendable = Vec::new();
        for document in documents::superseded(snapshot)? {
            let document = document?;
            let is_over = excess > 0 || document.at < Offset(log_start);
            let is_needed = document.at >= handled && document.at >= Offset(log_start);
            if !is_over || is_needed || expendable.len() == ROWS {
                break;
            }
            excess = excess.saturating_sub(document.bytes);
            expendable.push(document);
        }
        Ok(expendable)
    }
}
