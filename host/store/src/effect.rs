//! Owns the effects that a plugin may request, as plain values. They pass from its call through the commit to
//! the stages that send and publish.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use cid::Cid;
use dim_ipfs::unixfs;
use dim_model::entry::{Event, Generation, Kind, Offset};
use dim_model::ident::{ContentPath, IpnsName, KeyName, PluginName, Topic};
use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::entry_context::SubscriptionRequest;

/// Default lifetime of a record.
pub const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The lifetimes that a plugin may request.
pub const LIFETIMES: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(365 * 24 * 3600);

/// One publish.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    /// The topic.
    pub topic: Topic,
    /// The bytes of the message.
    pub data: Bytes,
}

/// A new value of a name.
#[derive(Clone, Debug, PartialEq)]
pub struct NameUpdate {
    /// The name of the key.
    pub name: IpnsName,
    /// The new value.
    pub value: NameValue,
    /// The lifetime of the record.
    pub lifetime: Duration,
}

/// The value of a name.
#[derive(Clone, Debug, PartialEq)]
pub enum NameValue {
    /// A path that exists already.
    Path(ContentPath),
    /// A file that the host stores.
    Document {
        /// The CID of the file, equal to that of `ipfs add` with CID version 1, raw leaves and 1 MiB chunks.
        cid: Cid,
        /// The content of the file.
        data: Bytes,
    },
}

impl NameValue {
    /// Makes the value for a file that the host stores.
    pub fn document(data: Bytes) -> Self {
        Self::Document { cid: unixfs::file_cid(&data), data }
    }

    /// The path of the value.
    pub fn path(&self) -> ContentPath {
        match self {
            Self::Path(path) => path.clone(),
            Self::Document { cid, .. } => ContentPath::of(cid),
        }
    }
}

/// The effects of one entry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    /// New values of state keys; `None` deletes a key.
    pub state: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// New times of timers; `None` clears a timer.
    pub timers: BTreeMap<String, Option<Timestamp>>,
    /// The publishes, in order.
    pub publishes: Vec<Publish>,
    /// New values of names.
    pub names: BTreeMap<KeyName, NameUpdate>,
    /// Requested subscriptions and ends of subscriptions, in order.
    pub subscriptions: Vec<(Topic, SubscriptionRequest)>,
    /// Names to follow (true) or to stop following (false).
    pub follows: BTreeMap<IpnsName, bool>,
}

/// An event to handle again later.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// The earliest time of the next attempt.
    pub at: Timestamp,
    /// The number of the next attempt, counted from 1.
    pub attempt: u32,
    /// The offset of the entry that contained the event first.
    pub first: Offset,
    /// The event.
    pub event: Event,
}

impl Retry {
    /// Encodes the entry of the next attempt in the format of the log. Code `by` of `plugin` requested the retry.
    pub fn to_bytes(&self, plugin: &PluginName, by: Generation) -> Vec<u8> {
        let again = Kind::Again {
            plugin: plugin.clone(),
            attempt: self.attempt,
            first: self.first,
            by,
            event: self.event.clone(),
        };
        again.to_bytes()
    }
}

/// An event that the plugin could not handle, with the reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The plugin that could not handle it.
    pub plugin: PluginName,
    /// The plugin's version.
    pub version: String,
    /// The generation of the code.
    #[serde(default)]
    pub by: Generation,
    /// The offset of the entry that contained the event first.
    pub offset: u64,
    /// The time at which it became a dead letter, in nanoseconds since 1970.
    pub time: u64,
    /// The number of attempts.
    pub attempts: u32,
    /// The reason of the failure.
    pub reason: String,
    /// The guest's functions at the trap, innermost first; empty without a trap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stack: Vec<String>,
    /// The plugin's log lines from the last attempt.
    pub log: Vec<String>,
    /// The event.
    #[serde(with = "stored_event")]
    pub event: Event,
}

/// Encodes an event in JSON: its format in the log, as base64url without padding.
mod stored_event {
    use multibase::Base;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use dim_model::entry::Event;

    pub fn serialize<S: Serializer>(event: &Event, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base::Base64Url.encode(event.to_bytes()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Event, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = Base::Base64Url.decode(text).map_err(D::Error::custom)?;
        Event::from_bytes(&bytes).map_err(D::Error::custom)
    }
}
