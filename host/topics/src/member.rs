//! Owns one member of a fleet: its own logs, the readers of the logs of others, and its heads. It receives events to
//! publish, verified bundles and heads, results of fetches and commits, and the time. It returns actions for its
//! driver. It has no I/O, no clock and no randomness.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;

use crate::action::{Action, Allowance, Budget, Checkpoint, Delivery, Stream};
use crate::alarm::{Alarm, Finding, MAX_FINDINGS};
use crate::bundle::{Bundle, Event, Listed, MAX_MESSAGE};
use crate::head::{Head, Place, Received};
use crate::head_schedule::{HeadSchedule, acknowledged_within, spread};
use crate::hybrid_clock::HybridClock;
use crate::identity::{Digest, Incarnation, WriterId};
use crate::index::{BundlePlace, NewNodes, Node};
use crate::membership::exchange::{Exchange, GrantRefusal, RosterRefusal};
use crate::membership::observed::Observations;
use crate::membership::{Membership, NoKey, RosterChange};
use crate::own_log::{Author, LogEnd, OwnLog};
use crate::reader::{Position, RECENT, Reader, ReaderCounters, Since, Step};
use crate::time::{Moment, Now};

/// The maximum number of writers that a member reads on one topic. Further writers are refused.
pub const MAX_WRITERS: usize = 10_000;

/// The maximum number of members whose heads are remembered.
const MAX_MEMBERS: usize = 10_000;

/// The maximum number of positions of other members that are remembered.
const MAX_POSITIONS: usize = 65_536;

/// The time after which a silent member no longer counts as known.
const FORGET_MEMBER: Duration = Duration::from_secs(3_600);

/// The shortest time between two requests for the heads of others.
const HELLO_PAUSE: Duration = Duration::from_secs(5);

/// The shortest time between two answers to requests to send the same block again.
const RESEND_PAUSE: Duration = Duration::from_secs(2);

/// The maximum number of blocks that are remembered as sent again.
const MAX_RESENT: usize = 1_024;

/// The initial state of a member, from its store.
#[derive(Debug)]
pub struct Setup {
    /// The identity with which it writes.
    pub author: Author,
    /// The incarnations of this member that its store knows, without the current one, with the hybrid times of their
    /// process starts. The driver adds the current one, with [`Member::began`], before the first action.
    pub past: BTreeMap<Incarnation, Timestamp>,
    /// The ends of the own logs.
    pub logs: BTreeMap<Topic, LogEnd>,
    /// The subscribed topics.
    pub topics: BTreeMap<Topic, Since>,
    /// The positions in the logs of others.
    pub checkpoints: Vec<(Topic, WriterId, Checkpoint)>,
    /// The topics and writers of which this member has raised an alarm that heads report
    /// ([`Finding::is_reported`]). They are reported again, because others may not have heard of them.
    pub alarmed: BTreeSet<(Topic, WriterId)>,
    /// Any number that differs between members, for the jitter of heads.
    pub seed: u64,
    /// The exchange of rosters and keys; `None` in a fleet without a roster, in which everybody may write and read.
    pub exchange: Option<Exchange>,
}

/// The time in which other members are heard.
#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    /// The time since which there was no break.
    since: Moment,
    /// The time of the last message.
    last: Option<Moment>,
}

impl Connection {
    /// Notes a message of another member.
    fn heard(&mut self, now: Moment) {
        if self.last.is_none_or(|last| now.since(last) > RECENT) {
            self.since = now;
        }
        self.last = Some(now);
    }

    /// The time since which there was no break; `None` if nobody is heard.
    fn connected_since(&self, now: Moment) -> Option<Moment> {
        self.last.filter(|last| now.since(*last) <= RECENT).map(|_| self.since)
    }
}

/// A topic, a writer, and an incarnation of the writer.
type PositionKey = (Topic, WriterId, Incarnation);

/// The knowledge about another member.
#[derive(Debug)]
struct Other {
    heard: Moment,
    incarnation: Incarnation,
    number: u64,
    place: Place,
    /// The positions that it has reported: the sequence after the last durable event, and the one from which on none is
    /// missing.
    received: BTreeMap<PositionKey, (u64, u64)>,
}

/// What a member shows of a writer on a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterStatus {
    /// The writer.
    pub writer: WriterId,
    /// Its incarnations.
    pub positions: Vec<Position>,
    /// The counters.
    pub counters: ReaderCounters,
}

/// A position in the log of a writer that another member has reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reported {
    /// The member.
    pub member: WriterId,
    /// The incarnation of the writer.
    pub incarnation: Incarnation,
    /// The sequence after the last event that is durable at the member.
    pub next: u64,
    /// The sequence from which on none is missing there.
    pub from: u64,
}

/// The counters of a member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemberCounters {
    /// Heads that were received.
    pub heads: u64,
    /// Heads that arrived again or late.
    pub old_heads: u64,
    /// Writers and members that were refused, because there are too many.
    pub refused: u64,
    /// Blocks that were sent again on request.
    pub resent: u64,
}

/// One member of a fleet.
#[derive(Debug)]
pub struct Member {
    author: Author,
    id: WriterId,
    past: BTreeMap<Incarnation, Timestamp>,
    clock: HybridClock,
    logs: BTreeMap<Topic, OwnLog>,
    readers: Readers,
    heads: Heads,
    others: BTreeMap<WriterId, Other>,
    exchange: Option<Exchange>,
    /// The encrypted topics of a member without a roster. Nothing is read on them: anybody could have written it.
    closed: BTreeSet<Topic>,
    connection: Connection,
    /// The blocks that were sent again, with the times.
    resent: BTreeMap<Digest, Moment>,
    /// The alarms about other programs with the key of this member.
    own_alarms: BTreeSet<Alarm>,
    /// The topics and writers of which an earlier process of this member has raised an alarm.
    alarmed: BTreeSet<(Topic, WriterId)>,
    counters: MemberCounters,
    actions: Vec<Action>,
}

/// A reading of a topic, and a writer.
type ReaderKey = (Stream, WriterId);

/// The readers of all topics and writers.
#[derive(Debug, Default)]
struct Readers {
    /// The readings of topics.
    streams: BTreeMap<Stream, Since>,
    /// The catch-ups, with what each may deliver.
    allowances: BTreeMap<u64, Allowance>,
    all: BTreeMap<ReaderKey, Reader>,
    budget: Budget,
    /// The readers that wait for a limit that all readers share.
    blocked: BTreeSet<ReaderKey>,
    /// The readers with work at a time.
    timers: BTreeSet<(Moment, ReaderKey)>,
    timer_of: BTreeMap<ReaderKey, Moment>,
}

/// The heads of this member.
#[derive(Debug)]
struct Heads {
    schedule: HeadSchedule,
    place: Place,
    number: u64,
    /// Whether the next head asks others for theirs.
    hello: bool,
    /// The time of the last request for the heads of others.
    asked: Option<Moment>,
    /// The index of the first own log of the next head, and of the first received position that was stated before.
    turns: (usize, usize),
    /// The received positions that were stated, and how often.
    stated: BTreeMap<PositionKey, (u64, u32)>,
}

impl Member {
    /// Creates a member that continues after the state in its store.
    pub fn new(setup: Setup, now: Now) -> Self {
        let Setup { mut author, past, logs, topics, checkpoints, alarmed, seed, exchange } = setup;
        let id = author.id();
        let streams = topics.into_iter().map(|(topic, since)| (Stream::main(topic), since)).collect();
        let mut readers = Readers { streams, ..Readers::default() };
        let mut last = Timestamp(0);
        for (topic, writer, checkpoint) in checkpoints {
            last = last.max(checkpoint.time);
            let stream = Stream::main(topic);
            let reader = readers.all.entry((stream.clone(), writer)).or_insert_with(|| {
                let own = if writer == id { own_incarnations(&author, &past) } else { BTreeSet::new() };
                Reader::new(stream, writer, own, now.moment)
            });
            reader.resume(&checkpoint);
        }
        // A clock that was set back does not make this process start look older than the ones before.
        let times = logs.values().flat_map(|log| log.recent.iter().map(|it| it.time));
        last = times.chain(past.values().copied()).max().map_or(last, |time| time.max(last));
        let mut clock = HybridClock::after(last);
        author.began = clock.tick(author.began);
        let heads = Heads {
            schedule: HeadSchedule::new(now.moment, seed),
            place: Place::default(),
            number: 0,
            hello: true,
            asked: None,
            turns: (0, 0),
            stated: BTreeMap::new(),
        };
        let mut it = Self {
            id,
            author,
            past,
            clock,
            logs: logs.into_iter().map(|(topic, end)| (topic, OwnLog::after(end))).collect(),
            readers,
            heads,
            others: BTreeMap::new(),
            exchange,
            closed: BTreeSet::new(),
            connection: Connection::default(),
            resent: BTreeMap::new(),
            own_alarms: BTreeSet::new(),
            alarmed,
            counters: MemberCounters::default(),
            actions: Vec::new(),
        };
        for stream in it.readers.streams.keys().cloned().collect::<Vec<_>>() {
            it.end_logs_of_removed(&stream, now);
        }
        it
    }

    /// The identity of this member.
    pub fn id(&self) -> WriterId {
        self.id
    }

    /// The process start of this member.
    pub fn incarnation(&self) -> Incarnation {
        self.author.incarnation
    }

    /// The hybrid time of the process start.
    pub fn began(&self) -> Timestamp {
        self.author.began
    }

    /// Subscribes to a topic. Returns false if it is subscribed already.
    pub fn subscribe(&mut self, topic: Topic, since: Since, now: Now) -> bool {
        let earliest = self.readers.catch_ups_of(&topic).map(|(_, since)| *since).reduce(Since::min);
        let since = earliest.map_or(since, |earliest| earliest.min(since));
        let Entry::Vacant(entry) = self.readers.streams.entry(Stream::main(topic)) else { return false };
        let stream = entry.key().clone();
        entry.insert(since);
        self.ask(now.moment);
        self.end_logs_of_removed(&stream, now);
        true
    }

    /// The place from which on the events of a topic are wanted; `None` if it is not subscribed.
    pub fn since(&self, topic: &Topic) -> Option<Since> {
        self.readers.streams.get(&Stream::main(topic.clone())).copied()
    }

    /// Ends a subscription, and the catch-ups of its topic. The positions in its logs are forgotten.
    pub fn unsubscribe(&mut self, topic: &Topic) {
        self.readers.remove(|stream| stream.topic == *topic);
    }

    /// Reads a topic once more, for one receiver, until it has caught up with the main reading of the topic. Continues
    /// at `checkpoints`. It delivers events of `allowance` bytes, and further ones after [`Member::allow`]. The main
    /// reading then wants events of new writers from the same place on.
    pub fn catch_up(
        &mut self,
        number: u64,
        topic: Topic,
        since: Since,
        checkpoints: Vec<(WriterId, Checkpoint)>,
        allowance: u64,
        now: Now,
    ) {
        let main = Stream::main(topic.clone());
        let stream = Stream { topic, catch_up: Some(number) };
        if self.readers.streams.contains_key(&stream) {
            return;
        }
        if let Some(earliest) = self.readers.streams.get_mut(&main) {
            *earliest = earliest.min(since);
        }
        self.readers.streams.insert(stream.clone(), since);
        let mut allowed = Allowance::default();
        allowed.set(allowance, now.moment);
        self.readers.allowances.insert(number, allowed);
        for (writer, checkpoint) in checkpoints {
            if self.ensure_reader(&(stream.clone(), writer), now.moment) {
                let reader = self.readers.all.get_mut(&(stream.clone(), writer)).expect("it was made");
                reader.resume(&checkpoint);
            }
        }
        let known = self.readers.all.keys().filter(|(of, _)| *of == main).map(|(_, writer)| *writer);
        for writer in known.filter(|writer| *writer != self.id).collect::<Vec<_>>() {
            if self.ensure_reader(&(stream.clone(), writer), now.moment) {
                let mut reader = self.readers.all.remove(&(stream.clone(), writer)).expect("it was made");
                reader.learn_from(&self.readers.all[&(main.clone(), writer)], since, now.moment);
                self.readers.all.insert((stream.clone(), writer), reader);
                self.with_reader(&(stream.clone(), writer), now, |reader, step| reader.advance(step));
            }
        }
        self.ask(now.moment);
        self.end_logs_of_removed(&stream, now);
        self.look_for_caught_up();
    }

    /// Sets the size of the events that a catch-up may deliver, in bytes, with those that were delivered and are not
    /// durable. At most one bundle more is delivered. At zero it waits, and does not end.
    pub fn allow(&mut self, number: u64, allowance: u64, now: Now) {
        let Some(allowed) = self.readers.allowances.get_mut(&number) else { return };
        let waited = allowed.waits_since.map(|since| now.moment.since(since));
        allowed.set(allowance.saturating_sub(allowed.in_flight), now.moment);
        let (Some(waited), is_released) = (waited, allowed.left > 0) else { return };
        let of_catch_up = self.readers.all.keys().filter(|(of, _)| of.catch_up == Some(number));
        for key in of_catch_up.cloned().collect::<Vec<_>>() {
            self.with_reader(&key, now, |reader, step| {
                if is_released {
                    reader.release(waited, step);
                } else {
                    // Others need the memory.
                    reader.drop_bundles(step);
                }
            });
        }
        self.look_for_caught_up();
    }

    /// Ends a catch-up.
    pub fn end_catch_up(&mut self, number: u64) {
        self.readers.remove(|stream| stream.catch_up == Some(number));
    }

    /// Ends the catch-ups that have received everything that the main readings of their topics have.
    fn look_for_caught_up(&mut self) {
        let streams = self.readers.streams.keys().filter(|stream| stream.catch_up.is_some());
        let done: Vec<Stream> = streams.filter(|stream| self.has_caught_up(stream)).cloned().collect();
        for stream in done {
            self.readers.remove(|it| *it == stream);
            self.actions.push(Action::CaughtUp(stream));
        }
    }

    fn has_caught_up(&self, stream: &Stream) -> bool {
        let main = Stream::main(stream.topic.clone());
        let reader = |stream: &Stream, writer| self.readers.all.get(&(stream.clone(), writer));
        let mut writers =
            self.readers.all.range(of_stream(&main)).map(|((_, writer), reader)| (*writer, reader));
        let has_writer = |(writer, main): (WriterId, &Reader)| {
            writer == self.id
                || reader(stream, writer).map_or(main.is_empty(), |it| it.has_caught_up_with(main))
        };
        let mut others = self.readers.all.range(of_stream(stream)).map(|((_, writer), _)| *writer);
        let waits = stream
            .catch_up
            .is_some_and(|number| self.readers.allowances.get(&number).is_some_and(|it| it.left == 0));
        !waits
            && self.readers.streams.contains_key(&main)
            && writers.all(has_writer)
            && others.all(|writer| reader(&main, writer).is_some())
    }

    /// Sets the place of the daemon that heads name.
    pub fn set_place(&mut self, place: Place) {
        self.heads.place = place;
    }

    /// The place of the daemon of another member.
    pub fn place(&self, member: &WriterId) -> Option<&Place> {
        self.others.get(member).map(|other| &other.place)
    }

    /// Whether a log of the writer is read.
    pub fn is_read(&self, writer: &WriterId) -> bool {
        self.readers.streams.keys().any(|stream| self.readers.all.contains_key(&(stream.clone(), *writer)))
    }

    /// The time in which each known member may send one head.
    pub fn spread(&self) -> Duration {
        spread(self.others.len())
    }

    /// The time within which another member usually acknowledges an event.
    pub fn acknowledged_within(&self) -> Duration {
        acknowledged_within(self.others.len())
    }

    /// The newest roster and the keys, in a fleet with a roster.
    pub fn membership(&self) -> Option<&Membership> {
        self.exchange.as_ref().map(Exchange::membership)
    }

    /// What this member observes of the others, in a fleet with a roster.
    pub fn observations(&self) -> Option<&Observations> {
        self.exchange.as_ref().map(Exchange::observations)
    }

    /// Forgets the keys of a group that were replaced before a time: what they encrypted is no longer kept.
    pub fn forget_keys_before(&mut self, group: &GroupName, time: Timestamp) {
        if let Some(exchange) = &mut self.exchange {
            exchange.forget_before(group, time, &mut self.actions);
        }
    }

    /// Says that a topic is encrypted for a group. In a fleet without a roster nothing is read on it.
    pub fn encrypt(&mut self, topic: Topic, group: GroupName) {
        match &mut self.exchange {
            Some(exchange) => exchange.encrypt(topic, group),
            None => drop(self.closed.insert(topic)),
        }
    }

    /// Takes in a roster that was fetched, or that an admin has made.
    pub fn take_roster(&mut self, block: &Bytes, now: Now) -> Result<RosterChange, RosterRefusal> {
        let Some(exchange) = &mut self.exchange else { return Ok(RosterChange::None) };
        let change = exchange.take_roster(block, now, &mut self.actions);
        self.hurry_if_needed(now.moment);
        if change == Ok(RosterChange::New) {
            for stream in self.readers.streams.keys().cloned().collect::<Vec<_>>() {
                self.end_logs_of_removed(&stream, now);
            }
            self.look_for_caught_up();
        }
        change
    }

    /// Ends the logs of former members on a topic where the roster says.
    fn end_logs_of_removed(&mut self, stream: &Stream, now: Now) {
        let roster = self.exchange.as_ref().and_then(|exchange| exchange.membership().roster());
        for ((of, writer), reader) in &mut self.readers.all {
            if of == stream && roster.is_some_and(|it| it.roster.members.contains_key(writer)) {
                reader.readmit();
            }
        }
        let removed = roster.iter().flat_map(|it| &it.roster.removed);
        let logs: Vec<(WriterId, BTreeMap<Incarnation, Listed>)> = removed
            .map(|(writer, row)| {
                let of_topic = row.cuts.iter().filter(|((topic, _), _)| *topic == stream.topic);
                (*writer, of_topic.map(|((_, incarnation), last)| (*incarnation, *last)).collect())
            })
            .collect();
        for (writer, ends) in logs {
            let key = (stream.clone(), writer);
            if writer != self.id && (!ends.is_empty() || self.readers.all.contains_key(&key)) {
                self.ensure_reader(&key, now.moment);
                self.with_reader(&key, now, |reader, step| reader.end_at(&ends, step));
            }
        }
    }

    /// Takes in a key grant that was fetched.
    pub fn take_grant(&mut self, block: &Bytes, now: Now) -> Result<(), GrantRefusal> {
        let Some(exchange) = &mut self.exchange else { return Ok(()) };
        let taken = exchange.take_grant(block, now, &mut self.actions);
        self.hurry_if_needed(now.moment);
        if let Some(group) = taken? {
            self.advance_group(&group, now);
        }
        Ok(())
    }

    /// Notes that key epochs are durable. What waited for them is read.
    pub fn epochs_stored(&mut self, number: u64, now: Now) {
        let Some(exchange) = &mut self.exchange else { return };
        let Some(group) = exchange.epochs_stored(number, now, &mut self.actions) else { return };
        self.advance_group(&group, now);
        self.hurry_if_needed(now.moment);
    }

    /// Advances the readers of the encrypted topics of a group.
    fn advance_group(&mut self, group: &GroupName, now: Now) {
        let Some(exchange) = &self.exchange else { return };
        let is_of_group = |(stream, _): &&ReaderKey| exchange.group_of(&stream.topic) == Some(group);
        for key in self.readers.all.keys().filter(is_of_group).cloned().collect::<Vec<_>>() {
            self.with_reader(&key, now, |reader, step| reader.advance(step));
        }
        self.look_for_caught_up();
    }

    /// Sends the next head soon if it has news of rosters or keys.
    fn hurry_if_needed(&mut self, now: Moment) {
        if self.exchange.as_mut().is_some_and(Exchange::take_hurry) {
            self.heads.schedule.hurry(now);
        }
    }

    /// Whether a writer is a member; in a fleet without a roster everybody is.
    pub fn is_member(&self, writer: &WriterId) -> bool {
        self.membership().is_none_or(|membership| membership.check_member(writer).is_ok())
    }

    /// Whether the roster allows a bundle.
    fn is_allowed(&mut self, bundle: &Bundle, is_fetched: bool, now: Now) -> bool {
        let Some(exchange) = &mut self.exchange else { return !self.closed.contains(&bundle.header.topic) };
        exchange.check_bundle(bundle, is_fetched, now).is_ok()
    }

    /// Forms the next bundle of the own log of a topic of as many of `events` as fit, at least one. The times of the
    /// events are times of day; the bundle has hybrid times. The driver makes the bundle durable and calls
    /// [`Member::stored`]. There is no bundle if the topic is encrypted and this member has no key for it.
    ///
    /// # Panics
    /// There is no event, or the first one is too large.
    pub fn form(
        &mut self,
        topic: &Topic,
        events: &[(Timestamp, Bytes)],
        now: Now,
    ) -> Result<Arc<Bundle>, NoKey> {
        let sealing = match &mut self.exchange {
            Some(exchange) => exchange.sealing(topic, now),
            None => Ok(None),
        };
        self.hurry_if_needed(now.moment);
        let sealing = sealing?;
        let before = self.clock;
        let event =
            |(wall, data): &(Timestamp, Bytes)| Event { time: self.clock.tick(*wall), data: data.clone() };
        let events: Vec<Event> = events.iter().take(crate::bundle::MAX_EVENTS as usize).map(event).collect();
        let log = self.logs.entry(topic.clone()).or_default();
        let bundle = log.form(topic, &events, &self.author, sealing.as_ref());
        // The times of the events that did not fit are given again.
        self.clock = before;
        self.clock.tick(events[bundle.count as usize - 1].time);
        Ok(Arc::new(bundle))
    }

    /// The end of the own log of a topic with the bundles that are not durable yet.
    pub fn formed_end(&self, topic: &Topic) -> Option<&LogEnd> {
        self.logs.get(topic)?.formed()
    }

    /// Drops the bundles of a topic that were formed and are not durable. Their sequences are given again.
    pub fn abandon(&mut self, topic: &Topic) {
        if let Some(log) = self.logs.get_mut(topic) {
            log.abandon();
        }
    }

    /// Publishes a bundle of this member that is durable now.
    pub fn stored(&mut self, bundle: Arc<Bundle>, now: Now) {
        self.heads.schedule.published(now.moment, self.others.len());
        self.logs.entry(bundle.header.topic.clone()).or_default().stored(&bundle);
        if bundle.block.len() <= MAX_MESSAGE {
            let topic = bundle.header.topic.clone();
            self.actions.push(Action::Publish { topic, bundle });
        } else {
            // It is too large for a message: readers fetch it when they see the head.
            self.heads.schedule.hurry(now.moment);
        }
    }

    /// The own logs with durable bundles that are not in their index.
    pub fn unindexed(&self) -> impl Iterator<Item = &Topic> {
        self.logs.iter().filter(|(_, log)| log.unindexed() > 0).map(|(topic, _)| topic)
    }

    /// Completes the index of an own log. The driver provides the new nodes to others, and calls [`Member::indexed`].
    pub fn index(&mut self, topic: &Topic) -> Option<NewNodes> {
        self.logs.get_mut(topic)?.index()
    }

    /// Builds the index of an own log anew from the bundles that are kept, in the order in which they were formed. All its
    /// nodes are new then.
    pub fn restore_index(&mut self, topic: &Topic, places: Vec<BundlePlace>) {
        self.logs.entry(topic.clone()).or_default().restore_index(places);
    }

    /// Notes that others can read the index of an own log with this root; `None` if there is none any more.
    pub fn indexed(&mut self, topic: &Topic, root: Option<Digest>) {
        if let Some(log) = self.logs.get_mut(topic) {
            log.indexed(root);
        }
    }

    /// Notes that the bundles of an own log before a time were removed.
    pub fn keep_since(&mut self, topic: &Topic, time: Timestamp) {
        if let Some(log) = self.logs.get_mut(topic) {
            log.keep_since(time);
        }
    }

    /// Takes in a bundle that arrived as a message.
    pub fn receive(&mut self, bundle: Arc<Bundle>, now: Now) {
        if !self.is_allowed(&bundle, false, now) {
            return;
        }
        for stream in self.readers.streams_of(&bundle.header.topic) {
            self.take(&stream, bundle.clone(), false, now);
        }
        self.look_for_caught_up();
    }

    /// Takes in a block that was fetched, by the place for which it was requested.
    pub fn fetched(
        &mut self,
        stream: &Stream,
        writer: &WriterId,
        listed: &Listed,
        bundle: Arc<Bundle>,
        now: Now,
    ) {
        self.end_fetch(stream, writer, listed, now);
        let is_wanted = bundle.header.topic == stream.topic && bundle.header.writer == *writer;
        if is_wanted && bundle.listed() == *listed && self.is_allowed(&bundle, true, now) {
            self.take(stream, bundle, true, now);
        }
        self.advance_blocked(now);
    }

    /// Takes in a node of an index that was fetched; `None` if it cannot be had.
    pub fn node_fetched(
        &mut self,
        stream: &Stream,
        writer: &WriterId,
        digest: &Digest,
        block: Option<&[u8]>,
        now: Now,
    ) {
        let budget = &mut self.readers.budget;
        budget.fetches = budget.fetches.saturating_sub(1);
        let node = block.and_then(|block| Node::open(block).ok());
        let key = (stream.clone(), *writer);
        self.with_reader(&key, now, |reader, step| reader.take_node(digest, node, step));
        self.advance_blocked(now);
    }

    /// Notes that a block could not be fetched, or is no bundle.
    pub fn fetch_failed(&mut self, stream: &Stream, writer: &WriterId, listed: &Listed, now: Now) {
        self.end_fetch(stream, writer, listed, now);
        let key = (stream.clone(), *writer);
        self.with_reader(&key, now, |reader, step| reader.advance(step));
        self.advance_blocked(now);
    }

    /// Notes that a delivery is durable.
    pub fn committed(&mut self, delivery: &Delivery, now: Now) {
        let Delivery { stream, writer, checkpoint, .. } = delivery;
        let budget = &mut self.readers.budget;
        budget.uncommitted = budget.uncommitted.saturating_sub(delivery.bytes());
        if let Some(allowance) = stream.catch_up.and_then(|it| self.readers.allowances.get_mut(&it)) {
            allowance.in_flight = allowance.in_flight.saturating_sub(delivery.bytes() as u64);
        }
        if let Some(reader) = self.readers.all.get_mut(&(stream.clone(), *writer)) {
            reader.committed(&checkpoint.incarnation, checkpoint.next);
            if stream.catch_up.is_none() {
                self.heads.schedule.received(now.moment, self.others.len());
            }
        }
        self.advance_blocked(now);
    }

    /// Notes that deliveries of `bytes` bytes were dropped, because nobody wants their topic any more.
    pub fn dropped(&mut self, bytes: usize, now: Now) {
        self.readers.budget.uncommitted = self.readers.budget.uncommitted.saturating_sub(bytes);
        self.advance_blocked(now);
    }

    /// Takes in a head. Returns whether it is a new one of another member.
    pub fn receive_head(&mut self, head: Head, now: Now) -> bool {
        if head.writer == self.id {
            self.look_at_own_head(&head);
            return false;
        }
        self.counters.heads += 1;
        if let Some(exchange) = &mut self.exchange {
            let is_member = exchange.take_head(&head, now, &mut self.actions).is_ok();
            self.hurry_if_needed(now.moment);
            if !is_member {
                return false;
            }
        }
        if !self.note_member(&head, now.moment) {
            // A mirror may have sent it again. It proves no connection.
            return false;
        }
        self.connection.heard(now.moment);
        self.clock.observe(head.time, now.wall);
        if head.hello {
            self.heads.schedule.asked(now.moment, self.others.len());
        }
        self.resend(&head, now.moment);
        self.look_at_received(&head, now);
        for stream in self.readers.streams.keys() {
            if let Some(reader) = self.readers.all.get_mut(&(stream.clone(), head.writer)) {
                reader.hear(now.moment);
            }
        }
        for log in &head.topics {
            if self.closed.contains(&log.topic) {
                continue;
            }
            for stream in self.readers.streams_of(&log.topic) {
                let key = (stream, head.writer);
                if self.ensure_reader(&key, now.moment) {
                    let process = (head.incarnation, head.began);
                    self.with_reader(&key, now, |reader, step| reader.take_head(log, process, step));
                }
            }
        }
        self.take_reports(&head, now);
        self.look_for_caught_up();
        true
    }

    /// Does what is due.
    pub fn wake(&mut self, now: Now) {
        while let Some((at, key)) = self.readers.timers.first().cloned()
            && at <= now.moment
        {
            self.readers.timers.pop_first();
            self.readers.timer_of.remove(&key);
            self.with_reader(&key, now, |reader, step| reader.advance(step));
        }
        self.look_for_caught_up();
        if let Some(exchange) = &mut self.exchange {
            exchange.wake(now, &mut self.actions);
        }
        self.hurry_if_needed(now.moment);
        let wants = self.wants();
        if self.readers.all.values().any(Reader::needs_head) {
            self.ask(now.moment);
        }
        if !wants.is_empty() {
            self.heads.schedule.hurry(now.moment);
        }
        if self.heads.schedule.next() <= now.moment {
            self.send_head(wants, now);
        }
    }

    /// The time at which [`Member::wake`] has work.
    pub fn deadline(&self) -> Moment {
        let timer = self.readers.timers.first().map(|(at, _)| *at);
        let exchange = self.exchange.as_ref().map(Exchange::deadline);
        timer
            .into_iter()
            .chain(exchange)
            .chain([self.heads.schedule.next()])
            .min()
            .expect("the last is there")
    }

    /// Takes the actions since the last call, in order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// The writers of a topic.
    pub fn writers(&self, topic: &Topic) -> Vec<WriterStatus> {
        let of_topic = self.readers.all.range(of_stream(&Stream::main(topic.clone())));
        let status = |((_, writer), reader): (&ReaderKey, &Reader)| WriterStatus {
            writer: *writer,
            positions: reader.positions().collect(),
            counters: reader.counters(),
        };
        of_topic.map(status).collect()
    }

    /// The positions that other members report in the log of a writer.
    pub fn positions_of(&self, topic: &Topic, writer: &WriterId) -> Vec<Reported> {
        let (lowest, highest) = (Incarnation([0; 16]), Incarnation([u8::MAX; 16]));
        let range = (topic.clone(), *writer, lowest)..=(topic.clone(), *writer, highest);
        let of_member = |(id, other): (&WriterId, &Other)| -> Vec<_> {
            let positions = other.received.range(range.clone());
            let reported = |((_, _, incarnation), (next, from)): (&PositionKey, &(u64, u64))| Reported {
                member: *id,
                incarnation: *incarnation,
                next: *next,
                from: *from,
            };
            positions.map(reported).collect()
        };
        self.others.iter().flat_map(of_member).collect()
    }

    /// The durable ends of the own logs.
    pub fn own_ends(&self) -> impl Iterator<Item = &LogEnd> {
        self.logs.values().filter_map(OwnLog::end)
    }

    /// The topics on which this member has written.
    pub fn own_topics(&self) -> impl Iterator<Item = &Topic> {
        self.logs.keys()
    }

    /// The durable end of the own log of a topic.
    pub fn own_end(&self, topic: &Topic) -> Option<&LogEnd> {
        self.logs.get(topic)?.end()
    }

    /// The findings about writers.
    pub fn alarms(&self) -> Vec<Alarm> {
        let of = |((Stream { topic, .. }, writer), reader): (&ReaderKey, &Reader)| -> Vec<Alarm> {
            let alarm =
                |finding: &Finding| Alarm { topic: topic.clone(), writer: *writer, finding: finding.clone() };
            reader.alarms().map(alarm).collect()
        };
        let mut alarms: BTreeSet<Alarm> = self.readers.all.iter().flat_map(of).collect();
        alarms.extend(self.own_alarms.iter().cloned());
        alarms.into_iter().collect()
    }

    /// The counters.
    pub fn counters(&self) -> MemberCounters {
        self.counters
    }

    /// The size of the bundles that all readers have in memory, in bytes.
    pub fn buffered(&self) -> usize {
        self.readers.all.values().map(Reader::buffered).sum()
    }

    /// The use of the limits that all readers share.
    pub fn budget(&self) -> Budget {
        self.readers.budget
    }

    fn take(&mut self, stream: &Stream, bundle: Arc<Bundle>, fetched: bool, now: Now) {
        let key = (stream.clone(), bundle.header.writer);
        let is_own = key.1 == self.id;
        // The echo of an own bundle. Another program with the same key has others.
        if is_own && !self.is_beyond_own_log(&stream.topic, &bundle.header.incarnation, bundle.next()) {
            return;
        }
        if !self.ensure_reader(&key, now.moment) {
            return;
        }
        if is_own {
            self.continue_past(&bundle);
        }
        if !fetched && !is_own {
            self.connection.heard(now.moment);
        }
        let is_near = self.clock.observe(bundle.time, now.wall);
        self.with_reader(&key, now, |reader, step| {
            if !is_near {
                reader.alarm(Finding::ClockAhead, step);
            }
            if is_own {
                reader.alarm(Finding::OwnKey { incarnation: bundle.header.incarnation }, step);
            }
            reader.take(bundle, fetched, step);
        });
    }

    /// Whether this member does not know the events of its key before `next`. Of its older incarnations it does not
    /// remember the ends.
    fn is_beyond_own_log(&self, topic: &Topic, incarnation: &Incarnation, next: u64) -> bool {
        if !self.is_own_incarnation(incarnation) {
            return true;
        }
        let Some(log) = self.logs.get(topic).filter(|log| log.end().is_some()) else { return true };
        log.next_of(incarnation).is_some_and(|end| next > end)
    }

    /// Whether what others say of an incarnation of this member can be true: this process start has written only on the
    /// topics that it knows. A restored host may not know those of an earlier start.
    fn may_be_own(&self, topic: &Topic, incarnation: &Incarnation) -> bool {
        *incarnation != self.author.incarnation || self.logs.contains_key(topic)
    }

    fn is_own_incarnation(&self, incarnation: &Incarnation) -> bool {
        *incarnation == self.author.incarnation || self.past.contains_key(incarnation)
    }

    /// Another program continues an incarnation of this member: its events are read from the end on that this member
    /// knows.
    fn continue_past(&mut self, bundle: &Bundle) {
        let header = &bundle.header;
        let end = self.logs.get(&header.topic).and_then(|log| log.end_of(&header.incarnation));
        let reader = self.readers.all.get_mut(&(Stream::main(header.topic.clone()), header.writer));
        if let (Some(end), Some(reader)) = (end, reader)
            && !reader.follows(&header.incarnation)
        {
            let last = end.recent.last().copied();
            reader.resume(&Checkpoint {
                incarnation: header.incarnation,
                began: header.began,
                next: end.next,
                from: 0,
                last,
                time: last.map_or(Timestamp(0), |it| it.time),
                before: None,
                is_replaced: false,
                floor: Timestamp(0),
            });
        }
    }

    /// Another program with the key of this member sends heads, too.
    fn look_at_own_head(&mut self, head: &Head) {
        if !self.is_own_incarnation(&head.incarnation) {
            for log in &head.topics {
                self.alarm_of_own_key(log.topic.clone(), head.incarnation);
            }
        }
    }

    /// Others have received events that their writer does not know: it was copied, or restored from a backup.
    fn look_at_received(&mut self, head: &Head, now: Now) {
        for Received { topic, writer, incarnation, next, .. } in &head.received {
            if *writer != self.id {
                let key = (Stream::main(topic.clone()), *writer);
                self.with_reader(&key, now, |reader, step| reader.compare(incarnation, *next, step));
            } else if self.may_be_own(topic, incarnation) && self.is_beyond_own_log(topic, incarnation, *next)
            {
                self.alarm_of_own_key(topic.clone(), *incarnation);
            }
        }
    }

    /// Takes in the alarms that another member reports.
    fn take_reports(&mut self, head: &Head, now: Now) {
        let finding = Finding::Reported { by: head.writer };
        for (topic, writer) in &head.alarms {
            let key = (Stream::main(topic.clone()), *writer);
            if *writer == self.id {
                self.own_alarm(topic.clone(), finding.clone());
            } else {
                // A writer that was not heard yet gets the report with a later head.
                self.with_reader(&key, now, |reader, step| reader.alarm(finding.clone(), step));
            }
        }
    }

    fn alarm_of_own_key(&mut self, topic: Topic, incarnation: Incarnation) {
        self.own_alarm(topic, Finding::OwnKey { incarnation });
    }

    fn own_alarm(&mut self, topic: Topic, finding: Finding) {
        let alarm = Alarm { topic, writer: self.id, finding };
        if self.own_alarms.len() < MAX_FINDINGS && self.own_alarms.insert(alarm.clone()) {
            self.actions.push(Action::Alarm(alarm));
        }
    }

    /// Notes the head of another member. Returns false if it is old.
    fn note_member(&mut self, head: &Head, now: Moment) -> bool {
        if !self.others.contains_key(&head.writer) && self.others.len() >= MAX_MEMBERS {
            self.others.retain(|_, other| now.since(other.heard) < FORGET_MEMBER);
            if self.others.len() >= MAX_MEMBERS {
                self.counters.refused += 1;
                return false;
            }
        }
        let positions: usize = self.others.values().map(|other| other.received.len()).sum();
        let other = self.others.entry(head.writer).or_insert_with(|| Other {
            heard: now,
            incarnation: head.incarnation,
            number: 0,
            place: Place::default(),
            received: BTreeMap::new(),
        });
        if other.incarnation == head.incarnation && head.number <= other.number {
            self.counters.old_heads += 1;
            return false;
        }
        other.heard = now;
        (other.incarnation, other.number) = (head.incarnation, head.number);
        other.place = head.place.clone();
        let mut room = MAX_POSITIONS.saturating_sub(positions);
        for Received { topic, writer, incarnation, next, from } in &head.received {
            let key = (topic.clone(), *writer, *incarnation);
            let is_about_own = *writer == self.id
                && self.logs.contains_key(topic)
                && (*incarnation == self.author.incarnation || self.past.contains_key(incarnation));
            if other.received.contains_key(&key) || room > 0 || is_about_own {
                let is_new = other.received.insert(key, (*next, *from)).is_none();
                room = room.saturating_sub(usize::from(is_new));
            }
        }
        true
    }

    /// Sends the own blocks again that another member cannot fetch.
    fn resend(&mut self, head: &Head, now: Moment) {
        self.resent.retain(|_, at| now.since(*at) < RESEND_PAUSE);
        for (_, digest) in head.wants.iter().filter(|(writer, _)| *writer == self.id) {
            if self.resent.len() < MAX_RESENT && !self.resent.contains_key(digest) {
                self.resent.insert(*digest, now);
                self.counters.resent += 1;
                self.actions.push(Action::Resend(*digest));
            }
        }
    }

    /// Makes sure that there is a reader. Returns false if the topic is not subscribed or has too many writers. A catch-up
    /// does not read the logs of this member.
    fn ensure_reader(&mut self, key: &ReaderKey, now: Moment) -> bool {
        let Readers { streams, all, .. } = &mut self.readers;
        if !streams.contains_key(&key.0) || key.0.catch_up.is_some() && key.1 == self.id {
            return false;
        }
        if all.contains_key(key) {
            return true;
        }
        if all.range(of_stream(&key.0)).count() >= MAX_WRITERS {
            self.counters.refused += 1;
            return false;
        }
        let own = if key.1 == self.id { own_incarnations(&self.author, &self.past) } else { BTreeSet::new() };
        all.insert(key.clone(), Reader::new(key.0.clone(), key.1, own, now));
        true
    }

    /// Runs a step of a reader, and notes when it has work again.
    fn with_reader(&mut self, key: &ReaderKey, now: Now, run: impl FnOnce(&mut Reader, &mut Step<'_>)) {
        let connected_since = self.connection.connected_since(now.moment);
        let Readers { streams, allowances, all, budget, blocked, timers, timer_of } = &mut self.readers;
        let (Some(reader), Some(since)) = (all.get_mut(key), streams.get(&key.0)) else { return };
        let (since, actions) = (*since, &mut self.actions);
        let allowance = key.0.catch_up.and_then(|number| allowances.get_mut(&number));
        let exchange = self.exchange.as_mut();
        let mut step =
            Step { now, since, connected_since, budget, actions, allowance, exchange, is_blocked: false };
        run(reader, &mut step);
        if step.is_blocked {
            blocked.insert(key.clone());
        }
        let deadline = reader.deadline(connected_since, now.moment);
        if let Some(before) = timer_of.remove(key) {
            timers.remove(&(before, key.clone()));
        }
        if let Some(at) = deadline {
            timers.insert((at, key.clone()));
            timer_of.insert(key.clone(), at);
        }
    }

    fn end_fetch(&mut self, stream: &Stream, writer: &WriterId, listed: &Listed, now: Now) {
        let budget = &mut self.readers.budget;
        budget.fetches = budget.fetches.saturating_sub(1);
        let key = (stream.clone(), *writer);
        self.with_reader(&key, now, |reader, step| reader.fetch_ended(&listed.digest, step.now.moment));
    }

    /// Advances the readers that waited for a limit that all readers share.
    fn advance_blocked(&mut self, now: Now) {
        for key in std::mem::take(&mut self.readers.blocked) {
            self.with_reader(&key, now, |reader, step| reader.advance(step));
        }
        self.look_for_caught_up();
    }

    fn wants(&self) -> Vec<(WriterId, Digest)> {
        // Only readers with a timer miss anything.
        let readers = self.readers.timer_of.keys().filter_map(|key| self.readers.all.get(key));
        readers.flat_map(Reader::wants).take(crate::head::MAX_WANTS).collect()
    }

    /// Asks the others for their heads with the next head, which is sent soon.
    fn ask(&mut self, now: Moment) {
        if self.heads.asked.is_none_or(|asked| now.since(asked) >= HELLO_PAUSE) {
            self.heads.hello = true;
            self.heads.schedule.hurry(now);
        }
    }

    fn send_head(&mut self, wants: Vec<(WriterId, Digest)>, now: Now) {
        let mut topics: Vec<_> = self.logs.iter().filter_map(|(topic, log)| log.head(topic)).collect();
        let main = self.readers.all.iter().filter(|((stream, _), _)| stream.catch_up.is_none());
        let mut received: Vec<_> = main.flat_map(|(_, reader)| reader.received()).collect();
        let (topic_turn, received_turn) = self.heads.turns;
        let logs = topics.len().max(1);
        topics.rotate_left(topic_turn.min(logs) % logs);
        let new = self.heads.new_first(&mut received, received_turn);
        let alarms = self.alarms().into_iter().filter(|alarm| alarm.finding.is_reported());
        let alarms = alarms.map(|alarm| (alarm.topic, alarm.writer)).chain(self.alarmed.iter().cloned());
        let alarms: BTreeSet<_> = alarms.collect();
        let alarms = alarms.into_iter().take(crate::head::MAX_ALARMS).collect();
        self.heads.number += 1;
        if self.heads.hello {
            self.heads.asked = Some(now.moment);
        }
        let (roster, grants, needs) =
            self.exchange.as_mut().map_or_else(Default::default, |exchange| exchange.state(now));
        let head = Head {
            writer: self.id,
            incarnation: self.author.incarnation,
            began: self.author.began,
            number: self.heads.number,
            time: self.clock.tick(now.wall),
            hello: std::mem::take(&mut self.heads.hello),
            place: self.heads.place.clone(),
            topics,
            received,
            wants,
            alarms,
            roster,
            grants,
            needs,
        };
        let signed = head.sign(&self.author.fleet, &self.author.key);
        self.heads.state(&head.received, signed.positions);
        let repeated = signed.positions.saturating_sub(new);
        self.heads.turns = ((topic_turn + signed.logs) % logs, received_turn + repeated);
        self.heads.schedule.sent(now.moment, self.others.len());
        self.actions.push(Action::PublishHead(signed.block));
    }
}

/// The number of heads that state a new position before those that were stated earlier. A head can be lost.
const STATED_FIRST: u32 = 2;

fn key_of(position: &Received) -> PositionKey {
    (position.topic.clone(), position.writer, position.incarnation)
}

impl Heads {
    /// Puts the positions first that are new, and the others after them, from the `turn`th on. Returns the number of new
    /// ones.
    fn new_first(&self, received: &mut Vec<Received>, turn: usize) -> usize {
        let is_new = |it: &Received| {
            self.stated.get(&key_of(it)).is_none_or(|(next, times)| *next != it.next || *times < STATED_FIRST)
        };
        let (mut new, mut stated): (Vec<_>, Vec<_>) = received.drain(..).partition(is_new);
        let count = stated.len().max(1);
        stated.rotate_left(turn % count);
        let first = new.len();
        new.append(&mut stated);
        *received = new;
        first
    }

    /// Notes the positions of a head, of which the first `count` fitted.
    fn state(&mut self, received: &[Received], count: usize) {
        let mut before = std::mem::take(&mut self.stated);
        for (index, position) in received.iter().enumerate() {
            let key = key_of(position);
            let stated = before.remove(&key).filter(|(next, _)| *next == position.next);
            let times = stated.map_or(0, |(_, times)| times) + u32::from(index < count);
            self.stated.insert(key, (position.next, times));
        }
    }
}

impl Readers {
    /// The readings of a topic.
    fn streams_of(&self, topic: &Topic) -> Vec<Stream> {
        let lowest = Stream::main(topic.clone());
        let streams = self.streams.range(lowest..).map(|(stream, _)| stream);
        streams.take_while(|stream| stream.topic == *topic).cloned().collect()
    }

    /// The catch-ups of a topic.
    fn catch_ups_of<'a>(&'a self, topic: &'a Topic) -> impl Iterator<Item = (&'a Stream, &'a Since)> {
        self.streams.iter().filter(move |(stream, _)| stream.topic == *topic && stream.catch_up.is_some())
    }

    /// Removes readings with their positions.
    fn remove(&mut self, is_gone: impl Fn(&Stream) -> bool) {
        for (stream, _) in self.streams.extract_if(.., |stream, _| is_gone(stream)) {
            if let Some(number) = stream.catch_up {
                self.allowances.remove(&number);
            }
        }
        let removed = self.all.extract_if(.., |(stream, _), _| is_gone(stream));
        let freed = removed.map(|(_, reader)| reader.buffered()).sum();
        self.budget.release(freed);
        self.blocked.retain(|(stream, _)| !is_gone(stream));
        self.timers.retain(|(_, (stream, _))| !is_gone(stream));
        self.timer_of.retain(|(stream, _), _| !is_gone(stream));
    }
}

/// The keys of all readers of a stream.
fn of_stream(stream: &Stream) -> RangeInclusive<ReaderKey> {
    (stream.clone(), WriterId([0; 32]))..=(stream.clone(), WriterId([255; 32]))
}

/// All incarnations of a member that its store knows.
fn own_incarnations(author: &Author, past: &BTreeMap<Incarnation, Timestamp>) -> BTreeSet<Incarnation> {
    past.keys().copied().chain([author.incarnation]).collect()
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;

    fn author(key: u8) -> Author {
        let key = SigningKey::from_bytes(&[key; 32]);
        Author { fleet: "fleet".to_owned(), key, incarnation: Incarnation([1; 16]), began: Timestamp(1) }
    }

    /// A member without a roster that reads everything on a topic.
    fn setup(number: u8, topic: &Topic) -> Setup {
        Setup {
            author: author(number),
            past: BTreeMap::new(),
            logs: BTreeMap::new(),
            topics: BTreeMap::from([(topic.clone(), Since::Earliest)]),
            checkpoints: Vec::new(),
            alarmed: BTreeSet::new(),
            seed: 1,
            exchange: None,
        }
    }

    #[test]
    fn the_end_of_a_subscription_frees_the_memory_of_its_bundles() {
        let topic: Topic = "jobs".parse().unwrap();
        let now = Now { moment: Moment::default(), wall: Timestamp(9) };
        let mut member = Member::new(setup(3, &topic), now);
        let mut log = OwnLog::default();
        let events = [Event { time: Timestamp(7), data: Bytes::from_static(b"x") }];
        let bundle = (0..2).map(|_| log.form(&topic, &events, &author(4), None)).last().unwrap();
        let size = bundle.block.len();
        member.receive(Arc::new(bundle), now);
        assert_eq!(member.budget().buffered, size, "it waits for the first one");
        member.unsubscribe(&topic);
        assert_eq!(member.budget().buffered, 0);
    }

    #[test]
    fn a_member_without_a_roster_reads_nothing_on_a_topic_that_is_encrypted() {
        let topic: Topic = "jobs".parse().unwrap();
        let now = Now { moment: Moment::default(), wall: Timestamp(9) };
        let member = |number: u8| Member::new(setup(number, &topic), now);
        let mut writer = member(4);
        let bundle = writer.form(&topic, &[(Timestamp(7), Bytes::from_static(b"x"))], now).unwrap();
        writer.stored(bundle.clone(), now);
        let later = Now { moment: Moment::default().after(Duration::from_secs(9)), wall: Timestamp(9) };
        writer.wake(later);
        let head = writer.take_actions().into_iter().find_map(|action| match action {
            Action::PublishHead(block) => Some(Head::open(&block, "fleet").unwrap()),
            _ => None,
        });
        for is_encrypted in [false, true] {
            let (mut by_message, mut by_head) = (member(3), member(3));
            if is_encrypted {
                by_message.encrypt(topic.clone(), "all".parse().unwrap());
                by_head.encrypt(topic.clone(), "all".parse().unwrap());
            }
            by_message.receive(bundle.clone(), now);
            by_head.receive_head(head.clone().unwrap(), now);
            by_head.wake(later);
            let reads = |member: &mut Member| {
                let actions = member.take_actions();
                actions.iter().any(|it| matches!(it, Action::Deliver(_) | Action::Fetch { .. }))
            };
            assert_eq!([&mut by_message, &mut by_head].map(reads), [!is_encrypted; 2]);
        }
    }

    #[test]
    fn what_a_head_says_of_own_topics_that_never_were_is_not_believed() {
        let topic: Topic = "jobs".parse().unwrap();
        let now = Now { moment: Moment::default(), wall: Timestamp(9) };
        let later = Now { moment: Moment::default().after(Duration::from_secs(9)), wall: Timestamp(9) };
        let (mut member, mut other) =
            (Member::new(setup(3, &topic), now), Member::new(setup(4, &topic), now));
        let bundle = other.form(&topic, &[(Timestamp(7), Bytes::from_static(b"x"))], now).unwrap();
        other.stored(bundle, now);
        other.wake(later);
        let head = other.take_actions().into_iter().find_map(|action| match action {
            Action::PublishHead(block) => Some(Head::open(&block, "fleet").unwrap()),
            _ => None,
        });
        let claim = |number: u64| Received {
            topic: format!("invented.{number}").parse().unwrap(),
            writer: member.id(),
            incarnation: member.incarnation(),
            next: 5,
            from: 0,
        };
        let head = Head { received: (0..200).map(claim).collect(), ..head.unwrap() };
        member.receive_head(head, later);
        assert_eq!(member.own_alarms.len(), 0);
        let alarms = member.take_actions().iter().filter(|it| matches!(it, Action::Alarm(_))).count();
        assert_eq!(alarms, 0);
    }

    /// The bundle that a fetch asks for.
    fn fetched_place(actions: &[Action]) -> Option<Listed> {
        actions.iter().find_map(|action| match action {
            Action::Fetch { listed, .. } => Some(*listed),
            _ => None,
        })
    }

    #[test]
    fn a_catch_up_goes_on_after_a_restart_although_the_writer_is_gone() {
        let topic: Topic = "jobs".parse().unwrap();
        let now = Now { moment: Moment::default(), wall: Timestamp(9) };
        let (mut log, writer) = (OwnLog::default(), author(4));
        let events = [Event { time: Timestamp(7), data: Bytes::from_static(b"x") }];
        let bundles: Vec<Arc<Bundle>> =
            (0..3).map(|_| Arc::new(log.form(&topic, &events, &writer, None))).collect();
        let checkpoint = |bundle: &Bundle| Checkpoint {
            incarnation: writer.incarnation,
            began: writer.began,
            next: bundle.listed().next(),
            from: 0,
            last: Some(bundle.listed()),
            time: Timestamp(7),
            before: None,
            is_replaced: false,
            floor: Timestamp(0),
        };
        let checkpoints = vec![(topic.clone(), writer.id(), checkpoint(&bundles[2]))];
        let setup = Setup { checkpoints, ..setup(3, &topic) };
        let mut member = Member::new(setup, now);
        let begun = vec![(writer.id(), checkpoint(&bundles[0]))];
        member.catch_up(1, topic.clone(), Since::Earliest, begun, u64::MAX, now);
        let stream = Stream { topic, catch_up: Some(1) };
        let (mut delivered, mut now) = (Vec::new(), now);
        let mut has_caught_up = false;
        while !has_caught_up {
            now.moment = member.deadline().max(now.moment);
            assert!(now.moment < Moment::default().after(Duration::from_secs(60)), "it waits for the writer");
            member.wake(now);
            let actions = member.take_actions();
            if let Some(listed) = fetched_place(&actions) {
                let bundle = bundles.iter().find(|bundle| bundle.listed() == listed).unwrap();
                member.fetched(&stream, &writer.id(), &listed, bundle.clone(), now);
            }
            for action in actions.into_iter().chain(member.take_actions()) {
                match action {
                    Action::Deliver(delivery) => {
                        delivered.push(delivery.first);
                        member.committed(&delivery, now);
                    }
                    Action::CaughtUp(_) => has_caught_up = true,
                    _ => {}
                }
            }
        }
        assert_eq!(delivered, [1, 2]);
    }
}
