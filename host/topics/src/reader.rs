//! Owns the log of one writer on one topic as this member reads it: all incarnations, in the order in which they
//! continue each other. It receives verified bundles, statements of heads and the results of fetches. It returns
//! deliveries, requests to fetch blocks, and alarms.

mod incarnation;
mod index_walk;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dim_model::time::Timestamp;

use crate::action::{Action, Allowance, Budget, Checkpoint, Delivery, GapReason, Outcome, Stream};
use crate::alarm::{Alarm, Finding, MAX_FINDINGS};
use crate::bundle::{Bundle, Listed, MAX_MESSAGE, Start};
use crate::head::{LogHead, Received};
use crate::identity::{Digest, Incarnation, WriterId};
use crate::index::Node;
use crate::membership::exchange::{Exchange, Opened};
use crate::time::{Moment, Now};
use incarnation::{Before, Conflict, IncarnationReader};
use index_walk::IndexWalk;

/// The maximum number of incarnations of a writer that a reader follows at once.
pub const MAX_INCARNATIONS: usize = 1_024;

/// The number of replaced incarnations that a reader remembers.
const REMEMBERED_INCARNATIONS: usize = 32;

/// The maximum number of blocks of a writer that are fetched at once.
const MAX_FETCHES: usize = 16;

/// A missing bundle becomes a gap after this time without any sign of the writer, while other members are heard.
pub const SILENT: Duration = Duration::from_secs(900);

/// A missing bundle of a writer that is heard becomes a gap after this time.
pub const UNAVAILABLE: Duration = Duration::from_secs(1_800);

/// A missing bundle becomes a gap after this time without any sign of the writer, if nobody else is heard either. The
/// member itself may be cut off.
pub const CUT_OFF: Duration = Duration::from_secs(6 * 3_600);

/// A member counts as heard for this time after its last message. Heads come about every minute.
pub const RECENT: Duration = Duration::from_secs(180);

/// The number of failed attempts after which the writer is asked to send a bundle again.
const TRIES_BEFORE_WANT: u32 = 1;

/// The place from which on a reader wants the events of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// From the time of the subscription on, and from the first bundle or head that it hears of a writer.
    Head(Timestamp),
    /// From the first bundle of this time on, and from the first bundle or head that it hears of a writer.
    Time(Timestamp),
    /// From the earliest event that is kept.
    Earliest,
}

impl Since {
    /// The earlier one of two places.
    pub fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::Earliest, _) | (_, Self::Earliest) => Self::Earliest,
            (Self::Head(one), Self::Head(other)) => Self::Head(one.min(other)),
            (Self::Head(one) | Self::Time(one), Self::Head(other) | Self::Time(other)) => {
                Self::Time(one.min(other))
            }
        }
    }
}

/// The work of one step of a reader: the time, the limits that all readers share, and the results.
#[derive(Debug)]
pub struct Step<'a> {
    /// The time.
    pub now: Now,
    /// The place from which on the topic is read.
    pub since: Since,
    /// The time since which other members are heard without a break; `None` if nobody is heard.
    pub connected_since: Option<Moment>,
    /// The limits that all readers share.
    pub budget: &'a mut Budget,
    /// The actions for the driver.
    pub actions: &'a mut Vec<Action>,
    /// For a catch-up: the events that may be delivered.
    pub allowance: Option<&'a mut Allowance>,
    /// In a fleet with a roster: the keys that decrypt events.
    pub exchange: Option<&'a mut Exchange>,
    /// Whether a limit that all readers share held something up.
    pub is_blocked: bool,
}

impl Step<'_> {
    /// Whether nothing may be delivered now.
    fn waits(&self) -> bool {
        self.allowance.as_ref().is_some_and(|allowance| allowance.left == 0)
    }

    /// Reads the events of a bundle; `None` if their key is missing and `may_wait`. It is asked for then.
    fn open(&mut self, bundle: &Bundle, may_wait: bool) -> Option<Outcome> {
        let opened = match &mut self.exchange {
            Some(exchange) => exchange.open(bundle),
            None => Opened::Events(bundle.events()),
        };
        match (opened, &mut self.exchange) {
            (Opened::Events(Ok(events)), _) => Some(Outcome::Events(events)),
            (Opened::Events(Err(why)), _) => Some(Outcome::Gap(GapReason::Unreadable(why))),
            (Opened::NoSecret(need), Some(exchange)) if may_wait => {
                exchange.need(need);
                None
            }
            (Opened::NoSecret((group, epoch)), Some(exchange)) => {
                // The next bundles of the epoch need not wait.
                epoch.into_iter().for_each(|epoch| exchange.give_up(group.clone(), epoch));
                Some(Outcome::Gap(GapReason::NoKey))
            }
            (Opened::Refused | Opened::NoSecret(_), _) => Some(Outcome::Gap(GapReason::NoKey)),
        }
    }
}

/// What a reader shows of an incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The sequence after the last event that the writer is known to have published.
    pub end: u64,
    /// The sequence after the last durable event.
    pub received: u64,
}

/// The counters of a reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReaderCounters {
    /// Bundles that were fetched because the message did not arrive.
    pub repaired: u64,
    /// Bundles that arrived again.
    pub repeated: u64,
    /// Gaps.
    pub gaps: u64,
    /// Bundles that were refused.
    pub refused: u64,
}

/// The log of one writer on one topic.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    writer: WriterId,
    incarnations: BTreeMap<Incarnation, IncarnationReader>,
    /// For each continued incarnation: those that continue it, in the order in which they were seen.
    successors: BTreeMap<Incarnation, Vec<Incarnation>>,
    /// The first incarnation that continues none.
    beginning: Option<Incarnation>,
    /// The replaced incarnations whose events are all delivered, oldest first.
    replaced: Vec<Incarnation>,
    /// The incarnations of this member itself, which it does not read. Empty for other writers.
    own: BTreeSet<Incarnation>,
    /// For incarnations that the last head named: the incarnation before, and the sequence after its last event.
    chain: BTreeMap<Incarnation, (Incarnation, u64)>,
    /// The hybrid time up to which incarnations were removed.
    floor: Timestamp,
    /// The hybrid time of the latest process start.
    latest: Timestamp,
    /// The hybrid time before which the writer has removed its bundles.
    kept: Timestamp,
    /// The search for the places of bundles.
    index: IndexWalk,
    /// The hybrid time of the process start whose head states the root of the index.
    indexed_by: Timestamp,
    heard: Moment,
    /// Whether the writer was removed from the fleet.
    is_removed: bool,
    /// The first finding about each subject.
    alarms: BTreeMap<Finding, Finding>,
    counters: ReaderCounters,
}

impl Reader {
    /// Creates the reader of a writer that is heard for the first time. It does not read the incarnations `own`.
    pub fn new(stream: Stream, writer: WriterId, own: BTreeSet<Incarnation>, now: Moment) -> Self {
        Self {
            stream,
            writer,
            incarnations: BTreeMap::new(),
            successors: BTreeMap::new(),
            beginning: None,
            replaced: Vec::new(),
            own,
            chain: BTreeMap::new(),
            floor: Timestamp(0),
            latest: Timestamp(0),
            kept: Timestamp(0),
            index: IndexWalk::default(),
            indexed_by: Timestamp(0),
            heard: now,
            is_removed: false,
            alarms: BTreeMap::new(),
            counters: ReaderCounters::default(),
        }
    }

    /// Continues after an incarnation whose events are durable up to a checkpoint.
    pub fn resume(&mut self, checkpoint: &Checkpoint) {
        let Checkpoint { incarnation, began, before, is_replaced, floor, .. } = checkpoint;
        let mut reader = IncarnationReader::resumed(checkpoint);
        self.latest = self.latest.max(*began);
        self.floor = self.floor.max(*floor);
        if let Some((previous, end)) = *before {
            self.successors.entry(previous).or_default().push(*incarnation);
            reader.before = Before::Incarnation(Start { previous, next: end, recent: Vec::new() });
        }
        self.incarnations.insert(*incarnation, reader);
        if *is_replaced {
            // The oldest ones are removed first.
            let is_older = |id: &Incarnation| self.incarnations[id].time <= checkpoint.time;
            let place = self.replaced.partition_point(is_older);
            self.replaced.insert(place, *incarnation);
        }
    }

    /// Learns from the main reading of the topic, for a catch-up, which incarnations there are and where they end, because
    /// their writer may be gone.
    pub fn learn_from(&mut self, main: &Reader, since: Since, now: Moment) {
        for (id, known) in &main.incarnations {
            let Some(next) = known.next else { continue };
            if let Some(reader) = self.incarnations.get_mut(id) {
                // It continues after a restart.
                if reader.next.is_some_and(|at| at < next) {
                    reader.end = reader.end.max(next);
                    // What the main reading has delivered is the event.
                    let _ = known.last.map(|last| reader.learn(last, now));
                }
                continue;
            }
            if self.was_removed(known) {
                continue;
            }
            let mut reader = IncarnationReader::new(known.began, next);
            reader.end = next;
            match since {
                // It wants nothing of the incarnation that the main reading has.
                Since::Time(time) | Since::Head(time) if known.time < time => {
                    (reader.next, reader.durable, reader.from) = (Some(next), next, next);
                    (reader.last, reader.time) = (known.last, known.time);
                    reader.before = Before::Nothing;
                }
                _ => {
                    // Nothing else is known, so there is no conflict.
                    let _ = known.last.map(|last| reader.learn(last, now));
                }
            }
            self.incarnations.insert(*id, reader);
        }
        for (id, before) in &main.chain {
            self.chain.entry(*id).or_insert(*before);
        }
        if let (None, Some(root)) = (self.index.root(), main.index.root()) {
            self.index.state(root);
            self.indexed_by = main.indexed_by;
        }
        self.kept = self.kept.max(main.kept);
    }

    /// Whether nothing is known of the writer but its name.
    pub fn is_empty(&self) -> bool {
        self.incarnations.is_empty()
    }

    /// Whether everything that the main reading of the topic has delivered is delivered here, and what it does not know.
    pub fn has_caught_up_with(&self, main: &Reader) -> bool {
        if self.is_removed {
            // The main reading may have more than what counts since then. It must not have anything to deliver that was
            // delivered here.
            let is_done = |(id, reader): (&Incarnation, &IncarnationReader)| {
                let known = main.incarnations.get(id);
                reader.is_complete() && known.is_none_or(|it| it.is_complete() || it.next >= reader.next)
            };
            return self.incarnations.iter().all(is_done);
        }
        let is_known = |(id, known): (&Incarnation, &IncarnationReader)| match self.incarnations.get(id) {
            Some(reader) => reader.next.is_some() && reader.next == known.next,
            None => known.next.is_some() && self.was_removed(known),
        };
        let passed = self.incarnations_before(main);
        // The main reading may still read an incarnation that it does not know.
        let is_done = |(id, reader): (&Incarnation, &IncarnationReader)| {
            main.incarnations.contains_key(id) || reader.is_complete() && passed.contains(id)
        };
        main.incarnations.iter().all(is_known) && self.incarnations.iter().all(is_done)
    }

    /// The incarnation before another one, from its first bundle or from the last head.
    fn incarnation_before(&self, id: &Incarnation) -> Option<Incarnation> {
        match self.incarnations.get(id).map(|it| &it.before) {
            Some(Before::Incarnation(start)) => Some(start.previous),
            _ => self.chain.get(id).map(|(previous, _)| *previous),
        }
    }

    /// The incarnations before those of which the main reading has passed the beginning. It never reads them.
    fn incarnations_before(&self, main: &Reader) -> BTreeSet<Incarnation> {
        let mut passed = BTreeSet::new();
        let begun = main.incarnations.iter().filter(|(_, it)| it.next.is_some_and(|next| next > 0));
        for (id, _) in begun {
            let mut at = *id;
            while let Some(previous) = self.incarnation_before(&at)
                && passed.insert(previous)
            {
                at = previous;
            }
        }
        passed
    }

    /// Whether an incarnation of the main reading is one of those that were replaced long ago and removed here.
    fn was_removed(&self, known: &IncarnationReader) -> bool {
        self.floor > Timestamp(0) && known.time.max(known.began) <= self.floor
    }

    /// Takes in a bundle. `fetched` says whether it was fetched.
    pub fn take(&mut self, bundle: Arc<Bundle>, fetched: bool, step: &mut Step<'_>) {
        if !fetched {
            // Anybody may provide a block that is fetched.
            self.heard = step.now.moment;
        }
        let id = bundle.header.incarnation;
        if !self.admit(id, bundle.header.began, bundle.header.first, bundle.time, step) {
            return;
        }
        let moment = step.now.moment;
        let mut conflicts = Vec::new();
        let reader = self.incarnations.get_mut(&id).expect("it was admitted");
        reader.began = bundle.header.began;
        self.latest = self.latest.max(bundle.header.began);
        for listed in bundle.header.recent.iter().chain([&bundle.listed()]) {
            conflicts.extend(reader.learn(*listed, moment).err());
        }
        let first = bundle.header.first;
        let is_next = reader.next == Some(first);
        match reader.known.get_mut(&first).filter(|known| known.listed.digest == bundle.digest) {
            Some(known) if known.bundle.is_none() => {
                known.is_in_flight = false;
                let has_room = step.budget.has_room(&self.stream, bundle.block.len()) && !reader.lacks_key;
                if !step.waits() && (is_next || has_room) {
                    step.budget.buffered += bundle.block.len();
                    known.bundle = Some(bundle.clone());
                    self.counters.repaired += u64::from(fetched);
                } else {
                    // It is fetched when there is room for it.
                    known.not_before = moment;
                }
            }
            Some(_) => self.counters.repeated += 1,
            None if conflicts.is_empty() => self.counters.repeated += 1,
            None => {}
        }
        step.budget.release(reader.trim());
        if first == 0 && reader.before == Before::Unknown {
            reader.before = bundle.header.start.clone().map_or(Before::Nothing, Before::Incarnation);
        }
        match &bundle.header.start {
            Some(start) => self.note_successor(start.previous, id, step),
            None if first == 0 => self.note_beginning(id, step),
            None => {}
        }
        for conflict in conflicts {
            self.report(id, conflict, step);
        }
        self.look_for_loss(id, step);
        self.advance(step);
    }

    /// Takes in what a head of the writer states about its log. `process` is the process start that sent the head, and
    /// its hybrid time.
    pub fn take_head(&mut self, log: &LogHead, process: (Incarnation, Timestamp), step: &mut Step<'_>) {
        self.heard = step.now.moment;
        let is_latest = process.1 >= self.latest;
        self.latest = self.latest.max(process.1);
        if is_latest {
            self.look_for_forgotten_end(log, process.0, step);
        }
        let began = if log.incarnation == process.0 { process.1 } else { Timestamp(0) };
        self.kept = self.kept.max(log.kept);
        let ids = [log.incarnation].into_iter().chain(log.earlier.iter().map(|(id, _)| *id));
        let chain = ids.zip(log.earlier.iter().copied());
        // A late head of an earlier process start knows less, but perhaps no later one has come.
        if is_latest {
            if let Some(root) = log.index {
                self.index.state(root);
                self.indexed_by = process.1;
            }
            self.chain = chain.collect();
        } else {
            for (id, before) in chain {
                self.chain.entry(id).or_insert(before);
            }
        }
        let latest = log.recent.last().map_or(step.now.wall, |it| it.time);
        if !self.admit(log.incarnation, began, log.next, latest, step) {
            return;
        }
        let reader = self.incarnations.get_mut(&log.incarnation).expect("it was admitted");
        let conflicts: Vec<_> =
            log.recent.iter().filter_map(|it| reader.learn(*it, step.now.moment).err()).collect();
        reader.end = reader.end.max(log.next);
        for conflict in conflicts {
            self.report(log.incarnation, conflict, step);
        }
        self.advance(step);
    }

    /// Reports a writer whose log ends earlier than this member knows, although it was started again since.
    fn look_for_forgotten_end(&mut self, log: &LogHead, process: Incarnation, step: &mut Step<'_>) {
        let Some(reader) = self.incarnations.get(&log.incarnation) else { return };
        let received = reader.end;
        let is_continued =
            self.successors.get(&log.incarnation).into_iter().flatten().any(|id| *id != process);
        // Bundles of the running process may overtake its heads.
        if process != log.incarnation && (is_continued || received > log.next) {
            let (previous, remembered) = (log.incarnation, log.next);
            self.alarm(Finding::Forgot { previous, remembered, received }, step);
        }
    }

    /// Takes in the position of another member in an incarnation of the writer.
    pub fn compare(&mut self, incarnation: &Incarnation, received: u64, step: &mut Step<'_>) {
        let is_replaced = self.successors.contains_key(incarnation);
        let end = self.incarnations.get(incarnation).filter(|_| is_replaced).map(|reader| reader.end);
        if let Some(remembered) = end.filter(|end| *end < received) {
            self.alarm(Finding::Lost { incarnation: *incarnation, remembered, received }, step);
        }
    }

    /// Ends the log of a former member with the last bundles that count. Of an incarnation without one nothing more
    /// counts than what was delivered.
    pub fn end_at(&mut self, ends: &BTreeMap<Incarnation, Listed>, step: &mut Step<'_>) {
        self.is_removed = true;
        for (id, last) in ends {
            if self.admit(*id, Timestamp(0), last.next(), last.time, step) {
                let reader = self.incarnations.get_mut(id).expect("it was admitted");
                if let Err(conflict) = reader.learn(*last, step.now.moment) {
                    self.report(*id, conflict, step);
                }
            }
        }
        for (id, reader) in &mut self.incarnations {
            let end = ends.get(id).map_or(0, Listed::next);
            step.budget.release(reader.end_at(end));
        }
        // What waits for a beginning that does not count never begins.
        self.incarnations.retain(|id, reader| ends.contains_key(id) || reader.next.is_some());
        self.advance(step);
    }

    /// Notes that the writer is a member, perhaps again.
    pub fn readmit(&mut self) {
        self.is_removed = false;
    }

    /// Whether an incarnation is read.
    pub fn follows(&self, incarnation: &Incarnation) -> bool {
        self.incarnations.contains_key(incarnation)
    }

    /// The size of the bundles in memory, in bytes.
    pub fn buffered(&self) -> usize {
        self.incarnations.values().map(IncarnationReader::buffered).sum()
    }

    /// Notes that the writer was heard, on any topic.
    pub fn hear(&mut self, now: Moment) {
        self.heard = now;
    }

    /// Notes that an attempt to fetch a block has ended without the bundle.
    pub fn fetch_ended(&mut self, digest: &Digest, now: Moment) {
        for reader in self.incarnations.values_mut() {
            let known = reader.known.values().find(|known| known.listed.digest == *digest);
            if let Some(first) = known.map(|known| known.listed.first) {
                reader.failed(first, now);
            }
        }
    }

    /// Takes in a node of the index, or notes that it cannot be had.
    pub fn take_node(&mut self, digest: &Digest, node: Option<Node>, step: &mut Step<'_>) {
        let mut conflicts = Vec::new();
        let mut is_full = false;
        for place in self.index.take(digest, node, step.now.moment) {
            if let Some(reader) = self.incarnations.get_mut(&place.incarnation) {
                let learned = reader.learn(place.listed, step.now.moment);
                conflicts.extend(learned.err().map(|conflict| (place.incarnation, conflict)));
                let searched = reader.searched;
                step.budget.release(reader.trim());
                is_full |= reader.searched != searched;
            }
        }
        if is_full {
            // The rest is looked for when these are delivered.
            self.index.end();
        }
        if self.index.is_complete() {
            let searched = self.incarnations.values_mut().filter(|it| it.searched == self.index.root());
            searched.for_each(|reader| reader.exhausted = reader.searched);
        }
        for (id, conflict) in conflicts {
            self.report(id, conflict, step);
        }
        self.advance(step);
    }

    /// Notes that the events of an incarnation before `next` are durable.
    pub fn committed(&mut self, incarnation: &Incarnation, next: u64) {
        if let Some(reader) = self.incarnations.get_mut(incarnation) {
            reader.durable = reader.durable.max(next);
        }
    }

    /// Delivers what is in order, requests what is missing, and reports gaps.
    pub fn advance(&mut self, step: &mut Step<'_>) {
        if step.waits() {
            return;
        }
        // Each delivery may let an incarnation continue that waits for another one.
        let mut is_moving = true;
        while is_moving {
            is_moving = false;
            let ids: Vec<Incarnation> = self.incarnations.keys().copied().collect();
            for id in ids {
                while self.advance_incarnation(id, step) {
                    is_moving = true;
                }
            }
        }
        self.fetch(step);
    }

    /// Continues after a time in which nothing was allowed. Nothing was fetched in it, so it does not count as a time in
    /// which events are missing.
    pub fn release(&mut self, waited: Duration, step: &mut Step<'_>) {
        for reader in self.incarnations.values_mut() {
            reader.stuck = reader.stuck.map(|stuck| stuck.after(waited));
        }
        self.advance(step);
    }

    /// Drops the bundles in memory, which are fetched again later.
    pub fn drop_bundles(&mut self, step: &mut Step<'_>) {
        let known = self.incarnations.values_mut().flat_map(|reader| reader.known.values_mut());
        for known in known.filter(|known| !known.is_in_flight) {
            if let Some(bundle) = known.bundle.take() {
                step.budget.release(bundle.block.len());
                known.not_before = step.now.moment;
            }
        }
    }

    /// The time after `now` at which [`Reader::advance`] has work although nothing is received.
    pub fn deadline(&self, connected_since: Option<Moment>, now: Moment) -> Option<Moment> {
        let of = |reader: &IncarnationReader| {
            if reader.is_complete() {
                return None;
            }
            let missing = reader.known.values().filter(|it| it.bundle.is_none() && !reader.lacks_key);
            let missing = missing.take(MAX_FETCHES).filter(|it| !it.is_in_flight && it.not_before > now);
            let fetch = missing.map(|it| it.not_before).min();
            let gaps = reader.stuck.into_iter().flat_map(|stuck| {
                let silent = stuck.max(self.heard);
                let connected = connected_since.unwrap_or_default();
                [
                    silent.max(connected).after(SILENT),
                    stuck.max(connected).after(UNAVAILABLE),
                    silent.after(CUT_OFF),
                ]
            });
            fetch.into_iter().chain(gaps).filter(|at| *at > now).min()
        };
        let node = self.index.deadline().filter(|at| *at > now);
        self.incarnations.values().filter_map(of).chain(node).min()
    }

    /// The blocks that could not be fetched and that the writer should send again.
    pub fn wants(&self) -> impl Iterator<Item = (WriterId, Digest)> {
        let known = self.incarnations.values().flat_map(|it| it.known.values().take(MAX_FETCHES));
        let wanted = known.filter(|it| it.bundle.is_none() && it.tries >= TRIES_BEFORE_WANT);
        let wanted = wanted.map(|it| it.listed.digest).chain(self.index.want());
        wanted.map(|digest| (self.writer, digest))
    }

    /// Whether events are missing whose bundles are not known, so that a head of the writer is needed.
    pub fn needs_head(&self) -> bool {
        self.incarnations.values().any(|it| !it.is_complete() && it.known.is_empty())
    }

    /// The durable positions, for heads.
    pub fn received(&self) -> impl Iterator<Item = Received> {
        self.incarnations.iter().filter(|(_, it)| it.next.is_some()).map(|(incarnation, it)| Received {
            topic: self.stream.topic.clone(),
            writer: self.writer,
            incarnation: *incarnation,
            next: it.durable,
            from: it.from,
        })
    }

    /// The positions of the incarnations.
    pub fn positions(&self) -> impl Iterator<Item = Position> {
        self.incarnations.iter().map(|(incarnation, it)| Position {
            incarnation: *incarnation,
            end: it.end,
            received: it.durable,
        })
    }

    /// The findings about the writer.
    pub fn alarms(&self) -> impl Iterator<Item = &Finding> {
        self.alarms.values()
    }

    /// The counters.
    pub fn counters(&self) -> ReaderCounters {
        self.counters
    }

    /// Reports a finding, once for each subject.
    pub fn alarm(&mut self, finding: Finding, step: &mut Step<'_>) {
        // The roster ends the log of a former member. What it says later is no finding.
        if self.is_removed {
            return;
        }
        let is_known = self.alarms.len() >= MAX_FINDINGS || self.alarms.contains_key(&finding.subject());
        // The main reading of the topic reports it.
        if self.stream.catch_up.is_none() && !is_known {
            self.alarms.insert(finding.subject(), finding.clone());
            let (topic, writer) = (self.stream.topic.clone(), self.writer);
            step.actions.push(Action::Alarm(Alarm { topic, writer, finding }));
        }
    }

    /// Makes sure that an incarnation is followed. Returns false if it is refused.
    fn admit(
        &mut self,
        id: Incarnation,
        began: Timestamp,
        evidence: u64,
        time: Timestamp,
        step: &mut Step<'_>,
    ) -> bool {
        if self.incarnations.contains_key(&id) {
            return true;
        }
        if self.is_passed(&id) || self.passed_until().is_some_and(|until| time < until) {
            // A late message from before the beginning: its events would come out of order.
            return false;
        }
        let refusal = if time <= self.floor {
            Finding::Outdated { incarnation: id }
        } else if self.incarnations.len() >= MAX_INCARNATIONS {
            Finding::TooManyIncarnations
        } else {
            self.incarnations.insert(id, IncarnationReader::new(began, evidence));
            return true;
        };
        self.counters.refused += 1;
        self.alarm(refusal, step);
        false
    }

    fn note_beginning(&mut self, id: Incarnation, step: &mut Step<'_>) {
        let one = *self.beginning.get_or_insert(id);
        if one != id {
            self.alarm(Finding::TwoBeginnings { one, other: id }, step);
        }
    }

    fn note_successor(&mut self, previous: Incarnation, id: Incarnation, step: &mut Step<'_>) {
        let successors = self.successors.entry(previous).or_default();
        if successors.contains(&id) {
            return;
        }
        successors.push(id);
        if let [one, .., other] = successors[..] {
            self.alarm(Finding::RunningTwice { previous, one, other }, step);
        }
    }

    fn report(&mut self, incarnation: Incarnation, conflict: Conflict, step: &mut Step<'_>) {
        self.counters.refused += 1;
        let Conflict { kept, refused } = conflict;
        let finding = Finding::Fork { incarnation, first: refused.first, kept, refused: refused.digest };
        self.alarm(finding, step);
    }

    /// Delivers the next bundle of an incarnation, or reports the next gap. Returns false if there is neither.
    fn advance_incarnation(&mut self, id: Incarnation, step: &mut Step<'_>) -> bool {
        let Some(reader) = self.incarnations.get_mut(&id) else { return false };
        match reader.find_beginning(step.since) {
            Some(freed) => step.budget.release(freed),
            None => return self.give_up_beginning(id, step),
        }
        let Some(next) = reader.next else { return false };
        let Some(bundle) = reader.at_next().and_then(|known| known.bundle.clone()) else {
            return next < reader.end && self.give_up_next(id, step);
        };
        if next == 0 && !self.is_previous_done(id, step) {
            return false;
        }
        let reader = self.incarnations.get_mut(&id).expect("it was there");
        if step.waits() {
            return false;
        }
        if !step.budget.may_deliver(&self.stream) {
            step.is_blocked = true;
            return false;
        }
        if let Some(last) = reader.last
            && bundle.header.recent.last() != Some(&last)
        {
            // The writer lists another bundle before this one than the one that was delivered.
            let conflict = Conflict { kept: Some(last.digest), refused: bundle.listed() };
            reader.known.remove(&next);
            step.budget.release(bundle.block.len());
            self.report(id, conflict, step);
            return true;
        }
        let now = step.now.moment;
        let may_wait = !reader.lacks_key || reader.stuck.is_none_or(|at| now.since(at) < UNAVAILABLE);
        let opened = step.open(&bundle, may_wait);
        let lacked_key = std::mem::replace(&mut reader.lacks_key, opened.is_none());
        let Some(outcome) = opened else {
            if !lacked_key {
                reader.stuck = Some(now);
            }
            // The later ones need not wait in memory.
            step.budget.release(reader.drop_later(next, now));
            return false;
        };
        let time = match &outcome {
            Outcome::Events(events) => events.last().map_or(bundle.time, |event| event.time),
            Outcome::Gap(_) => bundle.time,
        };
        self.counters.gaps += u64::from(matches!(outcome, Outcome::Gap(_)));
        reader.deliver(time);
        step.budget.release(bundle.block.len());
        self.deliver(id, next, outcome, step);
        true
    }

    /// Hands a delivery to the driver.
    fn deliver(&mut self, id: Incarnation, first: u64, outcome: Outcome, step: &mut Step<'_>) {
        let reader = &self.incarnations[&id];
        let before = match &reader.before {
            Before::Incarnation(start) => Some((start.previous, start.next)),
            Before::Unknown | Before::Nothing => None,
        };
        let next = reader.next.expect("a reader that delivers has a position");
        let (began, from, last, time) = (reader.began, reader.from, reader.last, reader.time);
        let is_replaced = self.replaced.contains(&id);
        let replaced = before.filter(|_| first == 0).map(|(previous, _)| previous);
        let removed = replaced.map_or_else(Vec::new, |previous| self.replace(previous, step.budget));
        let (stream, writer, floor) = (self.stream.clone(), self.writer, self.floor);
        let checkpoint =
            Checkpoint { incarnation: id, began, next, from, last, time, before, is_replaced, floor };
        let delivery = Delivery { stream, writer, first, outcome, checkpoint, replaced, removed };
        step.budget.uncommitted += delivery.bytes();
        if let Some(allowance) = &mut step.allowance {
            allowance.delivered(delivery.bytes() as u64, step.now.moment);
        }
        step.actions.push(Action::Deliver(delivery));
    }

    /// Notes that another incarnation continues `before`. Returns the incarnations that are removed for it.
    fn replace(&mut self, before: Incarnation, budget: &mut Budget) -> Vec<Incarnation> {
        if !self.replaced.contains(&before) && self.incarnations.contains_key(&before) {
            self.replaced.push(before);
        }
        let surplus = self.replaced.len().saturating_sub(REMEMBERED_INCARNATIONS);
        let removed: Vec<_> = self.replaced.drain(..surplus).collect();
        for id in &removed {
            if let Some(reader) = self.incarnations.remove(id) {
                self.floor = self.floor.max(reader.time);
                budget.release(reader.buffered());
            }
            self.successors.remove(id);
        }
        removed
    }

    /// Whether everything of the incarnation before is delivered, as far as its successor knows it.
    fn is_previous_done(&mut self, id: Incarnation, step: &mut Step<'_>) -> bool {
        let start = match &self.incarnations[&id].before {
            Before::Unknown => return false,
            Before::Nothing => return true,
            Before::Incarnation(start) => start.clone(),
        };
        if !self.incarnations.contains_key(&start.previous) {
            if self.own.contains(&start.previous) {
                return true;
            }
            let latest = start.recent.last().map_or(Timestamp(0), |it| it.time);
            if self.incarnations.len() >= MAX_INCARNATIONS || latest <= self.floor {
                return true;
            }
            let reader = IncarnationReader::new(Timestamp(0), u64::MAX);
            self.incarnations.insert(start.previous, reader);
        }
        self.learn_end(&start, step);
        self.look_for_loss(start.previous, step);
        self.incarnations[&start.previous].next.is_some_and(|next| next >= start.next)
    }

    /// Reports an incarnation that has more events than its successor remembers.
    fn look_for_loss(&mut self, previous: Incarnation, step: &mut Step<'_>) {
        let received = self.incarnations.get(&previous).map_or(0, |reader| reader.end);
        let successors = self.successors.get(&previous).into_iter().flatten();
        let starts = successors.filter_map(|id| match &self.incarnations.get(id)?.before {
            Before::Incarnation(start) => Some(start.next),
            Before::Unknown | Before::Nothing => None,
        });
        if let Some(remembered) = starts.filter(|remembered| *remembered < received).min() {
            self.alarm(Finding::Forgot { previous, remembered, received }, step);
        }
    }

    /// Learns the end of an incarnation from its successor.
    fn learn_end(&mut self, start: &Start, step: &mut Step<'_>) {
        let reader = self.incarnations.get_mut(&start.previous).expect("the caller has looked");
        if reader.end >= start.next && !reader.lacks_places() {
            return;
        }
        let conflicts: Vec<_> =
            start.recent.iter().filter_map(|it| reader.learn(*it, step.now.moment).err()).collect();
        reader.end = reader.end.max(start.next);
        for conflict in conflicts {
            self.report(start.previous, conflict, step);
        }
    }

    /// Decides whether the next event, which is missing, becomes a gap.
    fn give_up_next(&mut self, id: Incarnation, step: &mut Step<'_>) -> bool {
        let Some(reason) = self.gap_reason(id, step) else { return false };
        let reader = &self.incarnations[&id];
        let next = reader.next.expect("the caller has looked");
        let lowest = reader.known.first_key_value().map(|(_, it)| it.listed);
        let until = match (lowest, &reason) {
            (None, _) => reader.end,
            (Some(lowest), GapReason::NotKept) => lowest.next(),
            (Some(lowest), _) if lowest.first == next => lowest.next(),
            (Some(lowest), _) => lowest.first,
        };
        self.skip(id, next, until, reason, step)
    }

    /// Decides whether the events before the earliest known bundle, which cannot be fetched, become a gap.
    fn give_up_beginning(&mut self, id: Incarnation, step: &mut Step<'_>) -> bool {
        let Some(reason) = self.gap_reason(id, step) else { return false };
        let reader = &self.incarnations[&id];
        let until = reader.known.first_key_value().map_or(reader.end, |(_, lowest)| lowest.listed.next());
        self.skip(id, 0, until, reason, step)
    }

    /// The reason why the earliest missing bundle of an incarnation cannot be had, or `None` if it may still come.
    fn gap_reason(&mut self, id: Incarnation, step: &Step<'_>) -> Option<GapReason> {
        let (now, kept, heard) = (step.now.moment, self.kept, self.heard);
        let is_passed = self.is_passed(&id);
        let root = self.index.root();
        let reader = self.incarnations.get_mut(&id).expect("the caller has looked");
        let stuck = *reader.stuck.get_or_insert(now);
        // The index of a later process start has all bundles of the incarnation that are kept.
        let is_ended = is_passed || reader.began > Timestamp(0) && reader.began < self.indexed_by;
        if is_ended && reader.known.is_empty() && root.is_some() && reader.exhausted == root {
            return Some(GapReason::NotKept);
        }
        let lowest = reader.known.first_key_value().map(|(_, it)| it);
        // Only a reader that has read earlier events tries whether another member still has it.
        let is_tried = |tries: u32| tries > 0 || reader.next.is_none();
        if lowest.is_some_and(|it| it.bundle.is_none() && it.listed.time < kept && is_tried(it.tries)) {
            return Some(GapReason::NotKept);
        }
        let silent = stuck.max(heard);
        match step.connected_since {
            Some(connected) if now.since(heard) <= RECENT => {
                (now.since(stuck.max(connected)) >= UNAVAILABLE).then_some(GapReason::Unavailable)
            }
            Some(connected) if now.since(silent.max(connected)) >= SILENT => Some(GapReason::WriterSilent),
            _ => (now.since(silent) >= CUT_OFF).then_some(GapReason::WriterSilent),
        }
    }

    /// Whether the beginning of the next incarnation after `id` that is followed was delivered or skipped.
    fn is_passed(&self, id: &Incarnation) -> bool {
        let mut at = *id;
        // A chain of a hostile writer may be a circle.
        for _ in 0..=self.chain.len() {
            let Some((after, _)) = self.chain.iter().find(|(_, (before, _))| *before == at) else {
                return false;
            };
            if let Some(reader) = self.incarnations.get(after) {
                return reader.next.is_some_and(|next| next > 0);
            }
            at = *after;
        }
        false
    }

    /// The time before which all events of the writer are passed: that of the process start of the first incarnation of
    /// which the beginning was skipped. After a restart of the reader it is not known which ones are earlier. An
    /// incarnation that was read from its beginning on passes nothing: if it continues none, no other comes before it, and
    /// one that is older belongs to a copy of the writer.
    fn passed_until(&self) -> Option<Timestamp> {
        let is_first =
            |it: &IncarnationReader| it.before == Before::Nothing && it.from > 0 && it.next.is_some();
        let firsts = self.incarnations.iter().filter(|(_, it)| is_first(it));
        let began = firsts.map(|(id, it)| {
            // Of one that was skipped, only those that continue it are known.
            let after =
                self.successors.get(id).into_iter().flatten().filter_map(|id| self.incarnations.get(id));
            [it].into_iter().chain(after).map(|it| it.began).filter(|began| *began > Timestamp(0)).min()
        });
        began.min().flatten()
    }

    /// Skips events that cannot be had, and reports the gap. Returns false if an earlier gap comes first, and it is not
    /// decided yet.
    fn skip(
        &mut self,
        id: Incarnation,
        first: u64,
        next: u64,
        reason: GapReason,
        step: &mut Step<'_>,
    ) -> bool {
        if first == 0 && !self.skip_rest_before(id, &reason, step) {
            return false;
        }
        let reader = self.incarnations.get_mut(&id).expect("the caller has looked");
        if reader.before == Before::Unknown {
            // The first bundle is missing, and so is the name of the incarnation before.
            reader.before = Before::Nothing;
        }
        step.budget.release(reader.skip_to(next));
        self.counters.gaps += 1;
        self.deliver(id, first, Outcome::Gap(reason), step);
        true
    }

    /// Reports the end of the incarnation before `id` as a gap, if it is missing and only the first bundle of `id`,
    /// which cannot be had, knows the places of its bundles. Returns false if that incarnation still misses events whose
    /// places are known: after this gap nobody would look for its end.
    fn skip_rest_before(&mut self, id: Incarnation, reason: &GapReason, step: &mut Step<'_>) -> bool {
        let Some((previous, end)) = self.chain.get(&id).copied() else { return true };
        if self.own.contains(&previous) {
            return true;
        }
        if !self.incarnations.contains_key(&previous) {
            let is_wanted = step.since == Since::Earliest || self.follows_ancestor(previous);
            if !is_wanted || self.incarnations.len() >= MAX_INCARNATIONS {
                return true;
            }
            let mut reader = IncarnationReader::new(Timestamp(0), u64::MAX);
            // Its first bundle may still come, and names the one before it.
            reader.next = Some(0);
            self.incarnations.insert(previous, reader);
        }
        let reader = &self.incarnations[&previous];
        let has_no_place = reader.known.is_empty() && reader.next.is_none();
        match reader.next.filter(|_| reader.is_complete()).or(has_no_place.then_some(0)) {
            Some(next) if next < end => self.skip(previous, next, end, reason.clone(), step),
            position => position.is_some(),
        }
    }

    /// Whether an incarnation before `id` is read.
    fn follows_ancestor(&self, id: Incarnation) -> bool {
        let before = |id: &Incarnation| self.chain.get(id).map(|(before, _)| *before);
        let ancestors = std::iter::successors(before(&id), before).take(self.chain.len());
        ancestors.into_iter().any(|id| self.incarnations.contains_key(&id))
    }

    /// Looks for missing places in the index of the writer.
    fn search_index(&mut self, step: &mut Step<'_>) {
        if !self.index.is_active() {
            let Some(root) = self.index.root() else { return };
            let lacking = self.incarnations.values_mut().filter(|it| it.lacks_places());
            let lacking = lacking.filter(|it| it.searched != Some(root));
            let from = lacking.map(|it| {
                it.searched = Some(root);
                it.wanted_from(step.since)
            });
            match from.min() {
                Some(from) => self.index.begin(from),
                None => return,
            }
        }
        let Some(digest) = self.index.due(step.now.moment) else { return };
        if !step.budget.may_fetch(&self.stream) {
            step.is_blocked = true;
            return;
        }
        self.index.fetching();
        step.budget.fetches += 1;
        let (stream, writer) = (self.stream.clone(), self.writer);
        step.actions.push(Action::FetchNode { stream, writer, digest });
    }

    /// Requests the missing bundles that are needed first.
    fn fetch(&mut self, step: &mut Step<'_>) {
        self.search_index(step);
        // While a node cannot be had, what is known is fetched: it names earlier bundles, too.
        let is_searching = self.index.is_active() && self.index.want().is_none();
        let flights = self.incarnations.values().flat_map(|it| it.known.values());
        let mut flights = flights.filter(|it| it.is_in_flight).count();
        let wanting = self.incarnations.values_mut().filter(|it| !it.is_complete() && !it.lacks_key);
        for reader in wanting {
            if is_searching && reader.lacks_places() {
                // Earlier bundles are found soon.
                continue;
            }
            let missing = reader.known.values().filter(|it| it.bundle.is_none()).map(|it| it.listed.first);
            let missing: Vec<u64> = missing.take(MAX_FETCHES).collect();
            for (index, first) in missing.into_iter().enumerate() {
                let known = &reader.known[&first];
                if known.is_in_flight || known.not_before > step.now.moment {
                    continue;
                }
                if !step.budget.has_room(&self.stream, MAX_MESSAGE) {
                    step.budget.release(reader.make_room(first, step.now.moment).unwrap_or(0));
                }
                let known = reader.known.get_mut(&first).expect("it is known");
                // Only the earliest one leads further without room for it in memory.
                let has_room = index == 0 || step.budget.has_room(&self.stream, MAX_MESSAGE);
                if !has_room || flights >= MAX_FETCHES || !step.budget.may_fetch(&self.stream) {
                    step.is_blocked = true;
                    continue;
                }
                known.is_in_flight = true;
                flights += 1;
                step.budget.fetches += 1;
                step.actions.push(Action::Fetch {
                    stream: self.stream.clone(),
                    writer: self.writer,
                    listed: known.listed,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use dim_model::ident::Topic;
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::action::MAX_BUFFERED;
    use crate::bundle::Event;
    use crate::own_log::{Author, OwnLog};

    #[test]
    fn a_reader_that_looks_for_the_beginning_fetches_one_bundle_at_a_time_if_there_is_no_room() {
        let (topic, key): (Topic, _) = ("jobs".parse().unwrap(), SigningKey::from_bytes(&[3; 32]));
        let began = Timestamp(1);
        let author = Author { fleet: "fleet".to_owned(), key, incarnation: Incarnation([1; 16]), began };
        let mut log = OwnLog::default();
        let events = [Event { time: Timestamp(7), data: Bytes::from_static(b"x") }];
        let bundle = (0..20).map(|_| log.form(&topic, &events, &author, None)).last().unwrap();
        for (buffered, fetches) in [(0, 8), (MAX_BUFFERED, 1)] {
            let (mut budget, mut actions) = (Budget { buffered, ..Budget::default() }, Vec::new());
            let now = Now { moment: Moment(Duration::from_secs(1)), wall: Timestamp(9) };
            let mut step = Step {
                now,
                since: Since::Earliest,
                connected_since: None,
                budget: &mut budget,
                actions: &mut actions,
                allowance: None,
                exchange: None,
                is_blocked: false,
            };
            let mut reader =
                Reader::new(Stream::main(topic.clone()), author.id(), BTreeSet::new(), now.moment);
            reader.take(Arc::new(bundle.clone()), false, &mut step);
            step.now.moment = now.moment.after(Duration::from_secs(1));
            reader.advance(&mut step);
            // Without room the bundle itself is missing, too, and only the earliest one is fetched.
            assert_eq!(actions.len(), fetches, "{buffered}: {actions:?}");
        }
    }
}
