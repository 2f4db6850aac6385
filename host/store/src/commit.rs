//! Owns the one writer of the store: a thread that commits the batches of all plugins and all new entries of
//! the log in one transaction and one sync.
//!
//! It receives batches from the plugins and small writes from the other stages. It appends the publishes of
//! plugins to the log, for the other plugins, and to the outbox, for the backend. After the sync it sends the
//! replies of commands and wakes the stages that have work.

mod apply;
mod code_change;
mod durability;
mod queue;
mod counters;
mod writer;

use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;

use bytes::Bytes;
use cid::Cid;
use redb::WriteTransaction;
use thiserror::Error;
use tokio::sync::{Notify, oneshot};

pub use code_change::{Announcements, give_up};
pub use counters::Counters;
pub use durability::Durability;
pub use queue::Progress;

use apply::{NameChanges, Wakes};
use queue::{AfterCommit, ApiPublish, Queue, Submitted, Write};

use crate::batch::Batch;
use crate::change::{Change, Changes};
use crate::disk_monitor::{DiskMonitor, IntakeStopped};
use crate::effect::{NameUpdate, Publish};
use crate::followed_names::Followed;
use crate::interest::Interest;
use crate::names::ForeignValue;
use crate::outbox::Backlog;
use crate::{StoreError, Sync, dead_letters};
use dim_model::entry::Kind;
use dim_model::ident::{IpnsName, KeyName, PluginName};
use dim_model::time::Timestamp;

/// The reason why a write did not happen.
#[derive(Debug, Error)]
pub enum CommitError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk is full: the host has stopped the intake.
    #[error(transparent)]
    IntakeStopped(#[from] IntakeStopped),
    /// The host is shutting down.
    #[error("the host is shutting down")]
    Closed,
}

/// A change of a name from another stage than a plugin.
#[derive(Debug)]
pub enum NameChange {
    /// The operator sets a new value of an own name.
    Own {
        /// The key of the name.
        key: KeyName,
        /// The new value.
        update: NameUpdate,
    },
    /// The backend has published a value under an own name for which the host has no value.
    Found {
        /// The key of the name.
        key: KeyName,
        /// The published value.
        value: ForeignValue,
    },
    /// An own name takes over the value that another writer has published.
    TakenOver {
        /// The key of the name.
        key: KeyName,
        /// The published value.
        value: ForeignValue,
    },
    /// A followed name points to another file.
    Followed {
        /// The new resolution and record of the name.
        known: Followed,
        /// The file's CID.
        cid: Cid,
        /// The content of the file.
        data: Bytes,
    },
    /// A name has a new follower: its last known value is announced once more.
    Again {
        /// The name.
        name: IpnsName,
        /// The key of the name, if it is the host's own.
        key: Option<KeyName>,
    },
}

/// The interface of the writer for the other stages.
#[derive(Debug)]
pub struct Commit {
    queue: Mutex<Queue>,
    thread: OnceLock<Thread>,
    durability: Durability,
    dead_letters: dead_letters::Quota,
    disk: Arc<DiskMonitor>,
    interest: Arc<Interest>,
    backlog: Arc<Backlog>,
    /// The changes of plugins' code that are under way, and the feed of their states.
    pub changes: Arc<Changes>,
    /// Woken when there is something to publish on topics.
    pub outbox: Notify,
    /// Woken when the value of a name has changed.
    pub names: Notify,
    /// Woken when a plugin has requested a retry.
    pub retries: Notify,
    /// Woken when a plugin begins to receive earlier events of a topic, or ends it.
    pub catch_ups: Notify,
    /// The counters of the writer.
    pub counters: Counters,
}

impl Commit {
    /// Creates a writer that has not started.
    pub fn new(
        durability: Durability,
        dead_letters: dead_letters::Quota,
        interest: Arc<Interest>,
        backlog: Arc<Backlog>,
        disk: Arc<DiskMonitor>,
    ) -> Self {
        Self {
            interest,
            backlog,
            changes: Arc::default(),
            disk,
            dead_letters,
            queue: Mutex::default(),
            thread: OnceLock::new(),
            durability,
            outbox: Notify::new(),
            names: Notify::new(),
            retries: Notify::new(),
            catch_ups: Notify::new(),
            counters: Counters::default(),
        }
    }

    /// Submits a batch. The writer must have taken the plugin's earlier batch.
    pub fn submit(&self, batch: Arc<Batch>, progress: Arc<Progress>) {
        let mut queue = self.queue.lock().expect("no one panics while holding the queue");
        if queue.closed {
            // Dropping the batch drops its replies, so each waiting caller gets an error.
            return;
        }
        let earlier = queue.batches.insert(batch.plugin.clone(), Submitted::new(batch, progress));
        debug_assert!(earlier.is_none(), "a plugin waits until its batch is taken");
        drop(queue);
        self.wake();
    }

    /// Whether a batch of a plugin waits for the writer.
    pub fn has_batch_of(&self, plugin: &PluginName) -> bool {
        self.queue.lock().expect("no one panics while holding the queue").batches.contains_key(plugin)
    }

    /// Writes with the next transaction and waits until it is durable. Cancelling the wait does not cancel the write.
    pub async fn write<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.append_and_write(Vec::new(), write).await
    }

    /// Writes with one of the next transactions, without a sync of its own, and waits until it is committed.
    pub async fn write_later<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.append_and_write_later(Vec::new(), write).await
    }

    /// Appends `entries` to the log and writes, like [`Commit::write_later`].
    pub async fn append_and_write_later<R: Send + 'static>(
        &self,
        entries: Vec<Kind>,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let run = |transaction: &WriteTransaction, _: &mut NameChanges, _: &mut Announcements| {
            Ok((entries, write(transaction)?))
        };
        self.enqueue(Sync::Later, Wakes::default(), run).await
    }

    /// Appends `entries` to the log and writes, both in the next transaction, and waits until it is durable.
    pub async fn append_and_write<R: Send + 'static>(
        &self,
        entries: Vec<Kind>,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let run = |transaction: &WriteTransaction, _: &mut NameChanges, _: &mut Announcements| {
            Ok((entries, write(transaction)?))
        };
        self.enqueue(Sync::Now, Wakes::default(), run).await
    }

    /// Writes, and appends the entries that the write returns, both in the next transaction.
    pub async fn write_and_append<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<(Vec<Kind>, R), StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.enqueue(Sync::Now, Wakes::default(), |transaction, _, _| write(transaction)).await
    }

    /// Applies a change of a name and announces it to the name's followers.
    pub async fn change_name(&self, change: NameChange) -> Result<(), CommitError> {
        self.disk.check()?;
        let write = move |transaction: &WriteTransaction, names: &mut NameChanges, _: &mut Announcements| {
            Ok((names.make(transaction, &change)?.into_iter().collect(), ()))
        };
        self.enqueue(Sync::Now, Wakes { names: true, ..Wakes::default() }, write).await
    }

    /// Records and announces a change of a plugin's code that comes from no batch. `write` runs in the same
    /// transaction; its result is returned.
    pub async fn record<R: Send + 'static>(
        &self,
        change: Change,
        now: Timestamp,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.change(move |transaction, told| {
            let result = write(transaction)?;
            told.record(transaction, &change, now)?;
            Ok(result)
        })
        .await
    }

    /// Writes rows about changes of plugins' code, and announces these changes.
    pub async fn change<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction, &mut Announcements) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let write = move |transaction: &WriteTransaction, _: &mut NameChanges, told: &mut Announcements| {
            let result = write(transaction, told)?;
            Ok((std::mem::take(&mut told.entries), result))
        };
        self.enqueue(Sync::Now, Wakes::default(), write).await
    }

    /// Publishes a message of an API caller: to the plugins, and through the outbox.
    pub async fn publish(&self, publish: Publish, now: Timestamp) -> Result<(), CommitError> {
        self.disk.check()?;
        let (done, result) = oneshot::channel();
        self.add(|queue| queue.publishes.push(ApiPublish { publish, at: now, done }))?;
        result.await.map_err(|_| CommitError::Closed)
    }

    /// Adds work to the queue, and wakes the writer.
    fn add(&self, put: impl FnOnce(&mut Queue)) -> Result<(), CommitError> {
        {
            let mut queue = self.queue.lock().expect("no one panics while holding the queue");
            if queue.closed {
                return Err(CommitError::Closed);
            }
            put(&mut queue);
        }
        self.wake();
        Ok(())
    }

    async fn enqueue<R: Send + 'static>(
        &self,
        sync: Sync,
        wakes: Wakes,
        write: impl FnOnce(
            &WriteTransaction,
            &mut NameChanges,
            &mut Announcements,
        ) -> Result<(Vec<Kind>, R), StoreError>
        + Send
        + 'static,
    ) -> Result<R, CommitError> {
        let (done, result) = oneshot::channel();
        let run = Box::new(
            move |transaction: &WriteTransaction, names: &mut NameChanges, told: &mut Announcements| {
                let (entries, result) = write(transaction, names, told)?;
                Ok((entries, Box::new(move || drop(done.send(result))) as AfterCommit))
            },
        );
        self.add(|queue| queue.writes.push(Write { sync, wakes, run }))?;
        result.await.map_err(|_| CommitError::Closed)
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Registers the writer's thread. That thread calls it before anything is submitted.
    pub fn attach(&self, thread: Thread) {
        self.thread.set(thread).expect("a host has one writer");
    }

    /// Whether the writer has ended: nothing is committed any more.
    pub fn is_closed(&self) -> bool {
        self.queue.lock().expect("no one panics while holding the queue").closed
    }
}
