//! Owns the names of the pubsub topics that carry reliable topics, and the way to the driver. The subscriptions and the
//! outbox use it to pass on what belongs to a reliable topic.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::Incoming;
use dim_ipfs::ipns_record::Record;
use dim_model::beginning::{Beginning, ReadFrom};
use dim_model::entry::Offset;
use dim_model::ident::{GroupName, PluginName, Topic};
use dim_model::time::Timestamp;
use dim_store::catch_ups::KeptTopics;
use dim_store::grants::TopicPattern;
use dim_store::mirrors::Mirror;
use dim_topics::action::Stream;
use dim_topics::bundle::{Bundle, Listed};
use dim_topics::head::{Head, Place};
use dim_topics::identity::{Digest, WriterId};
use dim_topics::member::MemberCounters;
use dim_topics::membership::encryption::Secret;
use dim_topics::time::Moment;
use tokio::sync::{mpsc, oneshot, watch};

use super::SendResult;
use super::catch_ups::OwnMessages;
use super::identity::Identity;
use super::intake::Outcome;
use super::joining::JoinError;
use super::membership::{BlockKind, FleetState};
use super::mirrors::Attempt;
use super::own_index::Provided;
use super::plain_copies::PlainCopies;
use super::roster_name::NameError;
use super::writer_log::WriterLog;
use crate::encrypted_documents::{DocumentKey, NoDocumentKey};

/// The number of inputs that wait for the driver. At the maximum the streams are read more slowly, and the daemon drops
/// messages, which are fetched later.
const WAITING: usize = 1_024;

/// The prefix of all pubsub topics of the protocol, with its version.
const PREFIX: &str = "/dim/1";

/// The names of the pubsub topics of a fleet.
#[derive(Clone, Debug)]
pub struct Channels {
    fleet: String,
    /// The topic of heads.
    pub heads: Topic,
}

impl Channels {
    /// Returns the names for a fleet.
    ///
    /// # Panics
    /// The fleet's name makes no topic: it is longer than 64 bytes or has control characters.
    pub fn new(fleet: &str) -> Self {
        let heads = format!("{PREFIX}/{fleet}/heads").parse().expect("the config checks the name of a fleet");
        Self { fleet: fleet.to_owned(), heads }
    }

    /// The pubsub topic of a reliable topic. The CID of a name replaces a name that is too long for the prefix.
    pub fn of(&self, topic: &Topic) -> Topic {
        let channel = |name: &dyn Display| format!("{PREFIX}/{}/topics/{name}", self.fleet).parse();
        let short = || channel(&Digest::of(topic.as_str().as_bytes()));
        channel(topic).or_else(|_| short()).expect("the config checks the name of a fleet")
    }

    /// The name of the fleet.
    pub fn fleet(&self) -> &str {
        &self.fleet
    }
}

/// The settings of a reliable topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReliableTopic {
    /// Own bundles are kept for this time.
    pub time: Duration,
    /// The most bytes of own bundles that are kept.
    pub bytes: u64,
    /// The event with which a new subscription begins.
    pub from: ReadFrom,
    /// Whether the events are published as plain messages, too, and plain messages of others are taken in.
    pub is_plain_too: bool,
    /// Whether the daemon of the host keeps the events of the other members.
    pub is_mirrored: bool,
    /// The group whose keys encrypt the events; `None` if they are not encrypted.
    pub group: Option<GroupName>,
}

/// The settings of the topics whose delivery is stated; `None` for plain topics. The closest pattern decides. Other topics
/// are plain.
pub type Deliveries = BTreeMap<TopicPattern, Option<ReliableTopic>>;

/// The settings of a topic, if it is reliable.
pub fn reliable_topic<'a>(deliveries: &'a Deliveries, topic: &Topic) -> Option<&'a ReliableTopic> {
    TopicPattern::closest(deliveries, topic)?.as_ref()
}

/// The reliable topics as the rest of the host sees them.
#[derive(Clone, Debug)]
pub struct Reliable {
    deliveries: Arc<Deliveries>,
    /// The names of the pubsub topics. They change when the host joins a fleet.
    channels: Arc<watch::Sender<Arc<Channels>>>,
    copies: Arc<Mutex<PlainCopies>>,
    inputs: mpsc::Sender<Input>,
}

/// What the driver of reliable topics has done since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// The counters.
    pub counters: MemberCounters,
    /// The topics on which this host has written.
    pub written: Vec<Topic>,
}

/// The inputs of the driver.
#[derive(Debug)]
pub struct Inputs(pub(super) mpsc::Receiver<Input>);

impl Reliable {
    /// Creates the way to a driver.
    pub fn new(fleet: &str, deliveries: Deliveries) -> (Self, Inputs) {
        let (sender, receiver) = mpsc::channel(WAITING);
        let it = Self {
            deliveries: Arc::new(deliveries),
            channels: Arc::new(watch::Sender::new(Arc::new(Channels::new(fleet)))),
            copies: Arc::default(),
            inputs: sender,
        };
        (it, Inputs(receiver))
    }

    /// The names of the pubsub topics.
    pub fn channels(&self) -> Arc<Channels> {
        self.channels.borrow().clone()
    }

    /// Changes the fleet. The subscriptions follow.
    pub(super) fn enter_fleet(&self, fleet: &str) {
        self.channels.send_replace(Arc::new(Channels::new(fleet)));
    }

    /// Returns when the names of the pubsub topics are other ones than `channels`.
    pub async fn channels_changed(&self, channels: &Arc<Channels>) {
        let mut current = self.channels.subscribe();
        let is_other = |current: &Arc<Channels>| !Arc::ptr_eq(current, channels);
        current.wait_for(is_other).await.expect("this value holds the sender");
    }

    /// Whether any topic is reliable.
    pub fn is_used(&self) -> bool {
        self.deliveries.values().any(Option::is_some)
    }

    /// Whether a topic is reliable.
    pub fn is_reliable(&self, topic: &Topic) -> bool {
        self.closest(topic).is_some()
    }

    /// The topics whose writers keep their events.
    pub fn kept_topics(&self) -> KeptTopics {
        let kept = self.deliveries.iter().map(|(pattern, it)| (pattern.clone(), it.is_some()));
        KeptTopics::These(Arc::new(kept.collect()))
    }

    /// The settings of a topic: those of the closest pattern. A topic that is no longer reliable has none.
    pub fn settings(&self, topic: &Topic) -> Option<ReliableTopic> {
        self.closest(topic).cloned()
    }

    fn closest(&self, topic: &Topic) -> Option<&ReliableTopic> {
        reliable_topic(&self.deliveries, topic)
    }

    /// The group whose keys encrypt the events of a topic; `None` if they are not encrypted.
    pub fn group(&self, topic: &Topic) -> Option<&GroupName> {
        self.closest(topic)?.group.as_ref()
    }

    /// The longest time for which own bundles are kept that the keys of each group encrypt.
    pub(super) fn kept_of_groups(&self) -> BTreeMap<GroupName, Duration> {
        let mut kept = BTreeMap::new();
        for settings in self.deliveries.values().flatten() {
            if let Some(group) = &settings.group {
                let longest: &mut Duration = kept.entry(group.clone()).or_default();
                *longest = settings.time.max(*longest);
            }
        }
        kept
    }

    /// Whether a topic is reliable and plain.
    pub fn is_both(&self, topic: &Topic) -> bool {
        self.closest(topic).is_some_and(|it| it.is_plain_too)
    }

    /// Whether any topic is reliable and plain.
    pub fn has_both(&self) -> bool {
        self.deliveries.values().flatten().any(|it| it.is_plain_too)
    }

    /// Whether the daemon of the host keeps the events of the other members on a topic.
    pub fn is_mirrored(&self, topic: &Topic) -> bool {
        self.closest(topic).is_some_and(|it| it.is_mirrored)
    }

    /// Whether any topic is mirrored.
    pub fn has_mirrors(&self) -> bool {
        self.deliveries.values().flatten().any(|it| it.is_mirrored)
    }

    /// Whether a topic is reliable and not plain.
    pub fn is_only_reliable(&self, topic: &Topic) -> bool {
        self.settings(topic).is_some_and(|it| !it.is_plain_too)
    }

    /// The pubsub topic whose messages show whether the host hears a topic: that of its plain messages if it has any.
    pub fn channel(&self, topic: &Topic) -> Topic {
        if self.is_only_reliable(topic) { self.channels().of(topic) } else { topic.clone() }
    }

    /// The recent events and messages on topics with both deliveries.
    pub fn copies(&self) -> MutexGuard<'_, PlainCopies> {
        self.copies.lock().expect("no thread panics while it holds the copies")
    }

    /// Passes a message of a reliable topic to the driver. Returns the reason if it is no bundle of the topic.
    pub async fn receive(
        &self,
        topic: &Topic,
        message: Incoming,
    ) -> Result<(), dim_topics::malformed::Malformed> {
        let channels = self.channels();
        let bundle = Bundle::open(message.data, channels.fleet())?;
        if bundle.header.topic != *topic {
            return Err(dim_topics::malformed::Malformed::Elsewhere);
        }
        if self.is_both(topic) {
            self.copies().bundle_came_from(bundle.header.writer, &message.from);
        }
        self.send(Input::Bundle { bundle: Arc::new(bundle), channels }).await;
        Ok(())
    }

    /// Returns the logs of the writers of a topic, those of this host included; `None` if the driver has ended.
    pub async fn writers(&self, topic: &Topic) -> Option<Vec<WriterLog>> {
        let (to, answer) = oneshot::channel();
        self.send(Input::Writers { topic: topic.clone(), to }).await;
        answer.await.ok()
    }

    /// Returns the time within which another member usually acknowledges an event; `None` if the driver has ended.
    pub async fn acknowledged_within(&self) -> Option<Duration> {
        let (to, answer) = oneshot::channel();
        self.send(Input::AcknowledgedWithin(to)).await;
        answer.await.ok()
    }

    /// Returns what the driver counts, and the topics on which this host has written; `None` if the driver has ended.
    pub async fn activity(&self) -> Option<Activity> {
        let (to, answer) = oneshot::channel();
        self.send(Input::Activity(to)).await;
        answer.await.ok()
    }

    /// Returns the fleet as this host knows it; `None` if it has no roster, or if the driver has ended.
    pub async fn fleet(&self) -> Option<FleetState> {
        let (to, answer) = oneshot::channel();
        self.send(Input::Fleet(to)).await;
        answer.await.ok().flatten()
    }

    /// Returns the key with which the host encrypts documents for a group now, or the reason why it has none.
    pub async fn document_key(&self, group: &GroupName) -> Result<DocumentKey, NoDocumentKey> {
        let (to, answer) = oneshot::channel();
        self.send(Input::DocumentKey { group: group.clone(), to }).await;
        answer.await.unwrap_or(Err(NoDocumentKey::Stopping))
    }

    /// Returns the secrets that may be that of a key epoch of a group. There are none if this host belongs to another
    /// fleet, or has not got the key.
    pub async fn secrets(&self, fleet: &str, group: &GroupName, epoch: &[u8; 16]) -> Vec<Secret> {
        let (to, answer) = oneshot::channel();
        let (fleet, group, epoch) = (fleet.to_owned(), group.clone(), *epoch);
        self.send(Input::Secrets { fleet, group, epoch, to }).await;
        answer.await.unwrap_or_default()
    }

    /// Takes in a roster of the operator. Returns the version of the newest roster, or the reason why it is refused;
    /// `None` if the driver has ended.
    pub async fn offer_roster(&self, block: Bytes) -> Option<Result<u64, String>> {
        let (to, answer) = oneshot::channel();
        self.send(Input::RosterOffered { block, to }).await;
        answer.await.ok()
    }

    /// Takes in a record of the fleet's IPNS name, in its stored form. Returns the reason why it is refused; `None` if the
    /// driver has ended.
    pub async fn offer_record(&self, record: Vec<u8>) -> Option<Result<(), NameError>> {
        let (to, answer) = oneshot::channel();
        self.send(Input::RecordOffered { record, to }).await;
        answer.await.ok()
    }

    /// Lets the host write and read its topics in the fleet of `identity` from now on. Returns the reason if it cannot now;
    /// `None` if the driver has ended.
    pub async fn join(&self, identity: Identity) -> Option<Result<(), JoinError>> {
        let (to, answer) = oneshot::channel();
        self.send(Input::Join { identity: Box::new(identity), to }).await;
        answer.await.ok()
    }

    /// Passes an input to the driver. It is dropped when the driver has ended.
    pub async fn send(&self, input: Input) {
        let _ = self.inputs.send(input).await;
    }

    pub(super) fn sender(&self) -> mpsc::Sender<Input> {
        self.inputs.clone()
    }
}

/// A host without reliable topics.
impl Default for Reliable {
    fn default() -> Self {
        Self::new("none", BTreeMap::new()).0
    }
}

/// A publish that waits for its bundle.
#[derive(Clone, Debug)]
pub struct WaitingPublish {
    /// The number of its row in the outbox.
    pub number: u64,
    /// The plugin that published it; `None` for the API.
    pub owner: Option<PluginName>,
}

/// An input of the driver.
#[derive(Debug)]
pub enum Input {
    /// A bundle arrived as a message.
    Bundle {
        /// The bundle.
        bundle: Arc<Bundle>,
        /// The names of the pubsub topics of its fleet.
        channels: Arc<Channels>,
    },
    /// A head arrived.
    Head {
        /// The head.
        head: Box<Head>,
        /// Its block.
        block: Bytes,
    },
    /// A plugin or a caller wants a topic, a caller perhaps from an earlier event on.
    Subscribed(Topic, Beginning),
    /// Nobody wants a topic any more.
    Unsubscribed(Topic),
    /// A publish is durable in the outbox.
    Waiting {
        /// Its topic.
        topic: Topic,
        /// The publish.
        publish: WaitingPublish,
    },
    /// A bundle is durable, unless one of its publishes was void.
    Stored {
        /// Its topic.
        topic: Topic,
        /// The bundle.
        bundle: Arc<Bundle>,
        /// Its publishes.
        rows: Vec<WaitingPublish>,
        /// Whether a publish was void, so that nothing was stored.
        is_void: bool,
    },
    /// A block was sent, or could not be sent.
    Sent(SendResult),
    /// The pause after a block that could not be sent is over.
    Retry,
    /// A fetch has ended.
    Fetched {
        /// The reading of the topic.
        stream: Stream,
        /// The writer.
        writer: WriterId,
        /// The requested bundle.
        listed: Listed,
        /// The bundle, if it was found.
        bundle: Option<Arc<Bundle>>,
    },
    /// A fetch of a node of an index has ended.
    NodeFetched {
        /// The reading of the topic.
        stream: Stream,
        /// The writer.
        writer: WriterId,
        /// The requested node.
        digest: Digest,
        /// The node, if it was found.
        block: Option<Bytes>,
    },
    /// The place of the daemon.
    Place(Place),
    /// It is time to provide the indexes of the own logs.
    IndexesDue,
    /// The index of an own log was provided, or could not be provided.
    IndexProvided(Provided),
    /// It is time to check the mirrors.
    MirrorsDue,
    /// The writers had time to answer a request for heads. The mirror answers for those that were not heard.
    RepeatHeads {
        /// The time of the request.
        unheard_since: Moment,
    },
    /// An attempt to keep a log of another writer has ended.
    Mirrored(Box<Attempt>),
    /// The daemon has removed the pin of a log that is no longer mirrored, or has not.
    MirrorEnded {
        /// The log.
        mirror: Box<Mirror>,
        /// Whether the pin is removed.
        is_unpinned: bool,
    },
    /// Results of the protocol are durable.
    Committed {
        /// The results.
        outcomes: Vec<Outcome>,
        /// For each catch-up, the place in the log after its last event.
        ends: BTreeMap<u64, Offset>,
    },
    /// Subscriptions of plugins that receive earlier events began or ended.
    CatchUpsChanged,
    /// It is time to look at the plugins that catch up.
    CatchUpsDue,
    /// A search of the log for earlier messages of this host has ended.
    OwnMessages(Box<OwnMessages>),
    /// A roster or a key grant was fetched.
    MembershipFetched {
        /// The block.
        block: Bytes,
        /// What it should be.
        kind: BlockKind,
    },
    /// The operator has a roster.
    RosterOffered {
        /// The block.
        block: Bytes,
        /// The caller, who gets the version of the newest roster or the reason why the roster is refused.
        to: oneshot::Sender<Result<u64, String>>,
    },
    /// A roster is durable, or cannot be stored.
    RosterStored {
        /// Its version.
        version: u64,
        /// The reason why it cannot be stored.
        written: Result<(), String>,
    },
    /// Key epochs are durable.
    EpochsStored(u64),
    /// It is time to look at the name of the fleet.
    NameDue,
    /// The daemon has found a record of the name of the fleet, which is verified, or none.
    NameFound(Option<Box<Record>>),
    /// The operator has a record of the name of the fleet.
    RecordOffered {
        /// The record in its stored form.
        record: Vec<u8>,
        /// The caller, who gets the reason why the record is refused.
        to: oneshot::Sender<Result<(), NameError>>,
    },
    /// The host joins a fleet.
    Join {
        /// The host in the fleet.
        identity: Box<Identity>,
        /// The caller, who gets the reason if it cannot now.
        to: oneshot::Sender<Result<(), JoinError>>,
    },
    /// A caller asks for the counters.
    Activity(oneshot::Sender<Activity>),
    /// A caller asks for the fleet.
    Fleet(oneshot::Sender<Option<FleetState>>),
    /// A caller wants to encrypt a document.
    DocumentKey {
        /// The group that reads it.
        group: GroupName,
        /// The caller, who gets the key, or the reason why there is none.
        to: oneshot::Sender<Result<DocumentKey, NoDocumentKey>>,
    },
    /// A caller wants to read an encrypted document.
    Secrets {
        /// The fleet.
        fleet: String,
        /// The group.
        group: GroupName,
        /// The identity of the key epoch.
        epoch: [u8; 16],
        /// The caller.
        to: oneshot::Sender<Vec<Secret>>,
    },
    /// A caller asks for the writers of a topic.
    Writers {
        /// The topic.
        topic: Topic,
        /// The caller.
        to: oneshot::Sender<Vec<WriterLog>>,
    },
    /// A caller asks within which time another member usually acknowledges an event.
    AcknowledgedWithin(oneshot::Sender<Duration>),
    /// Small batches of results are no longer delayed.
    CommitsDue,
    /// Old bundles were removed: all from before these hybrid times.
    Removed(BTreeMap<Topic, Timestamp>),
}

#[cfg(test)]
mod tests {
    use dim_model::ident::MAX_TOPIC;

    use super::*;

    #[test]
    fn the_closest_pattern_decides_about_the_delivery() {
        let reliable = |is_plain_too| {
            let (time, from) = (Duration::from_secs(60), ReadFrom::default());
            Some(ReliableTopic { time, bytes: 1_000, from, is_plain_too, is_mirrored: false, group: None })
        };
        let rows = [("dim.*", reliable(false)), ("dim.jobs.*", None), ("dim.jobs.results", reliable(true))];
        let deliveries = rows.map(|(pattern, it)| (pattern.parse().unwrap(), it)).into();
        let (it, _inputs) = Reliable::new("fleet", deliveries);
        let kinds = |topic: &str| {
            let topic = topic.parse().unwrap();
            let is_kept = it.kept_topics().beginning(&topic, Beginning::Earliest) == Beginning::Earliest;
            assert_eq!(is_kept, it.is_reliable(&topic), "{topic}");
            (it.is_reliable(&topic), it.is_only_reliable(&topic), it.is_both(&topic))
        };
        assert_eq!(kinds("dim.nodes.status"), (true, true, false));
        assert_eq!(kinds("dim.jobs.updates"), (false, false, false));
        assert_eq!(kinds("dim.jobs.results"), (true, false, true));
        assert_eq!(kinds("other"), (false, false, false));
        let (plain, _inputs) = Reliable::new("fleet", [("dim.*".parse().unwrap(), None)].into());
        assert!(it.is_used() && !plain.is_used());
    }

    #[test]
    fn each_topic_has_a_channel_of_its_own() {
        let channels = Channels::new(&"f".repeat(64));
        let topic = |text: String| text.parse::<Topic>().unwrap();
        let short = topic("jobs".to_owned());
        assert_eq!(channels.of(&short).as_str(), format!("/dim/1/{}/topics/jobs", "f".repeat(64)));
        let longest = ["a", "b"].map(|letter| topic(letter.repeat(MAX_TOPIC)));
        let [one, other] = [&longest[0], &longest[1]].map(|topic| channels.of(topic));
        assert_ne!(one, other);
        assert!(one.as_str().starts_with("/dim/1/"), "it is not the plain topic: {one}");
    }
}
