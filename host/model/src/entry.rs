//! Owns the types of the event log: entries, their kinds and events. Sources of entries make these values, and the
//! log, the plugins and the API receive them.

pub mod export;
mod encoding;

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};

pub use encoding::{MalformedEntry, decode_chunk, encode_into};

use crate::beginning::Beginning;
use crate::ident::{ContentPath, IpnsName, MemberName, PeerName, PluginName, Topic};
use crate::time::Timestamp;

/// The position of an entry in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset(pub u64);

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Offset {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// The number of the code of a plugin among all codes that the plugin ran. It increases with each takeover and
/// rollback, so the effects of one code can be told from those of another. 0 is no code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// Returns the next generation.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its position.
    pub offset: Offset,
    /// The log time at which it was appended. It is not earlier than the time of the entry before.
    pub time: Timestamp,
    /// Its content.
    pub kind: Kind,
}

/// The content of an entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// An event for every plugin that it concerns: the subscribers of its topic, or the followers of its name. A
    /// timer that is due is no entry, because it follows from the times of the entries.
    Event(Event),
    /// Proof that the host heard topics. It changes the entry context of plugins and is no event.
    Heard(Vec<Hearing>),
    /// A followed name still has its value. It changes the entry context of plugins and is no event.
    NameConfirmed(Resolution),
    /// The peers of a topic changed. It changes the entry context of plugins and is no event.
    Peers {
        /// The topic.
        topic: Topic,
        /// Its peers, sorted.
        peers: Vec<PeerName>,
    },
    /// A command to a plugin. It has a reply.
    Command {
        /// The receiver.
        plugin: PluginName,
        /// The method of the command.
        method: String,
        /// The arguments, in JSON.
        body: String,
    },
    /// A plugin handled all entries, and one of its timers is due.
    Tick(PluginName),
    /// An event that is handled again, because the plugin or an operator requested it.
    Again {
        /// The plugin that handles it.
        plugin: PluginName,
        /// The number of this retry, counted from 1; 0 for a replay of the operator.
        attempt: u32,
        /// The entry with the original event.
        first: Offset,
        /// The generation that could not handle it.
        by: Generation,
        /// The event.
        event: Event,
    },
    /// A plugin exceeded a limit while it handled an entry. The point at which this happens depends on the machine.
    /// The record makes a second handling of the entry end in the same way.
    Struck {
        /// The plugin.
        plugin: PluginName,
        /// The entry that the plugin handled.
        offset: Offset,
        /// The call within the entry: 0 for the entry itself, a separate number for each timer that was due before
        /// it, and the largest number for a `start` of the plugin before it.
        part: u64,
        /// The generation that exceeded the limit.
        by: Generation,
        /// The limit.
        limit: StruckLimit,
    },
    /// A plugin subscribed or unsubscribed. It takes effect with this entry.
    Subscription {
        /// The plugin.
        plugin: PluginName,
        /// The topic.
        topic: Topic,
        /// Whether the plugin is subscribed from this entry on.
        subscribed: bool,
        /// The event with which the subscription begins.
        beginning: Beginning,
        /// Whether the messages of this host come with the earlier events, until the plugin has received these. Logs of
        /// older versions have subscriptions without it.
        own_too: bool,
        /// The generation that requested it.
        by: Generation,
    },
    /// An event of a member, or a message of this host, that is for a plugin alone that has not received all earlier
    /// ones.
    Earlier {
        /// The plugin.
        plugin: PluginName,
        /// The entry of the subscription.
        subscription: Offset,
        /// The event.
        event: Event,
    },
    /// A plugin has received all earlier events of a topic. From this entry on it receives the events of members and the
    /// messages of this host that come to all plugins.
    CaughtUp {
        /// The plugin.
        plugin: PluginName,
        /// The entry of the subscription.
        subscription: Offset,
        /// The topic.
        topic: Topic,
    },
    /// Other code of a plugin takes over. It is no event; it records which code handled which entries.
    Code {
        /// The plugin.
        plugin: PluginName,
        /// The generation of the new code.
        generation: Generation,
        /// The digest of its component, in hex.
        digest: String,
        /// The first entry that the code handles. After a rollback it is earlier than entries that were handled
        /// already.
        at: Offset,
        /// The first generation whose work is rolled back, if any.
        voids: Option<Generation>,
    },
}

/// An exceeded limit that depends on the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StruckLimit {
    /// The CPU time or the memory of a call. The call trapped. The memory depends on the age of the instance.
    Call {
        /// The number of this try, counted from 0.
        again: u32,
        /// The reason, as shown to the operator.
        reason: String,
        /// The lines that the plugin logged.
        log: Vec<String>,
    },
    /// The number of waiting publishes, or a rate. The fields say how much was still allowed.
    Outgoing {
        /// The number of this try, counted from 0.
        again: u32,
        /// The limit that one more message exceeds.
        limit: String,
        /// The number of messages.
        count: u64,
        /// The number of bytes.
        bytes: u64,
        /// The number of bytes of documents.
        document_bytes: u64,
    },
}

/// The argument of a call of a plugin. It is the part of an entry that retries and dead letters keep.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A message on a topic.
    Message {
        /// The topic of the publish.
        topic: Topic,
        /// The sender's bytes.
        data: Bytes,
        /// The sender.
        origin: Origin,
    },
    /// A timer that is due.
    Timer {
        /// The key that the plugin gave the timer.
        key: String,
        /// The time at which it was due.
        due: Timestamp,
    },
    /// A followed name has a new value.
    NameChanged(Resolution),
    /// A span of time in which the host may have missed messages of a topic.
    Gap {
        /// The topic.
        topic: Topic,
        /// The start of the span.
        since: Timestamp,
        /// The end of the span.
        until: Timestamp,
        /// On a reliable topic: the events of a member that cannot be had.
        missing: Option<Missing>,
    },
}

/// Consecutive events of a member that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Missing {
    /// The writer.
    pub writer: MemberName,
    /// The process start of the writer: 16 random bytes, in hex in JSON.
    #[serde(with = "incarnation_text")]
    pub incarnation: [u8; 16],
    /// The sequence of the first missing event.
    pub first: u64,
    /// The sequence after the last missing event.
    pub next: u64,
}

/// The text of an incarnation in JSON: 32 hex digits.
mod incarnation_text {
    use multibase::Base;
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(incarnation: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base::Base16Lower.encode(incarnation))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = Base::Base16Lower.decode(text).map_err(D::Error::custom)?;
        bytes.try_into().map_err(|_| D::Error::custom("an incarnation has 32 hex digits"))
    }
}

/// The sender of a message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A plugin of this host.
    Plugin(PluginName),
    /// The operator or a program that used the API of this host.
    Host,
    /// A peer of the network.
    Peer(PeerName),
    /// A member of the fleet, on a reliable topic.
    Member(MemberEvent),
}

/// The identity of an event of a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemberEvent {
    /// The writer.
    pub writer: MemberName,
    /// The process start of the writer: 16 random bytes.
    pub incarnation: [u8; 16],
    /// The number of the event in the incarnation, from 0.
    pub sequence: u64,
    /// The hybrid logical time of the event.
    pub time: Timestamp,
}

impl fmt::Display for MemberEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { writer, incarnation, sequence, time } = self;
        write!(f, "{writer} ")?;
        incarnation.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, " {sequence} {time}")
    }
}

impl FromStr for MemberEvent {
    type Err = NoMemberEvent;

    /// Parses the text that `Display` writes.
    fn from_str(text: &str) -> Result<Self, NoMemberEvent> {
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or(NoMemberEvent);
        let (writer, incarnation, sequence, time) = (word()?, word()?, word()?, word()?);
        let incarnation = multibase::Base::Base16Lower.decode(incarnation).map_err(|_| NoMemberEvent)?;
        let time: jiff::Timestamp = time.parse().map_err(|_| NoMemberEvent)?;
        Ok(Self {
            writer: writer.parse().map_err(|_| NoMemberEvent)?,
            incarnation: incarnation.try_into().map_err(|_| NoMemberEvent)?,
            sequence: sequence.parse().map_err(|_| NoMemberEvent)?,
            time: time.try_into().map_err(|_| NoMemberEvent)?,
        })
    }
}

/// The error of a text that is not the identity of an event of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of a member is WRITER INCARNATION SEQUENCE TIME")]
pub struct NoMemberEvent;

/// A span of time in which the host heard a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hearing {
    /// The topic.
    pub topic: Topic,
    /// The start of the span.
    pub since: Timestamp,
    /// The end of the span, up to which hearing is proven.
    pub until: Timestamp,
}

/// The result of resolving a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The name.
    pub name: IpnsName,
    /// The path that it points to.
    pub path: ContentPath,
    /// The sequence number of the record; for a name of this host, the number of its values so far.
    pub sequence: u64,
    /// The end of the validity of the record.
    pub valid_until: Timestamp,
    /// The time at which the backend last returned this record.
    pub confirmed_at: Timestamp,
}

impl Kind {
    /// Returns the only plugin that the entry is for, or `None` if it is not for one plugin.
    pub fn addressee(&self) -> Option<&PluginName> {
        match self {
            Kind::Command { plugin, .. }
            | Kind::Tick(plugin)
            | Kind::Again { plugin, .. }
            | Kind::Struck { plugin, .. }
            | Kind::Subscription { plugin, .. }
            | Kind::Earlier { plugin, .. }
            | Kind::CaughtUp { plugin, .. }
            | Kind::Code { plugin, .. } => Some(plugin),
            Kind::Event(_) | Kind::Heard(_) | Kind::NameConfirmed(_) | Kind::Peers { .. } => None,
        }
    }

    /// Returns the topic whose subscribers receive the entry.
    pub fn topic(&self) -> Option<&Topic> {
        match self {
            Kind::Event(event) => event.topic(),
            _ => None,
        }
    }

    /// Returns the approximate size of the payload in bytes.
    pub fn payload_len(&self) -> usize {
        match self {
            Kind::Command { method, body, .. } => method.len() + body.len(),
            Kind::Event(event) | Kind::Again { event, .. } | Kind::Earlier { event, .. } => {
                event.payload_len()
            }
            Kind::Heard(topics) => topics.len() * 64,
            Kind::Peers { peers, .. } => peers.len() * 64,
            _ => 64,
        }
    }
}

impl Event {
    /// Returns the topic of the event, if it has one.
    pub fn topic(&self) -> Option<&Topic> {
        match self {
            Event::Message { topic, .. } | Event::Gap { topic, .. } => Some(topic),
            Event::Timer { .. } | Event::NameChanged(_) => None,
        }
    }

    /// Returns the approximate size of the payload in bytes.
    pub fn payload_len(&self) -> usize {
        match self {
            Event::Message { data, .. } => data.len(),
            Event::Timer { .. } | Event::NameChanged(_) | Event::Gap { .. } => 64,
        }
    }

    /// Returns the event as an operator sees it: the name of its kind, and JSON.
    pub fn describe(&self) -> (&'static str, serde_json::Value) {
        match self {
            Event::Message { topic, data, origin } => (
                "message",
                serde_json::json!({
                    "topic": topic, "origin": origin.to_string(),
                    "data": String::from_utf8_lossy(data),
                    "bytes": data.len(),
                }),
            ),
            Event::Timer { key, due } => ("timer", serde_json::json!({ "key": key, "due": due })),
            Event::NameChanged(resolution) => ("name-changed", serde_json::json!(resolution)),
            Event::Gap { topic, since, until, missing } => {
                let mut gap = serde_json::json!({ "topic": topic, "since": since, "until": until });
                if let Some(missing) = missing {
                    gap["missing"] = serde_json::json!(missing);
                }
                ("gap", gap)
            }
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Plugin(name) => write!(f, "plugin {name}"),
            Origin::Host => f.write_str("this host"),
            Origin::Peer(peer) => write!(f, "peer {peer}"),
            Origin::Member(event) => write!(f, "member {}", event.writer),
        }
    }
}
