//! Owns the part of one incarnation that a reader has not delivered yet: the known bundles, those in memory, and the
//! position up to which events are delivered. It receives places of bundles and bundles, and returns the next step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dim_model::time::Timestamp;

use crate::action::Checkpoint;
use crate::bundle::{Bundle, Listed, Start};
use crate::identity::Digest;
use crate::reader::Since;
use crate::time::Moment;

/// The maximum number of bundles whose place is known and which are not delivered. At the limit the latest ones are
/// forgotten and found again later.
const MAX_KNOWN: usize = 8_192;

/// The number of delivered bundles whose digests are remembered, to recognise a fork.
const REMEMBERED: usize = 64;

/// A process start whose time is unknown by up to this duration counts as later than the start of a subscription.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(600);

/// The pause before the first attempt to fetch a bundle. A message may only be late.
const REORDER_PAUSE: Duration = Duration::from_millis(5);

/// The pauses between attempts to fetch a bundle.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// A bundle that is not delivered yet.
#[derive(Debug)]
pub struct Known {
    /// Its place.
    pub listed: Listed,
    /// The bundle, if it is in memory.
    pub bundle: Option<Arc<Bundle>>,
    /// The number of failed attempts to fetch it.
    pub tries: u32,
    /// The time of the next attempt.
    pub not_before: Moment,
    /// Whether an attempt is under way.
    pub is_in_flight: bool,
}

/// The knowledge about the incarnation before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Before {
    /// The first bundle was not seen yet.
    #[default]
    Unknown,
    /// There is none, or it does not matter.
    Nothing,
    /// This incarnation.
    Incarnation(Start),
}

/// Two bundles whose events have the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The bundle that was seen first, if its digest is still known.
    pub kept: Option<Digest>,
    /// The bundle that is refused.
    pub refused: Listed,
}

/// One incarnation of a writer as a reader knows it.
#[derive(Debug)]
pub struct IncarnationReader {
    /// The hybrid time of the process start; zero if it is unknown.
    pub began: Timestamp,
    /// The incarnation before.
    pub before: Before,
    /// The sequence of the next event to deliver; `None` while the beginning is being looked for.
    pub next: Option<u64>,
    /// The sequence after the last event that is durable.
    pub durable: u64,
    /// The sequence from which on no event is missing: that of the first event, or that after the last gap.
    pub from: u64,
    /// The sequence after the last event that the writer is known to have published.
    pub end: u64,
    /// The last delivered bundle, if no gap follows it.
    pub last: Option<Listed>,
    /// The hybrid time of the last delivered event.
    pub time: Timestamp,
    /// The bundles that are not delivered yet, by their first sequence.
    pub known: BTreeMap<u64, Known>,
    /// The time since which the next event is missing.
    pub stuck: Option<Moment>,
    /// Whether the next bundle is there and its key is missing.
    pub lacks_key: bool,
    /// The root of the index in which the bundles of the incarnation were looked for last.
    pub searched: Option<Digest>,
    /// The root of the last index that was read to its end for the incarnation.
    pub exhausted: Option<Digest>,
    /// The position at which the incarnation was first heard of. `u64::MAX` if only its successor named it.
    evidence: u64,
    delivered: VecDeque<Listed>,
}

impl IncarnationReader {
    /// Creates the reader of an incarnation that was first heard of at `evidence`.
    pub fn new(began: Timestamp, evidence: u64) -> Self {
        Self {
            began,
            before: Before::Unknown,
            next: None,
            durable: 0,
            from: 0,
            end: 0,
            last: None,
            time: Timestamp(0),
            known: BTreeMap::new(),
            stuck: None,
            lacks_key: false,
            searched: None,
            exhausted: None,
            evidence,
            delivered: VecDeque::new(),
        }
    }

    /// Creates the reader of an incarnation that continues at a checkpoint.
    pub fn resumed(checkpoint: &Checkpoint) -> Self {
        let Checkpoint { began, next, from, last, time, .. } = *checkpoint;
        let mut it = Self::new(began, 0);
        it.next = Some(next);
        (it.durable, it.from, it.end, it.last, it.time) = (next, from, next, last, time);
        it.delivered.extend(last);
        it.before = Before::Nothing;
        it
    }

    /// Whether everything that is known of the incarnation is delivered.
    pub fn is_complete(&self) -> bool {
        self.next.is_some_and(|next| next >= self.end)
    }

    /// Learns the place of a bundle.
    pub fn learn(&mut self, listed: Listed, now: Moment) -> Result<(), Conflict> {
        self.end = self.end.max(listed.next());
        if self.next.is_some_and(|next| listed.first < next) {
            return self.compare_with_delivered(&listed);
        }
        if let Some(known) = self.known.get(&listed.first) {
            let is_same = known.listed == listed;
            let kept = Some(known.listed.digest);
            return if is_same { Ok(()) } else { Err(Conflict { kept, refused: listed }) };
        }
        let earlier = self.known.range(..listed.first).next_back().map(|(_, it)| it.listed);
        let later = self.known.range(listed.first..).next().map(|(_, it)| it.listed);
        let overlapping =
            earlier.filter(|it| it.next() > listed.first).or(later.filter(|it| listed.next() > it.first));
        if let Some(other) = overlapping {
            return Err(Conflict { kept: Some(other.digest), refused: listed });
        }
        let not_before = now.after(REORDER_PAUSE);
        let known = Known { listed, bundle: None, tries: 0, not_before, is_in_flight: false };
        self.known.insert(listed.first, known);
        Ok(())
    }

    /// Compares the place of a bundle with what was delivered. A bundle that is no longer remembered passes.
    fn compare_with_delivered(&self, listed: &Listed) -> Result<(), Conflict> {
        let index = self.delivered.partition_point(|it| it.next() <= listed.first);
        let conflict = |kept| Err(Conflict { kept, refused: *listed });
        match self.delivered.get(index) {
            Some(it) if it.first <= listed.first && it != listed => conflict(Some(it.digest)),
            _ if self.next.is_some_and(|next| listed.next() > next) => conflict(None),
            _ => Ok(()),
        }
    }

    /// Forgets the latest places beyond the limit. Returns the size of the bundles that it forgot, in bytes.
    pub fn trim(&mut self) -> usize {
        let mut freed = 0;
        while self.known.len() > MAX_KNOWN {
            let Some((_, known)) = self.known.pop_last() else { break };
            // They are looked for again.
            self.searched = None;
            freed += known.bundle.map_or(0, |bundle| bundle.block.len());
        }
        freed
    }

    /// Whether the places of the next bundles are unknown.
    pub fn lacks_places(&self) -> bool {
        let lowest = self.known.first_key_value().map_or(self.end, |(first, _)| *first);
        lowest > self.next.unwrap_or(0) && !self.is_complete()
    }

    /// The time from which on bundles are wanted.
    pub fn wanted_from(&self, since: Since) -> Timestamp {
        match since {
            _ if self.next.is_some() => self.time,
            Since::Head(time) if self.began.after(CLOCK_TOLERANCE) >= time => self.began,
            Since::Head(time) | Since::Time(time) => time,
            Since::Earliest => Timestamp(0),
        }
    }

    /// Drops the latest bundle in memory that is later than `first`, so that an earlier one can be fetched. Returns its
    /// size in bytes.
    pub fn make_room(&mut self, first: u64, now: Moment) -> Option<usize> {
        let later = self.known.range_mut(first + 1..).rev().map(|(_, known)| known);
        let latest = later.into_iter().find(|known| known.bundle.is_some())?;
        latest.not_before = now;
        latest.bundle.take().map(|bundle| bundle.block.len())
    }

    /// Ends the incarnation at `end`, or where it was delivered to, if that is later. Returns the size of the bundles in
    /// memory that do not count, in bytes.
    pub fn end_at(&mut self, end: u64) -> usize {
        self.end = end.max(self.next.unwrap_or(0)).min(self.end);
        let later = self.known.split_off(&self.end);
        bytes_of(later.values())
    }

    /// Drops the bundles in memory after `first`. Returns their size in bytes.
    pub fn drop_later(&mut self, first: u64, now: Moment) -> usize {
        let later = self.known.range_mut(first + 1..).map(|(_, known)| known);
        let drop = |known: &mut Known| {
            let bundle = known.bundle.take()?;
            known.not_before = now;
            Some(bundle.block.len())
        };
        later.filter_map(drop).sum()
    }

    /// Looks for the beginning: the first event that the reader wants. Returns the size of the bundles before it that
    /// were in memory, in bytes, or `None` if an earlier bundle must be fetched first.
    pub fn find_beginning(&mut self, since: Since) -> Option<usize> {
        if self.next.is_some() {
            return Some(0);
        }
        let (time, evidence, is_entire) = match since {
            Since::Head(time) => {
                let is_new = self.began.after(CLOCK_TOLERANCE) >= time;
                (time, self.evidence, is_new)
            }
            Since::Time(time) => (time, self.evidence, false),
            Since::Earliest => (Timestamp(0), u64::MAX, true),
        };
        let unwanted = self.known.values().rev().find(|it| it.listed.time < time && !is_entire);
        let lowest = self.known.first_key_value().map_or(self.end, |(first, _)| *first);
        let next = match unwanted {
            Some(it) => it.listed.next().min(evidence),
            None if lowest == 0 => 0,
            None => return None,
        };
        (self.next, self.durable, self.from) = (Some(next), next, next);
        if next > 0 {
            self.before = Before::Nothing;
        }
        Some(self.forget_before(next))
    }

    /// Forgets the bundles before `next`. Returns the size of those in memory, in bytes.
    fn forget_before(&mut self, next: u64) -> usize {
        let later = self.known.split_off(&next);
        bytes_of(std::mem::replace(&mut self.known, later).values())
    }

    /// The bundle at the position of the next event, if its place is known.
    pub fn at_next(&self) -> Option<&Known> {
        self.known.get(&self.next?)
    }

    /// Marks the bundle at the position of the next event as delivered up to the time `time`, and returns it.
    pub fn deliver(&mut self, time: Timestamp) -> Option<Arc<Bundle>> {
        let known = self.known.remove(&self.next?)?;
        self.next = Some(known.listed.next());
        self.last = Some(known.listed);
        self.time = self.time.max(time);
        self.stuck = None;
        self.delivered.push_back(known.listed);
        if self.delivered.len() > REMEMBERED {
            self.delivered.pop_front();
        }
        known.bundle
    }

    /// The size of the bundles in memory, in bytes.
    pub fn buffered(&self) -> usize {
        bytes_of(self.known.values())
    }

    /// Skips the events before `next`, which cannot be had. Returns the size of the dropped bundles, in bytes.
    pub fn skip_to(&mut self, next: u64) -> usize {
        self.next = Some(next);
        self.from = next;
        self.last = None;
        self.stuck = None;
        self.end = self.end.max(next);
        self.forget_before(next)
    }

    /// Notes a failed attempt to fetch a bundle.
    pub fn failed(&mut self, first: u64, now: Moment) {
        if let Some(known) = self.known.get_mut(&first) {
            known.is_in_flight = false;
            known.tries += 1;
            let (shortest, longest) = RETRY_PAUSES;
            let pause = shortest.saturating_mul(1 << (known.tries - 1).min(16)).min(longest);
            known.not_before = now.after(pause);
        }
    }
}

/// The size of the bundles in memory, in bytes.
fn bytes_of<'a>(known: impl Iterator<Item = &'a Known>) -> usize {
    known.filter_map(|it| it.bundle.as_ref()).map(|bundle| bundle.block.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(first: u64, count: u32, digest: u8) -> Listed {
        Listed { first, count, time: Timestamp(100 + first), digest: Digest([digest; 32]) }
    }

    fn reader(places: &[Listed], began: u64, evidence: u64) -> IncarnationReader {
        let mut it = IncarnationReader::new(Timestamp(began), evidence);
        for place in places {
            it.learn(*place, Moment::default()).unwrap();
        }
        it
    }

    #[test]
    fn a_bundle_that_overlaps_a_known_or_delivered_one_is_a_conflict() {
        let mut it = reader(&[listed(0, 2, 1), listed(2, 3, 2), listed(9, 1, 3)], 0, 0);
        for (other, kept) in [
            (listed(0, 2, 9), Some(1)),
            (listed(0, 1, 1), Some(1)),
            (listed(1, 1, 9), Some(1)),
            (listed(4, 1, 9), Some(2)),
            (listed(8, 2, 9), Some(3)),
        ] {
            let conflict = it.learn(other, Moment::default()).unwrap_err();
            assert_eq!(conflict.kept, kept.map(|digest| Digest([digest; 32])), "{other:?}");
        }
        it.learn(listed(5, 4, 4), Moment::default()).unwrap();
        it.learn(listed(2, 3, 2), Moment::default()).unwrap();
        assert!(it.find_beginning(Since::Earliest).is_some());
        it.deliver(Timestamp(0));
        it.deliver(Timestamp(0));
        it.learn(listed(2, 3, 2), Moment::default()).unwrap();
        it.learn(listed(0, 2, 1), Moment::default()).unwrap();
        it.learn(listed(0, 2, 9), Moment::default()).unwrap_err();
        it.learn(listed(4, 2, 9), Moment::default()).unwrap_err();
    }

    #[test]
    fn the_beginning_depends_on_where_the_reader_begins() {
        // The bundles are of the times 110, 112 and 114, and the first one heard was the last of them.
        let places = [listed(10, 2, 1), listed(12, 2, 2), listed(14, 2, 3)];
        let late = CLOCK_TOLERANCE.as_nanos() as u64 + 1_000;
        for (since, began, next) in [
            (Since::Time(Timestamp(112)), 0, Some(12)),
            (Since::Time(Timestamp(113)), 0, Some(14)),
            // What arrives as a message is wanted, whatever the clock of its writer says.
            (Since::Time(Timestamp(900)), 0, Some(14)),
            (Since::Time(Timestamp(110)), 0, None),
            (Since::Earliest, 0, None),
            // Everything that is heard is wanted, although the time is earlier than the subscription.
            (Since::Head(Timestamp(late)), 0, Some(14)),
            // The process started after the subscription, as far as clocks can tell: all of it is wanted.
            (Since::Head(Timestamp(late)), 1_000, None),
        ] {
            let mut it = reader(&places, began, 14);
            assert_eq!(it.find_beginning(since).is_some(), next.is_some(), "{since:?}");
            assert_eq!(it.next, next, "{since:?}");
        }
        let mut whole = reader(&[listed(0, 10, 0), places[0]], 0, u64::MAX);
        assert!(whole.find_beginning(Since::Earliest).is_some());
        assert_eq!(whole.next, Some(0));
    }

    #[test]
    fn places_beyond_the_limit_are_forgotten_from_the_end() {
        let mut it = IncarnationReader::new(Timestamp(0), 0);
        for first in 0..MAX_KNOWN as u64 + 2 {
            it.learn(listed(first, 1, 1), Moment::default()).unwrap();
        }
        it.trim();
        assert_eq!(it.known.len(), MAX_KNOWN);
        assert_eq!(it.known.last_key_value().unwrap().0, &(MAX_KNOWN as u64 - 1));
        assert_eq!(it.end, MAX_KNOWN as u64 + 2);
    }
}
