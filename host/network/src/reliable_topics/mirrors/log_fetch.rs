//! Owns the fetching of a log for a mirror: it reads the index to which a root leads, fetches and verifies the bundles,
//! and lets the daemon pin them. What is pinned leads to nothing else.

use std::collections::HashMap;
use std::time::Duration;

use dim_ipfs::{BackendError, Content};
use dim_store::mirrors::Mirror;
use dim_topics::block::MAX_BLOCK;
use dim_topics::bundle::Bundle;
use dim_topics::identity::Digest;
use dim_topics::index::{BundlePlace, MAX_NODE, Node};
use dim_topics::malformed::Malformed;
use futures::{StreamExt as _, TryStreamExt as _};
use thiserror::Error;

use crate::reliable_topics::Parts;
use crate::reliable_topics::intake::FETCH;

/// The maximum number of nodes of the index of one log. They have at most a million bundles.
const MAX_NODES: usize = 4_096;

/// The number of blocks that are fetched at once.
const FETCHES: usize = 8;

/// The time limit of a pin, and the time that is added for each block. The daemon has all blocks, so a pin that takes
/// longer misses some.
const PIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(1));

/// The time after which an attempt ends, so that other logs have their turn. What was fetched is in the daemon.
const TURN: Duration = Duration::from_secs(600);

/// The verified blocks of a log.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    /// The nodes of the index.
    pub nodes: HashMap<Digest, Node>,
    /// The bundles, with their sizes in bytes.
    pub bundles: HashMap<Digest, usize>,
}

impl Blocks {
    /// The size of the bundles, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bundles.values().map(|bytes| *bytes as u64).sum()
    }
}

/// The reason why a log is not kept.
#[derive(Debug, Error)]
pub enum NotKept {
    /// A block cannot be had now.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A block is malformed.
    #[error("a block cannot be read: {0}")]
    Malformed(#[from] Malformed),
    /// The index is not that of the log.
    #[error("its index leads to something else than the bundles of the log")]
    Foreign,
    /// The limit of the topic is reached.
    #[error("the mirrored logs of the topic would have more than {0} bytes (topics.TOPIC.retention.bytes)")]
    TooLarge(u64),
    /// The index is too large.
    #[error("its index has more than {MAX_NODES} nodes")]
    TooManyNodes,
    /// The attempt took too long.
    #[error("it is not complete within {} s", TURN.as_secs())]
    Slow,
}

/// The bytes that a log may have.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// What the other logs of the topic leave.
    pub left: u64,
    /// The limit of the topic.
    pub most: u64,
}

/// Fetches and verifies everything to which the root of a log leads, apart from `known` blocks, and moves the pin from
/// the root before.
pub async fn keep(
    parts: &Parts,
    mirror: &Mirror,
    before: Option<Digest>,
    known: &Blocks,
    room: Room,
) -> Result<Blocks, NotKept> {
    let work = async {
        let (nodes, places) = read_index(&*parts.backend.content, mirror.root, known).await?;
        let mut blocks = Blocks { nodes, ..Blocks::default() };
        let (kept, missing): (Vec<_>, Vec<_>) =
            places.into_iter().partition(|it| known.bundles.contains_key(&it.listed.digest));
        let mut bytes: u64 = 0;
        for BundlePlace { listed, .. } in kept {
            let size = known.bundles[&listed.digest];
            bytes += size as u64;
            blocks.bundles.insert(listed.digest, size);
        }
        let fetches = missing.into_iter().map(|place| fetch(parts, mirror, place));
        let mut fetched = futures::stream::iter(fetches).buffer_unordered(FETCHES);
        while bytes <= room.left
            && let Some((digest, size)) = fetched.try_next().await?
        {
            bytes += size as u64;
            blocks.bundles.insert(digest, size);
        }
        if bytes > room.left {
            return Err(NotKept::TooLarge(room.most));
        }
        let before = before.filter(|before| *before != mirror.root).map(|before| before.cid());
        let count = u32::try_from(blocks.nodes.len() + blocks.bundles.len()).unwrap_or(u32::MAX);
        let limit = PIN.0 + PIN.1.saturating_mul(count);
        parts.backend.content.pin_graph(&mirror.root.cid(), before.as_ref(), limit).await?;
        Ok(blocks)
    };
    tokio::time::timeout(TURN, work).await.unwrap_or(Err(NotKept::Slow))
}

/// Reads the nodes of an index. Returns them and the places in their leaves.
async fn read_index(
    content: &dyn Content,
    root: Digest,
    known: &Blocks,
) -> Result<(HashMap<Digest, Node>, Vec<BundlePlace>), NotKept> {
    let (mut nodes, mut places) = (HashMap::new(), Vec::new());
    let mut open = vec![(root, None)];
    while let Some((digest, level)) = open.pop() {
        if nodes.contains_key(&digest) {
            // Otherwise a few nodes could have any number of paths.
            return Err(NotKept::Foreign);
        }
        let node = match known.nodes.get(&digest) {
            Some(node) => node.clone(),
            None => Node::open(&content.block(&digest.cid(), MAX_NODE, FETCH).await?)?,
        };
        if level.is_some_and(|level| node.level() != level) {
            return Err(NotKept::Foreign);
        }
        if nodes.len() >= MAX_NODES {
            return Err(NotKept::TooManyNodes);
        }
        match &node {
            Node::Leaf(bundles) => places.extend(bundles.iter().copied()),
            Node::Inner { level, children } => {
                open.extend(children.iter().map(|child| (child.digest, Some(level - 1))));
            }
        }
        nodes.insert(digest, node);
    }
    Ok((nodes, places))
}

/// Fetches a bundle into the daemon and verifies it: what is pinned must not lead anywhere else. Returns its size.
async fn fetch(parts: &Parts, mirror: &Mirror, place: BundlePlace) -> Result<(Digest, usize), NotKept> {
    let BundlePlace { incarnation, listed } = place;
    let block = parts.backend.content.block(&listed.digest.cid(), MAX_BLOCK, FETCH).await?;
    let size = block.len();
    let bundle = Bundle::open(block, parts.reliable.channels().fleet())?;
    let header = &bundle.header;
    let is_of_log = header.topic == mirror.topic && header.writer == mirror.writer;
    if is_of_log && header.incarnation == incarnation && bundle.listed() == listed {
        Ok((listed.digest, size))
    } else {
        Err(NotKept::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use bytes::Bytes;
    use cid::Cid;
    use dim_model::ident::ContentPath;
    use dim_model::time::Timestamp;
    use dim_topics::bundle::Listed;
    use dim_topics::identity::Incarnation;
    use dim_topics::index::{Child, IndexBuilder, NewNodes};

    use super::*;

    /// A daemon with some blocks, which counts the fetches.
    #[derive(Default)]
    struct Daemon {
        blocks: HashMap<Cid, Bytes>,
        fetches: AtomicUsize,
    }

    impl Daemon {
        fn add(&mut self, block: Bytes) -> Digest {
            let digest = Digest::of(&block);
            self.blocks.insert(digest.cid(), block);
            digest
        }
    }

    #[async_trait]
    impl Content for Daemon {
        async fn block(&self, cid: &Cid, _: usize, _: Duration) -> Result<Bytes, BackendError> {
            self.fetches.fetch_add(1, Ordering::Relaxed);
            let missing = || BackendError::Unreachable { what: cid.to_string(), why: "missing".to_owned() };
            self.blocks.get(cid).cloned().ok_or_else(missing)
        }

        async fn put(&self, _: &Cid, _: Bytes) -> Result<(), BackendError> {
            unimplemented!()
        }

        async fn file(&self, _: &ContentPath, _: usize) -> Result<(Cid, Bytes), BackendError> {
            unimplemented!()
        }

        async fn is_pinned(&self, _: &Cid) -> Result<bool, BackendError> {
            unimplemented!()
        }

        async fn unpin(&self, _: &Cid) -> Result<(), BackendError> {
            unimplemented!()
        }

        async fn put_block(&self, _: &Cid, _: Bytes) -> Result<(), BackendError> {
            unimplemented!()
        }

        async fn pin_graph(&self, _: &Cid, _: Option<&Cid>, _: Duration) -> Result<(), BackendError> {
            unimplemented!()
        }

        async fn import_graph(&self, _: &Cid, _: dim_ipfs::Blocks, _: Duration) -> Result<(), BackendError> {
            unimplemented!()
        }
    }

    fn place(number: u64) -> BundlePlace {
        let digest = Digest([number as u8; 32]);
        let listed = Listed { first: number, count: 1, time: Timestamp(number), digest };
        BundlePlace { incarnation: Incarnation([1; 16]), listed }
    }

    #[tokio::test]
    async fn an_index_is_read_and_what_is_known_of_it_is_not_fetched_again() {
        let (mut daemon, mut index) = (Daemon::default(), IndexBuilder::default());
        let (mut known, mut next) = (Blocks::default(), 0);
        for (count, fetches) in [(300, 3), (600, 3), (600, 0)] {
            (next..count).for_each(|number| index.add(place(number)));
            next = count;
            let NewNodes { root, blocks } = index.root().unwrap();
            daemon.blocks.extend(blocks.into_iter().map(|(digest, block)| (digest.cid(), block)));
            let (nodes, places) = read_index(&daemon, root, &known).await.unwrap();
            assert_eq!(daemon.fetches.swap(0, Ordering::Relaxed), fetches, "{count}");
            assert_eq!(places.len() as u64, count);
            known.nodes = nodes;
        }
    }

    #[tokio::test]
    async fn an_index_that_is_none_is_refused() {
        let mut daemon = Daemon::default();
        let leaf = daemon.add(Node::Leaf(vec![place(1)]).encode());
        let child = Child { time: Timestamp(1), digest: leaf };
        let inner = |level, children: &[Child]| Node::Inner { level, children: children.to_vec() }.encode();
        // A few nodes with any number of paths.
        let twice = daemon.add(inner(1, &[child, child]));
        // A leaf where a node of level 1 is expected.
        let uneven = daemon.add(inner(2, &[child]));
        for root in [twice, uneven] {
            let refused = read_index(&daemon, root, &Blocks::default()).await.unwrap_err();
            assert!(matches!(refused, NotKept::Foreign), "{refused}");
        }
        let missing = read_index(&daemon, Digest([9; 32]), &Blocks::default()).await.unwrap_err();
        assert!(matches!(missing, NotKept::Backend(_)), "{missing}");
    }
}
