//! Owns the search of a reader in the index of a writer. It receives the root that a head states and nodes, and returns
//! the node to fetch next and the places of bundles.

use std::time::Duration;

use dim_model::time::Timestamp;

use crate::identity::Digest;
use crate::index::{BundlePlace, Child, Node};
use crate::time::Moment;

/// The maximum number of nodes that one search reads. They have the places of a million bundles.
const MAX_NODES: usize = 4_096;

/// The pause after the first failed attempt to fetch a node. It doubles with each, up to 32 s.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The number of failed attempts after which the pause no longer grows.
const MAX_DOUBLINGS: u32 = 6;

/// A node that the search reads next.
#[derive(Clone, Copy, Debug)]
struct Pending {
    digest: Digest,
    /// The level, if a parent named the node.
    level: Option<u8>,
}

/// The search in the index of a writer.
#[derive(Debug, Default)]
pub struct IndexWalk {
    /// The root that the last head states.
    root: Option<Digest>,
    /// The root with which the search began.
    searched: Option<Digest>,
    /// The nodes that are not read yet. The last one is next.
    pending: Vec<Pending>,
    /// Bundles from before this time are not looked for.
    from: Timestamp,
    /// The number of nodes that this search has read.
    nodes: usize,
    is_in_flight: bool,
    /// Whether the last search has read all nodes that it wanted.
    is_complete: bool,
    tries: u32,
    not_before: Moment,
}

impl IndexWalk {
    /// The root of the next search.
    pub fn root(&self) -> Option<Digest> {
        self.root
    }

    /// Notes the root that a head states.
    pub fn state(&mut self, root: Digest) {
        self.root = Some(root);
        self.end_if_outdated();
    }

    /// Ends a search for nodes that cannot be had if the writer states another root by now.
    fn end_if_outdated(&mut self) {
        if self.tries > 0 && self.searched != self.root {
            self.end();
        }
    }

    /// Whether a search is under way.
    pub fn is_active(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Begins a search for the bundles from a time on.
    pub fn begin(&mut self, from: Timestamp) {
        self.pending = self.root.map(|digest| Pending { digest, level: None }).into_iter().collect();
        (self.from, self.nodes, self.tries, self.is_complete) = (from, 0, 0, false);
        self.searched = self.root;
        self.not_before = Moment::default();
    }

    /// Ends the search early.
    pub fn end(&mut self) {
        self.pending.clear();
        (self.tries, self.is_complete) = (0, false);
    }

    /// Whether the last search has read all nodes that it wanted.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The node to fetch now, if there is one.
    pub fn due(&self, now: Moment) -> Option<Digest> {
        let is_due = !self.is_in_flight && self.not_before <= now;
        self.pending.last().filter(|_| is_due).map(|it| it.digest)
    }

    /// The time of the next attempt to fetch a node, if one is planned.
    pub fn deadline(&self) -> Option<Moment> {
        (self.is_active() && !self.is_in_flight).then_some(self.not_before)
    }

    /// The node that cannot be fetched and that the writer should provide again.
    pub fn want(&self) -> Option<Digest> {
        self.pending.last().filter(|_| self.tries > 0).map(|it| it.digest)
    }

    /// Notes that the node that is due is being fetched.
    pub fn fetching(&mut self) {
        self.is_in_flight = true;
    }

    /// Takes in the result of a fetch. Returns the places of a leaf.
    pub fn take(&mut self, digest: &Digest, node: Option<Node>, now: Moment) -> Vec<BundlePlace> {
        self.is_in_flight = false;
        // The search may have ended, or begun again, meanwhile.
        let Some(wanted) = self.pending.last().copied().filter(|it| it.digest == *digest) else {
            return Vec::new();
        };
        let Some(node) = node else {
            self.failed(now);
            return Vec::new();
        };
        self.pending.pop();
        self.tries = 0;
        self.nodes += 1;
        if wanted.level.is_some_and(|level| level != node.level()) || self.nodes > MAX_NODES {
            self.end();
            return Vec::new();
        }
        let places = match node {
            Node::Leaf(places) => places,
            Node::Inner { level, children } => {
                self.pending.extend(
                    self.wanted(&children)
                        .rev()
                        .map(|it| Pending { digest: it.digest, level: Some(level - 1) }),
                );
                Vec::new()
            }
        };
        self.is_complete = self.pending.is_empty();
        places
    }

    /// The children that may have bundles from the wanted time on.
    fn wanted<'a>(&self, children: &'a [Child]) -> impl DoubleEndedIterator<Item = &'a Child> + use<'a> {
        // A node ends where the next one begins.
        let old = children.iter().skip(1).take_while(|next| next.time <= self.from).count();
        children[old..].iter()
    }

    fn failed(&mut self, now: Moment) {
        self.not_before = now.after(RETRY_PAUSE * (1 << self.tries.min(MAX_DOUBLINGS)));
        self.tries += 1;
        self.end_if_outdated();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bundle::Listed;
    use crate::identity::Incarnation;
    use crate::index::IndexBuilder;

    fn place(number: u64) -> BundlePlace {
        let listed =
            Listed { first: number, count: 1, time: Timestamp(number * 10), digest: Digest([1; 32]) };
        BundlePlace { incarnation: Incarnation([1; 16]), listed }
    }

    /// Searches in an index of a thousand bundles. Returns the first place, the number of places, and that of nodes.
    fn search(from: u64) -> (u64, usize, usize) {
        let mut builder = IndexBuilder::default();
        (0..1_000).for_each(|number| builder.add(place(number)));
        let new = builder.root().unwrap();
        let blocks: BTreeMap<_, _> = new.blocks.into_iter().collect();
        let mut walk = IndexWalk::default();
        walk.state(new.root);
        walk.begin(Timestamp(from));
        let mut places = Vec::new();
        while let Some(digest) = walk.due(Moment::default()) {
            walk.fetching();
            assert_eq!(walk.due(Moment::default()), None, "one at a time");
            places.extend(walk.take(&digest, Node::open(&blocks[&digest]).ok(), Moment::default()));
        }
        assert!(!walk.is_active() && walk.is_complete());
        assert!(places.is_sorted_by_key(|place| place.listed.first));
        (places[0].listed.first, places.len(), walk.nodes)
    }

    #[test]
    fn a_search_reads_the_nodes_from_a_time_on() {
        assert_eq!(search(0), (0, 1_000, 5));
        assert_eq!(search(2_555), (0, 1_000, 5));
        assert_eq!(search(2_560), (256, 744, 4));
        assert_eq!(search(u64::MAX), (768, 232, 2));
    }

    #[test]
    fn a_search_waits_for_a_node_that_cannot_be_had_until_another_root_is_stated() {
        let mut walk = IndexWalk::default();
        let (root, other) = (Digest([1; 32]), Digest([2; 32]));
        walk.state(root);
        walk.begin(Timestamp(0));
        let mut now = Moment::default();
        for tries in 0..20 {
            assert_eq!((walk.due(now), walk.want().is_some()), (Some(root), tries > 0));
            walk.fetching();
            walk.take(&root, None, now);
            assert_eq!(walk.due(now), None, "it waits");
            now = now.after(Duration::from_secs(32));
        }
        walk.state(root);
        assert!(walk.is_active());
        walk.state(other);
        assert!(!walk.is_active() && !walk.is_complete());
        // The writer states another root while the node of the one before is being fetched.
        walk.begin(Timestamp(0));
        walk.fetching();
        walk.state(root);
        assert!(walk.is_active());
        walk.take(&other, None, now);
        assert!(!walk.is_active());
    }

    #[test]
    fn a_search_ends_where_a_node_has_another_level() {
        let mut walk = IndexWalk::default();
        let (root, other) = (Digest([1; 32]), Digest([2; 32]));
        walk.state(root);
        walk.begin(Timestamp(0));
        let now = Moment::default();
        let children = vec![Child { time: Timestamp(1), digest: other }];
        walk.take(&root, Some(Node::Inner { level: 1, children: children.clone() }), now);
        assert_eq!(walk.due(now), Some(other));
        // A leaf is expected.
        walk.take(&other, Some(Node::Inner { level: 1, children }), now);
        assert!(!walk.is_active() && !walk.is_complete());
    }
}
