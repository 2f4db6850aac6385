//! Owns the indexes of the own logs in the daemon: their nodes, and the pins that protect the blocks of own bundles from
//! garbage collection.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::{BackendError, Blocks};
use dim_model::backoff::Backoff;
use dim_model::ident::Topic;
use dim_store::{StoreError, topic_rows};
use dim_topics::identity::Digest;
use dim_topics::index::NewNodes;
use dim_topics::time::Moment;

use super::channel::Input;
use super::{Parts, ReliableTopics};

/// The pause between a bundle and the index that has it. Until then heads and bundles list it.
pub(super) const PAUSE: Duration = Duration::from_secs(1);

/// The time limit of a pin. The daemon has all blocks, so a pin that takes longer misses some.
const PIN: Duration = Duration::from_secs(5);

/// The time limit of storing all blocks of a log again and pinning them, and what each block adds to it. A daemon that is
/// busy stores a thousand small blocks a second.
const RESTORE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_millis(5));

/// The shortest time between two repairs that members ask for.
const REPAIR: Duration = Duration::from_secs(60);

/// The indexes in the daemon.
#[derive(Debug, Default)]
pub struct OwnIndexes {
    /// The roots that the daemon has pinned last.
    pinned: BTreeMap<Topic, Digest>,
    /// The topics whose index is provided next although no bundle is new.
    changed: BTreeSet<Topic>,
    /// The topics whose blocks the daemon has lost, at least in part.
    damaged: BTreeSet<Topic>,
    /// Whether a time is planned, or an index is being provided.
    is_planned: bool,
    /// The time of the last repair that a member asked for.
    repaired: Option<Moment>,
    backoff: Backoff,
}

impl OwnIndexes {
    /// Continues with the roots that the daemon has pinned last.
    pub fn new(pinned: BTreeMap<Topic, Digest>) -> Self {
        Self { pinned, ..Self::default() }
    }
}

/// The index of an own log that was provided, or the reason why it was not.
#[derive(Debug)]
pub struct Provided {
    topic: Topic,
    /// `None` if the log has no bundles any more.
    root: Option<Digest>,
    result: Result<(), BackendError>,
}

impl ReliableTopics {
    /// Provides the indexes of all logs with new bundles soon.
    pub(super) fn plan_indexes(&mut self, pause: Duration) {
        // On the embedded bus nobody fetches anything.
        if self.indexes.is_planned || !self.parts.backend.network {
            return;
        }
        self.indexes.is_planned = true;
        let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            clock.sleep(pause).await;
            let _ = sender.send(Input::IndexesDue).await;
        });
    }

    /// Provides the indexes of logs whose oldest bundles were removed.
    pub(super) fn shorten_indexes(&mut self, topics: impl IntoIterator<Item = Topic>) {
        self.indexes.changed.extend(topics);
        self.plan_indexes(PAUSE);
    }

    /// Provides all blocks of the own logs again: another member cannot fetch a node. It does so at most once within
    /// [`REPAIR`], because a member can ask for anything.
    pub(super) fn repair_indexes(&mut self) {
        let now = self.now().moment;
        let OwnIndexes { pinned, damaged, repaired, .. } = &mut self.indexes;
        if repaired.is_some_and(|at| now.since(at) < REPAIR) {
            return;
        }
        *repaired = Some(now);
        damaged.extend(pinned.keys().cloned());
        self.plan_indexes(PAUSE);
    }

    /// Provides the index of one log with new bundles. The others follow.
    pub(super) fn provide_index(&mut self) {
        let new = self.member.unindexed().next().cloned();
        let changed = || self.indexes.changed.first().cloned();
        let Some(topic) = new.or_else(changed).or_else(|| self.indexes.damaged.first().cloned()) else {
            self.indexes.is_planned = false;
            return;
        };
        self.indexes.changed.remove(&topic);
        let is_damaged = self.indexes.damaged.contains(&topic);
        let lost = is_damaged.then(|| self.restore_index(&topic)).transpose().unwrap_or_else(|error| {
            tracing::error!(%topic, "cannot read the places of bundles: {error}");
            None
        });
        let nodes = self.member.index(&topic);
        let pinned = self.indexes.pinned.get(&topic).copied();
        let (parts, sender) = (self.parts.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let root = nodes.as_ref().map(|nodes| nodes.root);
            let result = provide(&parts, lost, nodes, pinned).await;
            let _ = sender.send(Input::IndexProvided(Provided { topic, root, result })).await;
        });
    }

    /// Continues after an index was provided, or tries again later with all its blocks.
    pub(super) fn index_provided(&mut self, Provided { topic, root, result }: Provided) {
        if let Err(error) = result {
            tracing::debug!(%topic, "the index of the own log is not provided yet: {error}");
            self.indexes.damaged.insert(topic);
            self.indexes.is_planned = false;
            let pause = self.indexes.backoff.next_pause();
            self.plan_indexes(pause);
            return;
        }
        self.indexes.backoff.reset();
        self.indexes.damaged.remove(&topic);
        self.member.indexed(&topic, root);
        match root {
            Some(root) => self.indexes.pinned.insert(topic.clone(), root),
            None => self.indexes.pinned.remove(&topic),
        };
        let commit = self.parts.commit.clone();
        self.spawn_write(async move {
            commit.write_later(move |write| topic_rows::pinned(write, &topic, root.as_ref())).await
        });
        // There may be another one.
        self.indexes.is_planned = false;
        self.plan_indexes(PAUSE);
    }

    /// Builds the index of a log again, so that all its nodes are new. Returns the bundles that are kept.
    fn restore_index(&mut self, topic: &Topic) -> Result<Vec<Digest>, StoreError> {
        let places = topic_rows::places(&self.parts.store.snapshot()?, topic)?;
        let digests = places.iter().map(|place| place.listed.digest).collect();
        self.member.restore_index(topic, places);
        Ok(digests)
    }
}

/// Gives the daemon new nodes, and all bundles if it has perhaps lost some. Then moves the pin from the root before to the
/// new one.
async fn provide(
    parts: &Parts,
    lost: Option<Vec<Digest>>,
    nodes: Option<NewNodes>,
    pinned: Option<Digest>,
) -> Result<(), BackendError> {
    let content = &parts.backend.content;
    let Some(NewNodes { root, blocks }) = nodes else {
        return match pinned {
            Some(root) => content.unpin(&root.cid()).await,
            None => Ok(()),
        };
    };
    let before = pinned.filter(|before| *before != root).map(|before| before.cid());
    let Some(lost) = lost else {
        for (digest, block) in blocks {
            content.put_block(&digest.cid(), block).await?;
        }
        return content.pin_graph(&root.cid(), before.as_ref(), PIN).await;
    };
    if before.is_none() && content.is_pinned(&root.cid()).await? {
        // It has lost nothing: a pin protects all blocks.
        return Ok(());
    }
    if let Some(before) = &before
        && content.is_pinned(before).await?
    {
        // It has the earlier blocks. If it lacks one of the new bundles, everything is imported.
        for (digest, block) in &blocks {
            content.put_block(&digest.cid(), block.clone()).await?;
        }
        if content.pin_graph(&root.cid(), Some(before), PIN).await.is_ok() {
            return Ok(());
        }
    }
    let (limit, each) = RESTORE;
    let count = u32::try_from(lost.len() + blocks.len()).unwrap_or(u32::MAX);
    tracing::debug!(count, "giving the daemon all blocks of an own log again");
    content.import_graph(&root.cid(), all_blocks(parts, blocks, lost), limit + each * count).await?;
    match before {
        Some(before) => content.unpin(&before).await,
        None => Ok(()),
    }
}

/// The nodes of an index, and the bundles that the host still has.
fn all_blocks(parts: &Parts, nodes: Vec<(Digest, Bytes)>, bundles: Vec<Digest>) -> Blocks {
    let parts = parts.clone();
    let stored = move |digest: Digest| {
        let block = parts.stored_block(&digest).map_err(|error| BackendError::Store(error.to_string()));
        // It may have been removed meanwhile.
        block.transpose().map(|block| block.map(|block| (digest.cid(), block)))
    };
    let nodes = nodes.into_iter().map(|(digest, block)| Ok((digest.cid(), block)));
    Box::new(nodes.chain(bundles.into_iter().filter_map(stored)))
}
