//! Owns one simulated member: its durable store, its daemon's blocks, and the protocol while it runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_topics::action::{Checkpoint, Delivery, Stream};
use dim_topics::alarm::Alarm;
use dim_topics::bundle::Bundle;
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::index::BundlePlace;
use dim_topics::member::{Member, Setup};
use dim_topics::membership::Membership;
use dim_topics::membership::exchange::{Exchange, RandomSource};
use dim_topics::membership::key_grant::Epoch;
use dim_topics::membership::roster::SignedRoster;
use dim_topics::own_log::{Author, LogEnd};
use dim_topics::reader::Since;
use dim_topics::time::{Moment, Now};
use ed25519_dalek::SigningKey;
use rand::Rng as _;
use rand::rngs::StdRng;

use crate::admin;
use crate::checker::{Record, Truth};

/// The name of the fleet.
pub const FLEET: &str = "simulated";

/// The time of day at the start of a simulation.
pub const START: u64 = 1_700_000_000_000_000_000;

/// The state of a member that survives a crash.
#[derive(Clone, Debug)]
pub struct Store {
    pub key: [u8; 32],
    /// The identity of the member, which follows from the key.
    pub id: WriterId,
    pub past: BTreeMap<Incarnation, Timestamp>,
    /// The events that are not in a bundle yet.
    pub outbox: BTreeMap<Topic, VecDeque<(Timestamp, Bytes)>>,
    /// The own bundles, and whether each was published.
    pub bundles: Vec<(Arc<Bundle>, bool)>,
    pub logs: BTreeMap<Topic, LogEnd>,
    pub kept: BTreeMap<Topic, Timestamp>,
    pub checkpoints: Checkpoints,
    pub topics: BTreeMap<Topic, Since>,
    pub record: Record,
    /// The newest roster, with its version.
    pub roster: Option<(u64, Bytes)>,
    pub epochs: Vec<Epoch>,
    /// The receivers that began late, by the numbers of their catch-ups.
    pub late_receivers: BTreeMap<u64, LateReceiver>,
}

/// A receiver of a member that began later than the member, and reads from the earliest event on.
#[derive(Clone, Debug)]
pub struct LateReceiver {
    pub topic: Topic,
    pub checkpoints: Checkpoints,
    pub record: Record,
    pub has_caught_up: bool,
    /// The size of the events that it may still receive, in bytes, as it said last.
    pub allowance: u64,
}

/// Positions in the logs of writers.
pub type Checkpoints = BTreeMap<(Topic, WriterId, Incarnation), Checkpoint>;

/// Something that a member makes durable.
#[derive(Debug)]
pub enum Committed {
    Delivery(Box<Delivery>),
    CaughtUp(Stream),
}

impl Store {
    /// The own bundles of a topic that are kept.
    pub fn places(&self, topic: &Topic) -> Vec<BundlePlace> {
        let bundles = self.bundles.iter().map(|(bundle, _)| bundle);
        bundles.filter(|bundle| bundle.header.topic == *topic).map(|bundle| bundle.place()).collect()
    }
}

/// One simulated member.
#[derive(Debug)]
pub struct Node {
    pub store: Store,
    /// The protocol, while the member runs.
    pub member: Option<Member>,
    /// The number of the process start; events of an earlier one are void.
    pub generation: u64,
    /// The blocks of the daemon. They survive a crash of the member.
    pub blocks: BTreeSet<Digest>,
    /// The offset of the time of day, in nanoseconds.
    pub offset: i64,
    /// The topics for which a bundle is being made durable.
    pub writing: BTreeSet<Topic>,
    /// The deliveries that are not durable.
    pub deliveries: VecDeque<Committed>,
    /// Whether deliveries are being made durable.
    pub is_committing: bool,
    /// Whether a time is planned at which the own indexes are provided.
    pub is_indexing: bool,
    /// The alarms since the start of the simulation.
    pub alarms: BTreeSet<Alarm>,
    /// The time of the earliest planned wake.
    pub wake: Option<Duration>,
    pub joined: bool,
}

impl Node {
    pub fn new(number: usize) -> Self {
        let mut key = [7; 32];
        key[0] = number as u8;
        Self {
            store: Store {
                key,
                id: WriterId::of(&SigningKey::from_bytes(&key).verifying_key()),
                past: BTreeMap::new(),
                outbox: BTreeMap::new(),
                bundles: Vec::new(),
                logs: BTreeMap::new(),
                kept: BTreeMap::new(),
                checkpoints: BTreeMap::new(),
                topics: BTreeMap::new(),
                record: Record::default(),
                roster: None,
                epochs: Vec::new(),
                late_receivers: BTreeMap::new(),
            },
            member: None,
            generation: 0,
            blocks: BTreeSet::new(),
            offset: 0,
            writing: BTreeSet::new(),
            deliveries: VecDeque::new(),
            is_committing: false,
            is_indexing: false,
            alarms: BTreeSet::new(),
            wake: None,
            joined: false,
        }
    }

    /// The time at this member.
    pub fn now(&self, now: Duration) -> Now {
        let wall = START.saturating_add_signed(self.offset) + now.as_nanos() as u64;
        Now { moment: Moment(now), wall: Timestamp(wall) }
    }

    /// Starts the member as a new incarnation, which is durable before anything is published.
    /// In a fleet with a roster there are random numbers for keys.
    pub fn start(
        &mut self,
        incarnation: Incarnation,
        seed: u64,
        now: Duration,
        fleet: &str,
        random: Option<StdRng>,
    ) {
        let now = self.now(now);
        let author = Author {
            fleet: fleet.to_owned(),
            key: SigningKey::from_bytes(&self.store.key),
            incarnation,
            began: now.wall,
        };
        let exchange = random.map(|mut random| {
            let open = |(_, block): &(u64, Bytes)| SignedRoster::open(block, fleet).expect("it was verified");
            let roster = self.store.roster.as_ref().map(open);
            let identity = admin::identity(&self.store.key);
            let mut membership = Membership::new(fleet.to_owned(), author.id(), identity, roster);
            membership.restore(admin::group(), self.store.epochs.iter().cloned());
            let random = RandomSource::new(move |bytes| random.fill_bytes(bytes));
            let mut exchange = Exchange::new(membership, author.key.clone(), random);
            for topic in self.store.topics.keys() {
                exchange.encrypt(topic.clone(), admin::group());
            }
            exchange
        });
        let checkpoints = self.store.checkpoints.iter();
        let alarmed = self.alarms.iter().filter(|alarm| alarm.finding.is_reported());
        let setup = Setup {
            author,
            past: self.store.past.clone(),
            logs: self.store.logs.clone(),
            topics: self.store.topics.clone(),
            checkpoints: checkpoints
                .map(|((topic, writer, _), checkpoint)| (topic.clone(), *writer, checkpoint.clone()))
                .collect(),
            alarmed: alarmed.map(|alarm| (alarm.topic.clone(), alarm.writer)).collect(),
            seed,
            exchange,
        };
        let mut member = Member::new(setup, now);
        for (topic, time) in &self.store.kept {
            member.keep_since(topic, *time);
        }
        for topic in self.store.topics.keys() {
            member.restore_index(topic, self.store.places(topic));
        }
        for (number, receiver) in self.store.late_receivers.iter().filter(|(_, it)| !it.has_caught_up) {
            let checkpoints = receiver.checkpoints.iter().map(|((_, writer, _), it)| (*writer, it.clone()));
            member.catch_up(
                *number,
                receiver.topic.clone(),
                Since::Earliest,
                checkpoints.collect(),
                receiver.allowance,
                now,
            );
        }
        self.store.past.insert(incarnation, member.began());
        self.member = Some(member);
    }

    /// Ends the process. What is not durable is lost.
    pub fn crash(&mut self) {
        self.member = None;
        self.generation += 1;
        self.writing.clear();
        self.deliveries.clear();
        self.is_committing = false;
        self.is_indexing = false;
        self.wake = None;
    }

    /// Makes a result durable, in the way of a transaction, and checks it.
    pub fn commit(&mut self, result: &Committed, truth: &Truth) {
        let delivery = match result {
            Committed::Delivery(delivery) => delivery,
            Committed::CaughtUp(stream) => {
                let number = stream.catch_up.expect("the main reading does not catch up");
                let receiver = self.store.late_receivers.get_mut(&number).expect("it began");
                assert!(!receiver.has_caught_up, "a receiver catches up once");
                receiver.has_caught_up = true;
                return;
            }
        };
        let is_own = delivery.writer == self.store.id;
        let store = &mut self.store;
        if let Some(number) = delivery.stream.catch_up {
            let receiver = store.late_receivers.get_mut(&number).expect("it began");
            assert!(!receiver.has_caught_up, "an earlier event after the end of a catch-up");
            receiver.record.add(delivery, is_own, truth);
            advance(&mut receiver.checkpoints, delivery);
            return;
        }
        store.record.add(delivery, is_own, truth);
        advance(&mut store.checkpoints, delivery);
        for receiver in store.late_receivers.values_mut() {
            if receiver.has_caught_up && receiver.topic == delivery.stream.topic {
                receiver.record.add(delivery, is_own, truth);
            }
        }
    }
}

/// Writes the position after a delivery.
fn advance(checkpoints: &mut Checkpoints, delivery: &Delivery) {
    let (topic, writer) = (delivery.stream.topic.clone(), delivery.writer);
    if let Some(replaced) = delivery.replaced
        && let Some(checkpoint) = checkpoints.get_mut(&(topic.clone(), writer, replaced))
    {
        checkpoint.is_replaced = true;
    }
    for removed in &delivery.removed {
        checkpoints.remove(&(topic.clone(), writer, *removed));
    }
    let key = (topic, writer, delivery.checkpoint.incarnation);
    checkpoints.insert(key, delivery.checkpoint.clone());
}
