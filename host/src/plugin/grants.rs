//! Owns what a plugin may reach: topics, keys and names. Nothing is granted by default, and the
//! host functions ask here before anything is touched.

use std::collections::BTreeSet;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ident::{InvalidWord, IpnsName, KeyName, Topic};

/// What one plugin may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Grants {
    /// Topics to publish on.
    #[schema(value_type = Vec<String>, required)]
    pub publish: BTreeSet<TopicPattern>,
    /// Topics to subscribe to.
    #[schema(value_type = Vec<String>, required)]
    pub subscribe: BTreeSet<TopicPattern>,
    /// IPNS keys to publish under.
    #[schema(value_type = Vec<String>, required)]
    pub write: BTreeSet<KeyName>,
    /// IPNS names to read; a key of this host stands for its name.
    #[schema(value_type = Vec<String>, required)]
    pub read: BTreeSet<NameOrKey>,
}

impl Grants {
    /// Whether `topic` may be published on.
    pub fn may_publish(&self, topic: &Topic) -> bool {
        self.publish.iter().any(|pattern| pattern.covers(topic))
    }

    /// Whether `topic` may be subscribed to.
    pub fn may_subscribe(&self, topic: &Topic) -> bool {
        self.subscribe.iter().any(|pattern| pattern.covers(topic))
    }

    /// The keys of this host that are written, or read by their key: they must be there.
    pub fn keys(&self) -> impl Iterator<Item = &KeyName> {
        let read = self.read.iter().filter_map(|either| match either {
            NameOrKey::Key(key) => Some(key),
            NameOrKey::Name(_) => None,
        });
        self.write.iter().chain(read)
    }

    /// What `other` allows and this does not, in words.
    pub fn missing(&self, other: &Grants) -> Vec<String> {
        let publish = lacking(&self.publish, &other.publish).map(|topic| format!("publish on {}", topic.0));
        let subscribe =
            lacking(&self.subscribe, &other.subscribe).map(|topic| format!("subscribe to {}", topic.0));
        let write = other.write.difference(&self.write).map(|key| format!("write under the key {key}"));
        let read = other.read.difference(&self.read).map(|read| match read {
            NameOrKey::Name(name) => format!("read {name}"),
            NameOrKey::Key(key) => format!("read what is under the key {key}"),
        });
        publish.chain(subscribe).chain(write).chain(read).collect()
    }

    /// Whether all that `other` allows is allowed here too.
    pub fn cover(&self, other: &Grants) -> bool {
        lacking(&self.publish, &other.publish).next().is_none()
            && lacking(&self.subscribe, &other.subscribe).next().is_none()
            && other.write.is_subset(&self.write)
            && other.read.is_subset(&self.read)
    }
}

/// The patterns that none of `granted` includes.
fn lacking<'a>(
    granted: &'a BTreeSet<TopicPattern>,
    asked: &'a BTreeSet<TopicPattern>,
) -> impl Iterator<Item = &'a TopicPattern> {
    asked.iter().filter(|asked| !granted.iter().any(|granted| granted.includes(asked)))
}

/// A topic, or all topics that start with `prefix.`, written `prefix.*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TopicPattern(Topic);

impl TopicPattern {
    /// Whether the pattern covers `topic`.
    pub fn covers(&self, topic: &Topic) -> bool {
        match self.0.as_str().strip_suffix(".*") {
            Some(prefix) => topic
                .as_str()
                .strip_prefix(prefix)
                .is_some_and(|rest| rest.len() > 1 && rest.starts_with('.')),
            None => *topic == self.0,
        }
    }

    /// Whether all that `other` covers is covered.
    fn includes(&self, other: &TopicPattern) -> bool {
        match other.exact() {
            Some(topic) => self.covers(topic),
            None => self == other || self.covers(&other.0),
        }
    }

    /// The topic, if the pattern is one.
    pub fn exact(&self) -> Option<&Topic> {
        (!self.0.as_str().ends_with(".*")).then_some(&self.0)
    }
}

impl FromStr for TopicPattern {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        text.parse().map(Self)
    }
}

/// An IPNS name, or a key of this host that stands for its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NameOrKey {
    /// A name, `k51…`.
    Name(IpnsName),
    /// A key of this host.
    Key(KeyName),
}

impl FromStr for NameOrKey {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        match text.parse() {
            Ok(name) => Ok(Self::Name(name)),
            Err(error) if text.starts_with("/ipns/") => Err(error),
            Err(_) => text.parse().map(Self::Key),
        }
    }
}

impl TryFrom<String> for NameOrKey {
    type Error = InvalidWord;

    fn try_from(text: String) -> Result<Self, InvalidWord> {
        text.parse()
    }
}

impl From<NameOrKey> for String {
    fn from(either: NameOrKey) -> String {
        match either {
            NameOrKey::Name(name) => name.into(),
            NameOrKey::Key(key) => key.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_covers_what_lies_under_it_and_nothing_beside() {
        let pattern: TopicPattern = "dim.jobs.*".parse().unwrap();
        for (topic, covered) in [
            ("dim.jobs.updates", true),
            ("dim.jobs.a.b", true),
            ("dim.jobs", false),
            ("dim.jobs.", false),
            ("dim.jobsx.updates", false),
        ] {
            assert_eq!(pattern.covers(&topic.parse().unwrap()), covered, "{topic}");
        }
    }
}
