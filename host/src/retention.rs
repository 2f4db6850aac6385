//! Owns how long the event log and the documents of its time are kept: by size and age, and not past what a
//! plugin has yet to read, unless that is too far back. And how long dead letters are.

mod marks;

use std::collections::BTreeSet;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bytes::Bytes;
use redb::ReadableTable;
use tokio_util::sync::CancellationToken;

use crate::commit::{Commit, CommitError};
use crate::config::LogConfig;
use crate::entry::{Offset, decode_chunk};
use crate::ident::PluginName;
use crate::plugin::roster;
use crate::room::{Quota, Room};
use crate::store::documents::{self, Superseded};
use crate::store::{self, LOG, META, Snapshot, Store, StoreError, dead};
use crate::time::Timestamp;

/// How often the log is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// With less of the disk free, in bytes, a host that failed at removing something does not try again: what
/// removing takes may not be there, and it would fail over and over.
const HOPELESS: u64 = 1 << 20;

/// Rows that are removed in one transaction, so that it stays short.
const ROWS: usize = 512;

/// For how long there is a way back to what plugins were before other code took over.
#[derive(Clone, Copy, Debug)]
pub struct Undo {
    /// For so long.
    pub time: Duration,
    /// Bytes of what has changed since, of all plugins.
    pub bytes: u64,
}

/// The task that trims the log.
#[derive(Clone, Debug)]
pub struct Retention {
    /// Where the log lies.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// What is kept.
    pub kept: LogConfig,
    /// For how long there is a way back to what plugins were before.
    pub undo: Undo,
    /// Which dead letters are kept.
    pub letters: dead::Quota,
    /// What goes first where there is no room.
    pub quota: Quota,
    /// What is short.
    pub room: Arc<Room>,
    /// The plugins that the log waits for.
    pub awaited: Awaited,
    /// Bytes of the log that wait for them, if it is larger than it is to be.
    pub queue_bytes: u64,
}

/// The plugins that the log waits for, also one that could not be loaded; none that is disabled or gone.
pub type Awaited = Arc<RwLock<BTreeSet<PluginName>>>;

impl Retention {
    /// Trims until `stop` is cancelled.
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
        // It is known only once it is synced.
        if self.room.has_failed_at_removing() && self.look(|this, _| this.store.free()).await? < HOPELESS {
            return Ok(());
        }
        self.room.set_removing(true);
        // What is short of room frees the log, too.
        self.trim_marks().await?;
        while self.trim_entries().await? == ROWS {}
        while self.trim_documents().await? == ROWS {}
        self.trim_letters().await?;
        self.room.set_removing(false);
        Ok(())
    }

    async fn trim_entries(&self) -> Result<usize, CommitError> {
        let rows = self.look(|this, snapshot| this.expendable_rows(snapshot, Timestamp::wall())).await?;
        let count = rows.len();
        if count > 0 {
            self.commit.write(move |write| store::log::trim(write, &rows)).await?;
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

    /// The dead letters that are too old go; those that are too many went with the commit that brought more.
    async fn trim_letters(&self) -> Result<(), CommitError> {
        let (kept, now) = (self.letters, Timestamp::wall());
        if self.look(move |_, snapshot| dead::has_old(snapshot, &kept, now)).await? {
            self.commit.write(move |write| dead::put(write, &[], &kept, now)).await?;
        }
        Ok(())
    }

    /// Looks for what can go, off the async threads.
    async fn look<R: Send + 'static>(
        &self,
        find: impl FnOnce(&Self, &Snapshot) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let this = self.clone();
        let found = tokio::task::spawn_blocking(move || find(&this, &this.store.snapshot()?)).await;
        Ok(found.expect("looking does not panic")?)
    }

    /// Everything before the first of these was handled by each plugin, and by code that is not on probation; the
    /// second is what probations hold.
    fn handled_by_all(&self, snapshot: &Snapshot) -> Result<(Offset, Offset), StoreError> {
        let awaited = self.awaited.read().expect("no one panics while holding the awaited").clone();
        let last = roster::furthest_behind(snapshot, &awaited)?;
        let last = last.map_or(Offset(u64::MAX), |(cursor, _)| cursor);
        let watched = marks::held_by_probations(snapshot, &awaited)?;
        Ok((last.min(watched), watched))
    }

    /// How many bytes have to go for want of room.
    fn excess(&self, snapshot: &Snapshot) -> Result<u64, StoreError> {
        self.quota.excess(&self.store, snapshot, &self.room.slack)
    }

    /// The first rows of the log that no one needs, or that lie too far back for who does: a row ends where the
    /// next one begins.
    fn expendable_rows(&self, snapshot: &Snapshot, now: Timestamp) -> Result<Vec<u64>, StoreError> {
        let (handled, watched) = self.handled_by_all(snapshot)?;
        let table = snapshot.table(LOG)?;
        let held = store::log::bytes(&snapshot.table(META)?)?;
        let mut excess = held.saturating_sub(self.kept.max_bytes).max(self.excess(snapshot)?);
        // What is left of the log from a row on.
        let mut left = held;
        let oldest = Duration::from_secs(self.kept.max_age_hours.saturating_mul(3600));
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

    /// The documents of entries that are gone, and the oldest of those that are too much.
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
