//! Owns the fetching of a log for a mirror: it reads the index to which a root leads, fetches and verifies the bundles,
//! and lets the daemon pin them. What is pinned leads to nothing else.

use std::collections::HashMap;
use std::time::Duration;

use dim_ipfs::BackendError;
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
    let kept = tokio::time::timeout(TURN, fetch_and_pin(parts, mirror, before, known, room)).await;
    kept.unwrap_or(Err(NotKept::Slow))
}

async fn fetch_and_pin(
    parts: &Parts,
    mirror: &Mirror,
    before: Option<Digest>,
    known: &Blocks,
    room: Room,
) -> Result<Blocks, NotKept> {
    let (nodes, places) = read_index(parts, mirror.root, known).await?;
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
}

/// Reads the nodes of an index. Returns them and the places in their leaves.
async fn read_index(
    parts: &Parts,
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
            None => Node::open(&parts.backend.content.block(&digest.cid(), MAX_NODE, FETCH).await?)?,
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
    let bundle = Bundle::open(block, parts.reliable.channels.fleet())?;
    let header = &bundle.header;
    let is_of_log = header.topic == mirror.topic && header.writer == mirror.writer;
    if is_of_log && header.incarnation == incarnation && bundle.listed() == listed {
        Ok((listed.digest, size))
    } else {
        Err(NotKept::Foreign)
    }
}
