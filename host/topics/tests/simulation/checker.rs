//! Owns the check of a simulation: what the writers have published, by hash chains, and whether a reader has received
//! exactly that.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_topics::action::{Delivery, GapReason, Outcome};
use dim_topics::bundle::{Bundle, Event, Start};
use dim_topics::identity::{Incarnation, WriterId};

use crate::admin::Admin;
use crate::fleet::fail_unless;

/// The hash of an event and of all events before it in the incarnation.
fn link(before: u64, data: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (before, data).hash(&mut hasher);
    hasher.finish()
}

/// An incarnation as its writer published it.
#[derive(Debug, Default)]
struct Published {
    /// The hash after each event.
    chain: Vec<u64>,
    start: Option<Start>,
}

/// Everything that was made durable by writers.
#[derive(Debug, Default)]
pub struct Truth {
    logs: BTreeMap<(Topic, WriterId, Incarnation), Published>,
    /// The events that were published, by their content.
    contents: BTreeSet<Vec<u8>>,
    /// Whether two bundles with the same content are expected, because a member was restored or copied.
    pub may_repeat: bool,
}

impl Truth {
    pub fn new(may_repeat: bool) -> Self {
        Self { may_repeat, ..Self::default() }
    }

    /// Adds a bundle that is durable at its writer.
    pub fn published(&mut self, bundle: &Bundle, events: &[Event]) {
        let header = &bundle.header;
        let key = (header.topic.clone(), header.writer, header.incarnation);
        let log = self.logs.entry(key).or_default();
        assert_eq!(log.chain.len() as u64, header.first, "a writer leaves a hole in its sequence");
        if header.first == 0 {
            log.start = header.start.clone();
        }
        for event in events {
            let before = log.chain.last().copied().unwrap_or_default();
            log.chain.push(link(before, &event.data));
            let is_new = self.contents.insert(event.data.to_vec());
            assert!(is_new || self.may_repeat, "an event was published twice");
        }
    }

    /// The number of published events.
    pub fn len(&self) -> usize {
        self.contents.len()
    }

    /// The incarnations of a topic, without those of `own`.
    fn of<'a>(
        &'a self,
        topic: &'a Topic,
        own: &'a BTreeMap<Incarnation, Timestamp>,
    ) -> impl Iterator<Item = (WriterId, Incarnation, &'a Published)> {
        let logs = self.logs.iter().filter(move |((of, _, id), _)| of == topic && !own.contains_key(id));
        logs.map(|((_, writer, id), published)| (*writer, *id, published))
    }
}

/// What a reader has made durable of one incarnation.
#[derive(Clone, Debug, Default)]
struct Taken {
    next: u64,
    chain: u64,
    gaps: Vec<(u64, u64, GapReason)>,
}

/// What a reader has made durable.
///
/// An incarnation of which it has nothing is part of a gap if the one after it begins with a gap.
#[derive(Clone, Debug, Default)]
pub struct Record {
    taken: BTreeMap<(Topic, WriterId, Incarnation), Taken>,
    /// The number of events.
    pub events: usize,
}

impl Record {
    /// Adds a delivery, in the order in which deliveries are made durable. It fails at the first event that is not the
    /// next one of its writer.
    pub fn add(&mut self, delivery: &Delivery, is_own: bool, truth: &Truth) {
        let key = (delivery.stream.topic.clone(), delivery.writer, delivery.checkpoint.incarnation);
        let published = &truth.logs[&key];
        if !is_own && !self.taken.contains_key(&key) {
            self.check_order(&key, delivery, published);
        }
        let taken = self.taken.entry(key).or_insert_with(|| {
            // Of its own incarnations, which another program continues, a member knows the beginning.
            let next = if is_own { delivery.first } else { 0 };
            let chain = next.checked_sub(1).map_or(0, |index| published.chain[index as usize]);
            Taken { next, chain, gaps: Vec::new() }
        });
        assert_eq!(taken.next, delivery.first, "the next event is delivered next: {taken:?}, {delivery:?}");
        match &delivery.outcome {
            Outcome::Events(events) => {
                for event in events {
                    taken.chain = link(taken.chain, &event.data);
                    assert_eq!(published.chain[taken.next as usize], taken.chain, "an event differs");
                    taken.next += 1;
                }
                self.events += events.len();
            }
            Outcome::Gap(reason) => {
                assert!(delivery.checkpoint.next as usize <= published.chain.len(), "a gap after the end");
                taken.gaps.push((delivery.first, delivery.checkpoint.next, reason.clone()));
                taken.next = delivery.checkpoint.next;
                let index = (taken.next as usize).checked_sub(1);
                taken.chain = index.map_or(0, |index| published.chain[index]);
            }
        }
        assert_eq!(taken.next, delivery.checkpoint.next, "the checkpoint is the end of the delivery");
    }

    /// Whether the reader has all events of a bundle.
    pub fn has(&self, bundle: &Bundle) -> bool {
        let header = &bundle.header;
        let key = (header.topic.clone(), header.writer, header.incarnation);
        self.taken.get(&key).is_some_and(|taken| taken.next >= bundle.next())
    }

    /// Checks that the events of the incarnation before were delivered first.
    fn check_order(&self, key: &(Topic, WriterId, Incarnation), delivery: &Delivery, published: &Published) {
        let Some(start) = published.start.as_ref().filter(|_| delivery.first == 0) else { return };
        if matches!(delivery.outcome, Outcome::Gap(_)) {
            return;
        }
        let before = (key.0.clone(), key.1, start.previous);
        let taken = self.taken.get(&before).map_or(0, |taken| taken.next);
        assert!(
            taken >= start.next,
            "{delivery:?} comes before the end of the incarnation before it: {taken} of {start:?}",
        );
    }

    /// Checks that the reader has everything that others have published on a topic. `reader` and `own` are the identity
    /// and the incarnations of the reader itself. `lost` has the ends of incarnations whose later events have no copy
    /// left; the logs of former members end where the roster says. Returns the gaps.
    pub fn check_all(
        &self,
        topic: &Topic,
        own: &BTreeMap<Incarnation, Timestamp>,
        reader: WriterId,
        (truth, lost, admin): (&Truth, &BTreeMap<(Topic, Incarnation), u64>, Option<&Admin>),
    ) -> Result<Vec<GapReason>, String> {
        let mut gaps = Vec::new();
        for (writer, id, published) in truth.of(topic, own).filter(|(writer, ..)| *writer != reader) {
            let taken = self.taken.get(&(topic.clone(), writer, id)).cloned().unwrap_or_default();
            if taken.next == 0 && self.begins_with_gap_after(topic, writer, id, truth) {
                // All its bundles were removed, and so was the one that names it.
                gaps.push(GapReason::NotKept);
                continue;
            }
            let has = taken.next;
            // The newest events of a writer that was restored may have no copy left.
            let lost = |of: u64| lost.get(&(topic.clone(), id)).copied().unwrap_or(of);
            let of = lost(published.chain.len() as u64);
            let of = admin.and_then(|admin| admin.cut(topic, &writer, &id)).unwrap_or(of);
            fail_unless(has >= of, || {
                format!("{reader} has {has} of {of} events of writer {writer}, incarnation {id}, on {topic}")
            })?;
            gaps.extend(taken.gaps.into_iter().map(|(.., reason)| reason));
        }
        Ok(gaps)
    }

    /// Whether the reader was told a gap at the beginning of the incarnation that continues `id`.
    fn begins_with_gap_after(&self, topic: &Topic, writer: WriterId, id: Incarnation, truth: &Truth) -> bool {
        let is_after = |published: &Published| published.start.as_ref().is_some_and(|it| it.previous == id);
        let mut after =
            truth.logs.iter().filter(|((of, by, _), it)| of == topic && *by == writer && is_after(it));
        after.any(|(key, _)| match self.taken.get(key) {
            Some(taken) => taken.gaps.first().is_some_and(|(first, ..)| *first == 0),
            None => self.begins_with_gap_after(topic, writer, key.2, truth),
        })
    }
}
