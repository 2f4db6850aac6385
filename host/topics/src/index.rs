//! Owns the index of a log: a tree of the places of all bundles that a writer keeps on a topic. A reader that is far
//! behind finds with it what it misses, and one pin of its root keeps all its blocks in a daemon. This file has the wire
//! format of nodes; it receives places, or untrusted bytes, and returns blocks or nodes.
//!
//! A node is a DAG-CBOR map. It is not signed: a head of the writer states the CID of the root.
//!
//! | key | value |
//! |---|---|
//! | `v` | 1 |
//! | `level` | 0 for a leaf; else one more than the level of the children |
//! | `nodes` | `[time, link]`: the children of an inner node, with the hybrid time of their first bundle |
//! | `bundles` | `[incarnation, first, count, time, link]`: the bundles of a leaf |
//!
//! A node has at most 256 children or bundles, in the order in which the bundles were formed. The tree only grows at its
//! end, so a new root shares all complete nodes with the one before. Retention removes nodes from its beginning.

use bytes::Bytes;
use cid::Cid;
use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bundle::{Listed, MAX_EVENTS, VERSION};
use crate::identity::{Digest, Incarnation};
use crate::malformed::Malformed;

/// The maximum number of children or bundles of a node.
pub const FAN_OUT: usize = 256;

/// The maximum size of a node, in bytes.
pub const MAX_NODE: usize = 32 << 10;

/// The maximum level of a node: a tree with this root has 2^40 bundles.
pub const MAX_LEVEL: u8 = 4;

/// A bundle in the log of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundlePlace {
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The bundle.
    pub listed: Listed,
}

/// A node that another node contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// The hybrid time of its first bundle.
    pub time: Timestamp,
    /// Its digest.
    pub digest: Digest,
}

/// A node of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// Bundles.
    Leaf(Vec<BundlePlace>),
    /// Nodes of the level below `level`.
    Inner {
        /// The level, at least 1.
        level: u8,
        /// The nodes.
        children: Vec<Child>,
    },
}

#[derive(Serialize, Deserialize)]
struct Payload {
    v: u64,
    level: u8,
    nodes: Vec<WireChild>,
    bundles: Vec<WirePlace>,
}

/// `[time, link]`.
#[derive(Serialize, Deserialize)]
struct WireChild(u64, Cid);

/// `[incarnation, first, count, time, link]`.
#[derive(Serialize, Deserialize)]
struct WirePlace(Incarnation, u64, u32, u64, Cid);

impl Node {
    /// The level.
    pub fn level(&self) -> u8 {
        match self {
            Self::Leaf(_) => 0,
            Self::Inner { level, .. } => *level,
        }
    }

    /// Encodes the node as a block.
    pub fn encode(&self) -> Bytes {
        let (mut nodes, mut bundles) = (Vec::new(), Vec::new());
        match self {
            Self::Leaf(places) => bundles.extend(places.iter().map(|BundlePlace { incarnation, listed }| {
                let Listed { first, count, time, digest } = listed;
                WirePlace(*incarnation, *first, *count, time.0, digest.cid())
            })),
            Self::Inner { children, .. } => {
                nodes.extend(children.iter().map(|it| WireChild(it.time.0, it.digest.cid())));
            }
        }
        let payload = Payload { v: VERSION, level: self.level(), nodes, bundles };
        serde_ipld_dagcbor::to_vec(&payload).expect("a map of plain fields").into()
    }

    /// Parses untrusted bytes as a node.
    pub fn open(block: &[u8]) -> Result<Self, Malformed> {
        if block.len() > MAX_NODE {
            return Err(Malformed::TooLarge { bytes: block.len(), limit: MAX_NODE });
        }
        let Payload { v, level, nodes, bundles } = serde_ipld_dagcbor::from_slice(block)
            .map_err(|_| Malformed::Payload("not the DAG-CBOR map of a node of an index"))?;
        if v != VERSION {
            return Err(Malformed::Version(v));
        }
        let (used, unused) =
            if level == 0 { (bundles.len(), nodes.len()) } else { (nodes.len(), bundles.len()) };
        if level > MAX_LEVEL || unused > 0 || used == 0 || used > FAN_OUT {
            return Err(Malformed::Payload("the level or the size of a node is out of range"));
        }
        let node = Self::of_wire(level, nodes, bundles)?;
        // A daemon that pins the node follows every link in it, also one that this version ignores.
        if node.encode() != block {
            return Err(Malformed::Payload("a node of an index is not canonical"));
        }
        Ok(node)
    }

    fn of_wire(level: u8, nodes: Vec<WireChild>, bundles: Vec<WirePlace>) -> Result<Self, Malformed> {
        if level > 0 {
            let child = |WireChild(time, link): WireChild| {
                Ok(Child { time: Timestamp(time), digest: Digest::of_link(&link)? })
            };
            return Ok(Self::Inner {
                level,
                children: nodes.into_iter().map(child).collect::<Result<_, _>>()?,
            });
        }
        let place = |WirePlace(incarnation, first, count, time, link): WirePlace| {
            if count == 0 || count > MAX_EVENTS || first.checked_add(u64::from(count)).is_none() {
                return Err(Malformed::Payload("the number of events is out of range"));
            }
            let listed = Listed { first, count, time: Timestamp(time), digest: Digest::of_link(&link)? };
            Ok(BundlePlace { incarnation, listed })
        };
        Ok(Self::Leaf(bundles.into_iter().map(place).collect::<Result<_, _>>()?))
    }
}

/// The nodes of an index that are new since its last root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewNodes {
    /// The root.
    pub root: Digest,
    /// The blocks of the new nodes with their digests, children before their parents.
    pub blocks: Vec<(Digest, Bytes)>,
}

/// The index of an own log. It holds the nodes at its end that are not full.
#[derive(Clone, Debug, Default)]
pub struct IndexBuilder {
    leaf: Vec<BundlePlace>,
    /// The children of the last node of each level, from level 1 on.
    inner: Vec<Vec<Child>>,
    /// The full nodes since the last root.
    full: Vec<(Digest, Bytes)>,
    /// The number of bundles since the last root.
    added: usize,
    /// The hybrid time of the last bundle.
    last: Timestamp,
}

impl IndexBuilder {
    /// Adds the next bundle.
    pub fn add(&mut self, place: BundlePlace) {
        self.added += 1;
        self.last = place.listed.time;
        self.leaf.push(place);
        if self.leaf.len() < FAN_OUT {
            return;
        }
        let mut time = self.leaf[0].listed.time;
        let leaf = Node::Leaf(std::mem::take(&mut self.leaf));
        let mut digest = self.note(&leaf);
        for level in 1..=MAX_LEVEL {
            if self.inner.len() < usize::from(level) {
                self.inner.push(Vec::new());
            }
            let children = &mut self.inner[usize::from(level) - 1];
            children.push(Child { time, digest });
            if children.len() < FAN_OUT || level == MAX_LEVEL {
                return;
            }
            let children = std::mem::take(children);
            time = children[0].time;
            digest = self.note(&Node::Inner { level, children });
        }
    }

    /// The number of bundles that the last root does not have.
    pub fn added(&self) -> usize {
        self.added
    }

    /// Returns the root over all bundles, and the nodes that are new since the last call; `None` without a bundle.
    pub fn root(&mut self) -> Option<NewNodes> {
        let mut last = self.leaf.first().map(|it| it.listed.time).map(|time| {
            let digest = self.note(&Node::Leaf(self.leaf.clone()));
            Child { time, digest }
        });
        for index in 0..self.inner.len() {
            let mut children = self.inner[index].clone();
            children.extend(last.take());
            let is_top = self.inner[index + 1..].iter().all(Vec::is_empty);
            last = match children[..] {
                [] => None,
                // It needs no parent.
                [only] if is_top => Some(only),
                [first, ..] => {
                    let level = u8::try_from(index + 1).expect("at most MAX_LEVEL");
                    let digest = self.note(&Node::Inner { level, children });
                    Some(Child { time: first.time, digest })
                }
            };
        }
        self.added = 0;
        let root = last?.digest;
        Some(NewNodes { root, blocks: std::mem::take(&mut self.full) })
    }

    /// Removes the nodes all of whose bundles are from before a time, and the bundles themselves where they are not in
    /// a full node.
    pub fn remove_before(&mut self, time: Timestamp) {
        if self.last < time {
            self.inner.clear();
        }
        self.leaf.retain(|it| it.listed.time >= time);
        let mut next = self.leaf.first().map(|it| it.listed.time);
        for children in &mut self.inner {
            // A node ends where the next one begins.
            let begins = children.iter().skip(1).map(|it| Some(it.time)).chain([next]);
            let old = begins.take_while(|begin| begin.is_some_and(|begin| begin <= time)).count();
            children.drain(..old.min(children.len()));
            next = children.first().map(|it| it.time).or(next);
        }
    }

    fn note(&mut self, node: &Node) -> Digest {
        let block = node.encode();
        let digest = Digest::of(&block);
        self.full.push((digest, block));
        digest
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn place(number: u64) -> BundlePlace {
        let digest = Digest([number as u8; 32]);
        let listed = Listed { first: number * 3, count: 3, time: Timestamp(number * 10), digest };
        BundlePlace { incarnation: Incarnation([1; 16]), listed }
    }

    /// All places below a node, and the number of nodes.
    fn walk(blocks: &BTreeMap<Digest, Bytes>, digest: &Digest) -> (Vec<BundlePlace>, usize) {
        match Node::open(&blocks[digest]).unwrap() {
            Node::Leaf(places) => (places, 1),
            Node::Inner { level, children } => {
                let mut all = (Vec::new(), 1);
                for child in children {
                    let node = Node::open(&blocks[&child.digest]).unwrap();
                    assert_eq!(node.level() + 1, level);
                    let (places, nodes) = walk(blocks, &child.digest);
                    assert_eq!(places[0].listed.time, child.time);
                    all.0.extend(places);
                    all.1 += nodes;
                }
                all
            }
        }
    }

    #[test]
    fn a_root_leads_to_all_bundles_and_shares_what_is_complete() {
        let (mut builder, mut blocks) = (IndexBuilder::default(), BTreeMap::new());
        assert_eq!(builder.root(), None);
        let mut count = 0;
        for more in [1, 254, 1, 1, 255, 256, 1, 65_536 - 769, 1, 70_000] {
            (count..count + more).for_each(|number| builder.add(place(number)));
            count += more;
            assert_eq!(builder.added() as u64, more);
            let NewNodes { root, blocks: new } = builder.root().unwrap();
            assert!(new.len() as u64 <= more / 255 + 4, "{more}: {} new nodes", new.len());
            blocks.extend(new);
            let (places, _) = walk(&blocks, &root);
            assert!(places.iter().copied().eq((0..count).map(place)), "{count}");
        }
        assert!(blocks.values().all(|block| block.len() <= MAX_NODE));
    }

    #[test]
    fn retention_removes_nodes_from_the_beginning() {
        let (mut builder, mut blocks) = (IndexBuilder::default(), BTreeMap::new());
        for number in 0..70_000 {
            builder.add(place(number));
            if number % 100 == 99 {
                // The last five hundred are kept.
                builder.remove_before(Timestamp((number + 1).saturating_sub(500) * 10));
            }
        }
        let NewNodes { root, blocks: new } = builder.root().unwrap();
        blocks.extend(new);
        let (places, nodes) = walk(&blocks, &root);
        assert!(places.len() < 500 + 2 * FAN_OUT && nodes <= 5, "{} {nodes}", places.len());
        let first = 70_000 - places.len() as u64;
        assert!(first <= 69_500 && places.iter().copied().eq((first..70_000).map(place)));
        builder.remove_before(Timestamp(u64::MAX));
        assert_eq!(builder.root(), None);
    }

    #[test]
    fn a_node_that_is_not_as_it_should_be_is_refused() {
        let leaf = |places: Vec<BundlePlace>| Node::Leaf(places).encode();
        assert!(Node::open(&leaf(vec![place(1)])).is_ok());
        let mut wrong = place(1);
        wrong.listed.count = 0;
        let mut far = place(1);
        far.listed.first = u64::MAX;
        let child = Child { time: Timestamp(1), digest: Digest([1; 32]) };
        let inner = |level, count| Node::Inner { level, children: vec![child; count] }.encode();
        for block in [
            leaf(vec![]),
            leaf(vec![place(1); FAN_OUT + 1]),
            leaf(vec![wrong]),
            leaf(vec![far]),
            inner(1, 0),
            inner(MAX_LEVEL + 1, 1),
            inner(0, 1),
            Bytes::from_static(b"\xa0"),
            Bytes::from(vec![0; MAX_NODE + 1]),
        ] {
            Node::open(&block).unwrap_err();
        }
    }

    #[test]
    fn a_node_with_a_link_that_a_daemon_follows_and_a_reader_ignores_is_refused() {
        #[derive(Serialize)]
        struct WithMore {
            v: u64,
            more: Cid,
            level: u8,
            nodes: Vec<WireChild>,
            bundles: Vec<WirePlace>,
        }
        let (listed, more) = (place(1).listed, Digest([9; 32]).cid());
        let bundles = vec![WirePlace(Incarnation([1; 16]), listed.first, 3, 10, listed.digest.cid())];
        let node = WithMore { v: VERSION, more, level: 0, nodes: vec![], bundles };
        let refused = Node::open(&serde_ipld_dagcbor::to_vec(&node).unwrap()).unwrap_err();
        assert_eq!(refused, Malformed::Payload("a node of an index is not canonical"));
    }
}
