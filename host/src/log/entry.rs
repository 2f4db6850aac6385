//! Owns the entries of the event log and their form in the store: protocol buffers, one after the
//! other, each behind its length, so that fields can be added later.

use std::fmt;
use std::str::FromStr;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message as _;
use serde::{Serialize, Serializer};

use crate::followed::Resolution;
use crate::ident::{PeerName, PluginName, Topic};
use crate::store::StoreError;
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
        /// The event.
        event: Event,
    },
    /// A plugin has subscribed or unsubscribed from here on.
    Subscription {
        /// Which plugin.
        plugin: PluginName,
        /// Which topic.
        topic: Topic,
        /// Whether it is subscribed from here on.
        subscribed: bool,
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

impl Kind {
    /// The plugin that the entry is addressed to, if it is for one only.
    pub fn addressee(&self) -> Option<&PluginName> {
        match self {
            Kind::Command { plugin, .. }
            | Kind::Tick(plugin)
            | Kind::Again { plugin, .. }
            | Kind::Subscription { plugin, .. } => Some(plugin),
            Kind::Event(_) | Kind::Heard(_) | Kind::NameConfirmed(_) | Kind::Peers { .. } => None,
        }
    }

    /// The topic whose subscribers the entry is for.
    pub fn topic(&self) -> Option<&Topic> {
        match self {
            Kind::Event(Event::Message { topic, .. } | Event::Gap { topic, .. }) => Some(topic),
            _ => None,
        }
    }

    /// Roughly the bytes of what the entry carries.
    pub fn payload_len(&self) -> usize {
        match self {
            Kind::Command { method, body, .. } => method.len() + body.len(),
            Kind::Event(Event::Message { data, .. })
            | Kind::Again { event: Event::Message { data, .. }, .. } => data.len(),
            Kind::Heard(topics) => topics.len() * 64,
            Kind::Peers { peers, .. } => peers.len() * 64,
            _ => 64,
        }
    }
}

/// Appends the stored form of `entry` to `chunk`.
pub fn encode_into(entry: &Entry, chunk: &mut BytesMut) {
    let wire = wire::Entry { offset: entry.offset.0, time: entry.time.0, kind: Some(wire_kind(&entry.kind)) };
    wire.encode_length_delimited(chunk).expect("a BytesMut grows as needed");
}

/// Reads the entries of a stored chunk.
pub fn decode_chunk(mut chunk: Bytes) -> Result<Vec<Entry>, StoreError> {
    let mut entries = Vec::new();
    while chunk.has_remaining() {
        let wire = wire::Entry::decode_length_delimited(&mut chunk)
            .map_err(|error| StoreError::corrupt("event log", error))?;
        entries.push(entry_of(wire)?);
    }
    Ok(entries)
}

impl Kind {
    /// The stored form, without an offset and a time.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::Entry { offset: 0, time: 0, kind: Some(wire_kind(self)) }.encode_to_vec()
    }

    /// Reads the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        let wire = wire::Entry::decode(bytes).map_err(|error| StoreError::corrupt("entry", error))?;
        Ok(entry_of(wire)?.kind)
    }
}

impl Event {
    /// The stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire_event(self).encode_to_vec()
    }

    /// Reads the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StoreError> {
        let wire = wire::Event::decode(bytes).map_err(|error| StoreError::corrupt("event", error))?;
        event_of(wire)
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

fn wire_kind(kind: &Kind) -> wire::entry::Kind {
    use wire::entry::Kind as W;
    match kind {
        Kind::Event(event) => W::Event(wire_event(event)),
        Kind::Heard(topics) => W::Heard(wire::Heard {
            topics: topics.iter().map(|h| wire_span(&h.topic, h.since, h.until)).collect(),
        }),
        Kind::NameConfirmed(resolution) => W::NameConfirmed(wire_resolution(resolution)),
        Kind::Peers { topic, peers } => W::Peers(wire::Peers {
            topic: topic.to_string(),
            peers: peers.iter().map(PeerName::to_string).collect(),
        }),
        Kind::Command { plugin, method, body } => W::Command(wire::Command {
            plugin: plugin.to_string(),
            method: method.clone(),
            body: body.clone(),
        }),
        Kind::Tick(plugin) => W::Tick(plugin.to_string()),
        Kind::Again { plugin, attempt, first, event } => W::Again(wire::Again {
            plugin: plugin.to_string(),
            attempt: *attempt,
            first: first.0,
            event: Some(wire_event(event)),
        }),
        Kind::Subscription { plugin, topic, subscribed } => W::Subscription(wire::Subscription {
            plugin: plugin.to_string(),
            topic: topic.to_string(),
            subscribed: *subscribed,
        }),
    }
}

fn wire_message(topic: &Topic, data: &Bytes, origin: &Origin) -> wire::Message {
    let origin = match origin {
        Origin::Plugin(plugin) => Some(wire::message::Origin::Plugin(plugin.to_string())),
        Origin::Host => None,
        Origin::Peer(peer) => Some(wire::message::Origin::Peer(peer.to_string())),
    };
    wire::Message { topic: topic.to_string(), data: data.clone(), origin }
}

fn wire_span(topic: &Topic, since: Timestamp, until: Timestamp) -> wire::Span {
    wire::Span { topic: topic.to_string(), since: since.0, until: until.0 }
}

fn wire_resolution(resolution: &Resolution) -> wire::Resolution {
    wire::Resolution {
        name: resolution.name.to_string(),
        path: resolution.path.to_string(),
        sequence: resolution.sequence,
        valid_until: resolution.valid_until.0,
        confirmed_at: resolution.confirmed_at.0,
    }
}

fn wire_event(event: &Event) -> wire::Event {
    use wire::event::Event as W;
    let event = match event {
        Event::Message { topic, data, origin } => W::Message(wire_message(topic, data, origin)),
        Event::Timer { key, due } => W::Timer(wire::Timer { key: key.clone(), due: due.0 }),
        Event::NameChanged(resolution) => W::NameChanged(wire_resolution(resolution)),
        Event::Gap { topic, since, until } => W::Gap(wire_span(topic, *since, *until)),
    };
    wire::Event { event: Some(event) }
}

fn entry_of(wire: wire::Entry) -> Result<Entry, StoreError> {
    let kind = kind_of(wire.kind.ok_or_else(|| missing("kind of an entry"))?)?;
    Ok(Entry { offset: Offset(wire.offset), time: Timestamp(wire.time), kind })
}

fn kind_of(wire: wire::entry::Kind) -> Result<Kind, StoreError> {
    use wire::entry::Kind as W;
    Ok(match wire {
        W::Event(event) => Kind::Event(event_of(event)?),
        W::Heard(heard) => Kind::Heard(heard.topics.iter().map(span_of).collect::<Result<_, _>>()?),
        W::NameConfirmed(resolution) => Kind::NameConfirmed(resolution_of(resolution)?),
        W::Peers(peers) => Kind::Peers {
            topic: word(&peers.topic)?,
            peers: peers.peers.iter().map(|peer| word(peer)).collect::<Result<_, _>>()?,
        },
        W::Command(command) => {
            Kind::Command { plugin: word(&command.plugin)?, method: command.method, body: command.body }
        }
        W::Tick(plugin) => Kind::Tick(word(&plugin)?),
        W::Again(again) => Kind::Again {
            plugin: word(&again.plugin)?,
            attempt: again.attempt,
            first: Offset(again.first),
            event: event_of(again.event.ok_or_else(|| missing("event of a retry"))?)?,
        },
        W::Subscription(subscription) => Kind::Subscription {
            plugin: word(&subscription.plugin)?,
            topic: word(&subscription.topic)?,
            subscribed: subscription.subscribed,
        },
    })
}

fn message_of(message: wire::Message) -> Result<(Topic, Bytes, Origin), StoreError> {
    let origin = match message.origin {
        None => Origin::Host,
        Some(wire::message::Origin::Plugin(plugin)) => Origin::Plugin(word(&plugin)?),
        Some(wire::message::Origin::Peer(peer)) => Origin::Peer(word(&peer)?),
    };
    Ok((word(&message.topic)?, message.data, origin))
}

fn event_of(wire: wire::Event) -> Result<Event, StoreError> {
    use wire::event::Event as W;
    Ok(match wire.event.ok_or_else(|| missing("event"))? {
        W::Message(message) => {
            let (topic, data, origin) = message_of(message)?;
            Event::Message { topic, data, origin }
        }
        W::Timer(timer) => Event::Timer { key: timer.key, due: Timestamp(timer.due) },
        W::NameChanged(resolution) => Event::NameChanged(resolution_of(resolution)?),
        W::Gap(span) => {
            let Hearing { topic, since, until } = span_of(&span)?;
            Event::Gap { topic, since, until }
        }
    })
}

fn span_of(span: &wire::Span) -> Result<Hearing, StoreError> {
    Ok(Hearing { topic: word(&span.topic)?, since: Timestamp(span.since), until: Timestamp(span.until) })
}

fn resolution_of(wire: wire::Resolution) -> Result<Resolution, StoreError> {
    Ok(Resolution {
        name: word(&wire.name)?,
        path: word(&wire.path)?,
        sequence: wire.sequence,
        valid_until: Timestamp(wire.valid_until),
        confirmed_at: Timestamp(wire.confirmed_at),
    })
}

fn word<T: FromStr>(text: &str) -> Result<T, StoreError>
where
    T::Err: fmt::Display,
{
    text.parse().map_err(|error| StoreError::corrupt("event log", error))
}

fn missing(what: &'static str) -> StoreError {
    StoreError::corrupt("event log", format!("the {what} is missing or newer than this host"))
}

/// The protocol buffers of the log. Field numbers are never reused.
mod wire {
    use bytes::Bytes;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Entry {
        #[prost(uint64, tag = "1")]
        pub offset: u64,
        #[prost(fixed64, tag = "2")]
        pub time: u64,
        #[prost(oneof = "entry::Kind", tags = "3, 4, 6, 7, 8, 9, 10, 11")]
        pub kind: Option<entry::Kind>,
    }

    pub mod entry {
        #[derive(Clone, PartialEq, prost::Oneof)]
        pub enum Kind {
            #[prost(message, tag = "3")]
            Event(super::Event),
            #[prost(message, tag = "4")]
            NameConfirmed(super::Resolution),
            #[prost(message, tag = "6")]
            Heard(super::Heard),
            #[prost(message, tag = "7")]
            Peers(super::Peers),
            #[prost(message, tag = "8")]
            Command(super::Command),
            #[prost(string, tag = "9")]
            Tick(String),
            #[prost(message, tag = "10")]
            Again(super::Again),
            #[prost(message, tag = "11")]
            Subscription(super::Subscription),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Message {
        #[prost(string, tag = "1")]
        pub topic: String,
        #[prost(bytes = "bytes", tag = "2")]
        pub data: Bytes,
        #[prost(oneof = "message::Origin", tags = "3, 4")]
        pub origin: Option<message::Origin>,
    }

    pub mod message {
        #[derive(Clone, PartialEq, prost::Oneof)]
        pub enum Origin {
            #[prost(string, tag = "3")]
            Plugin(String),
            #[prost(string, tag = "4")]
            Peer(String),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Resolution {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(string, tag = "2")]
        pub path: String,
        #[prost(uint64, tag = "3")]
        pub sequence: u64,
        #[prost(fixed64, tag = "4")]
        pub valid_until: u64,
        #[prost(fixed64, tag = "5")]
        pub confirmed_at: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Span {
        #[prost(string, tag = "1")]
        pub topic: String,
        #[prost(fixed64, tag = "2")]
        pub since: u64,
        #[prost(fixed64, tag = "3")]
        pub until: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Heard {
        #[prost(message, repeated, tag = "1")]
        pub topics: Vec<Span>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Peers {
        #[prost(string, tag = "1")]
        pub topic: String,
        #[prost(string, repeated, tag = "2")]
        pub peers: Vec<String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Command {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(string, tag = "2")]
        pub method: String,
        #[prost(string, tag = "3")]
        pub body: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Timer {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(fixed64, tag = "2")]
        pub due: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Event {
        #[prost(oneof = "event::Event", tags = "1, 2, 3, 4")]
        pub event: Option<event::Event>,
    }

    pub mod event {
        #[derive(Clone, PartialEq, prost::Oneof)]
        pub enum Event {
            #[prost(message, tag = "1")]
            Message(super::Message),
            #[prost(message, tag = "2")]
            Timer(super::Timer),
            #[prost(message, tag = "3")]
            NameChanged(super::Resolution),
            #[prost(message, tag = "4")]
            Gap(super::Span),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Again {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(uint32, tag = "2")]
        pub attempt: u32,
        #[prost(uint64, tag = "3")]
        pub first: u64,
        #[prost(message, optional, tag = "4")]
        pub event: Option<Event>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Subscription {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(string, tag = "2")]
        pub topic: String,
        #[prost(bool, tag = "3")]
        pub subscribed: bool,
    }
}
