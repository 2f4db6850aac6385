//! Owns the grants of a plugin: topics, keys, names and limits above the default. Nothing is granted by
//! default. The host functions check the grants before any other step.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use dim_model::ident::{InvalidWord, IpnsName, KeyName, Topic};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::plugin_limits::SomeLimits;

/// A set of permissions: requested by a manifest, granted by an operator, or denied by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Grants {
    /// Topics to publish on.
    #[schema(value_type = Vec<String>)]
    pub publish: BTreeSet<TopicPattern>,
    /// Topics to subscribe to.
    #[schema(value_type = Vec<String>)]
    pub subscribe: BTreeSet<TopicPattern>,
    /// IPNS keys to publish under.
    #[schema(value_type = Vec<String>)]
    pub write: BTreeSet<KeyName>,
    /// IPNS names to read; a key of this host represents its name.
    #[schema(value_type = Vec<String>)]
    pub read: BTreeSet<NameOrKey>,
    /// Keys among `write` that another plugin may write as well. Both plugins need this grant.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub share: BTreeSet<KeyName>,
    /// Limits above the default.
    #[serde(skip_serializing_if = "SomeLimits::is_empty")]
    pub limits: SomeLimits,
}

impl Grants {
    /// Adds the permissions in `other`.
    pub fn add(&mut self, other: &Self) {
        self.publish.extend(other.publish.iter().cloned());
        self.subscribe.extend(other.subscribe.iter().cloned());
        self.write.extend(other.write.iter().cloned());
        self.read.extend(other.read.iter().cloned());
        self.share.extend(other.share.iter().cloned());
        self.limits.add(&other.limits);
    }

    /// Removes the permissions that `other` covers. A prefix that is wider than those in `other` stays.
    pub fn take(&mut self, other: &Self) {
        self.publish.retain(|own| !other.publish.iter().any(|it| it.includes(own)));
        self.subscribe.retain(|own| !other.subscribe.iter().any(|it| it.includes(own)));
        self.write.retain(|own| !other.write.contains(own));
        self.read.retain(|own| !other.read.contains(own));
        self.share.retain(|own| !other.share.contains(own));
        self.limits.take(&other.limits);
    }
}

/// The effective permissions of a plugin: everything that it is granted and not denied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Reach {
    /// The granted permissions.
    pub granted: Grants,
    /// The denied permissions, which override the granted ones.
    pub denied: Grants,
}

impl Reach {
    /// Whether the plugin may publish on `topic`.
    pub fn may_publish(&self, topic: &Topic) -> bool {
        covered(&self.granted.publish, topic) && !covered(&self.denied.publish, topic)
    }

    /// Whether the plugin may subscribe to `topic`.
    pub fn may_subscribe(&self, topic: &Topic) -> bool {
        covered(&self.granted.subscribe, topic) && !covered(&self.denied.subscribe, topic)
    }

    /// Whether the plugin may publish a value under `key`.
    pub fn may_write(&self, key: &KeyName) -> bool {
        self.granted.write.contains(key) && !self.denied.write.contains(key)
    }

    /// The keys under which the plugin may publish.
    pub fn writes(&self) -> impl Iterator<Item = &KeyName> {
        self.granted.write.difference(&self.denied.write)
    }

    /// The keys that the plugin may share with other plugins.
    pub fn shares(&self) -> impl Iterator<Item = &KeyName> {
        self.granted.share.difference(&self.denied.share)
    }

    /// The names that the plugin may read, and the keys that represent names.
    pub fn reads(&self) -> impl Iterator<Item = &NameOrKey> {
        self.granted.read.difference(&self.denied.read)
    }

    /// The keys of this host that the plugin writes, or reads by their key: they must exist.
    pub fn keys(&self) -> impl Iterator<Item = &KeyName> {
        let read = self.reads().filter_map(|either| match either {
            NameOrKey::Key(key) => Some(key),
            NameOrKey::Name(_) => None,
        });
        self.writes().chain(read)
    }

    /// Limits above the default.
    pub fn limits(&self) -> SomeLimits {
        let mut limits = self.granted.limits.clone();
        limits.take(&self.denied.limits);
        limits
    }

    /// The permissions in `asked` that the plugin does not have, in words.
    pub fn missing(&self, asked: &Grants) -> Vec<String> {
        let Lacking { publish, subscribe, write, read, share, limits } = self.lacking(asked);
        let publish = publish.into_iter().map(|topic| format!("publish on {}", topic.0));
        let subscribe = subscribe.into_iter().map(|topic| format!("subscribe to {}", topic.0));
        let write = write.into_iter().map(|key| format!("write under the key {key}"));
        let read = read.into_iter().map(|read| match read {
            NameOrKey::Name(name) => format!("read {name}"),
            NameOrKey::Key(key) => format!("read what is under the key {key}"),
        });
        let share = share.into_iter().map(|key| format!("share the key {key} with other plugins"));
        let limits = limits.into_iter().map(|limit| format!("have {limit}"));
        publish.chain(subscribe).chain(write).chain(read).chain(share).chain(limits).collect()
    }

    /// The permissions in `asked` that the operator has neither granted nor denied, in words.
    pub fn unanswered(&self, asked: &Grants) -> Vec<String> {
        let mut open = asked.clone();
        open.take(&self.denied);
        Self { granted: self.granted.clone(), denied: Grants::default() }.missing(&open)
    }

    fn lacking<'a>(&'a self, asked: &'a Grants) -> Lacking<'a> {
        let limits = self.limits();
        Lacking {
            publish: lacking(&self.granted.publish, &self.denied.publish, &asked.publish),
            subscribe: lacking(&self.granted.subscribe, &self.denied.subscribe, &asked.subscribe),
            write: asked.write.iter().filter(|key| !self.may_write(key)).collect(),
            read: asked.read.iter().filter(|read| !self.reads().any(|own| own == *read)).collect(),
            share: asked.share.iter().filter(|key| !self.shares().any(|own| own == *key)).collect(),
            limits: limits
                .lacking(&asked.limits)
                .map(|(limit, value)| format!("{value} {}", limit.what))
                .collect(),
        }
    }
}

/// The requested permissions that the plugin does not have.
struct Lacking<'a> {
    publish: Vec<&'a TopicPattern>,
    subscribe: Vec<&'a TopicPattern>,
    write: Vec<&'a KeyName>,
    read: Vec<&'a NameOrKey>,
    share: Vec<&'a KeyName>,
    limits: Vec<String>,
}

fn covered(patterns: &BTreeSet<TopicPattern>, topic: &Topic) -> bool {
    includes(patterns, topic)
}

/// Above this number of patterns, looking up the patterns that could cover a topic is faster than testing each
/// pattern.
const FEW: usize = 16;

/// Whether one of `patterns` covers a topic, or all topics of a pattern with that text.
fn includes(patterns: &BTreeSet<TopicPattern>, text: &Topic) -> bool {
    if patterns.len() <= FEW {
        let wanted = TopicPattern(text.clone());
        return patterns.iter().any(|pattern| pattern == &wanted || pattern.covers(text));
    }
    let has = |pattern: &str| pattern.parse().is_ok_and(|pattern: TopicPattern| patterns.contains(&pattern));
    let text = text.as_str();
    // A prefix covers only topics with at least one more character after the dot.
    let prefixes = text.match_indices('.').map(|(at, _)| &text[..at]).filter(|it| text.len() > it.len() + 1);
    has(text) || prefixes.into_iter().any(|prefix| has(&format!("{prefix}.*")))
}

/// The requested patterns that no granted pattern includes, or that a denied pattern touches.
fn lacking<'a>(
    granted: &BTreeSet<TopicPattern>,
    denied: &BTreeSet<TopicPattern>,
    asked: &'a BTreeSet<TopicPattern>,
) -> Vec<&'a TopicPattern> {
    let is_whole = |asked: &&TopicPattern| {
        includes(granted, &asked.0)
            && !denied.iter().any(|denied| denied.includes(asked) || asked.includes(denied))
    };
    asked.iter().filter(|asked| !is_whole(asked)).collect()
}

/// A topic, or all topics that start with `prefix.`, written `prefix.*`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TopicPattern(Topic);

impl std::fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

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

    /// Whether the pattern covers all topics that `other` covers.
    fn includes(&self, other: &TopicPattern) -> bool {
        match other.exact() {
            Some(topic) => self.covers(topic),
            None => self == other || self.covers(&other.0),
        }
    }

    /// The value of the closest pattern that covers `topic`: an exact topic takes precedence over a prefix, and a longer
    /// prefix over a shorter one.
    pub fn closest<'a, V>(values: &'a BTreeMap<Self, V>, topic: &Topic) -> Option<&'a V> {
        let covering = values.iter().filter(|(pattern, _)| pattern.covers(topic));
        let closest = covering.max_by_key(|(pattern, _)| (pattern.exact().is_some(), pattern.bytes()));
        closest.map(|(_, value)| value)
    }

    /// The length of the text in bytes.
    pub fn bytes(&self) -> usize {
        self.0.as_str().len()
    }

    /// The topic, if the pattern is a single topic.
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

/// An IPNS name, or a key of this host that represents its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NameOrKey {
    /// A name, `k51…`.
    Name(IpnsName),
    /// A key of this host.
    Key(KeyName),
}

/// The prefixes of names: as paths, as CIDs of keys in base 36 and base 32, and as peer ids.
const NAMES_BEGIN: [&str; 6] = ["/ipns/", "k51", "k2k4", "bafz", "12D3Koo", "Qm"];

impl FromStr for NameOrKey {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        match text.parse() {
            Ok(name) => Ok(Self::Name(name)),
            // A text with the prefix of a name is a mistyped name, not a key.
            Err(error) if NAMES_BEGIN.iter().any(|begin| text.starts_with(begin)) => Err(error),
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
    fn what_begins_as_a_name_does_is_one_or_nothing() {
        for slip in ["k51abc", "/ipns/nothing", "12D3KooW", "QmNotThere", "bafzaa"] {
            assert!(slip.parse::<NameOrKey>().is_err(), "{slip}");
        }
        for key in ["dim-state-key", "k5", "other"] {
            assert!(matches!(key.parse(), Ok(NameOrKey::Key(_))), "{key}");
        }
    }

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

    fn grants(text: &str) -> Grants {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_denied_counts_more_than_what_is_granted() {
        let reach = Reach {
            granted: grants(
                r#"{"publish": ["a.*"], "subscribe": ["a.*"], "write": ["k"], "limits": {"timers": 300000}}"#,
            ),
            denied: grants(r#"{"publish": ["a.secret"], "write": ["k"], "limits": {"timers": 0}}"#),
        };
        assert!(reach.may_publish(&"a.b".parse().unwrap()));
        assert!(!reach.may_publish(&"a.secret".parse().unwrap()));
        assert!(reach.may_subscribe(&"a.secret".parse().unwrap()));
        assert!(!reach.may_write(&"k".parse().unwrap()));
        assert_eq!(reach.writes().count(), 0);
        // A prefix with a denied part is not granted as a whole.
        assert_eq!(reach.missing(&grants(r#"{"publish": ["a.*"]}"#)), ["publish on a.*"]);
        assert!(reach.missing(&grants(r#"{"publish": ["a.b"], "subscribe": ["a.secret"]}"#)).is_empty());
        assert_eq!(reach.missing(&grants(r#"{"limits": {"timers": 250000}}"#)), ["have 250000 timers"]);
    }

    #[test]
    fn what_is_taken_back_is_gone_and_a_wider_prefix_stays() {
        let mut own = grants(r#"{"publish": ["a.*", "b.c"], "read": ["k"], "share": ["k"]}"#);
        own.take(&grants(r#"{"publish": ["a.b", "b.*"], "read": ["k"]}"#));
        assert_eq!(own, grants(r#"{"publish": ["a.*"], "share": ["k"]}"#));
    }
}
