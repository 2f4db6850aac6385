//! Owns the one writer of the store: a thread that makes finished batches real, those of several
//! plugins and all new entries of the log in one transaction and one sync.
//!
//! It receives batches from the plugins and small writes from the other stages. What a plugin
//! published goes into the log here, for the other plugins, and into the outbox, for the backend.
//! After the sync it sends the replies of commands and wakes the stages that have work.

mod apply;
mod code;
mod disk;
mod queue;
mod tally;
mod writer;

use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;

use bytes::Bytes;
use cid::Cid;
use redb::WriteTransaction;
use thiserror::Error;
use tokio::sync::{Notify, oneshot};

pub use code::{Told, give_up};
pub use disk::Durability;
pub use queue::Progress;
pub use tally::Tally;

use apply::{NameChanges, Wakes};
use queue::{AfterCommit, Queue, Submitted, Write};

use crate::backend::Current;
use crate::change::{Change, Changes};
use crate::effect::{NameUpdate, Publish};
use crate::entry::{Event, Kind, Origin};
use crate::ident::{IpnsName, KeyName, PluginName};
use crate::interest::Interest;
use crate::plugin::Batch;
use crate::room::{NoRoom, Room};
use crate::store::followed::Followed;
use crate::store::outbox::{self, Backlog};
use crate::store::{StoreError, Sync, dead};
use crate::time::Timestamp;

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
    /// An own name that never had a value points to what the host has not published.
    Found {
        /// The key behind it.
        key: KeyName,
        /// That as a value of the name.
        update: NameUpdate,
        /// What is published.
        current: Current,
    },
    /// An own name takes over what someone else has published under it.
    TakenOver {
        /// The key behind it.
        key: KeyName,
        /// That as a value of the name.
        update: NameUpdate,
        /// What is published.
        current: Current,
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
    dead_letters: dead::Quota,
    room: Arc<Room>,
    interest: Arc<Interest>,
    backlog: Arc<Backlog>,
    /// Who hears of changes of plugins' code.
    pub changes: Arc<Changes>,
    /// Woken when there is something to publish on topics.
    pub outbox: Notify,
    /// Woken when the value of a name has changed.
    pub names: Notify,
    /// Woken when a retry was put off.
    pub retries: Notify,
    /// How many transactions and syncs there were, and how long they took in all.
    pub tally: Tally,
}

impl Commit {
    /// A writer that has not started.
    pub fn new(
        durability: Durability,
        dead_letters: dead::Quota,
        interest: Arc<Interest>,
        backlog: Arc<Backlog>,
        room: Arc<Room>,
    ) -> Self {
        Self {
            interest,
            backlog,
            changes: Arc::default(),
            room,
            dead_letters,
            queue: Mutex::default(),
            thread: OnceLock::new(),
            durability,
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
        let earlier = queue.batches.insert(batch.plugin.clone(), Submitted::new(batch, progress));
        debug_assert!(earlier.is_none(), "a plugin waits until its batch is taken");
        drop(queue);
        self.wake();
    }

    /// Whether a batch of a plugin waits.
    pub fn has_batch_of(&self, plugin: &PluginName) -> bool {
        self.queue.lock().expect("no one panics while holding the queue").batches.contains_key(plugin)
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
        let run = |transaction: &WriteTransaction, _: &mut NameChanges, _: &mut Told| {
            Ok((entries, write(transaction)?))
        };
        self.enqueue(Sync::Later, Wakes::default(), run).await
    }

    /// Appends `entries` to the log and writes, both in the next transaction, and waits until it
    /// is durable.
    pub async fn append_and_write<R: Send + 'static>(
        &self,
        entries: Vec<Kind>,
        write: impl FnOnce(&WriteTransaction) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let run = |transaction: &WriteTransaction, _: &mut NameChanges, _: &mut Told| {
            Ok((entries, write(transaction)?))
        };
        self.enqueue(Sync::Now, Wakes::default(), run).await
    }

    /// Writes and appends what the write finds, both in the next transaction.
    pub async fn write_and_append<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<(Vec<Kind>, R), StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        self.enqueue(Sync::Now, Wakes::default(), |transaction, _, _| write(transaction)).await
    }

    /// Takes in news of a name and tells its followers.
    pub async fn change_name(&self, change: NameChange) -> Result<(), CommitError> {
        self.room.check()?;
        let write = move |transaction: &WriteTransaction, names: &mut NameChanges, _: &mut Told| {
            Ok((names.make(transaction, &change)?.into_iter().collect(), ()))
        };
        self.enqueue(Sync::Now, Wakes { names: true, ..Wakes::default() }, write).await
    }

    /// Puts a change of a plugin's code on record that no plugin's batch brings about, and tells of it, with
    /// what `write` does to the store; what that returns goes with it.
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

    /// Writes what concerns changes of plugins' code, and tells of them.
    pub async fn change<R: Send + 'static>(
        &self,
        write: impl FnOnce(&WriteTransaction, &mut Told) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, CommitError> {
        let write = move |transaction: &WriteTransaction, _: &mut NameChanges, told: &mut Told| {
            let result = write(transaction, told)?;
            Ok((std::mem::take(&mut told.entries), result))
        };
        self.enqueue(Sync::Now, Wakes::default(), write).await
    }

    /// Publishes what a caller of the API gave: to the plugins, and through the outbox.
    pub async fn publish(&self, publish: Publish, now: Timestamp) -> Result<(), CommitError> {
        self.room.check()?;
        let Publish { topic, data } = publish.clone();
        let message = Kind::Event(Event::Message { topic, data, origin: Origin::Host });
        let write = move |transaction: &WriteTransaction, _: &mut NameChanges, _: &mut Told| {
            outbox::enqueue(transaction, None, &[publish], now)?;
            Ok((vec![message], ()))
        };
        self.enqueue(Sync::Now, Wakes { outbox: true, ..Wakes::default() }, write).await
    }

    async fn enqueue<R: Send + 'static>(
        &self,
        sync: Sync,
        wakes: Wakes,
        write: impl FnOnce(&WriteTransaction, &mut NameChanges, &mut Told) -> Result<(Vec<Kind>, R), StoreError>
        + Send
        + 'static,
    ) -> Result<R, CommitError> {
        let (done, result) = oneshot::channel();
        {
            let mut queue = self.queue.lock().expect("no one panics while holding the queue");
            if queue.closed {
                return Err(CommitError::Closed);
            }
            let run =
                Box::new(move |transaction: &WriteTransaction, names: &mut NameChanges, told: &mut Told| {
                    let (entries, result) = write(transaction, names, told)?;
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

    /// Whether nothing will be committed any more.
    pub fn is_closed(&self) -> bool {
        self.queue.lock().expect("no one panics while holding the queue").closed
    }
}
