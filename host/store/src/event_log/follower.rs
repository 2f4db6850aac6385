//! Owns the reading of the log outside the plugins: durable entries only, from an offset on, each once.

use std::collections::VecDeque;
use std::sync::Arc;

use dim_model::entry::{Entry, Offset};
use tokio::sync::watch;

use super::{EventLog, weight};
use crate::StoreError;

/// Most entries that one read returns.
const AT_A_TIME: usize = 256;

/// Bytes that one read returns; its last entry may exceed them. The limit exists because readers may be many
/// and slow.
const BYTES_AT_A_TIME: usize = 1 << 20;

/// A reader of the log. It keeps no entries in memory, however far it lags behind.
#[derive(Debug)]
pub struct Follower {
    log: Arc<EventLog>,
    next: Offset,
    durable: watch::Receiver<Offset>,
}

/// The result of one read of a follower.
#[derive(Debug)]
pub struct Followed {
    /// The number of entries before these that the log no longer contains.
    pub missed: u64,
    /// The entries, in order.
    pub entries: VecDeque<Arc<Entry>>,
}

impl Follower {
    /// Creates a reader of the entries from `next` on.
    pub(super) fn new(log: Arc<EventLog>, next: Offset, durable: watch::Receiver<Offset>) -> Self {
        Self { log, next, durable }
    }

    /// The offset of the next entry to read.
    pub fn next_offset(&self) -> Offset {
        self.next
    }

    /// Waits until there are entries, and reads some of them. Cancel safe.
    pub async fn read(&mut self) -> Result<Followed, StoreError> {
        // The log outlives its readers.
        let durable = *self.durable.wait_for(|durable| *durable > self.next).await.expect("the log is there");
        let (log, next) = (self.log.clone(), self.next);
        let read = tokio::task::spawn_blocking(move || {
            let mut entries = VecDeque::new();
            log.read(next, AT_A_TIME, &mut entries).map(|()| entries)
        });
        let mut entries = read.await.expect("reading does not panic")?;
        entries.retain(|entry| entry.offset < durable);
        let mut bytes = 0;
        let few = entries.iter().take_while(|entry| {
            let is_read = bytes < BYTES_AT_A_TIME;
            bytes += weight(entry);
            is_read
        });
        let few = few.count();
        entries.truncate(few);
        let first = entries.front().map_or(durable, |first| first.offset);
        self.next = entries.back().map_or(durable, |last| Offset(last.offset.0 + 1));
        Ok(Followed { missed: first.0 - next.0, entries })
    }
}
