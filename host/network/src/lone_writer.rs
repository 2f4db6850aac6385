//! Owns a writer of reliable topics without a host: a program that publishes events and receives none. It has a store of
//! its own. It receives events, and returns once they are on the disk. Later it returns how many of them another member
//! has made durable. Events that all members have passed over are given up; the program publishes them again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::Thread;
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::Backend;
use dim_ipfs::keys::{KeyError, Keyring};
use dim_model::error_chain::chain;
use dim_model::ident::Topic;
use dim_model::time::Clock;
use dim_store::commit::{Commit, CommitError, Durability};
use dim_store::disk_monitor::{DiskCheck, DiskMonitor, Quota};
use dim_store::effect::Publish;
use dim_store::event_log::EventLog;
use dim_store::outbox::Backlog;
use dim_store::{Absent, Disk, Store, StoreError, dead_letters, outbox};
use dim_topics::identity::Incarnation;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::outbox::{API_QUOTA, Outbox};
use crate::reliable_topics::{
    Deliveries, Driver, Identity, IdentityError, Inputs, Parts, Reliable, WriterLog, enter_fleet,
};

/// The size of the cache for the pages of the store, in bytes.
const CACHE: usize = 4 << 20;

/// Most memory for entries of the log, in bytes. A writer without plugins has hardly any.
const TAIL: usize = 1 << 20;

/// The bytes of the disk that stay free.
const MIN_FREE: u64 = 64 << 20;

/// The pause between checks of the disk.
const LOOK: Duration = Duration::from_secs(1);

/// The time after which an event on a topic that is no longer reliable expires.
const EXPIRY: Duration = Duration::from_secs(3_600);

/// A day.
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// The shortest time after which an event without an acknowledgement is published again.
const SOONEST_AGAIN: Duration = Duration::from_secs(600);

/// The options of a writer.
#[derive(Debug)]
pub struct Options {
    /// The directory of its store and its key.
    pub dir: PathBuf,
    /// The name of the fleet.
    pub fleet: String,
    /// The delivery of the topics.
    pub deliveries: Deliveries,
    /// The daemon.
    pub backend: Backend,
    /// The clock.
    pub clock: Arc<dyn Clock>,
}

/// The reason why a writer does not start.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Its store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its keys cannot be read.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Its key cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// The reason why an event is not published.
#[derive(Debug, Error)]
pub enum PublishError {
    /// The store failed, or the disk is full.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// Too many events wait for the daemon.
    #[error("{API_QUOTA} events wait for the daemon already")]
    Full,
}

/// The end of the log at some time, and what it covers.
#[derive(Clone, Copy, Debug)]
struct Target {
    /// The number of events, of those since the start, that the log had.
    covered: u64,
    /// The process start with the last one.
    incarnation: Incarnation,
    /// The sequence after it.
    next: u64,
}

/// What was published on a topic since the start, and what of it is acknowledged.
#[derive(Debug, Default)]
struct Published {
    /// The number of events that are on the disk.
    count: u64,
    /// The end that another member must reach.
    target: Option<Target>,
    /// The sequence of the first event that is neither acknowledged nor given up.
    first: u64,
    progress: Progress,
}

/// What became of the events of a topic since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The number of the first events of which another member has each that was not given up.
    pub acknowledged: u64,
    /// The number of the first events that were given up if they were not acknowledged: a member has passed over them,
    /// because it began later or because they were missing.
    pub given_up: u64,
}

impl Published {
    /// Takes in the own log as it is now. `has_formed` says whether it has the first so many events.
    fn look_at(&mut self, log: &WriterLog, has_formed: Option<u64>) {
        let reached = self.progress.acknowledged.max(self.progress.given_up);
        if let Some(covered) = has_formed.filter(|covered| self.target.is_none() && *covered > reached) {
            self.target = Some(Target { covered, incarnation: log.incarnation, next: log.end });
        }
        let Some(target) = self.target.filter(|target| target.incarnation == log.incarnation) else { return };
        let mut readers = log.readers.iter().filter(|reader| reader.received >= target.next).peekable();
        let has_some = readers.peek().is_some();
        if readers.any(|reader| reader.from <= self.first) {
            self.progress.acknowledged = target.covered;
        } else if has_some {
            self.progress.given_up = target.covered;
        } else {
            return;
        }
        (self.first, self.target) = (target.next, None);
    }
}

/// A writer.
#[derive(Debug)]
pub struct LoneWriter {
    parts: Parts,
    published: Arc<Mutex<BTreeMap<Topic, Published>>>,
}

/// The tasks of a writer, before they run.
#[derive(Debug)]
pub struct Tasks {
    parts: Parts,
    identity: Identity,
    inputs: Inputs,
}

impl LoneWriter {
    /// Opens the store in a directory, which is created if it is missing. The tasks must run before anything is
    /// published. Blocks.
    pub fn open(options: Options) -> Result<(Self, Tasks), OpenError> {
        let Options { dir, fleet, deliveries, backend, clock } = options;
        // A store that is lost is made again: the program still has what was not acknowledged.
        let absent = if Store::file(&dir).exists() { Absent::Refused } else { Absent::Created };
        let store = Arc::new(Store::open_on(&dir, Arc::new(Disk), CACHE, absent)?);
        forget_waiting(&store)?;
        enter_fleet(&store, &fleet)?;
        let keys = Keyring::open(store.dir())?;
        let identity = Identity::new(&keys, &fleet, clock.wall())?;
        let (backlog, disk) = (Arc::new(Backlog::restore(&store)?), Arc::<DiskMonitor>::default());
        let (interest, letters) = (Arc::default(), dead_letters::Quota::default());
        let commit =
            Arc::new(Commit::new(Durability::Immediate, letters, interest, backlog.clone(), disk.clone()));
        let (next, last) = store.log_end()?;
        let log = Arc::new(EventLog::new(store.clone(), next, last, clock, TAIL));
        let (reliable, inputs) = Reliable::new(&fleet, deliveries);
        let echoes = Arc::default();
        // It has no plugins.
        let queue_bytes = 0;
        let parts = Parts { store, commit, log, disk, backend, backlog, reliable, echoes, queue_bytes };
        let writer = Self { parts: parts.clone(), published: Arc::default() };
        Ok((writer, Tasks { parts, identity, inputs }))
    }

    /// Whether a topic is reliable.
    pub fn writes(&self, topic: &Topic) -> bool {
        self.parts.reliable.is_reliable(topic)
    }

    /// Whether the events of a topic are plain messages, too.
    pub fn is_both(&self, topic: &Topic) -> bool {
        self.parts.reliable.is_both(topic)
    }

    /// The pubsub topic on which the events of a reliable topic are sent.
    pub fn channel(&self, topic: &Topic) -> Topic {
        self.parts.reliable.channels().of(topic)
    }

    /// The number of events that wait for their sequences.
    pub fn waiting(&self) -> usize {
        self.parts.backlog.length(None).load(Ordering::Relaxed)
    }

    /// Publishes an event on a reliable topic. It is on the disk when this returns. Returns its number among those of
    /// the topic since the start. Cancelling the wait does not cancel the publish.
    pub async fn publish(&self, topic: &Topic, data: Bytes) -> Result<u64, PublishError> {
        if self.waiting() >= API_QUOTA {
            return Err(PublishError::Full);
        }
        let Parts { commit, log, backlog, disk, .. } = self.parts.clone();
        disk.check().map_err(CommitError::from)?;
        let (publish, now) = (Publish { topic: topic.clone(), data }, log.now());
        let (published, topic) = (self.published.clone(), topic.clone());
        backlog.added(None, 1);
        let publishing = tokio::spawn(async move {
            let written = commit.write(move |write| outbox::enqueue(write, None, &[publish], now)).await;
            if let Err(error) = written {
                backlog.length(None).fetch_sub(1, Ordering::Relaxed);
                return Err(error.into());
            }
            commit.outbox.notify_one();
            let mut published = lock(&published);
            let of_topic = published.entry(topic).or_default();
            of_topic.count += 1;
            Ok(of_topic.count)
        });
        publishing.await.expect("publishing does not panic")
    }

    /// What became of the events of a topic that were published since the start.
    pub async fn progress(&self, topic: &Topic) -> Progress {
        let Some(count) = lock(&self.published).get(topic).map(|it| it.count) else {
            return Progress::default();
        };
        // The end of the log covers the events that had their sequences when it was read.
        let has_formed = (self.waiting() == 0).then_some(count);
        let logs = self.parts.reliable.writers(topic).await.unwrap_or_default();
        let mut published = lock(&self.published);
        let of_topic = published.get_mut(topic).expect("nothing removes it");
        if let Some(log) = logs.iter().find(|log| log.is_own) {
            of_topic.look_at(log, has_formed);
        }
        of_topic.progress
    }

    /// The time after which an event without an acknowledgement is published again: half of the time for which readers
    /// can fetch it.
    pub fn again(&self, topic: &Topic) -> Duration {
        let kept = self.parts.reliable.settings(topic).map_or(DAY, |it| it.time);
        (kept / 2).clamp(SOONEST_AGAIN, DAY)
    }

    /// The time within which another member usually acknowledges an event.
    pub async fn acknowledged_within(&self) -> Duration {
        self.parts.reliable.acknowledged_within().await.unwrap_or_default()
    }
}

fn lock(published: &Mutex<BTreeMap<Topic, Published>>) -> MutexGuard<'_, BTreeMap<Topic, Published>> {
    published.lock().expect("no thread panics while it holds the counts")
}

impl Tasks {
    /// Runs the writer until `stop` is cancelled.
    ///
    /// # Errors
    /// The store failed. Nothing is published any more.
    pub async fn run(self, stop: CancellationToken) -> Result<(), StoreError> {
        let Self { parts, identity, inputs } = self;
        let tasks = TaskTracker::new();
        let driver = Driver::new(parts.clone(), Some(identity), stop.clone())?;
        let writer = Writer::spawn(&parts);
        tasks.spawn(driver.run(inputs));
        tasks.spawn(send_waiting(&parts).run(stop.clone()));
        tokio::select! {
            biased;
            () = writer.stop.cancelled() => {}
            () = watch_disk(&parts) => {}
            () = stop.cancelled() => {}
        }
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        writer.end().await
    }
}

/// The thread that commits.
struct Writer {
    /// Cancelled to end it, and when it has ended.
    stop: CancellationToken,
    thread: Thread,
    end: oneshot::Receiver<Result<(), StoreError>>,
}

impl Writer {
    fn spawn(parts: &Parts) -> Self {
        let Parts { store, commit, log, .. } = parts.clone();
        let (stop, (done, end)) = (CancellationToken::new(), oneshot::channel());
        let until = stop.clone();
        let run = move || {
            let ended = until.clone().drop_guard();
            let result = commit.run(&store, &log, &until);
            drop((ended, done.send(result)));
        };
        let thread = std::thread::Builder::new().name("commit".to_owned()).spawn(run);
        let thread = thread.expect("the system gives a thread").thread().clone();
        parts.commit.attach(thread.clone());
        parts.log.attach(thread.clone());
        Self { stop, thread, end }
    }

    async fn end(self) -> Result<(), StoreError> {
        self.stop.cancel();
        self.thread.unpark();
        self.end.await.expect("the thread that commits does not panic")
    }
}

/// Removes the events that have no sequence yet: the program publishes them again.
fn forget_waiting(store: &Store) -> Result<(), StoreError> {
    let waiting = outbox::numbers(&store.snapshot()?)?;
    let write = store.begin()?;
    outbox::forget(&write, &waiting)?;
    write.commit()?;
    Ok(())
}

/// The task that passes waiting events to the driver.
fn send_waiting(parts: &Parts) -> Outbox {
    let Parts { store, commit, log, backend, backlog, reliable, echoes, .. } = parts.clone();
    // Nothing of it expires but events on a topic that is no longer reliable.
    let (sent, expiry, clock) = (Arc::default(), EXPIRY, log.clock().clone());
    Outbox { store, commit, backend, echoes, backlog, sent, reliable, expiry, clock }
}

/// Checks the disk again and again. A full disk stops the publishes, so that the store does not fail.
async fn watch_disk(parts: &Parts) {
    let Parts { store, log, disk, .. } = parts.clone();
    let check = DiskCheck { store, log, disk, quota: Quota { max_held: None, min_free: MIN_FREE } };
    loop {
        let looking = check.clone();
        let looked = tokio::task::spawn_blocking(move || looking.look()).await;
        if let Err(error) = looked.expect("looking does not panic") {
            tracing::error!("cannot check the disk of the writer: {}", chain(&error));
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use dim_topics::identity::WriterId;
    use dim_topics::reader::ReaderCounters;

    use super::*;
    use crate::reliable_topics::ReaderPosition;

    /// The own log with `end` events, and the positions of readers: the sequence after the last event, and the one from
    /// which on none is missing.
    fn log(incarnation: u8, end: u64, readers: &[(u64, u64)]) -> WriterLog {
        let name = WriterId([7; 32]).name();
        let reader = |&(received, from)| ReaderPosition { reader: name.clone(), received, from };
        WriterLog {
            writer: name.clone(),
            is_own: true,
            is_mirrored: false,
            incarnation: Incarnation([incarnation; 16]),
            end,
            received: end,
            counters: ReaderCounters::default(),
            readers: readers.iter().map(reader).collect(),
        }
    }

    #[test]
    fn events_are_acknowledged_by_a_reader_that_has_all_of_them() {
        let mut published = Published { count: 3, ..Published::default() };
        published.look_at(&log(1, 2, &[(9, 0)]), None);
        assert_eq!(published.progress, Progress::default(), "not all have their sequences");
        published.look_at(&log(1, 3, &[(2, 0)]), Some(3));
        assert_eq!(published.progress, Progress::default());
        // More is published before the first ones are acknowledged.
        published.look_at(&log(1, 8, &[(3, 0)]), Some(8));
        assert_eq!(published.progress, Progress { acknowledged: 3, given_up: 0 });
        published.look_at(&log(1, 8, &[(8, 3)]), Some(8));
        assert_eq!(published.progress, Progress { acknowledged: 8, given_up: 0 });
        published.look_at(&log(1, 8, &[(8, 3)]), Some(8));
        assert_eq!(published.progress, Progress { acknowledged: 8, given_up: 0 });
    }

    #[test]
    fn events_that_the_readers_have_passed_over_are_given_up() {
        let mut published = Published { count: 3, ..Published::default() };
        // A host began to read at the end of the log, and one has a gap.
        published.look_at(&log(1, 3, &[(3, 3), (3, 2)]), Some(3));
        assert_eq!(published.progress, Progress { acknowledged: 0, given_up: 3 });
        // They are published again.
        published.look_at(&log(1, 6, &[(3, 3), (3, 2)]), Some(6));
        assert_eq!(published.progress, Progress { acknowledged: 0, given_up: 3 });
        published.look_at(&log(1, 6, &[(6, 3)]), Some(6));
        assert_eq!(published.progress, Progress { acknowledged: 6, given_up: 3 });
    }
}
