//! Owns the one writer of the store: a thread that makes finished batches real, those of several
//! plugins and all new entries of the log in one transaction and one sync.
//!
//! It receives batches from the plugins and small writes from the other stages. What a plugin
//! published goes into the log here, for the other plugins, and into the outbox, for the backend.
//! After the sync it sends the replies of commands and wakes the stages that have work.

mod apply;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cid::Cid;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use redb::WriteTransaction;
use thiserror::Error;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use apply::{NameChanges, Wakes, apply, entries_of};

use crate::config::{DeadLetterConfig, StoreConfig};
use crate::effect::{NameUpdate, Publish};
use crate::entry::{Entry, Event, Kind, Offset, Origin};
use crate::ident::{IpnsName, KeyName, PluginName};
use crate::interest::Interest;
use crate::log::{EventLog, Mailbox};
use crate::plugin::Batch;
use crate::room::{NoRoom, Room};
use crate::store::followed::Followed;
use crate::store::outbox::{self, Backlog};
use crate::store::{self, Store, StoreError, Sync};
use crate::time::Timestamp;

/// How long entries wait for a batch to share a transaction with.
const LINGER: Duration = Duration::from_millis(20);

/// How long what is not worth a sync of its own may wait for the disk. The database frees no page
/// before it is synced.
const TRIFLES: Duration = Duration::from_secs(5);

/// How long anything may wait for the disk with `durability: eventual`.
const EVENTUAL: Duration = Duration::from_millis(500);

/// Why a write did not happen.
#[derive(Debug, Error)]
pub enum CommitError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no room for more.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The host is going down.
    #[error("the host is shutting down")]
    Closed,
}

/// A small write of another stage.
struct Write {
    sync: Sync,
    wakes: Wakes,
    run: RunWrite,
}

/// What writes, in the transaction; it says which entries join the log and what is done afterwards.
type RunWrite = Box<
    dyn FnOnce(&WriteTransaction, &mut NameChanges) -> Result<(Vec<Kind>, AfterCommit), StoreError> + Send,
>;

/// What is done once a write is durable.
type AfterCommit = Box<dyn FnOnce() + Send>;

/// A name that another stage has news of.
#[derive(Debug)]
pub enum NameChange {
    /// The operator gives an own name a new value.
    Own {
        /// The key behind it.
        key: KeyName,
        /// The value.
        update: NameUpdate,
    },
    /// A followed name points to another file.
    Followed {
        /// What is known of it.
        known: Followed,
        /// The file's CID.
        cid: Cid,
        /// The file.
        data: Bytes,
    },
    /// Someone new follows a name: what is known of it by then is said again.
    Again {
        /// The name.
        name: IpnsName,
        /// The key behind it, if it is the host's own.
        key: Option<KeyName>,
    },
}

/// The writer, as the other stages know it.
#[derive(Debug)]
pub struct Commit {
    queue: Mutex<Queue>,
    thread: OnceLock<Thread>,
    durability: Durability,
    dead_letters: DeadLetterConfig,
    room: Arc<Room>,
    interest: Arc<Interest>,
    backlog: Arc<Backlog>,
    /// Woken when there is something to publish on topics.
    pub outbox: Notify,
    /// Woken when the value of a name has changed.
    pub names: Notify,
    /// Woken when a retry was put off.
    pub retries: Notify,
    /// How many transactions and syncs there were, and how long they took in all.
    pub tally: Tally,
}

/// Counts of the writer.
#[derive(Debug)]
pub struct Tally {
    /// Transactions.
    pub commits: AtomicU64,
    /// Nanoseconds from the beginning of a transaction to the end of its sync, in all.
    pub nanoseconds: AtomicU64,
    /// Entries that plugins have handled and that are durable.
    pub handled: AtomicU64,
    /// Dead letters that went because there were too many.
    pub dead_dropped: AtomicU64,
    /// Seconds that each commit with a sync waited for the disk.
    pub syncs: Histogram,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            commits: AtomicU64::default(),
            nanoseconds: AtomicU64::default(),
            handled: AtomicU64::default(),
            dead_dropped: AtomicU64::default(),
            // From 0.1 ms to 3.3 s.
            syncs: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
        }
    }
}

/// Whether a commit waits for the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A reply is sent when the effects are on the disk.
    #[default]
    Immediate,
    /// The disk is synced twice a second; a crash of the machine may lose what came since.
    Eventual,
}

#[derive(Default)]
struct Queue {
    batches: BTreeMap<PluginName, Submitted>,
    writes: Vec<Write>,
    closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("batches", &self.batches.len()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Submitted {
    batch: Arc<Batch>,
    progress: Arc<Progress>,
}

/// How far the batches of one plugin have come.
#[derive(Debug)]
pub struct Progress {
    taken: AtomicU64,
    committed: AtomicU64,
    mailbox: Arc<Mailbox>,
}

impl Progress {
    /// No batch yet; `mailbox` is rung at each step.
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { taken: AtomicU64::new(0), committed: AtomicU64::new(0), mailbox }
    }

    /// The number of the newest batch that the writer has begun with.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// The number of the newest batch that is durable.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }
}

impl Commit {
    /// A writer that has not started.
    pub fn new(
        config: &StoreConfig,
        interest: Arc<Interest>,
        backlog: Arc<Backlog>,
        room: Arc<Room>,
    ) -> Self {
        Self {
            interest,
            backlog,
            room,
            dead_letters: config.dead_letters,
            queue: Mutex::default(),
            thread: OnceLock::new(),
            durability: config.durability,
            outbox: Notify::new(),
            names: Notify::new(),
            retries: Notify::new(),
            tally: Tally::default(),
        }
    }

    /// Hands over a batch. The plugin's earlier one must have been taken.
    pub fn submit(&self, batch: Arc<Batch>, progress: Arc<Progress>) {
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        if queue.closed {
            // It will not happen: whoever waits for a reply is told, for the reply goes with it.
            return;
        }
        let earlier = queue.batches.insert(batch.plugin.clone(), Submitted { batch, progress });
        debug_assert!(earlier.is_none(), "a plugin waits until its batch is taken");
        drop(queue);
        self.wake();
    }

    /// Writes with the next transaction and waits until it is durable. Cancelling the wait does
    /// not cancel the write.
    pub async fn write<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.append_and_write(Vec::new(), write).await
    }

    /// Writes with one of the next transactions, without a sync of its own, and waits for it.
    pub async fn write_later<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.append_and_write_later(Vec::new(), write).await
    }

    /// Appends `entries` to the log and writes, as [`Commit::write_later`] does.
    pub async fn append_and_write_later<R: Send + 'static>(
        &self,
        entries: Vec<Kind>,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let run = |transaction: &WriteTransaction, _: &mut NameChanges| Ok((entries, write(transaction)?));
        self.enqueue(Sync::Later, Wakes::default(), run).await
    }

    /// Appends `entries` to the log and writes, both in the next transaction, and waits until it
    /// is durable.
    pub async fn append_and_write<R: Send + 'static>(
        &self,
        entries: Vec<Kind>,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let run = |transaction: &WriteTransaction, _: &mut NameChanges| Ok((entries, write(transaction)?));
        self.enqueue(Sync::Now, Wakes::default(), run).await
    }

    /// Writes and appends what the write finds, both in the next transaction.
    pub async fn write_and_append<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<(Vec<Kind>, R), StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.enqueue(Sync::Now, Wakes::default(), |transaction, _| write(transaction)).await
    }

    /// Takes in news of a name and tells its followers.
    pub async fn change_name(&self, change: NameChange) -> Result<(), CommitError> {
        self.room.check()?;
        let write = move |transaction: &WriteTransaction, names: &mut NameChanges| {
            Ok((names.make(transaction, &change)?.into_iter().collect(), ()))
        };
        self.enqueue(Sync::Now, Wakes { names: true, ..Wakes::default() }, write).await
    }

    /// Publishes what a caller of the API gave: to the plugins, and through the outbox.
    pub async fn publish(&self, publish: Publish, now: Timestamp) -> Result<(), CommitError> {
        self.room.check()?;
        let Publish { topic, data } = publish.clone();
        let message = Kind::Event(Event::Message { topic, data, origin: Origin::Host });
        let write = move |transaction: &WriteTransaction, _: &mut NameChanges| {
            outbox::enqueue(transaction, None, &[publish], now)?;
            Ok((vec![message], ()))
        };
        self.enqueue(Sync::Now, Wakes { outbox: true, ..Wakes::default() }, write).await
    }

    async fn enqueue<R: Send + 'static>(
        &self,
        sync: Sync,
        wakes: Wakes,
        write: impl FnOnce(&WriteTransaction, &mut NameChanges) -> Result<(Vec<Kind>, R), StoreError>
        + Send
        + 'static,
    ) -> Result<R, CommitError> {
        let (done, result) = oneshot::channel();
        {
            let mut queue = self.queue.lock().expect("no one panics while holding the queue");
            if queue.closed {
                return Err(CommitError::Closed);
            }
            let run = Box::new(move |transaction: &WriteTransaction, names: &mut NameChanges| {
                let (entries, result) = write(transaction, names)?;
                Ok((entries, Box::new(move || drop(done.send(result))) as AfterCommit))
            });
            queue.writes.push(Write { sync, wakes, run });
        }
        self.wake();
        result.await.map_err(|_| CommitError::Closed)
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Says which thread is the writer; called by that thread before anything is submitted.
    pub fn attach(&self, thread: Thread) {
        self.thread.set(thread).expect("a host has one writer");
    }

    /// The writer's thread: commits until `stop` is cancelled and nothing waits any more. What is
    /// committed when it returns is on the disk.
    pub fn run(&self, store: &Store, log: &EventLog, stop: &CancellationToken) -> Result<(), StoreError> {
        let outcome = self.run_until(store, log, stop);
        // After an error nothing is acknowledged any more: who waits is told.
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        *queue = Queue { closed: true, ..Queue::default() };
        outcome
    }

    /// Whether nothing will be committed any more.
    pub fn is_closed(&self) -> bool {
        self.queue.lock().expect("no one panics while holding the queue").closed
    }

    fn run_until(&self, store: &Store, log: &EventLog, stop: &CancellationToken) -> Result<(), StoreError> {
        let mut since: Option<Instant> = None;
        let mut disk = Disk { synced_at: Instant::now(), behind: false };
        loop {
            let stopping = stop.is_cancelled();
            let Some(work) = self.take(stopping && !log.has_pending() && !disk.behind) else { return Ok(()) };
            if work.is_empty() && !stopping {
                let pause = if log.has_pending() {
                    LINGER.saturating_sub(since.get_or_insert_with(Instant::now).elapsed())
                } else {
                    since = None;
                    disk.pause(self.most_behind())
                };
                if !pause.is_zero() {
                    std::thread::park_timeout(pause);
                    continue;
                }
            }
            since = None;
            self.commit(store, log, work, &mut disk, stopping)?;
        }
    }

    /// How long the disk may lag behind the commits.
    fn most_behind(&self) -> Duration {
        match self.durability {
            Durability::Immediate => TRIFLES,
            Durability::Eventual => EVENTUAL,
        }
    }

    /// What waits; none once the queue is empty and closed for good.
    fn take(&self, last: bool) -> Option<Work> {
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        let work = Work {
            batches: std::mem::take(&mut queue.batches).into_values().collect(),
            writes: std::mem::take(&mut queue.writes),
        };
        if last && work.is_empty() {
            queue.closed = true;
            return None;
        }
        Some(work)
    }

    fn commit(
        &self,
        store: &Store,
        log: &EventLog,
        mut work: Work,
        disk: &mut Disk,
        stopping: bool,
    ) -> Result<(), StoreError> {
        let begun = Instant::now();
        let mut write = store.begin()?;
        // Before the pending entries are looked at, so that they share the transaction.
        let (mut wakes, mut names) = (Wakes::default(), NameChanges::new(log.now()));
        let mut after = Vec::new();
        let mut worth = Sync::Later;
        for small in std::mem::take(&mut work.writes) {
            if small.sync == Sync::Now {
                worth = Sync::Now;
            }
            wakes.add(small.wakes);
            let (entries, done) = (small.run)(&write, &mut names)?;
            log.append_now(entries);
            after.push(done);
        }
        for submitted in &work.batches {
            submitted.progress.taken.store(submitted.batch.number, Ordering::Release);
            submitted.progress.mailbox.ring();
            log.append_now(entries_of(&submitted.batch));
            for (key, update) in &submitted.batch.names {
                log.append_now(names.set_own(&write, key, update)?);
            }
        }
        let entries = log.pending();
        let sync = self.sync(worth, &work, &entries, disk, stopping);
        store::set_sync(&mut write, sync)?;
        store::log::append(&write, entries.iter().map(AsRef::as_ref))?;
        if let Some(last) = entries.last() {
            names.settle(&write, last.offset)?;
        }
        let (now, mut dropped) = (log.now(), 0);
        for submitted in &work.batches {
            dropped += apply(&write, &submitted.batch, now, &self.dead_letters, &mut wakes)?;
        }
        // Before the outbox can see them and count them down.
        for submitted in &work.batches {
            self.backlog.added(Some(&submitted.batch.plugin), submitted.batch.publishes.len());
        }
        let syncing = Instant::now();
        write.commit()?;
        if sync == Sync::Now {
            self.tally.syncs.observe(syncing.elapsed().as_secs_f64());
        }
        disk.committed(sync);
        if let Some(last) = entries.last() {
            log.committed(Offset(last.offset.0 + 1));
        }
        self.tally.commits.fetch_add(1, Ordering::Relaxed);
        self.tally.dead_dropped.fetch_add(dropped, Ordering::Relaxed);
        let elapsed = crate::time::nanoseconds(begun.elapsed());
        self.tally.nanoseconds.fetch_add(elapsed, Ordering::Relaxed);
        for submitted in work.batches {
            self.finish(submitted);
        }
        after.into_iter().for_each(|done| done());
        self.announce(&wakes);
        Ok(())
    }

    /// Whether this commit waits for the disk. Proof of listening alone is not worth a sync: losing
    /// it only makes a gap begin earlier.
    fn sync(&self, writes: Sync, work: &Work, entries: &[Arc<Entry>], disk: &Disk, stopping: bool) -> Sync {
        let changes_world = |entry: &Arc<Entry>| {
            matches!(entry.kind, Kind::Heard(_) | Kind::NameConfirmed(_) | Kind::Peers { .. } | Kind::Tick(_))
        };
        let trifling = writes == Sync::Later
            && work.batches.iter().all(|submitted| submitted.batch.is_trifling())
            && entries.iter().all(changes_world);
        let may_lag = trifling || self.durability == Durability::Eventual;
        if may_lag && !stopping && disk.synced_at.elapsed() < self.most_behind() {
            Sync::Later
        } else {
            Sync::Now
        }
    }

    fn finish(&self, submitted: Submitted) {
        let Submitted { batch, progress } = submitted;
        self.tally.handled.fetch_add(batch.entries as u64, Ordering::Relaxed);
        self.interest.update(&batch);
        batch.send_replies();
        progress.committed.store(batch.number, Ordering::Release);
        progress.mailbox.ring();
    }

    fn announce(&self, wakes: &Wakes) {
        for (due, notify) in
            [(wakes.outbox, &self.outbox), (wakes.names, &self.names), (wakes.retries, &self.retries)]
        {
            if due {
                notify.notify_one();
            }
        }
    }
}

/// How far the disk is behind the commits.
struct Disk {
    synced_at: Instant,
    /// Whether something was committed since.
    behind: bool,
}

impl Disk {
    fn committed(&mut self, sync: Sync) {
        self.behind = sync == Sync::Later;
        if sync == Sync::Now {
            self.synced_at = Instant::now();
        }
    }

    /// How long there is nothing to do for the disk.
    fn pause(&self, most_behind: Duration) -> Duration {
        if self.behind {
            most_behind.saturating_sub(self.synced_at.elapsed())
        } else {
            Duration::from_secs(1)
        }
    }
}

#[derive(Default)]
struct Work {
    batches: Vec<Submitted>,
    writes: Vec<Write>,
}

impl Work {
    fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.writes.is_empty()
    }
}
