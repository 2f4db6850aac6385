//! Owns the export format of entries: lines of JSON for people and other programs, and for the replay of events to a
//! plugin. It receives entries and returns records, and the reverse.
//!
//! The first line is a [`Header`]. Each other line is a [`Record`] of an entry from outside, in order. Entries that
//! plugins caused (retries, subscriptions, exceeded limits) are left out, because a replay produces them again. Bytes
//! are exact: UTF-8 is under `text`, other bytes are under `base64`.

mod parse;

use std::collections::BTreeMap;

use bytes::Bytes;
use multibase::Base;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::{Entry, Event, Generation, Hearing, Kind, Missing, Offset, Origin, Resolution};
use crate::beginning::Beginning;
use crate::ident::{IpnsName, KeyName, PeerName, PluginName, Topic};
use crate::time::Timestamp;

/// The version of the export format.
pub const FORM: u32 = 1;

/// The first line of an export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The version of the export format.
    pub dim_events: u32,
    /// The identity of the host.
    pub host: String,
    /// The seed of random numbers that replaces the host's secret, in hex. It is the same in each export of a host
    /// and reveals nothing about the secret.
    pub random: String,
    /// The IPNS names of the keys of the host.
    pub keys: BTreeMap<KeyName, IpnsName>,
    /// The config of each running plugin, including the values that the operator set.
    pub plugins: BTreeMap<PluginName, Value>,
    /// The time of the export. A replay runs until this time.
    pub until: Timestamp,
}

/// One exported entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "parse::Written")]
pub struct Record {
    /// Its offset in the log.
    pub offset: u64,
    /// The time at which it was appended.
    pub time: Timestamp,
    /// Its content.
    #[serde(flatten)]
    pub what: What,
}

/// The content of a record.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A message.
    Message {
        /// Its topic.
        topic: Topic,
        /// `host`, `plugin NAME`, `peer ID` or `member WRITER INCARNATION SEQUENCE TIME`.
        from: String,
        /// The plugin that alone receives it, if it is older than the subscription of that plugin.
        #[serde(skip_serializing_if = "Option::is_none")]
        earlier_for: Option<CatchingUp>,
        /// Its bytes.
        #[serde(flatten)]
        data: Data,
    },
    /// A span of time in which the host may have missed messages of a topic.
    Gap {
        /// The topic.
        topic: Topic,
        /// The start of the span.
        since: Timestamp,
        /// The end of the span.
        until: Timestamp,
        /// On a reliable topic: the events of a member that cannot be had.
        #[serde(skip_serializing_if = "Option::is_none")]
        missing: Option<Missing>,
        /// The plugin that alone receives it, if it is older than the subscription of that plugin.
        #[serde(skip_serializing_if = "Option::is_none")]
        earlier_for: Option<CatchingUp>,
    },
    /// A plugin begins to receive earlier events of a topic.
    CatchingUp {
        /// The plugin and its subscription.
        #[serde(flatten)]
        who: CatchingUp,
        /// The topic.
        topic: Topic,
        /// Whether the messages of the host come with them.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        own_too: bool,
    },
    /// A plugin has received all earlier events of a topic.
    CaughtUp {
        /// The plugin and its subscription.
        #[serde(flatten)]
        who: CatchingUp,
        /// The topic.
        topic: Topic,
    },
    /// Spans of time in which the host heard topics.
    Heard(Vec<Span>),
    /// The peers of a topic changed.
    Peers {
        /// The topic.
        topic: Topic,
        /// Its peers.
        peers: Vec<PeerName>,
    },
    /// A name has a new value.
    Name {
        /// The result of resolving the name.
        #[serde(flatten)]
        resolution: Resolution,
        /// The document that the name points to, if the host still has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        document: Option<Data>,
    },
    /// A name still has its value.
    Confirmed(Resolution),
    /// A command to a plugin.
    Command {
        /// The receiver.
        plugin: PluginName,
        /// The method of the command.
        method: String,
        /// The arguments, in JSON.
        body: String,
    },
}

/// A plugin that receives earlier events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatchingUp {
    /// The plugin.
    pub plugin: PluginName,
    /// The offset of the entry of its subscription.
    pub subscription: u64,
}

/// A span of time in which the host heard a topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The topic.
    pub topic: Topic,
    since: Timestamp,
    until: Timestamp,
}

/// Bytes, as text if they are UTF-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Data {
    /// UTF-8.
    Text(String),
    /// Other bytes, in base64 with padding.
    Base64(String),
}

/// The error of a line that is not valid.
#[derive(Debug, Error)]
pub enum Malformed {
    /// The line is not valid JSON, or it is not a header or a record.
    #[error("{}", .0.to_string().replace(" at line 1 column ", ", at column "))]
    Line(serde_json::Error),
    /// The record has no content, or more than one.
    #[error(
        "a record has one of message, gap, catching_up, caught_up, heard, peers, name, confirmed and command"
    )]
    Sort,
    /// A message has neither text nor base64, or it has both.
    #[error("a message has either text or base64")]
    Data,
    /// A record is not later in the log than the record before it.
    #[error("the offsets of records rise, and their times do not fall")]
    Order,
    /// The bytes are not base64.
    #[error("base64: {0}")]
    Base64(#[from] multibase::Error),
    /// The sender is none of the four kinds.
    #[error(
        "{0:?} is no sender: a message is from host, plugin NAME, peer ID or member WRITER INCARNATION SEQUENCE TIME"
    )]
    Sender(String),
    /// The export has another format version.
    #[error("the events have the form {0}; this program reads {FORM}")]
    Form(u32),
    /// The seed of random numbers is invalid.
    #[error("`random` has 64 hex digits")]
    Random,
}

impl From<serde_json::Error> for Malformed {
    fn from(error: serde_json::Error) -> Self {
        Self::Line(error)
    }
}

impl From<&[u8]> for Data {
    fn from(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(Base::Base64Pad.encode(bytes)),
        }
    }
}

impl Data {
    /// Decodes the bytes.
    ///
    /// # Errors
    /// The text under `base64` is not base64.
    pub fn bytes(&self) -> Result<Bytes, Malformed> {
        Ok(match self {
            Self::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            Self::Base64(text) => Base::Base64Pad.decode(text)?.into(),
        })
    }
}

impl Header {
    /// Parses the first line of an export.
    pub fn read(line: &str) -> Result<Self, Malformed> {
        #[derive(Deserialize)]
        struct Form {
            dim_events: u32,
        }
        let Form { dim_events } = serde_json::from_str(line)?;
        if dim_events != FORM {
            return Err(Malformed::Form(dim_events));
        }
        let header: Self = serde_json::from_str(line)?;
        header.secret()?;
        Ok(header)
    }

    /// Decodes the seed of random numbers.
    pub fn secret(&self) -> Result<[u8; 32], Malformed> {
        let bytes = Base::Base16Lower.decode(&self.random).map_err(|_| Malformed::Random)?;
        bytes.try_into().map_err(|_| Malformed::Random)
    }
}

impl Record {
    /// Makes the record of an entry, or returns `None` for an entry that a plugin caused. `document` returns the
    /// document that a name points to.
    pub fn of(entry: &Entry, document: impl FnOnce(&Resolution) -> Option<Vec<u8>>) -> Option<Self> {
        let what = match &entry.kind {
            Kind::Event(event) => What::of_event(event, None, document)?,
            Kind::Earlier { plugin, subscription, event } => {
                let who = CatchingUp { plugin: plugin.clone(), subscription: subscription.0 };
                What::of_event(event, Some(who), document)?
            }
            Kind::CaughtUp { plugin, subscription, topic } => {
                let who = CatchingUp { plugin: plugin.clone(), subscription: subscription.0 };
                What::CaughtUp { who, topic: topic.clone() }
            }
            Kind::Heard(heard) => {
                let span = |it: &Hearing| Span { topic: it.topic.clone(), since: it.since, until: it.until };
                What::Heard(heard.iter().map(span).collect())
            }
            Kind::Peers { topic, peers } => What::Peers { topic: topic.clone(), peers: peers.clone() },
            Kind::NameConfirmed(resolution) => What::Confirmed(resolution.clone()),
            Kind::Command { plugin, method, body } => {
                What::Command { plugin: plugin.clone(), method: method.clone(), body: body.clone() }
            }
            Kind::Subscription { plugin, topic, subscribed: true, beginning, own_too, .. }
                if *beginning != Beginning::Head =>
            {
                let who = CatchingUp { plugin: plugin.clone(), subscription: entry.offset.0 };
                What::CatchingUp { who, topic: topic.clone(), own_too: *own_too }
            }
            // Replays of dead letters are left out too. The export has their events as they first came.
            Kind::Again { .. }
            | Kind::Tick(_)
            | Kind::Struck { .. }
            | Kind::Subscription { .. }
            | Kind::Code { .. } => return None,
        };
        Some(Self { offset: entry.offset.0, time: entry.time, what })
    }

    /// Parses a line. A record that it returns can be converted to an entry.
    pub fn read(line: &str) -> Result<Self, Malformed> {
        let record: Self = serde_json::from_str(line)?;
        record.what.kind()?;
        if let What::Name { document: Some(document), .. } = &record.what {
            document.bytes()?;
        }
        Ok(record)
    }

    /// Returns whether the record can follow a record with the given offset and time.
    pub fn follows(&self, last: Option<(u64, Timestamp)>) -> bool {
        last.is_none_or(|(offset, time)| offset < self.offset && time <= self.time)
    }
}

impl What {
    /// The content of the record of an event, or `None` for a timer.
    fn of_event(
        event: &Event,
        earlier_for: Option<CatchingUp>,
        document: impl FnOnce(&Resolution) -> Option<Vec<u8>>,
    ) -> Option<Self> {
        Some(match event {
            Event::Message { topic, data, origin } => {
                let from = match origin {
                    Origin::Host => "host".to_owned(),
                    Origin::Plugin(plugin) => format!("plugin {plugin}"),
                    Origin::Peer(peer) => format!("peer {peer}"),
                    Origin::Member(event) => format!("member {event}"),
                };
                Self::Message { topic: topic.clone(), from, earlier_for, data: data.as_ref().into() }
            }
            Event::Gap { topic, since, until, missing } => Self::Gap {
                topic: topic.clone(),
                since: *since,
                until: *until,
                missing: missing.clone(),
                earlier_for,
            },
            Event::NameChanged(resolution) => {
                let document = document(resolution).map(|bytes| bytes.as_slice().into());
                Self::Name { resolution: resolution.clone(), document }
            }
            Event::Timer { .. } => return None,
        })
    }

    /// Returns the topics of the record.
    pub fn topics(&self) -> Vec<&Topic> {
        match self {
            Self::Message { topic, .. }
            | Self::Gap { topic, .. }
            | Self::CatchingUp { topic, .. }
            | Self::CaughtUp { topic, .. }
            | Self::Peers { topic, .. } => vec![topic],
            Self::Heard(spans) => spans.iter().map(|span| &span.topic).collect(),
            Self::Name { .. } | Self::Confirmed(_) | Self::Command { .. } => Vec::new(),
        }
    }

    /// Converts the content to that of an entry.
    pub fn kind(&self) -> Result<Kind, Malformed> {
        Ok(match self {
            Self::Message { topic, from, earlier_for, data } => {
                let no_sender = || Malformed::Sender(from.clone());
                let origin = match from.split_once(' ') {
                    None if from == "host" => Origin::Host,
                    Some(("plugin", plugin)) => Origin::Plugin(plugin.parse().map_err(|_| no_sender())?),
                    Some(("peer", peer)) => Origin::Peer(peer.parse().map_err(|_| no_sender())?),
                    Some(("member", event)) => Origin::Member(event.parse().map_err(|_| no_sender())?),
                    _ => return Err(no_sender()),
                };
                let event = Event::Message { topic: topic.clone(), data: data.bytes()?, origin };
                kind_of(event, earlier_for.as_ref())
            }
            Self::Gap { topic, since, until, missing, earlier_for } => {
                let (topic, since, until, missing) = (topic.clone(), *since, *until, missing.clone());
                kind_of(Event::Gap { topic, since, until, missing }, earlier_for.as_ref())
            }
            Self::CatchingUp { who: CatchingUp { plugin, .. }, topic, own_too } => Kind::Subscription {
                plugin: plugin.clone(),
                topic: topic.clone(),
                subscribed: true,
                beginning: Beginning::Earliest,
                own_too: *own_too,
                by: Generation(0),
            },
            Self::CaughtUp { who: CatchingUp { plugin, subscription }, topic } => Kind::CaughtUp {
                plugin: plugin.clone(),
                subscription: Offset(*subscription),
                topic: topic.clone(),
            },
            Self::Heard(spans) => {
                let heard =
                    |span: &Span| Hearing { topic: span.topic.clone(), since: span.since, until: span.until };
                Kind::Heard(spans.iter().map(heard).collect())
            }
            Self::Peers { topic, peers } => Kind::Peers { topic: topic.clone(), peers: peers.clone() },
            Self::Name { resolution, .. } => Kind::Event(Event::NameChanged(resolution.clone())),
            Self::Confirmed(resolution) => Kind::NameConfirmed(resolution.clone()),
            Self::Command { plugin, method, body } => {
                Kind::Command { plugin: plugin.clone(), method: method.clone(), body: body.clone() }
            }
        })
    }
}

/// The content of the entry of an event.
fn kind_of(event: Event, earlier_for: Option<&CatchingUp>) -> Kind {
    match earlier_for {
        Some(CatchingUp { plugin, subscription }) => {
            Kind::Earlier { plugin: plugin.clone(), subscription: Offset(*subscription), event }
        }
        None => Kind::Event(event),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::MemberEvent;

    #[test]
    fn what_leaves_the_host_comes_back_to_the_byte() {
        let peer = "12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF".parse::<PeerName>().unwrap();
        let topic = "t".parse::<Topic>().unwrap();
        let message = |data: &'static [u8], origin| {
            Kind::Event(Event::Message { topic: topic.clone(), data: Bytes::from_static(data), origin })
        };
        let (since, until) = (Timestamp(1), Timestamp(2));
        let kinds = [
            message(b"{ \"a\" : 1 }", Origin::Peer(peer.clone())),
            message(b"\xff\x00", Origin::Host),
            message(b"", Origin::Plugin("p".parse().unwrap())),
            message(
                b"",
                Origin::Member(MemberEvent {
                    writer: peer.as_str().parse().unwrap(),
                    incarnation: [7; 16],
                    sequence: u64::MAX,
                    time: Timestamp(1_700_000_000_123_456_789),
                }),
            ),
            Kind::Event(Event::Gap { topic: topic.clone(), since, until, missing: None }),
            Kind::Event(Event::Gap {
                topic: topic.clone(),
                since,
                until,
                missing: Some(Missing {
                    writer: peer.as_str().parse().unwrap(),
                    incarnation: [8; 16],
                    first: 3,
                    next: 9,
                }),
            }),
            Kind::Earlier {
                plugin: "p".parse().unwrap(),
                subscription: Offset(2),
                event: Event::Message {
                    topic: topic.clone(),
                    data: Bytes::from_static(b"old"),
                    origin: Origin::Host,
                },
            },
            Kind::Earlier {
                plugin: "p".parse().unwrap(),
                subscription: Offset(2),
                event: Event::Gap { topic: topic.clone(), since, until, missing: None },
            },
            Kind::Subscription {
                plugin: "p".parse().unwrap(),
                topic: topic.clone(),
                subscribed: true,
                beginning: Beginning::Earliest,
                own_too: true,
                by: Generation(0),
            },
            Kind::Subscription {
                plugin: "p".parse().unwrap(),
                topic: topic.clone(),
                subscribed: true,
                beginning: Beginning::Earliest,
                own_too: false,
                by: Generation(0),
            },
            Kind::CaughtUp { plugin: "p".parse().unwrap(), subscription: Offset(2), topic: topic.clone() },
            Kind::Heard(vec![Hearing { topic: topic.clone(), since, until }]),
            Kind::Peers { topic: topic.clone(), peers: vec![peer] },
            Kind::Command { plugin: "p".parse().unwrap(), method: "m".to_owned(), body: "{}".to_owned() },
        ];
        for kind in kinds {
            let entry = Entry { offset: Offset(7), time: Timestamp(3), kind };
            let record = Record::of(&entry, |_| None).unwrap();
            let line = serde_json::to_string(&record).unwrap();
            let read = Record::read(&line).unwrap();
            assert_eq!((&read, read.what.kind().unwrap()), (&record, entry.kind), "{line}");
        }
        let tick = Entry { offset: Offset(7), time: Timestamp(3), kind: Kind::Tick("p".parse().unwrap()) };
        assert_eq!(Record::of(&tick, |_| None), None);
        for wrong in
            ["{}", "{\"offset\":1,\"time\":\"2026-01-01T00:00:00Z\",\"message\":{\"topic\":\"t\"}}", "x"]
        {
            assert!(Record::read(wrong).is_err(), "{wrong}");
        }
        let why = |what: &str| {
            let line = format!("{{\"offset\":1,\"time\":\"2026-01-01T00:00:00Z\"{what}}}");
            Record::read(&line).unwrap_err().to_string()
        };
        assert!(why("").contains("one of message"), "{}", why(""));
        let message = ",\"message\":{\"topic\":\"t\",\"from\":\"host\"";
        let both = why(&format!("{message},\"text\":\"a\",\"base64\":\"YQ==\"}}"));
        assert!(both.contains("either text or base64"), "{both}");
        let no_base64 = why(&format!("{message},\"base64\":\"?\"}}"));
        assert!(no_base64.contains("base64: "), "{no_base64}");
        let no_sender = why(",\"message\":{\"topic\":\"t\",\"from\":\"me\",\"text\":\"\"}");
        assert!(no_sender.contains("is no sender"), "{no_sender}");
        let unknown = why(&format!("{message},\"text\":\"a\"}},\"more\":1"));
        assert!(unknown.contains("unknown field `more`"), "{unknown}");
        let other = Header::read("{\"dim_events\":9}").unwrap_err();
        assert!(matches!(other, Malformed::Form(9)));
    }
}
