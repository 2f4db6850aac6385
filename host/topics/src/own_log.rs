//! Owns the place of the next bundle in the own log of a topic. It receives events and returns bundles with the next
//! sequences.

use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use ed25519_dalek::SigningKey;

use crate::bundle::{Bundle, Event, Header, Listed, RECENT, Sealing, Start};
use crate::head::{LogHead, MAX_EARLIER};
use crate::identity::{Digest, Incarnation, WriterId};
use crate::index::{BundlePlace, IndexBuilder, NewNodes};

/// The identity with which a member writes.
#[derive(Clone, Debug)]
pub struct Author {
    /// The name of the fleet.
    pub fleet: String,
    /// The private key.
    pub key: SigningKey,
    /// The process start.
    pub incarnation: Incarnation,
    /// The time of the process start. A member makes it a hybrid time that is later than all times in its store.
    pub began: Timestamp,
}

impl Author {
    /// The identity of the key.
    pub fn id(&self) -> WriterId {
        WriterId::of(&self.key.verifying_key())
    }
}

/// The durable end of the own log of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// The newest incarnation with events.
    pub incarnation: Incarnation,
    /// The sequence after its last event.
    pub next: u64,
    /// Its last bundles, at most 8, in order.
    pub recent: Vec<Listed>,
    /// The incarnations before, newest first, each with the sequence after its last event. At most 32.
    pub earlier: Vec<(Incarnation, u64)>,
}

impl LogEnd {
    /// The end of a log that ended at `before` and whose last bundle is `bundle`.
    pub fn after(bundle: &Bundle, before: Option<&Self>) -> Self {
        let mut recent = bundle.header.recent.clone();
        if recent.len() == RECENT {
            recent.remove(0);
        }
        recent.push(bundle.listed());
        let incarnation = bundle.header.incarnation;
        let earlier = match before {
            Some(before) if before.incarnation == incarnation => before.earlier.clone(),
            Some(before) => {
                let newest = (before.incarnation, before.next);
                [newest].into_iter().chain(before.earlier.iter().copied()).take(MAX_EARLIER).collect()
            }
            None => Vec::new(),
        };
        Self { incarnation, next: bundle.next(), recent, earlier }
    }
}

/// The own log of a topic.
#[derive(Debug, Default)]
pub struct OwnLog {
    /// The end with the bundles that are not durable yet.
    formed: Option<LogEnd>,
    /// The durable end.
    end: Option<LogEnd>,
    /// The end of the incarnation before the newest one.
    before: Option<LogEnd>,
    /// The hybrid time before which bundles were removed.
    kept: Timestamp,
    /// The index of the durable bundles.
    index: IndexBuilder,
    /// The root of the index that other members can read.
    root: Option<Digest>,
}

impl OwnLog {
    /// Continues a log after `end`.
    pub fn after(end: LogEnd) -> Self {
        Self { formed: Some(end.clone()), end: Some(end), ..Self::default() }
    }

    /// Forms a bundle of as many of `events` as fit, at least one, with the next sequences. The caller makes it durable
    /// before it is published.
    pub fn form(
        &mut self,
        topic: &Topic,
        events: &[Event],
        author: &Author,
        sealing: Option<&Sealing>,
    ) -> Bundle {
        let before = self.formed.take();
        let (first, recent, start) = match before.clone() {
            None => (0, Vec::new(), None),
            Some(end) if end.incarnation == author.incarnation => (end.next, end.recent, None),
            Some(LogEnd { incarnation, next, recent, .. }) => {
                (0, Vec::new(), Some(Start { previous: incarnation, next, recent }))
            }
        };
        let header = Header {
            topic: topic.clone(),
            writer: author.id(),
            incarnation: author.incarnation,
            began: author.began,
            first,
            recent,
            start,
        };
        let bundle = Bundle::form(&author.fleet, header, events, &author.key, sealing);
        self.formed = Some(LogEnd::after(&bundle, before.as_ref()));
        bundle
    }

    /// Drops the bundles that were formed and are not durable. Their sequences are given again.
    pub fn abandon(&mut self) {
        self.formed.clone_from(&self.end);
    }

    /// The end with the bundles that are not durable yet.
    pub fn formed(&self) -> Option<&LogEnd> {
        self.formed.as_ref()
    }

    /// Notes that a bundle is durable. Heads state durable bundles only.
    pub fn stored(&mut self, bundle: &Bundle) {
        let end = LogEnd::after(bundle, self.end.as_ref());
        let is_newer =
            self.end.as_ref().is_none_or(|it| it.incarnation != end.incarnation || it.next < end.next);
        // A bundle of an earlier process start that is published again is not newer.
        if is_newer && self.formed.as_ref().is_none_or(|formed| formed.incarnation == end.incarnation) {
            self.index.add(bundle.place());
            let before = self.end.replace(end);
            self.before =
                before.filter(|it| it.incarnation != bundle.header.incarnation).or(self.before.take());
        }
    }

    /// Notes that the bundles before a time were removed.
    pub fn keep_since(&mut self, time: Timestamp) {
        self.kept = self.kept.max(time);
        self.index.remove_before(time);
    }

    /// The number of durable bundles that are not in the index yet.
    pub fn unindexed(&self) -> usize {
        self.index.added()
    }

    /// Completes the index. The caller provides the new nodes to others, and calls [`OwnLog::indexed`].
    pub fn index(&mut self) -> Option<NewNodes> {
        self.index.root()
    }

    /// Builds the index anew from the bundles that are kept.
    pub fn restore_index(&mut self, places: Vec<BundlePlace>) {
        self.index = IndexBuilder::default();
        places.into_iter().for_each(|place| self.index.add(place));
    }

    /// Notes that others can read the index with this root. Heads state it.
    pub fn indexed(&mut self, root: Option<Digest>) {
        self.root = root;
    }

    /// The end of the log, if it has events.
    pub fn end(&self) -> Option<&LogEnd> {
        self.end.as_ref()
    }

    /// The end of an incarnation, if it is one of the two newest ones with events.
    pub fn end_of(&self, incarnation: &Incarnation) -> Option<&LogEnd> {
        self.end.iter().chain(&self.before).find(|end| end.incarnation == *incarnation)
    }

    /// The sequence after the last event of an incarnation, if it is one of the newest ones.
    pub fn next_of(&self, incarnation: &Incarnation) -> Option<u64> {
        let end = self.end.as_ref()?;
        let newest = (end.incarnation, end.next);
        let all = [newest].into_iter().chain(end.earlier.iter().copied());
        all.into_iter().find(|(id, _)| id == incarnation).map(|(_, next)| next)
    }

    /// The statement of a head about the log, if it has events.
    pub fn head(&self, topic: &Topic) -> Option<LogHead> {
        let LogEnd { incarnation, next, recent, earlier } = self.end.clone()?;
        let (kept, index) = (self.kept, self.root);
        Some(LogHead { topic: topic.clone(), incarnation, next, kept, recent, earlier, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn author(incarnation: u8) -> Author {
        Author {
            fleet: "fleet".to_owned(),
            key: SigningKey::from_bytes(&[3; 32]),
            incarnation: Incarnation([incarnation; 16]),
            began: Timestamp(1),
        }
    }

    #[test]
    fn bundles_continue_each_other_over_restarts() {
        let topic: Topic = "jobs".parse().unwrap();
        let events = [Event { time: Timestamp(7), data: b"x".as_slice().into() }];
        let mut log = OwnLog::default();
        let mut places = Vec::new();
        for number in 0..20 {
            let bundle = log.form(&topic, &events, &author(1), None);
            assert_eq!(bundle.header.first, number);
            assert_eq!(bundle.header.recent, places[places.len().saturating_sub(RECENT)..]);
            assert_eq!(bundle.header.start, None);
            Bundle::open(bundle.block.clone(), "fleet").unwrap();
            assert_eq!(
                log.end().map_or(0, |end| end.next),
                number,
                "a bundle that is not durable is not stated"
            );
            log.stored(&bundle);
            places.push(bundle.listed());
        }
        let mut log = OwnLog::after(log.end().unwrap().clone());
        let bundle = log.form(&topic, &events, &author(2), None);
        assert_eq!((bundle.header.first, bundle.header.recent.len()), (0, 0));
        let recent = places[12..].to_vec();
        let start = Start { previous: Incarnation([1; 16]), next: 20, recent };
        assert_eq!(bundle.header.start, Some(start));
        log.stored(&bundle);
        assert_eq!(log.next_of(&Incarnation([1; 16])), Some(20));
        assert_eq!(log.next_of(&Incarnation([2; 16])), Some(1));
        Bundle::open(bundle.block, "fleet").unwrap();
        let head = log.head(&topic).unwrap();
        assert_eq!((head.next, head.earlier), (1, vec![(Incarnation([1; 16]), 20)]));
    }
}
