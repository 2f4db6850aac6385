//! Owns a simulated fleet: the members, the network between them, and the queue of everything that happens, in virtual
//! time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_topics::action::{Action, GapReason, Outcome, Stream};
use dim_topics::alarm::Finding;
use dim_topics::bundle::{Bundle, Listed};
use dim_topics::head::Head;
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::membership::key_grant::Epoch;
use dim_topics::own_log::LogEnd;
use dim_topics::reader::Since;
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use crate::admin::{Admin, Change};
use crate::checker::{Record, Truth};
use crate::node::{Committed, FLEET, LateReceiver, Node, Store};
use crate::troubles::Troubles;

/// The maximum number of alarms about a writer of a topic that one node raises, over all its process starts.
const MAX_ALARMS: usize = 500;

/// The age at which a writer with retention removes a bundle.
const RETENTION: Duration = Duration::from_secs(20);

/// A message in the network.
#[derive(Clone)]
pub enum Message {
    Bundle(Bytes),
    Head(Bytes),
}

/// Something that happens.
pub enum Happening {
    Arrive {
        to: usize,
        message: Message,
    },
    Wake {
        node: usize,
    },
    PublishEvent {
        node: usize,
        topic: usize,
        number: usize,
    },
    CommitBundle {
        node: usize,
        generation: u64,
        bundle: Arc<Bundle>,
        end: LogEnd,
        events: usize,
        version: u64,
    },
    CommitDeliveries {
        node: usize,
        generation: u64,
        deliveries: Vec<Committed>,
    },
    EndNodeFetch {
        node: usize,
        generation: u64,
        stream: Stream,
        writer: WriterId,
        digest: Digest,
    },
    ProvideIndexes {
        node: usize,
        generation: u64,
    },
    EndFetch {
        node: usize,
        generation: u64,
        stream: Stream,
        writer: WriterId,
        listed: Listed,
    },
    Crash {
        node: usize,
    },
    Start {
        node: usize,
    },
    LoseBlocks {
        node: usize,
    },
    JumpClock {
        node: usize,
    },
    Partition {
        group: BTreeSet<usize>,
    },
    Heal,
    RemoveOld {
        node: usize,
    },
    Backup {
        node: usize,
    },
    Restore {
        node: usize,
    },
    Copy {
        node: usize,
    },
    BeginCatchUp {
        node: usize,
        topic: usize,
        number: u64,
    },
    Allow {
        node: usize,
        number: u64,
        allowance: u64,
    },
    EndTroubles,
    Admin(Change),
    Publish,
    EndBlockFetch {
        node: usize,
        generation: u64,
        digest: Digest,
        is_roster: bool,
    },
    CommitRoster {
        node: usize,
        generation: u64,
        version: u64,
        block: Bytes,
    },
    CommitEpochs {
        node: usize,
        generation: u64,
        number: u64,
        epochs: Vec<Epoch>,
    },
}

/// A simulated fleet.
pub struct Fleet {
    pub troubles: Troubles,
    pub rng: StdRng,
    pub now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    happenings: HashMap<u64, Happening>,
    count: u64,
    pub nodes: Vec<Node>,
    pub topics: Vec<Topic>,
    truth: Truth,
    /// The members that cannot reach the others.
    cut_off: BTreeSet<usize>,
    has_trouble: bool,
    /// The admin of a fleet with a roster.
    pub admin: Option<Admin>,
    /// The members that never start again.
    pub dead: BTreeSet<usize>,
    backups: BTreeMap<usize, Store>,
    /// The keys of members that were copied or restored.
    doubled: BTreeSet<WriterId>,
    /// Those of them that others can notice.
    noticeable: BTreeSet<WriterId>,
    /// The incarnations of which a restored member has lost bundles.
    lost: BTreeMap<(Topic, Incarnation), u64>,
    /// The bundles by their digests.
    bundles: HashMap<Digest, Arc<Bundle>>,
    /// The nodes of indexes by their digests.
    index_nodes: HashMap<Digest, Bytes>,
    /// Verified heads, because each is received by many members.
    heads: HashMap<Digest, Head>,
}

impl Fleet {
    pub fn new(seed: u64, troubles: Troubles) -> Self {
        let topics = (0..troubles.topics).map(|it| format!("topic-{it}").parse().expect("a topic")).collect();
        let nodes: Vec<Node> = (0..troubles.members + troubles.late_joiners).map(Node::new).collect();
        let admin = Admin::new(&troubles, &nodes);
        let mut fleet = Self {
            admin,
            dead: BTreeSet::new(),
            rng: StdRng::seed_from_u64(seed),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            happenings: HashMap::new(),
            count: 0,
            nodes,
            topics,
            truth: Truth::new(troubles.restored + troubles.copied > 0),
            cut_off: BTreeSet::new(),
            has_trouble: true,
            backups: BTreeMap::new(),
            doubled: BTreeSet::new(),
            noticeable: BTreeSet::new(),
            lost: BTreeMap::new(),
            bundles: HashMap::new(),
            index_nodes: HashMap::new(),
            heads: HashMap::new(),
            troubles,
        };
        fleet.plan();
        fleet
    }

    /// Plans the load and the troubles.
    fn plan(&mut self) {
        let Troubles { members, late_joiners, length, events, .. } = self.troubles;
        for node in 0..members + late_joiners {
            let at = if node < members { Duration::ZERO } else { self.random(length) };
            self.at(at, Happening::Start { node });
            let first = if node < members { Duration::from_millis(1) } else { at + Duration::from_secs(1) };
            for number in 0..events {
                let at = first + self.random(length.saturating_sub(first));
                let topic = self.rng.random_range(0..self.topics.len());
                self.at(at, Happening::PublishEvent { node, topic, number });
            }
        }
        for _ in 0..self.troubles.crashes {
            let (at, node) = (self.random(length), self.rng.random_range(0..members));
            self.at(at, Happening::Crash { node });
        }
        for _ in 0..self.troubles.lost_blocks {
            let (at, node) = (self.random(length), self.rng.random_range(0..members));
            self.at(at, Happening::LoseBlocks { node });
        }
        for _ in 0..self.troubles.clock_jumps {
            let (at, node) = (self.random(length), self.rng.random_range(0..members));
            self.at(at, Happening::JumpClock { node });
        }
        for _ in 0..self.troubles.partitions {
            let at = self.random(length);
            let group = (0..members).filter(|_| self.rng.random_bool(0.5)).collect();
            self.at(at, Happening::Partition { group });
            let heal = at + self.random(Duration::from_secs(60));
            self.at(heal, Happening::Heal);
        }
        if self.troubles.has_retention {
            for node in 0..members {
                let mut at = RETENTION;
                while at < length + self.troubles.recovery() {
                    self.at(at, Happening::RemoveOld { node });
                    at += Duration::from_secs(5);
                }
            }
        }
        let mut victims: Vec<usize> = (0..members).collect();
        for _ in 0..self.troubles.restored {
            let node = victims.swap_remove(self.rng.random_range(0..victims.len()));
            self.at(length / 3, Happening::Backup { node });
            self.at(length * 2 / 3, Happening::Restore { node });
        }
        for _ in 0..self.troubles.copied {
            let node = victims.swap_remove(self.rng.random_range(0..victims.len()));
            self.at(length / 2, Happening::Copy { node });
        }
        for number in 0..self.troubles.catch_ups {
            let (at, node) = (self.random(length), self.rng.random_range(0..members));
            let (topic, number) = (self.rng.random_range(0..self.topics.len()), number as u64);
            self.at(at, Happening::BeginCatchUp { node, topic, number });
            if self.troubles.has_slow_receivers {
                // One waits longer than a missing bundle does.
                for (after, allowance) in [(1, 0), (3_000, 500), (9_000, 0), (2_000_000, u64::MAX)] {
                    let at = at + Duration::from_millis(after);
                    self.at(at, Happening::Allow { node, number, allowance });
                }
            }
        }
        self.plan_admin();
        self.at(length, Happening::EndTroubles);
    }

    /// Runs until everything is delivered, and checks it.
    pub fn run(mut self) {
        let end = self.troubles.length + self.troubles.recovery();
        let mut look = self.troubles.length + Duration::from_secs(30);
        while let Some(Reverse((at, number))) = self.queue.pop() {
            if at > end {
                break;
            }
            self.now = at;
            let happening = self.happenings.remove(&number).expect("each has its entry");
            self.happen(happening);
            if self.now > look {
                look = self.now + Duration::from_secs(30);
                if self.is_done() {
                    break;
                }
            }
        }
        if let Err(why) = self.check() {
            if std::env::var("DIM_SIMULATION_SEED").is_ok() {
                eprintln!("{:#?}", self.nodes.iter().map(|node| &node.member).collect::<Vec<_>>());
            }
            panic!("{why}");
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrive { to, message } => self.arrive(to, message),
            Happening::Wake { node } => {
                if self.nodes[node].wake == Some(self.now) {
                    self.nodes[node].wake = None;
                    self.with_member(node, |member, now| member.wake(now));
                }
            }
            Happening::PublishEvent { node, topic, number } => self.publish_event(node, topic, number),
            Happening::CommitBundle { node, generation, bundle, end, events, version } => {
                if self.nodes[node].generation == generation {
                    self.commit_bundle(node, bundle, end, events, version);
                }
            }
            Happening::CommitDeliveries { node, generation, deliveries } => {
                if self.nodes[node].generation == generation {
                    self.commit_deliveries(node, deliveries);
                }
            }
            Happening::EndFetch { node, generation, stream, writer, listed } => {
                if self.nodes[node].generation == generation {
                    self.end_fetch(node, &stream, &writer, &listed);
                }
            }
            Happening::EndNodeFetch { node, generation, stream, writer, digest } => {
                if self.nodes[node].generation == generation {
                    self.end_node_fetch(node, &stream, &writer, &digest);
                }
            }
            Happening::ProvideIndexes { node, generation } => {
                if self.nodes[node].generation == generation {
                    self.provide_indexes(node);
                }
            }
            Happening::Crash { node } => self.crash(node),
            Happening::Start { node } => self.start(node),
            Happening::LoseBlocks { node } => self.nodes[node].blocks.clear(),
            Happening::JumpClock { node } => {
                let seconds = self.rng.random_range(-300..300_i64);
                self.nodes[node].offset += seconds * 1_000_000_000;
            }
            Happening::Partition { group } => self.cut_off = group,
            Happening::Heal => self.cut_off.clear(),
            Happening::RemoveOld { node } => self.remove_old(node),
            Happening::Backup { node } => drop(self.backups.insert(node, self.nodes[node].store.clone())),
            Happening::Restore { node } => self.restore(node),
            Happening::Copy { node } => self.copy(node),
            Happening::BeginCatchUp { node, topic, number } => self.begin_catch_up(node, topic, number),
            Happening::Allow { node, number, allowance } => {
                // It says the same to a member that starts again.
                if let Some(receiver) = self.nodes[node].store.late_receivers.get_mut(&number) {
                    receiver.allowance = allowance;
                }
                self.with_member(node, |member, now| member.allow(number, allowance, now));
            }
            Happening::Admin(change) => self.change_roster(change),
            Happening::Publish => self.publish_roster(),
            Happening::EndBlockFetch { node, generation, digest, is_roster } => {
                if self.nodes[node].generation == generation {
                    self.end_block_fetch(node, &digest, is_roster);
                }
            }
            Happening::CommitRoster { node, generation, version, block } => {
                let it = &mut self.nodes[node];
                let is_newer = it.store.roster.as_ref().is_none_or(|(stored, _)| *stored < version);
                if it.generation == generation && is_newer {
                    it.store.roster = Some((version, block));
                }
            }
            Happening::CommitEpochs { node, generation, number, epochs } => {
                if self.nodes[node].generation == generation {
                    self.store_epochs(node, number, &epochs);
                }
            }
            Happening::EndTroubles => {
                self.has_trouble = false;
                self.cut_off.clear();
            }
        }
    }

    fn start(&mut self, node: usize) {
        if self.nodes[node].member.is_some() || self.dead.contains(&node) {
            return;
        }
        let (incarnation, seed) = (Incarnation(self.rng.random()), self.rng.next_u64());
        if !self.nodes[node].joined {
            self.nodes[node].joined = true;
            let now = self.nodes[node].now(self.now);
            let is_late = node >= self.troubles.members && self.now > Duration::ZERO;
            let reads_all = is_late || self.rng.random_bool(0.5);
            let since = if reads_all { Since::Earliest } else { Since::Head(now.wall) };
            let topics = self.topics.iter().map(|topic| (topic.clone(), since));
            self.nodes[node].store.topics = topics.collect();
        }
        let now = self.now;
        let random = self.admin.is_some().then(|| StdRng::seed_from_u64(seed));
        let fleet = self.admin.as_ref().map_or(FLEET, Admin::fleet).to_owned();
        self.nodes[node].start(incarnation, seed, now, &fleet, random);
        // What was durable and perhaps not published is published again, as the same block.
        let unsent: Vec<Arc<Bundle>> = self.nodes[node]
            .store
            .bundles
            .iter()
            .filter(|(_, sent)| !sent)
            .map(|(it, _)| it.clone())
            .collect();
        self.with_member(node, |member, now| {
            for bundle in unsent {
                member.stored(bundle, now);
            }
            member.wake(now);
        });
        for topic in self.topics.clone() {
            self.form_bundle(node, &topic);
        }
        self.plan_indexes(node);
    }

    /// Provides the indexes of a member soon.
    fn plan_indexes(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if it.is_indexing {
            return;
        }
        it.is_indexing = true;
        let generation = it.generation;
        let at = self.now + Duration::from_millis(100) + self.random(Duration::from_secs(5));
        self.at(at, Happening::ProvideIndexes { node, generation });
    }

    fn provide_indexes(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        it.is_indexing = false;
        let Some(member) = &mut it.member else { return };
        for topic in member.unindexed().cloned().collect::<Vec<_>>() {
            let nodes = member.index(&topic);
            member.indexed(&topic, nodes.as_ref().map(|nodes| nodes.root));
            // All bundles may be removed by now.
            let Some(nodes) = nodes else { continue };
            it.blocks.extend(nodes.blocks.iter().map(|(digest, _)| *digest));
            self.index_nodes.extend(nodes.blocks);
        }
    }

    fn crash(&mut self, node: usize) {
        if self.nodes[node].member.is_none() {
            return;
        }
        self.nodes[node].crash();
        let back = self.now + self.random(Duration::from_secs(20));
        self.at(back, Happening::Start { node });
    }

    /// Lets the member crash, as often as the troubles say. Returns whether it did.
    pub fn may_crash(&mut self, node: usize) -> bool {
        let crashes = self.has_trouble && self.rng.random_bool(self.troubles.crashes_at_commits);
        if crashes {
            self.crash(node);
        }
        crashes
    }

    fn publish_event(&mut self, node: usize, topic: usize, number: usize) {
        let topic = self.topics[topic].clone();
        let wall = self.nodes[node].now(self.now).wall;
        let padding = "x".repeat(self.rng.random_range(0..200));
        let generation = self.nodes[node].generation;
        let event = Bytes::from(format!("{node} {number} {generation} {padding}"));
        self.nodes[node].store.outbox.entry(topic.clone()).or_default().push_back((wall, event));
        self.form_bundle(node, &topic);
    }

    /// Forms a bundle of the waiting events, unless one is being made durable.
    pub fn form_bundle(&mut self, node: usize, topic: &Topic) {
        let now = self.nodes[node].now(self.now);
        let it = &mut self.nodes[node];
        let Some(member) = &mut it.member else { return };
        let waiting = it.store.outbox.get(topic).filter(|waiting| !waiting.is_empty());
        let (Some(waiting), false) = (waiting, it.writing.contains(topic)) else { return };
        let events: Vec<_> = waiting.iter().cloned().collect();
        let Ok(bundle) = member.form(topic, &events, now) else {
            assert!(self.admin.is_some(), "the topic is not encrypted");
            // It asks for a key.
            self.with_member(node, |_, _| ());
            return;
        };
        let version = member.membership().and_then(|it| it.roster()).map_or(0, |it| it.roster.version);
        let end = LogEnd::after(&bundle, it.store.logs.get(topic));
        it.writing.insert(topic.clone());
        let (generation, events) = (it.generation, bundle.count as usize);
        let at = self.now + Duration::from_millis(1) + self.random(self.troubles.commit);
        self.at(at, Happening::CommitBundle { node, generation, bundle, end, events, version });
    }

    fn commit_bundle(&mut self, node: usize, bundle: Arc<Bundle>, end: LogEnd, events: usize, version: u64) {
        if self.may_crash(node) {
            return;
        }
        let topic = bundle.header.topic.clone();
        let it = &mut self.nodes[node];
        it.store.outbox.get_mut(&topic).expect("it had events").drain(..events);
        it.store.logs.insert(topic.clone(), end);
        it.store.bundles.push((bundle.clone(), false));
        it.blocks.insert(bundle.digest);
        it.writing.remove(&topic);
        let published = match &mut self.admin {
            Some(admin) => admin.published(&bundle, version),
            None => bundle.events().expect("own events can be read"),
        };
        self.truth.published(&bundle, &published);
        // The unit tests verify bundles; here that would take most of the time.
        self.bundles.insert(bundle.digest, bundle.clone());
        if self.may_crash(node) {
            return;
        }
        self.with_member(node, |member, now| member.stored(bundle, now));
        self.form_bundle(node, &topic);
        self.plan_indexes(node);
    }

    fn commit_deliveries(&mut self, node: usize, deliveries: Vec<Committed>) {
        self.nodes[node].is_committing = false;
        if self.may_crash(node) {
            return;
        }
        for delivery in &deliveries {
            let it = &mut self.nodes[node];
            it.commit(delivery, &self.truth);
            let Committed::Delivery(delivery) = delivery else { continue };
            let own = &it.store.past;
            let id = delivery.checkpoint.incarnation;
            if let (Some(admin), Outcome::Events(_)) = (&self.admin, &delivery.outcome) {
                let topic = delivery.stream.topic.clone();
                admin.check_reader(node, (topic, delivery.writer, id, delivery.first));
            }
            assert!(
                !own.contains_key(&id) || self.doubled.contains(&delivery.writer),
                "a member reads its own events"
            );
        }
        if self.may_crash(node) {
            return;
        }
        self.with_member(node, |member, now| {
            for delivery in &deliveries {
                if let Committed::Delivery(delivery) = delivery {
                    member.committed(delivery, now);
                }
            }
        });
        self.commit_more(node);
    }

    /// Makes the waiting deliveries durable, unless others are being made durable.
    fn commit_more(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if it.is_committing || it.deliveries.is_empty() {
            return;
        }
        it.is_committing = true;
        let (generation, deliveries) = (it.generation, it.deliveries.drain(..).collect());
        let at = self.now + Duration::from_millis(1) + self.random(self.troubles.commit);
        self.at(at, Happening::CommitDeliveries { node, generation, deliveries });
    }

    fn arrive(&mut self, to: usize, message: Message) {
        match message {
            Message::Bundle(block) => {
                let bundle = self.bundles[&Digest::of(&block)].clone();
                self.with_member(to, |member, now| member.receive(bundle, now));
            }
            Message::Head(block) => {
                let digest = Digest::of(&block);
                let fleet = self.admin.as_ref().map_or(FLEET, Admin::fleet);
                let open = || Head::open(&block, fleet).expect("members send valid heads");
                let head = self.heads.entry(digest).or_insert_with(open).clone();
                self.with_member(to, |member, now| {
                    member.receive_head(head, now);
                });
            }
        }
    }

    fn end_node_fetch(&mut self, node: usize, stream: &Stream, writer: &WriterId, digest: &Digest) {
        let block = self.provider(node, digest).map(|_| self.index_nodes[digest].clone());
        if block.is_some() {
            self.nodes[node].blocks.insert(*digest);
        }
        let block = block.as_deref();
        self.with_member(node, |member, now| member.node_fetched(stream, writer, digest, block, now));
    }

    /// A member from which another one can fetch a block now.
    pub fn provider(&mut self, node: usize, digest: &Digest) -> Option<usize> {
        let fails = self.has_trouble && self.rng.random_bool(self.troubles.failed_fetches);
        let reaches = |other: &usize| self.reaches(*other, node);
        let has = |other: &usize| self.nodes[*other].blocks.contains(digest);
        (0..self.nodes.len()).find(|other| reaches(other) && has(other)).filter(|_| !fails)
    }

    fn end_fetch(&mut self, node: usize, stream: &Stream, writer: &WriterId, listed: &Listed) {
        let block = self.provider(node, &listed.digest).map(|_| self.bundles[&listed.digest].clone());
        match block {
            Some(bundle) => {
                self.nodes[node].blocks.insert(listed.digest);
                self.with_member(node, |member, now| member.fetched(stream, writer, listed, bundle, now));
            }
            None => self.with_member(node, |member, now| member.fetch_failed(stream, writer, listed, now)),
        }
    }

    fn remove_old(&mut self, node: usize) {
        let oldest = self.nodes[node].now(self.now).wall.0.saturating_sub(RETENTION.as_nanos() as u64);
        let it = &mut self.nodes[node];
        for topic in &self.topics {
            let removed: Vec<Digest> = it
                .store
                .bundles
                .iter()
                .filter(|(bundle, sent)| *sent && bundle.header.topic == *topic && bundle.time.0 < oldest)
                .map(|(bundle, _)| bundle.digest)
                .collect();
            it.store.bundles.retain(|(bundle, _)| !removed.contains(&bundle.digest));
            it.blocks.retain(|digest| !removed.contains(digest));
            let of_topic = it.store.bundles.iter().filter(|(bundle, _)| bundle.header.topic == *topic);
            let kept = of_topic.map(|(bundle, _)| bundle.time).min();
            let kept = kept.unwrap_or(dim_model::time::Timestamp(oldest));
            let stored = it.store.kept.entry(topic.clone()).or_default();
            *stored = kept.max(*stored);
            if let Some(member) = &mut it.member {
                member.keep_since(topic, kept);
            }
        }
    }

    fn restore(&mut self, node: usize) {
        let Some(backup) = self.backups.remove(&node) else { return };
        let id = backup.id;
        self.doubled.insert(id);
        // Others can only notice the loss of what they have received.
        let is_lost = |bundle: &Bundle| backup.bundles.iter().all(|(it, _)| it.digest != bundle.digest);
        let lost = self.nodes[node].store.bundles.iter().map(|(bundle, _)| bundle).filter(|it| is_lost(it));
        let others = self.nodes.iter().map(|other| &other.store.record);
        if lost.into_iter().any(|bundle| others.clone().any(|record| record.has(bundle))) {
            self.noticeable.insert(id);
        }
        let it = &mut self.nodes[node];
        let lost = it.store.bundles.iter().map(|(it, _)| (it.header.topic.clone(), it.header.incarnation));
        self.lost.extend(lost.map(|key| (key, 0)));
        it.crash();
        it.store = backup;
        it.blocks.clear();
        self.start(node);
    }

    fn copy(&mut self, node: usize) {
        let mut copy = Node::new(node);
        copy.store = self.nodes[node].store.clone();
        copy.blocks = self.nodes[node].blocks.clone();
        copy.joined = self.nodes[node].joined;
        copy.generation = 1_000_000;
        self.doubled.insert(copy.store.id);
        self.noticeable.insert(copy.store.id);
        self.nodes.push(copy);
        let number = self.nodes.len() - 1;
        self.start(number);
        for event in 0..self.troubles.events {
            let at = self.now + self.random(self.troubles.length / 2);
            let topic = self.rng.random_range(0..self.topics.len());
            self.at(at, Happening::PublishEvent { node: number, topic, number: event });
        }
    }

    /// Adds a receiver to a member that has run for a while.
    fn begin_catch_up(&mut self, node: usize, topic: usize, number: u64) {
        let topic = self.topics[topic].clone();
        let receiver = LateReceiver {
            topic: topic.clone(),
            checkpoints: BTreeMap::new(),
            record: Record::default(),
            has_caught_up: false,
            allowance: u64::MAX,
        };
        self.nodes[node].store.late_receivers.insert(number, receiver);
        self.with_member(node, |member, now| {
            member.catch_up(number, topic, Since::Earliest, Vec::new(), u64::MAX, now);
        });
    }

    /// Calls the protocol of a member, and carries out its actions.
    pub fn with_member(
        &mut self,
        node: usize,
        call: impl FnOnce(&mut dim_topics::member::Member, dim_topics::time::Now),
    ) {
        let now = self.nodes[node].now(self.now);
        let Some(member) = &mut self.nodes[node].member else { return };
        call(member, now);
        let actions = member.take_actions();
        let deadline = member.deadline().0;
        for action in actions {
            self.act(node, action);
        }
        self.commit_more(node);
        // A driver does not wake more than once a millisecond.
        let at = deadline.max(self.now + Duration::from_millis(1));
        let it = &mut self.nodes[node];
        if it.wake.is_none_or(|planned| at < planned) {
            it.wake = Some(at);
            self.at(at, Happening::Wake { node });
        }
    }

    fn act(&mut self, node: usize, action: Action) {
        match action {
            Action::Publish { bundle, .. } => {
                let stored = self.nodes[node].store.bundles.iter_mut();
                for (_, sent) in stored.filter(|(it, _)| it.digest == bundle.digest) {
                    *sent = true;
                }
                self.broadcast(node, &Message::Bundle(bundle.block.clone()));
            }
            Action::PublishHead(block) => self.broadcast(node, &Message::Head(block)),
            Action::Fetch { stream, writer, listed } => {
                let generation = self.nodes[node].generation;
                let at = self.now + Duration::from_millis(2) + self.random(Duration::from_millis(100));
                self.at(at, Happening::EndFetch { node, generation, stream, writer, listed });
            }
            Action::FetchNode { stream, writer, digest } => {
                let generation = self.nodes[node].generation;
                let at = self.now + Duration::from_millis(2) + self.random(Duration::from_millis(100));
                self.at(at, Happening::EndNodeFetch { node, generation, stream, writer, digest });
            }
            Action::Deliver(delivery) => {
                if let Outcome::Gap(reason) = &delivery.outcome {
                    let is_allowed = self.troubles.has_retention && *reason == GapReason::NotKept;
                    let is_doubled = self.doubled.contains(&delivery.writer);
                    let is_foreign = self.is_gap_of_membership(node, reason);
                    assert!(is_allowed || is_doubled || is_foreign, "{delivery:?} at {:?}", self.now);
                }
                self.nodes[node].deliveries.push_back(Committed::Delivery(Box::new(delivery)));
            }
            Action::CaughtUp(stream) => {
                self.nodes[node].deliveries.push_back(Committed::CaughtUp(stream));
            }
            Action::Resend(digest) => {
                let it = &mut self.nodes[node];
                let bundle = it.store.bundles.iter().find(|(bundle, _)| bundle.digest == digest);
                if let Some(block) = bundle.map(|(bundle, _)| bundle.block.clone()) {
                    it.blocks.insert(digest);
                    self.broadcast(node, &Message::Bundle(block));
                } else if let Some(member) = &mut it.member {
                    for topic in self.topics.iter() {
                        member.restore_index(topic, it.store.places(topic));
                    }
                    self.plan_indexes(node);
                }
            }
            Action::Alarm(alarm) => {
                let is_clock = alarm.finding == Finding::ClockAhead;
                let is_doubled = self.doubled.contains(&alarm.writer);
                assert!(is_clock || is_doubled, "a false alarm: {alarm}");
                let alarms = &mut self.nodes[node].alarms;
                alarms.insert(alarm.clone());
                // A copy that runs on does not raise an alarm for each of its bundles.
                let about = alarms.iter().filter(|it| (&it.topic, it.writer) == (&alarm.topic, alarm.writer));
                assert!(about.count() <= MAX_ALARMS, "too many alarms about a writer: {alarm}");
            }
            Action::FetchRoster(digest) => self.fetch_block(node, digest, true),
            Action::FetchGrant(digest) => self.fetch_block(node, digest, false),
            Action::StoreRoster { version, block } => {
                let generation = self.nodes[node].generation;
                let at = self.now + Duration::from_millis(1) + self.random(self.troubles.commit);
                self.at(at, Happening::CommitRoster { node, generation, version, block });
            }
            Action::StoreEpochs { number, epochs, .. } => {
                let generation = self.nodes[node].generation;
                let at = self.now + Duration::from_millis(1) + self.random(self.troubles.commit);
                self.at(at, Happening::CommitEpochs { node, generation, number, epochs });
            }
            Action::Provide(block) => {
                let digest = Digest::of(&block);
                self.nodes[node].blocks.insert(digest);
                self.admin.as_mut().expect("a fleet with a roster").blocks.insert(digest, block);
            }
            Action::ForgetEpochs { .. } => panic!("nothing ends the retention"),
            Action::RosterFork { fork, .. } => panic!("a false alarm: {fork}"),
        }
    }

    fn fetch_block(&mut self, node: usize, digest: Digest, is_roster: bool) {
        let generation = self.nodes[node].generation;
        let at = self.now + Duration::from_millis(2) + self.random(Duration::from_millis(100));
        self.at(at, Happening::EndBlockFetch { node, generation, digest, is_roster });
    }

    /// Whether a gap is expected because a member does not get a key, or because a writer is gone. All that knew a key
    /// may have been removed, and the witness of a removal may not know the end of an earlier process start.
    fn is_gap_of_membership(&self, node: usize, reason: &GapReason) -> bool {
        let Some(admin) = &self.admin else { return false };
        match reason {
            GapReason::NoKey => admin.lacks_history(node) || !admin.removed.is_empty(),
            GapReason::WriterSilent | GapReason::Unavailable => !admin.removed.is_empty(),
            _ => false,
        }
    }

    fn broadcast(&mut self, from: usize, message: &Message) {
        for to in 0..self.nodes.len() {
            if to == from || !self.reaches(from, to) {
                continue;
            }
            let mut copies = 1;
            if self.has_trouble {
                copies -= usize::from(self.rng.random_bool(self.troubles.loss));
                copies += usize::from(copies > 0 && self.rng.random_bool(self.troubles.repeats));
            }
            for _ in 0..copies {
                let is_late = self.has_trouble && self.rng.random_bool(self.troubles.late);
                let longest = if is_late { Duration::from_secs(120) } else { self.troubles.delay };
                let at = self.now + Duration::from_micros(500) + self.random(longest);
                self.at(at, Happening::Arrive { to, message: message.clone() });
            }
        }
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        self.cut_off.contains(&from) == self.cut_off.contains(&to)
    }

    pub fn at(&mut self, at: Duration, happening: Happening) {
        self.count += 1;
        self.happenings.insert(self.count, happening);
        self.queue.push(Reverse((at, self.count)));
    }

    pub fn random(&mut self, limit: Duration) -> Duration {
        limit.mul_f64(self.rng.random())
    }

    /// Whether every reader has everything. Members that were copied or restored are looked at in the end.
    fn is_done(&self) -> bool {
        self.doubled.is_empty() && self.check().is_ok()
    }

    /// The ends of the incarnations of restored members, as their stores still know them.
    fn lost(&self) -> BTreeMap<(Topic, Incarnation), u64> {
        let mut ends = self.lost.clone();
        for (bundle, _) in self.nodes.iter().flat_map(|node| &node.store.bundles) {
            if let Some(end) = ends.get_mut(&(bundle.header.topic.clone(), bundle.header.incarnation)) {
                *end = bundle.next().max(*end);
            }
        }
        ends
    }

    /// Checks what every member has made durable, and that every event was published.
    fn check(&self) -> Result<(), String> {
        if self.admin.is_none() {
            assert!(self.truth.len() > 0);
        }
        self.check_membership()?;
        for member in self.nodes.iter().filter_map(|node| node.member.as_ref()) {
            assert_eq!(member.budget().buffered, member.buffered(), "bytes of bundles in memory");
        }
        let lost = self.lost();
        let is_former = |node: usize| {
            self.dead.contains(&node) || self.admin.as_ref().is_some_and(|it| it.removed.contains_key(&node))
        };
        for (number, node) in self.nodes.iter().enumerate().filter(|(number, _)| !is_former(*number)) {
            for (_, event) in node.store.outbox.values().flatten() {
                fail_unless(self.truth.may_repeat, || format!("an event was not published: {event:?}"))?;
            }
            let (own, id) = (&node.store.past, node.store.id);
            for topic in &self.topics {
                let gaps =
                    node.store.record.check_all(topic, own, id, (&self.truth, &lost, self.admin.as_ref()))?;
                let is_expected = |reason: &GapReason| {
                    self.troubles.has_retention && *reason == GapReason::NotKept
                        || !self.doubled.is_empty()
                        || self.is_gap_of_membership(number, reason)
                };
                fail_unless(gaps.iter().all(is_expected), || format!("gaps: {gaps:?}"))?;
            }
            for (receiver_number, receiver) in &node.store.late_receivers {
                let topic = &receiver.topic;
                let checked =
                    receiver.record.check_all(topic, own, id, (&self.truth, &lost, self.admin.as_ref()));
                let gaps = checked.map_err(|why| format!("receiver {receiver_number}: {why}"))?;
                let is_expected = |reason: &GapReason| {
                    self.troubles.has_retention && *reason == GapReason::NotKept
                        || !self.doubled.is_empty()
                        || self.is_gap_of_membership(number, reason)
                };
                fail_unless(gaps.iter().all(is_expected), || {
                    format!("gaps of receiver {receiver_number}: {gaps:?}")
                })?;
                fail_unless(receiver.has_caught_up || !self.doubled.is_empty(), || {
                    format!("receiver {receiver_number} of {id} does not catch up")
                })?;
            }
            for writer in &self.noticeable {
                let is_noticed = node.alarms.iter().any(|alarm| alarm.writer == *writer);
                fail_unless(is_noticed, || {
                    format!("{id} does not notice that {writer} was copied or restored")
                })?;
            }
        }
        Ok(())
    }
}

pub fn fail_unless(is_right: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if is_right { Ok(()) } else { Err(why()) }
}
