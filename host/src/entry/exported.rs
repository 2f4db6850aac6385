//! Owns the form in which entries leave the host: lines of JSON, which people and other programs can read, and which a
//! plugin can be tried on.
//!
//! The first line is a [`Header`], each other one a [`Record`] of what came from outside, in order. What plugins
//! brought about themselves (their retries, their subscriptions, limits that struck) is not among them: it comes
//! again by itself. Bytes are exact: text that is UTF-8 stands under `text`, other bytes under `base64`.

mod written;

use std::collections::BTreeMap;

use bytes::Bytes;
use multibase::Base;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::{Entry, Event, Hearing, Kind, Origin, Resolution};
use crate::ident::{IpnsName, KeyName, PeerName, PluginName, Topic};
use crate::time::Timestamp;

/// The version of the form.
pub const FORM: u32 = 1;

/// The first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The version of the form.
    pub dim_events: u32,
    /// The host's identity.
    pub host: String,
    /// What random follows from in place of the host's secret, in hex: it is the same for each export of a host, and
    /// says nothing of the secret.
    pub random: String,
    /// The names that belong to the keys of the host.
    pub keys: BTreeMap<KeyName, IpnsName>,
    /// The config of each plugin that runs, with what the operator has set.
    pub plugins: BTreeMap<PluginName, Value>,
    /// When it was exported: time goes on until then.
    pub until: Timestamp,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "written::Written")]
pub struct Record {
    /// Its place in the log.
    pub offset: u64,
    /// When it was appended.
    pub time: Timestamp,
    /// What it is.
    #[serde(flatten)]
    pub what: What,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A message.
    Message {
        /// Its topic.
        topic: Topic,
        /// `host`, `plugin NAME` or `peer ID`.
        from: String,
        /// What it says.
        #[serde(flatten)]
        data: Data,
    },
    /// A time in which messages of a topic may have been missed.
    Gap {
        /// The topic.
        topic: Topic,
        /// From when.
        since: Timestamp,
        /// Until when.
        until: Timestamp,
    },
    /// Spans in which topics were listened to.
    Heard(Vec<Span>),
    /// The peers of a topic have changed.
    Peers {
        /// The topic.
        topic: Topic,
        /// Its peers.
        peers: Vec<PeerName>,
    },
    /// A name has another value.
    Name {
        /// What is known of it.
        #[serde(flatten)]
        resolution: Resolution,
        /// The document that it points to, if the host still holds it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        document: Option<Data>,
    },
    /// A name still has its value.
    Confirmed(Resolution),
    /// An order to a plugin.
    Command {
        /// To whom.
        plugin: PluginName,
        /// Which.
        method: String,
        /// JSON.
        body: String,
    },
}

/// A span in which a topic was listened to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The topic.
    pub topic: Topic,
    since: Timestamp,
    until: Timestamp,
}

/// Bytes: as text if they are UTF-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Data {
    /// UTF-8.
    Text(String),
    /// Other bytes, in base64 with padding.
    Base64(String),
}

/// Why a line is not what it should be.
#[derive(Debug, Error)]
pub enum Malformed {
    /// It is no line of this form.
    #[error("{}", .0.to_string().replace(" at line 1 column ", ", at column "))]
    Line(serde_json::Error),
    /// It is of no sort, or of several.
    #[error("a record has one of message, gap, heard, peers, name, confirmed and command")]
    Sort,
    /// A message says nothing, or two things.
    #[error("a message has either text or base64")]
    Data,
    /// It is not behind the one before it.
    #[error("the offsets of records rise, and their times do not fall")]
    Order,
    /// Bytes that are none.
    #[error("base64: {0}")]
    Base64(#[from] multibase::Error),
    /// A sender that is none.
    #[error("{0:?} is no sender: a message is from host, plugin NAME or peer ID")]
    Sender(String),
    /// It is of another version.
    #[error("the events have the form {0}; this program reads {FORM}")]
    Form(u32),
    /// The stand-in of the secret.
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
    /// The bytes.
    pub fn bytes(&self) -> Result<Bytes, Malformed> {
        Ok(match self {
            Self::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            Self::Base64(text) => Base::Base64Pad.decode(text)?.into(),
        })
    }
}

impl Header {
    /// Reads the first line.
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

    /// What random follows from.
    pub fn secret(&self) -> Result<[u8; 32], Malformed> {
        let bytes = Base::Base16Lower.decode(&self.random).map_err(|_| Malformed::Random)?;
        bytes.try_into().map_err(|_| Malformed::Random)
    }
}

impl Record {
    /// The record of an entry; none of what a plugin brought about. `document` is what a name points to.
    pub fn of(entry: &Entry, document: impl FnOnce(&Resolution) -> Option<Vec<u8>>) -> Option<Self> {
        let what = match &entry.kind {
            Kind::Event(Event::Message { topic, data, origin }) => {
                let from = match origin {
                    Origin::Host => "host".to_owned(),
                    Origin::Plugin(plugin) => format!("plugin {plugin}"),
                    Origin::Peer(peer) => format!("peer {peer}"),
                };
                What::Message { topic: topic.clone(), from, data: data.as_ref().into() }
            }
            Kind::Event(Event::Gap { topic, since, until }) => {
                What::Gap { topic: topic.clone(), since: *since, until: *until }
            }
            Kind::Event(Event::NameChanged(resolution)) => {
                let document = document(resolution).map(|bytes| bytes.as_slice().into());
                What::Name { resolution: resolution.clone(), document }
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
            // What an operator has handled again comes as it came first.
            Kind::Again { .. }
            | Kind::Event(Event::Timer { .. })
            | Kind::Tick(_)
            | Kind::Struck { .. }
            | Kind::Subscription { .. }
            | Kind::Code { .. } => return None,
        };
        Some(Self { offset: entry.offset.0, time: entry.time, what })
    }

    /// Reads a line: what it returns is an entry.
    pub fn read(line: &str) -> Result<Self, Malformed> {
        let record: Self = serde_json::from_str(line)?;
        record.what.kind()?;
        if let What::Name { document: Some(document), .. } = &record.what {
            document.bytes()?;
        }
        Ok(record)
    }

    /// Whether it may come behind the record with this place and time.
    pub fn follows(&self, last: Option<(u64, Timestamp)>) -> bool {
        last.is_none_or(|(offset, time)| offset < self.offset && time <= self.time)
    }
}

impl What {
    /// The topics that it concerns, if it concerns any.
    pub fn topics(&self) -> Vec<&Topic> {
        match self {
            Self::Message { topic, .. } | Self::Gap { topic, .. } | Self::Peers { topic, .. } => vec![topic],
            Self::Heard(spans) => spans.iter().map(|span| &span.topic).collect(),
            Self::Name { .. } | Self::Confirmed(_) | Self::Command { .. } => Vec::new(),
        }
    }

    /// The entry that it was.
    pub fn kind(&self) -> Result<Kind, Malformed> {
        Ok(match self {
            Self::Message { topic, from, data } => {
                let no_sender = || Malformed::Sender(from.clone());
                let origin = match from.split_once(' ') {
                    None if from == "host" => Origin::Host,
                    Some(("plugin", plugin)) => Origin::Plugin(plugin.parse().map_err(|_| no_sender())?),
                    Some(("peer", peer)) => Origin::Peer(peer.parse().map_err(|_| no_sender())?),
                    _ => return Err(no_sender()),
                };
                Kind::Event(Event::Message { topic: topic.clone(), data: data.bytes()?, origin })
            }
            Self::Gap { topic, since, until } => {
                Kind::Event(Event::Gap { topic: topic.clone(), since: *since, until: *until })
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Offset;

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
            Kind::Event(Event::Gap { topic: topic.clone(), since, until }),
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
