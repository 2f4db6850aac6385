//! Owns the words of the event log: an entry, the event that it may be, and what an event speaks of.

pub mod exported;
mod stored;

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};

pub use stored::{MalformedEntry, decode_chunk, encode_into};

use crate::ident::{ContentPath, IpnsName, PeerName, PluginName, Topic};
use crate::time::Timestamp;

/// The place of an entry in the log.
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

/// Which of the codes that a plugin has run, one after the other. It counts up whenever other code goes on,
/// so that what one has caused can be told from what another has; 0 is no code's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// The one after it.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its place.
    pub offset: Offset,
    /// When it was appended; no earlier than the entry before it.
    pub time: Timestamp,
    /// What it is.
    pub kind: Kind,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// An event for every plugin that it concerns: the subscribers of its topic, the followers of
    /// its name. (A timer that falls due is no entry: it follows from the entries' times.)
    Event(Event),
    /// Proof that topics were listened to. Changes the world of plugins; no event of its own.
    Heard(Vec<Hearing>),
    /// A followed name still has its value. Changes the world of plugins; no event of its own.
    NameConfirmed(Resolution),
    /// The peers of a topic have changed. Changes the world of plugins; no event of its own.
    Peers {
        /// The topic.
        topic: Topic,
        /// Its peers, sorted.
        peers: Vec<PeerName>,
    },
    /// An order to a plugin, with a reply.
    Command {
        /// To whom.
        plugin: PluginName,
        /// Which order.
        method: String,
        /// JSON.
        body: String,
    },
    /// A plugin has caught up and a timer of it falls due.
    Tick(PluginName),
    /// An event that is handled again, because the plugin asked for it or an operator did.
    Again {
        /// By whom.
        plugin: PluginName,
        /// The how manyth try this is, counted from 1 for the first retry; 0 for an operator's.
        attempt: u32,
        /// The entry that it came from.
        first: Offset,
        /// Which code could not handle it.
        by: Generation,
        /// The event.
        event: Event,
    },
    /// A limit struck while a plugin handled an entry. Where it strikes depends on the machine, so it
    /// is recorded: handling the entry again ends in the same way.
    Struck {
        /// Which plugin.
        plugin: PluginName,
        /// The entry that it handled.
        offset: Offset,
        /// 0 for the entry itself; a number of its own for each timer that fell due before it, and the largest for a
        /// start of the plugin before it.
        part: u64,
        /// Which code it struck.
        by: Generation,
        /// Which limit.
        limit: StruckLimit,
    },
    /// A plugin has subscribed or unsubscribed from here on.
    Subscription {
        /// Which plugin.
        plugin: PluginName,
        /// Which topic.
        topic: Topic,
        /// Whether it is subscribed from here on.
        subscribed: bool,
        /// Which code asked for it.
        by: Generation,
    },
    /// Other code of a plugin goes on. No event; it says which code handled what.
    Code {
        /// Which plugin.
        plugin: PluginName,
        /// Which code it is.
        generation: Generation,
        /// The digest of its component, in hex.
        digest: String,
        /// The first entry that it handles: an earlier one than those handled already, if what came since
        /// is taken back.
        at: Offset,
        /// The first code whose work is taken back, if any is.
        voids: Option<Generation>,
    },
}

/// A limit that depends on the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StruckLimit {
    /// The CPU time or the memory of a call, which trapped. The memory depends on how long the
    /// instance had lived.
    Call {
        /// Which try this was, counted from 0.
        again: u32,
        /// What the operator is told.
        reason: String,
        /// What the plugin logged.
        log: Vec<String>,
    },
    /// The publishes that may wait, or a rate: there was room for so much.
    Outgoing {
        /// Which try this was, counted from 0.
        again: u32,
        /// The limit that is met with one message more.
        limit: String,
        /// How many messages.
        count: u64,
        /// How many bytes.
        bytes: u64,
        /// How many bytes of documents.
        document_bytes: u64,
    },
}

/// What a plugin is called with; the part of an entry that outlives it in retries and dead letters.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A message on a topic.
    Message {
        /// Where it was published.
        topic: Topic,
        /// The sender's bytes.
        data: Bytes,
        /// Who sent it.
        origin: Origin,
    },
    /// A timer that fell due.
    Timer {
        /// The plugin's name for it.
        key: String,
        /// When it was due.
        due: Timestamp,
    },
    /// A followed name has a new value.
    NameChanged(Resolution),
    /// A time in which messages of a topic may have been missed.
    Gap {
        /// The topic.
        topic: Topic,
        /// From when.
        since: Timestamp,
        /// Until when.
        until: Timestamp,
    },
}

/// Who published a message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A plugin of this host.
    Plugin(PluginName),
    /// The operator or a program, through the API of this host.
    Host,
    /// A peer of the network.
    Peer(PeerName),
}

/// A span of time in which a topic was listened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hearing {
    /// The topic.
    pub topic: Topic,
    /// From when.
    pub since: Timestamp,
    /// Until when it is proven.
    pub until: Timestamp,
}

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The name.
    pub name: IpnsName,
    /// What it points to.
    pub path: ContentPath,
    /// The record's sequence; of an own name the count of its values.
    pub sequence: u64,
    /// When the record stops being valid.
    pub valid_until: Timestamp,
    /// When the backend last had this record.
    pub confirmed_at: Timestamp,
}

impl Kind {
    /// The plugin that the entry is addressed to, if it is for one only.
    pub fn addressee(&self) -> Option<&PluginName> {
        match self {
            Kind::Command { plugin, .. }
            | Kind::Tick(plugin)
            | Kind::Again { plugin, .. }
            | Kind::Struck { plugin, .. }
            | Kind::Subscription { plugin, .. }
            | Kind::Code { plugin, .. } => Some(plugin),
            Kind::Event(_) | Kind::Heard(_) | Kind::NameConfirmed(_) | Kind::Peers { .. } => None,
        }
    }

    /// The topic whose subscribers the entry is for.
    pub fn topic(&self) -> Option<&Topic> {
        match self {
            Kind::Event(event) => event.topic(),
            _ => None,
        }
    }

    /// Roughly the bytes of what the entry carries.
    pub fn payload_len(&self) -> usize {
        match self {
            Kind::Command { method, body, .. } => method.len() + body.len(),
            Kind::Event(event) | Kind::Again { event, .. } => event.payload_len(),
            Kind::Heard(topics) => topics.len() * 64,
            Kind::Peers { peers, .. } => peers.len() * 64,
            _ => 64,
        }
    }
}

impl Event {
    /// The topic, if it concerns one.
    pub fn topic(&self) -> Option<&Topic> {
        match self {
            Event::Message { topic, .. } | Event::Gap { topic, .. } => Some(topic),
            Event::Timer { .. } | Event::NameChanged(_) => None,
        }
    }

    /// Roughly the bytes of what the event carries.
    pub fn payload_len(&self) -> usize {
        match self {
            Event::Message { data, .. } => data.len(),
            Event::Timer { .. } | Event::NameChanged(_) | Event::Gap { .. } => 64,
        }
    }

    /// The event as an operator sees it: a word for its kind, and JSON.
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
            Event::Gap { topic, since, until } => {
                ("gap", serde_json::json!({ "topic": topic, "since": since, "until": until }))
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
        }
    }
}
