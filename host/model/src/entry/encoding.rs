//! Owns the stored form of entries: length-delimited protocol buffers, so that fields can be added later. It receives
//! entries and returns bytes, and the reverse.

use std::fmt::Display;
use std::str::FromStr;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message as _;
use thiserror::Error;

use super::{
    Entry, Event, Generation, Hearing, Kind, MemberEvent, Missing, Offset, Origin, Resolution, StruckLimit,
};
use crate::beginning::Beginning;
use crate::ident::{MemberName, PeerName, Topic};
use crate::time::Timestamp;

/// The error of stored bytes that are no entry.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct MalformedEntry(String);

impl MalformedEntry {
    fn because(why: impl Display) -> Self {
        Self(why.to_string())
    }
}

/// Appends the stored form of `entry` to `chunk`.
pub fn encode_into(entry: &Entry, chunk: &mut BytesMut) {
    let wire = wire::Entry { offset: entry.offset.0, time: entry.time.0, kind: Some(wire_kind(&entry.kind)) };
    wire.encode_length_delimited(chunk).expect("a BytesMut grows as needed");
}

/// Decodes the entries of a stored chunk.
pub fn decode_chunk(mut chunk: Bytes) -> Result<Vec<Entry>, MalformedEntry> {
    let mut entries = Vec::new();
    while chunk.has_remaining() {
        let wire = wire::Entry::decode_length_delimited(&mut chunk).map_err(MalformedEntry::because)?;
        entries.push(entry_of(wire)?);
    }
    Ok(entries)
}

impl Kind {
    /// Returns the stored form without offset and time.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire::Entry { offset: 0, time: 0, kind: Some(wire_kind(self)) }.encode_to_vec()
    }

    /// Decodes the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MalformedEntry> {
        let wire = wire::Entry::decode(bytes).map_err(MalformedEntry::because)?;
        Ok(entry_of(wire)?.kind)
    }
}

impl Event {
    /// Returns the stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        wire_event(self).encode_to_vec()
    }

    /// Decodes the stored form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MalformedEntry> {
        let wire = wire::Event::decode(bytes).map_err(MalformedEntry::because)?;
        event_of(wire)
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
        Kind::Again { plugin, attempt, first, by, event } => W::Again(wire::Again {
            plugin: plugin.to_string(),
            attempt: *attempt,
            first: first.0,
            by: by.0,
            event: Some(wire_event(event)),
        }),
        Kind::Struck { plugin, offset, part, by, limit } => {
            let (again, reason, log, room) = match limit {
                StruckLimit::Call { again, reason, log } => (*again, reason.clone(), log.clone(), None),
                StruckLimit::Outgoing { again, limit, count, bytes, document_bytes } => {
                    (*again, limit.clone(), Vec::new(), Some((*count, *bytes, *document_bytes)))
                }
            };
            W::Struck(wire::Struck {
                plugin: plugin.to_string(),
                offset: offset.0,
                part: *part,
                by: by.0,
                again,
                reason,
                log,
                room: room.map(|(count, ..)| count),
                room_bytes: room.map(|(_, bytes, _)| bytes),
                room_document_bytes: room.map(|(.., document_bytes)| document_bytes),
            })
        }
        Kind::Subscription { plugin, topic, subscribed, beginning, own_too, by } => {
            W::Subscription(wire::Subscription {
                plugin: plugin.to_string(),
                topic: topic.to_string(),
                subscribed: *subscribed,
                by: by.0,
                is_from_earliest: *beginning == Beginning::Earliest,
                from_time: match beginning {
                    Beginning::Time(time) => Some(time.0),
                    Beginning::Head | Beginning::Earliest => None,
                },
                own_too: *own_too,
            })
        }
        Kind::Earlier { plugin, subscription, event } => W::Earlier(wire::Earlier {
            plugin: plugin.to_string(),
            subscription: subscription.0,
            event: Some(wire_event(event)),
        }),
        Kind::CaughtUp { plugin, subscription, topic } => W::CaughtUp(wire::CaughtUp {
            plugin: plugin.to_string(),
            subscription: subscription.0,
            topic: topic.to_string(),
        }),
        Kind::Code { plugin, generation, digest, at, voids } => W::Code(wire::Code {
            plugin: plugin.to_string(),
            generation: generation.0,
            digest: digest.clone(),
            at: at.0,
            voids: voids.map(|first| first.0),
        }),
    }
}

fn wire_message(topic: &Topic, data: &Bytes, origin: &Origin) -> wire::Message {
    let origin = match origin {
        Origin::Plugin(plugin) => Some(wire::message::Origin::Plugin(plugin.to_string())),
        Origin::Host => None,
        Origin::Peer(peer) => Some(wire::message::Origin::Peer(peer.to_string())),
        Origin::Member(event) => Some(wire::message::Origin::Member(wire::Member {
            writer: Bytes::copy_from_slice(event.writer.multihash()),
            incarnation: Bytes::copy_from_slice(&event.incarnation),
            sequence: event.sequence,
            time: event.time.0,
        })),
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
        Event::Gap { topic, since, until, missing } => W::Gap(wire::Gap {
            topic: topic.to_string(),
            since: since.0,
            until: until.0,
            missing: missing.as_ref().map(|it| wire::Missing {
                writer: Bytes::copy_from_slice(it.writer.multihash()),
                incarnation: Bytes::copy_from_slice(&it.incarnation),
                first: it.first,
                next: it.next,
            }),
        }),
    };
    wire::Event { event: Some(event) }
}

fn entry_of(wire: wire::Entry) -> Result<Entry, MalformedEntry> {
    let kind = kind_of(wire.kind.ok_or_else(|| missing("kind of an entry"))?)?;
    Ok(Entry { offset: Offset(wire.offset), time: Timestamp(wire.time), kind })
}

fn kind_of(wire: wire::entry::Kind) -> Result<Kind, MalformedEntry> {
    use wire::entry::Kind as W;
    Ok(match wire {
        W::Event(event) => Kind::Event(event_of(event)?),
        W::Heard(heard) => Kind::Heard(heard.topics.iter().map(span_of).collect::<Result<_, _>>()?),
        W::NameConfirmed(resolution) => Kind::NameConfirmed(resolution_of(resolution)?),
        W::Peers(peers) => Kind::Peers {
            topic: word(&peers.topic)?,
            peers: peers.peers.into_iter().map(PeerName::stored).collect(),
        },
        W::Command(command) => {
            Kind::Command { plugin: word(&command.plugin)?, method: command.method, body: command.body }
        }
        W::Tick(plugin) => Kind::Tick(word(&plugin)?),
        W::Again(again) => Kind::Again {
            plugin: word(&again.plugin)?,
            attempt: again.attempt,
            first: Offset(again.first),
            by: Generation(again.by),
            event: event_of(again.event.ok_or_else(|| missing("event of a retry"))?)?,
        },
        W::Struck(struck) => Kind::Struck {
            plugin: word(&struck.plugin)?,
            offset: Offset(struck.offset),
            part: struck.part,
            by: Generation(struck.by),
            limit: match struck.room {
                Some(count) => StruckLimit::Outgoing {
                    again: struck.again,
                    limit: struck.reason,
                    count,
                    bytes: struck.room_bytes.unwrap_or(u64::MAX),
                    document_bytes: struck.room_document_bytes.unwrap_or(u64::MAX),
                },
                None => StruckLimit::Call { again: struck.again, reason: struck.reason, log: struck.log },
            },
        },
        W::Subscription(subscription) => Kind::Subscription {
            plugin: word(&subscription.plugin)?,
            topic: word(&subscription.topic)?,
            subscribed: subscription.subscribed,
            beginning: match subscription.from_time {
                _ if subscription.is_from_earliest => Beginning::Earliest,
                Some(time) => Beginning::Time(Timestamp(time)),
                None => Beginning::Head,
            },
            own_too: subscription.own_too,
            by: Generation(subscription.by),
        },
        W::Earlier(earlier) => Kind::Earlier {
            plugin: word(&earlier.plugin)?,
            subscription: Offset(earlier.subscription),
            event: event_of(earlier.event.ok_or_else(|| missing("earlier event"))?)?,
        },
        W::CaughtUp(caught_up) => Kind::CaughtUp {
            plugin: word(&caught_up.plugin)?,
            subscription: Offset(caught_up.subscription),
            topic: word(&caught_up.topic)?,
        },
        W::Code(code) => Kind::Code {
            plugin: word(&code.plugin)?,
            generation: Generation(code.generation),
            digest: code.digest,
            at: Offset(code.at),
            voids: code.voids.map(Generation),
        },
    })
}

fn message_of(message: wire::Message) -> Result<(Topic, Bytes, Origin), MalformedEntry> {
    let origin = match message.origin {
        None => Origin::Host,
        Some(wire::message::Origin::Plugin(plugin)) => Origin::Plugin(word(&plugin)?),
        Some(wire::message::Origin::Peer(peer)) => Origin::Peer(PeerName::stored(peer)),
        Some(wire::message::Origin::Member(member)) => Origin::Member(member_event(&member)?),
    };
    Ok((word(&message.topic)?, message.data, origin))
}

fn member_event(member: &wire::Member) -> Result<MemberEvent, MalformedEntry> {
    Ok(MemberEvent {
        writer: MemberName::from_multihash(&member.writer).map_err(MalformedEntry::because)?,
        incarnation: member.incarnation.as_ref().try_into().map_err(MalformedEntry::because)?,
        sequence: member.sequence,
        time: Timestamp(member.time),
    })
}

fn event_of(wire: wire::Event) -> Result<Event, MalformedEntry> {
    use wire::event::Event as W;
    Ok(match wire.event.ok_or_else(|| missing("event"))? {
        W::Message(message) => {
            let (topic, data, origin) = message_of(message)?;
            Event::Message { topic, data, origin }
        }
        W::Timer(timer) => Event::Timer { key: timer.key, due: Timestamp(timer.due) },
        W::NameChanged(resolution) => Event::NameChanged(resolution_of(resolution)?),
        W::Gap(gap) => Event::Gap {
            topic: word(&gap.topic)?,
            since: Timestamp(gap.since),
            until: Timestamp(gap.until),
            missing: gap.missing.map(missing_of).transpose()?,
        },
    })
}

fn missing_of(missing: wire::Missing) -> Result<Missing, MalformedEntry> {
    Ok(Missing {
        writer: MemberName::from_multihash(&missing.writer).map_err(MalformedEntry::because)?,
        incarnation: missing.incarnation.as_ref().try_into().map_err(MalformedEntry::because)?,
        first: missing.first,
        next: missing.next,
    })
}

fn span_of(span: &wire::Span) -> Result<Hearing, MalformedEntry> {
    Ok(Hearing { topic: word(&span.topic)?, since: Timestamp(span.since), until: Timestamp(span.until) })
}

fn resolution_of(wire: wire::Resolution) -> Result<Resolution, MalformedEntry> {
    Ok(Resolution {
        name: word(&wire.name)?,
        path: word(&wire.path)?,
        sequence: wire.sequence,
        valid_until: Timestamp(wire.valid_until),
        confirmed_at: Timestamp(wire.confirmed_at),
    })
}

fn word<T: FromStr>(text: &str) -> Result<T, MalformedEntry>
where
    T::Err: Display,
{
    text.parse().map_err(MalformedEntry::because)
}

fn missing(what: &'static str) -> MalformedEntry {
    MalformedEntry(format!("the {what} is missing or newer than this host"))
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
        #[prost(oneof = "entry::Kind", tags = "3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")]
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
            #[prost(message, tag = "12")]
            Struck(super::Struck),
            #[prost(message, tag = "13")]
            Code(super::Code),
            #[prost(message, tag = "14")]
            Earlier(super::Earlier),
            #[prost(message, tag = "15")]
            CaughtUp(super::CaughtUp),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Message {
        #[prost(string, tag = "1")]
        pub topic: String,
        #[prost(bytes = "bytes", tag = "2")]
        pub data: Bytes,
        #[prost(oneof = "message::Origin", tags = "3, 4, 5")]
        pub origin: Option<message::Origin>,
    }

    pub mod message {
        #[derive(Clone, PartialEq, prost::Oneof)]
        pub enum Origin {
            #[prost(string, tag = "3")]
            Plugin(String),
            #[prost(string, tag = "4")]
            Peer(String),
            #[prost(message, tag = "5")]
            Member(super::Member),
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Member {
        /// The multihash of the writer's public key.
        #[prost(bytes = "bytes", tag = "1")]
        pub writer: Bytes,
        #[prost(bytes = "bytes", tag = "2")]
        pub incarnation: Bytes,
        #[prost(uint64, tag = "3")]
        pub sequence: u64,
        #[prost(fixed64, tag = "4")]
        pub time: u64,
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
    pub struct Gap {
        #[prost(string, tag = "1")]
        pub topic: String,
        #[prost(fixed64, tag = "2")]
        pub since: u64,
        #[prost(fixed64, tag = "3")]
        pub until: u64,
        #[prost(message, optional, tag = "4")]
        pub missing: Option<Missing>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Missing {
        /// The multihash of the writer's public key.
        #[prost(bytes = "bytes", tag = "1")]
        pub writer: Bytes,
        #[prost(bytes = "bytes", tag = "2")]
        pub incarnation: Bytes,
        #[prost(uint64, tag = "3")]
        pub first: u64,
        #[prost(uint64, tag = "4")]
        pub next: u64,
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
            Gap(super::Gap),
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
        #[prost(uint32, tag = "5")]
        pub by: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Struck {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(uint64, tag = "2")]
        pub offset: u64,
        #[prost(uint64, tag = "3")]
        pub part: u64,
        #[prost(uint32, tag = "4")]
        pub again: u32,
        #[prost(string, tag = "5")]
        pub reason: String,
        #[prost(string, repeated, tag = "6")]
        pub log: Vec<String>,
        /// For a limit on publishes: the number of messages that were still allowed. `None` for a limit that ended
        /// the call.
        #[prost(uint64, optional, tag = "7")]
        pub room: Option<u64>,
        #[prost(uint32, tag = "8")]
        pub by: u32,
        /// For a limit on publishes: the number of bytes that were still allowed. `None` in entries older than this
        /// limit.
        #[prost(uint64, optional, tag = "9")]
        pub room_bytes: Option<u64>,
        /// For a limit on publishes: the number of document bytes that were still allowed. `None` in entries older
        /// than this limit.
        #[prost(uint64, optional, tag = "10")]
        pub room_document_bytes: Option<u64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Subscription {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(string, tag = "2")]
        pub topic: String,
        #[prost(bool, tag = "3")]
        pub subscribed: bool,
        #[prost(uint32, tag = "4")]
        pub by: u32,
        #[prost(bool, tag = "5")]
        pub is_from_earliest: bool,
        #[prost(fixed64, optional, tag = "6")]
        pub from_time: Option<u64>,
        #[prost(bool, tag = "7")]
        pub own_too: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Earlier {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(message, optional, tag = "2")]
        pub event: Option<Event>,
        #[prost(uint64, tag = "3")]
        pub subscription: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct CaughtUp {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(string, tag = "2")]
        pub topic: String,
        #[prost(uint64, tag = "3")]
        pub subscription: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Code {
        #[prost(string, tag = "1")]
        pub plugin: String,
        #[prost(uint32, tag = "2")]
        pub generation: u32,
        #[prost(string, tag = "3")]
        pub digest: String,
        #[prost(uint64, tag = "4")]
        pub at: u64,
        #[prost(uint32, optional, tag = "5")]
        pub voids: Option<u32>,
    }
}
