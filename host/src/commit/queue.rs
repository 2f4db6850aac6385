//! Owns what waits for the writer: at most one batch of each plugin, and the small writes of the other
//! stages.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::WriteTransaction;

use super::apply::{NameChanges, Wakes};
use super::code::Told;
use crate::entry::Kind;
use crate::ident::PluginName;
use crate::log::Mailbox;
use crate::plugin::{Batch, World};
use crate::store::undo::Place;
use crate::store::{StoreError, Sync};

/// A small write of another stage.
pub struct Write {
    /// Whether it is worth a sync.
    pub sync: Sync,
    /// Which stages have work afterwards.
    pub wakes: Wakes,
    /// What writes.
    pub run: RunWrite,
}

/// What writes, in the transaction; it says which entries join the log and what is done afterwards.
pub type RunWrite = Box<
    dyn FnOnce(&WriteTransaction, &mut NameChanges, &mut Told) -> Result<(Vec<Kind>, AfterCommit), StoreError>
        + Send,
>;

/// What is done once a write is durable.
pub type AfterCommit = Box<dyn FnOnce() + Send>;

/// What waits.
#[derive(Default)]
pub struct Queue {
    /// Batches, at most one of each plugin.
    pub batches: BTreeMap<PluginName, Submitted>,
    /// Small writes, in the order in which they came.
    pub writes: Vec<Write>,
    /// Whose large batch has let others go first, in the order in which they came.
    pub waits: VecDeque<PluginName>,
    /// Whether nothing is taken any more.
    pub closed: bool,
}

/// Bytes of effects from which on a batch holds up the others that share a transaction with it.
const LARGE: usize = 256 << 10;

impl Queue {
    /// What the next transaction is made of: whatever is small, and a large batch if nothing else waits, or if it has
    /// let others go first. Of several it is the one whose plugin's turn it is.
    pub fn take(&mut self) -> Work {
        let writes = std::mem::take(&mut self.writes);
        let is_large = |batch: &Submitted| batch.batch.bytes > LARGE;
        let is_idle = writes.is_empty() && !self.batches.values().any(|it| !is_large(it));
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
        Work { batches: taken.into_values().collect(), writes }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("batches", &self.batches.len()).finish_non_exhaustive()
    }
}

/// A batch that waits.
#[derive(Debug)]
pub struct Submitted {
    /// The effects.
    pub batch: Arc<Batch>,
    /// Whom it concerns how far it has come.
    pub progress: Arc<Progress>,
    /// The mark whose rows are saved while it is applied.
    pub undo: Option<Place>,
    /// The world that it goes back to, if it takes something back.
    pub world: Option<World>,
}

impl Submitted {
    /// A batch of which nothing is done yet.
    pub fn new(batch: Arc<Batch>, progress: Arc<Progress>) -> Self {
        Self { batch, progress, undo: None, world: None }
    }
}

/// How far the batches of one plugin have come.
#[derive(Debug)]
pub struct Progress {
    pub(super) taken: AtomicU64,
    pub(super) committed: AtomicU64,
    pub(super) mailbox: Arc<Mailbox>,
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

/// What one transaction is made of.
#[derive(Default)]
pub struct Work {
    /// Batches, at most one of each plugin.
    pub batches: Vec<Submitted>,
    /// Small writes, in the order in which they came.
    pub writes: Vec<Write>,
}

impl Work {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.writes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Generation, Offset};
    use crate::store::PluginId;

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
        // However many want much all the time, each has its turn.
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
