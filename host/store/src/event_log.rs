//! Owns the event log: the ordered record of everything that plugins react to.
//!
//! It receives entries from subscriptions, the API and the commit. It assigns each an offset and a time that
//! never decreases, and keeps the newest entries in memory for the plugins to read. It passes new entries to
//! the commit, which makes them durable. Older entries are read from the store.

mod follower;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::watch;

pub use follower::{Followed, Follower};

use crate::{Store, StoreError};
use dim_model::entry::{Entry, Event, Kind, Offset};
use dim_model::ident::{PluginName, Topic};
use dim_model::time::{Clock, LogClock, Timestamp};

/// Default size of the committed entries that stay in memory for the plugins to read, in bytes.
pub const TAIL_BYTES: usize = 32 << 20;

/// Bytes of entries that may wait for the commit. Above it, callers of `append` wait: the host then reads the
/// daemon's stream more slowly and the daemon drops messages, which becomes a gap.
const PENDING_BYTES: usize = 64 << 20;

/// The interval of the checks whether there is space again.
const ROOM_POLL: Duration = Duration::from_millis(5);

/// Memory that an entry uses beside its payload, in bytes.
const ENTRY_OVERHEAD: usize = 160;

/// The event log.
#[derive(Debug)]
pub struct EventLog {
    inner: Mutex<Inner>,
    room: Condvar,
    writer: OnceLock<Thread>,
    store: Arc<Store>,
    clock: Arc<dyn Clock>,
    /// The offset before which all entries are durable.
    durable: watch::Sender<Offset>,
}

#[derive(Debug)]
struct Inner {
    clock: LogClock,
    next: Offset,
    /// The newest entries; those from `uncommitted` on are not durable yet.
    tail: VecDeque<Arc<Entry>>,
    tail_bytes: usize,
    most_tail_bytes: usize,
    uncommitted: Offset,
    pending_bytes: usize,
    readers: Vec<Reader>,
    /// The host is shutting down: callers no longer wait for space.
    closed: bool,
}

/// Most entries that are examined one by one to count those that wait for a plugin.
const COUNTED: u64 = 10_000;

/// A plugin that waits for entries.
#[derive(Debug)]
struct Reader {
    plugin: PluginName,
    topics: Vec<Topic>,
    mailbox: Arc<Mailbox>,
    /// The offset after the newest entry that concerns the plugin.
    wanted: Offset,
}

/// Wakes the thread of a plugin.
#[derive(Debug)]
pub struct Mailbox {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Mailbox {
    /// Creates a mailbox that has not been rung.
    pub fn new() -> Self {
        Self { rung: Mutex::new(false), bell: Condvar::new() }
    }

    /// Wakes the owner, or makes its next wait return at once.
    pub fn ring(&self) {
        let mut rung = self.rung.lock().expect("no one panics while holding the bell");
        if !*rung {
            *rung = true;
            self.bell.notify_one();
        }
    }

    /// Waits until the mailbox is rung, at most for `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let rung = self.rung.lock().expect("no one panics while holding the bell");
        let (mut rung, _) = self
            .bell
            .wait_timeout_while(rung, timeout, |rung| !*rung)
            .expect("no one panics while holding the bell");
        *rung = false;
    }
}

impl Default for Mailbox {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLog {
    /// Creates the log that continues at `next` after `last_time`, the end of the log in `store`, by `clock`.
    /// Committed entries use at most `tail` bytes of memory.
    pub fn new(
        store: Arc<Store>,
        next: Offset,
        last_time: Timestamp,
        clock: Arc<dyn Clock>,
        tail: usize,
    ) -> Self {
        let inner = Inner {
            clock: LogClock::starting_at(last_time, clock.clone()),
            next,
            tail: VecDeque::new(),
            tail_bytes: 0,
            most_tail_bytes: tail,
            uncommitted: next,
            pending_bytes: 0,
            readers: Vec::new(),
            closed: false,
        };
        Self {
            inner: Mutex::new(inner),
            room: Condvar::new(),
            writer: OnceLock::new(),
            store,
            clock,
            durable: watch::Sender::new(next),
        }
    }

    /// Registers the thread that commits. The log unparks it when entries wait for it.
    pub fn attach(&self, writer: Thread) {
        self.writer.set(writer).expect("a host has one writer");
    }

    /// Returns a reader of the durable entries from `from` on; without `from`, of those appended after this call.
    pub fn follow(self: &Arc<Self>, from: Option<Offset>) -> Follower {
        let from = from.unwrap_or_else(|| self.head());
        Follower::new(self.clone(), from, self.durable.subscribe())
    }

    fn wake_writer(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    /// Appends an entry and wakes the plugins that it concerns. Blocks while too many bytes wait for the
    /// commit, so it must not be called on an async thread; see [`EventLog::has_room`].
    pub fn append(&self, kind: Kind) -> Arc<Entry> {
        let mut inner = self.lock();
        while !inner.has_room() {
            inner = self.room.wait(inner).expect("no one panics while holding the log");
        }
        let entry = inner.append(kind);
        drop(inner);
        self.wake_writer();
        entry
    }

    /// Appends entries without waiting for space. Only for the commit itself, and for small and rare entries.
    pub fn append_now(&self, kinds: impl IntoIterator<Item = Kind>) {
        let mut inner = self.lock();
        for kind in kinds {
            inner.append(kind);
        }
        drop(inner);
        self.wake_writer();
    }

    /// Appends one small entry without waiting for space; returns its offset.
    pub fn append_command(&self, kind: Kind) -> Offset {
        let mut inner = self.lock();
        let entry = inner.append(kind);
        drop(inner);
        self.wake_writer();
        entry.offset
    }

    /// Waits until there is space. Callers that append commands wait here first, so that commands cannot fill
    /// the memory faster than the host commits them.
    pub async fn room(&self) {
        while !self.has_room() {
            tokio::time::sleep(ROOM_POLL).await;
        }
    }

    /// Marks the log as shutting down. Callers that wait for space continue.
    pub fn close(&self) {
        self.lock().closed = true;
        self.room.notify_all();
    }

    /// Whether an append would return without waiting.
    pub fn has_room(&self) -> bool {
        self.lock().has_room()
    }

    /// The clock of the host. Its monotonic time measures pauses, and its time of day sets the log time.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The current log time.
    pub fn now(&self) -> Timestamp {
        self.lock().clock.now()
    }

    /// The offset that the next entry will have.
    pub fn head(&self) -> Offset {
        self.lock().next
    }

    /// Registers `mailbox` for entries on `topics` and entries addressed to `plugin`.
    pub fn watch(&self, plugin: &PluginName, topics: Vec<Topic>, mailbox: &Arc<Mailbox>) {
        let mut inner = self.lock();
        let before = inner.readers.extract_if(.., |reader| reader.plugin == *plugin).next();
        // Only the plugin's own reading shows which of the entries before this call concern it.
        let wanted = before.map_or(inner.next, |reader| reader.wanted);
        inner.readers.push(Reader { plugin: plugin.clone(), topics, mailbox: mailbox.clone(), wanted });
    }

    /// The number of entries from `cursor` on that concern a plugin. If the plugin has more than 10,000 entries
    /// to read, or some are no longer in memory, it is the number of entries that it has to read.
    pub fn waiting(&self, plugin: &PluginName, cursor: Offset) -> u64 {
        let inner = self.lock();
        let Some(reader) = inner.readers.iter().find(|reader| reader.plugin == *plugin) else {
            return inner.next.0.saturating_sub(cursor.0);
        };
        let first = inner.next.0 - inner.tail.len() as u64;
        let to_read = reader.wanted.0.saturating_sub(cursor.0);
        if to_read > COUNTED || cursor.0 < first {
            return to_read;
        }
        let unread = inner.tail.iter().skip(usize::try_from(cursor.0 - first).unwrap_or(usize::MAX));
        unread.take(to_read as usize).filter(|entry| reader.wants(&entry.kind)).count() as u64
    }

    /// Removes a plugin from those that the log wakes.
    pub fn unwatch(&self, plugin: &PluginName) {
        self.lock().readers.retain(|reader| reader.plugin != *plugin);
    }

    /// Reads at most `limit` entries from `from` on into `into`; none if there is no newer entry.
    pub fn read(
        &self,
        from: Offset,
        limit: usize,
        into: &mut VecDeque<Arc<Entry>>,
    ) -> Result<(), StoreError> {
        {
            let inner = self.lock();
            let first = Offset(inner.next.0 - inner.tail.len() as u64);
            if from >= first {
                let start = usize::try_from(from.0 - first.0).unwrap_or(usize::MAX);
                into.extend(inner.tail.iter().skip(start).take(limit).cloned());
                return Ok(());
            }
        }
        into.extend(self.store.read_log(from, limit)?.into_iter().map(Arc::new));
        Ok(())
    }

    /// The entries that are not durable yet, for the commit. The commit then calls `committed`.
    pub fn pending(&self) -> Vec<Arc<Entry>> {
        let inner = self.lock();
        let count = usize::try_from(inner.next.0 - inner.uncommitted.0).unwrap_or(usize::MAX);
        inner.tail.iter().skip(inner.tail.len() - count).cloned().collect()
    }

    /// Whether the entry at `offset` is durable.
    pub fn is_committed(&self, offset: Offset) -> bool {
        offset < self.lock().uncommitted
    }

    /// Whether entries wait for the commit.
    pub fn has_pending(&self) -> bool {
        let inner = self.lock();
        inner.next > inner.uncommitted
    }

    /// Marks everything before `offset` as durable.
    pub fn committed(&self, offset: Offset) {
        let mut inner = self.lock();
        let first = inner.next.0 - inner.tail.len() as u64;
        let done = inner.uncommitted.0 - first..offset.0.max(inner.uncommitted.0) - first;
        let bytes: usize = inner.tail.range(done.start as usize..done.end as usize).map(|e| weight(e)).sum();
        inner.uncommitted = inner.uncommitted.max(offset);
        inner.pending_bytes -= bytes;
        self.durable.send_replace(inner.uncommitted);
        inner.shorten();
        drop(inner);
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no one panics while holding the log")
    }
}

impl Inner {
    fn has_room(&self) -> bool {
        self.closed || self.pending_bytes <= PENDING_BYTES
    }

    fn append(&mut self, kind: Kind) -> Arc<Entry> {
        let entry = Arc::new(Entry { offset: self.next, time: self.clock.now(), kind });
        self.next = Offset(self.next.0 + 1);
        self.tail_bytes += weight(&entry);
        self.pending_bytes += weight(&entry);
        self.tail.push_back(entry.clone());
        for reader in &mut self.readers {
            if reader.wants(&entry.kind) {
                reader.wanted = self.next;
                reader.mailbox.ring();
            }
        }
        entry
    }

    fn shorten(&mut self) {
        while self.tail_bytes > self.most_tail_bytes {
            let Some(oldest) = self.tail.front() else { return };
            if oldest.offset >= self.uncommitted {
                return;
            }
            self.tail_bytes -= weight(oldest);
            self.tail.pop_front();
        }
    }
}

impl Reader {
    fn wants(&self, kind: &Kind) -> bool {
        match (kind.addressee(), kind.topic()) {
            (Some(plugin), _) => *plugin == self.plugin,
            (None, Some(topic)) => self.topics.contains(topic),
            // No plugin waits for entries that only change the context: peers, listening and confirmed names.
            (None, None) => matches!(kind, Kind::Event(Event::NameChanged(_))),
        }
    }
}

fn weight(entry: &Entry) -> usize {
    ENTRY_OVERHEAD + entry.kind.payload_len()
}
