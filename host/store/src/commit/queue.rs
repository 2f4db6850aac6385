//! Owns the work that waits for the writer: at most one batch of each plugin, and the small writes of the other
//! stages.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dim_model::entry::Kind;
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use redb::WriteTransaction;
use tokio::sync::oneshot;

use super::apply::{NameChanges, Wakes};
use super::code_change::Announcements;
use crate::batch::Batch;
use crate::effect::Publish;
use crate::entry_context::EntryContext;
use crate::event_log::Mailbox;
use crate::rollback_rows::Place;
use crate::{StoreError, Sync};

/// A publish of an API caller.
#[derive(Debug)]
pub struct ApiPublish {
    /// The message.
    pub publish: Publish,
    /// The time of the call.
    pub at: Timestamp,
    /// Told when the publish is durable.
    pub done: oneshot::Sender<()>,
}

/// A small write of another stage.
pub struct Write {
    /// Whether the write needs a sync.
    pub sync: Sync,
    /// The stages that have work after the commit.
    pub wakes: Wakes,
    /// The function that writes.
    pub run: RunWrite,
}

/// A write within the transaction. It returns the entries to append to the log, and the step after the commit.
pub type RunWrite = Box<
    dyn FnOnce(
            &WriteTransaction,
            &mut NameChanges,
            &mut Announcements,
        ) -> Result<(Vec<Kind>, AfterCommit), StoreError>
        + Send,
>;

/// The step that runs once a write is durable.
pub type AfterCommit = Box<dyn FnOnce() + Send>;

/// The waiting work.
#[derive(Default)]
pub struct Queue {
    /// Batches, at most one of each plugin.
    pub batches: BTreeMap<PluginName, Submitted>,
    /// Small writes, in the order of their arrival.
    pub writes: Vec<Write>,
    /// Publishes of API callers, in the order of their arrival.
    pub publishes: Vec<ApiPublish>,
    /// The plugins whose large batch has already waited for one transaction, in the order of their arrival.
    pub waits: VecDeque<PluginName>,
    /// Whether the queue refuses new work.
    pub closed: bool,
}

/// Size of the effects, in bytes, above which a batch delays the others in the same transaction.
const LARGE: usize = 256 << 10;

impl Queue {
    /// Takes the work of the next transaction: all small work, and at most one large batch. A large batch is
    /// taken if nothing else waits or if it has already waited for one transaction; of several, the plugins
    /// take turns.
    pub fn take(&mut self) -> Work {
        let writes = std::mem::take(&mut self.writes);
        let publishes = std::mem::take(&mut self.publishes);
        let is_large = |batch: &Submitted| batch.batch.bytes > LARGE;
        let is_idle =
            writes.is_empty() && publishes.is_empty() && !self.batches.values().any(|it| !is_large(it));
        let mut large = self.batches.iter().filter(|(_, it)| is_large(it)).map(|(name, _)| name);
        let first = large.next().filter(|_| is_idle).cloned();
        let turn = self.waits.pop_front().or(first);
        let waits = |name: &PluginName, batch: &Submitted| is_large(batch) && turn.as_ref() != Some(name);
        let (waiting, taken): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.batches).into_iter().partition(|(name, batch)| waits(name, batch));
        for name in waiting.keys() {
            if !self.waits.contains(name) {
                self.waits.push_back(name.clone());
            }
        }
        self.batches = waiting;
        Work { batches: taken.into_values().collect(), writes, publishes }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("batches", &self.batches.len()).finish_non_exhaustive()
    }
}

/// A submitted batch.
#[derive(Debug)]
pub struct Submitted {
    /// The effects.
    pub batch: Arc<Batch>,
    /// The progress of the plugin's batches.
    pub progress: Arc<Progress>,
    /// The checkpoint that receives the old values of rows while the batch is applied.
    pub undo: Option<Place>,
    /// The context that a rollback restores, if the batch is one.
    pub context: Option<EntryContext>,
}

impl Submitted {
    /// Creates the entry of a batch that is not applied yet.
    pub fn new(batch: Arc<Batch>, progress: Arc<Progress>) -> Self {
        Self { batch, progress, undo: None, context: None }
    }
}

/// The progress of the batches of one plugin.
#[derive(Debug)]
pub struct Progress {
    pub(super) taken: AtomicU64,
    pub(super) committed: AtomicU64,
    pub(super) mailbox: Arc<Mailbox>,
}

impl Progress {
    /// Creates the progress before the first batch. `mailbox` is rung at each step.
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { taken: AtomicU64::new(0), committed: AtomicU64::new(0), mailbox }
    }

    /// The number of the newest batch that the writer has taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// The number of the newest batch that is durable.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }
}

/// The work of one transaction.
#[derive(Default)]
pub struct Work {
    /// Batches, at most one of each plugin.
    pub batches: Vec<Submitted>,
    /// Small writes, in the order of their arrival.
    pub writes: Vec<Write>,
    /// Publishes of API callers, in the order of their arrival.
    pub publishes: Vec<ApiPublish>,
}

impl Work {
    /// Whether there is no work.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.writes.is_empty() && self.publishes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PluginId;
    use dim_model::entry::{Generation, Offset};

    fn put(queue: &mut Queue, name: &str, bytes: usize) {
        let name: PluginName = name.parse().unwrap();
        let mut batch = Batch::new(name.clone(), PluginId(1), Generation(1), 1, Offset(0));
        batch.bytes = bytes;
        let progress = Arc::new(Progress::new(Arc::new(Mailbox::new())));
        queue.batches.insert(name, Submitted::new(Arc::new(batch), progress));
    }

    fn taken(queue: &mut Queue) -> Vec<String> {
        queue.take().batches.iter().map(|it| it.batch.plugin.to_string()).collect()
    }

    #[test]
    fn small_batches_go_first_and_large_ones_in_turn() {
        let mut queue = Queue::default();
        put(&mut queue, "large", LARGE + 1);
        assert_eq!(taken(&mut queue), ["large"], "nobody else waits");
        put(&mut queue, "large", LARGE + 1);
        put(&mut queue, "small", LARGE);
        assert_eq!(taken(&mut queue), ["small"]);
        put(&mut queue, "small", LARGE);
        assert_eq!(taken(&mut queue), ["large", "small"], "it has waited once");
        // However many plugins submit large batches all the time, each has its turn.
        let mut turns = Vec::new();
        for _ in 0..9 {
            ["a", "b", "c"].iter().for_each(|name| put(&mut queue, name, LARGE + 1));
            turns.extend(taken(&mut queue));
        }
        for name in ["a", "b", "c"] {
            assert_eq!(turns.iter().filter(|it| *it == name).count(), 3, "{turns:?}");
        }
    }
}
