//! Owns what a plugin may ask for, as plain values: they pass from its call through the commit to the
//! stages that send and publish.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use cid::Cid;
use serde::{Deserialize, Serialize};

use crate::backend::unixfs;
use crate::entry::{Event, Generation, Kind, Offset};
use crate::ident::{ContentPath, IpnsName, KeyName, PluginName, Topic};
use crate::time::Timestamp;

/// How long a record is valid unless the plugin says otherwise.
pub const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The lifetimes that may be asked for.
pub const LIFETIMES: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(365 * 24 * 3600);

/// One publish.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    /// Where.
    pub topic: Topic,
    /// What.
    pub data: Bytes,
}

/// A new value of a name.
#[derive(Clone, Debug, PartialEq)]
pub struct NameUpdate {
    /// The name that belongs to the key.
    pub name: IpnsName,
    /// What the name points to from now on.
    pub value: NameValue,
    /// How long the record is valid.
    pub lifetime: Duration,
}

/// What a name points to.
#[derive(Clone, Debug, PartialEq)]
pub enum NameValue {
    /// A path that exists already.
    Path(ContentPath),
    /// A file that the host stores.
    Document {
        /// Its CID, as `ipfs add` with CID version 1, raw leaves and 1 MiB chunks makes it.
        cid: Cid,
        /// The whole file.
        data: Bytes,
    },
}

impl NameValue {
    /// A file that the host stores.
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

/// What one entry has asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    /// New values of state keys; none for a deleted one.
    pub state: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// New times of timers; none for a cleared one.
    pub timers: BTreeMap<String, Option<Timestamp>>,
    /// What is to be published, in order.
    pub publishes: Vec<Publish>,
    /// New values of names.
    pub names: BTreeMap<KeyName, NameUpdate>,
    /// Topics to subscribe to (true) and to unsubscribe from, in order.
    pub subscriptions: Vec<(Topic, bool)>,
    /// Names that are followed from now on (true) or no longer.
    pub follows: BTreeMap<IpnsName, bool>,
}

/// An event that is to be handled again later.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// Not before this time.
    pub at: Timestamp,
    /// Counted from 1.
    pub attempt: u32,
    /// The entry that the event came from.
    pub first: Offset,
    /// The event.
    pub event: Event,
}

impl Retry {
    /// The entry that it will be, put off by code `by` of `plugin`, in the form of the log.
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

/// An event that was set aside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Which plugin could not handle it.
    pub plugin: PluginName,
    /// The plugin's version.
    pub version: String,
    /// Which code it was.
    #[serde(default)]
    pub by: Generation,
    /// The entry that the event came from.
    pub offset: u64,
    /// When it was set aside, in nanoseconds since 1970.
    pub time: u64,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it was set aside.
    pub reason: String,
    /// Where it trapped, if it did: the guest's functions, innermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stack: Vec<String>,
    /// What the plugin logged meanwhile.
    pub log: Vec<String>,
    /// The event.
    #[serde(with = "stored_event")]
    pub event: Event,
}

/// An event in JSON: its form in the log, as base64url without padding.
mod stored_event {
    use multibase::Base;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::entry::Event;

    pub fn serialize<S: Serializer>(event: &Event, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Base::Base64Url.encode(event.to_bytes()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Event, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = Base::Base64Url.decode(text).map_err(D::Error::custom)?;
        Event::from_bytes(&bytes).map_err(D::Error::custom)
    }
}
