//! Owns what a plugin may reach: topics, keys, names, and more than the usual of what is limited. Nothing is
//! granted by default, and the host functions ask here before anything is touched.

use std::collections::BTreeSet;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SomeLimits;
use crate::ident::{InvalidWord, IpnsName, KeyName, Topic};

/// What a manifest asks for, what an operator grants, or what one denies.
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
    /// IPNS names to read; a key of this host stands for its name.
    #[schema(value_type = Vec<String>)]
    pub read: BTreeSet<NameOrKey>,
    /// Of the keys to publish under, those that another plugin may publish under, too. Both need this grant.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub share: BTreeSet<KeyName>,
    /// Limits beyond the default.
    #[serde(skip_serializing_if = "SomeLimits::is_empty")]
    pub limits: SomeLimits,
}

impl Grants {
    /// Takes in what `other` allows.
    pub fn add(&mut self, other: &Self) {
        self.publish.extend(other.publish.iter().cloned());
        self.subscribe.extend(other.subscribe.iter().cloned());
        self.write.extend(other.write.iter().cloned());
        self.read.extend(other.read.iter().cloned());
        self.share.extend(other.share.iter().cloned());
        self.limits.add(&other.limits);
    }

    /// Gives up what `other` covers. A prefix that is wider than what `other` has stays.
    pub fn take(&mut self, other: &Self) {
        self.publish.retain(|own| !other.publish.iter().any(|it| it.includes(own)));
        self.subscribe.retain(|own| !other.subscribe.iter().any(|it| it.includes(own)));
        self.write.retain(|own| !other.write.contains(own));
        self.read.retain(|own| !other.read.contains(own));
        self.share.retain(|own| !other.share.contains(own));
        self.limits.take(&other.limits);
    }
}

/// What a plugin may reach: what it is granted and not denied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Reach {
    /// What it is granted.
    pub granted: Grants,
    /// What it is denied all the same: what counts more.
    pub denied: Grants,
}

impl Reach {
    /// Whether `topic` may be published on.
    pub fn may_publish(&self, topic: &Topic) -> bool {
        covered(&self.granted.publish, topic) && !covered(&self.denied.publish, topic)
    }

    /// Whether `topic` may be subscribed to.
    pub fn may_subscribe(&self, topic: &Topic) -> bool {
        covered(&self.granted.subscribe, topic) && !covered(&self.denied.subscribe, topic)
    }

    /// Whether a value may be published under `key`.
    pub fn may_write(&self, key: &KeyName) -> bool {
        self.granted.write.contains(key) && !self.denied.write.contains(key)
    }

    /// The keys to publish under.
    pub fn writes(&self) -> impl Iterator<Item = &KeyName> {
        self.granted.write.difference(&self.denied.write)
    }

    /// The keys to publish under of which others may have the same.
    pub fn shares(&self) -> impl Iterator<Item = &KeyName> {
        self.granted.share.difference(&self.denied.share)
    }

    /// The names to read, and the keys that stand for one.
    pub fn reads(&self) -> impl Iterator<Item = &NameOrKey> {
        self.granted.read.difference(&self.denied.read)
    }

    /// The keys of this host that are written, or read by their key: they must be there.
    pub fn keys(&self) -> impl Iterator<Item = &KeyName> {
        let read = self.reads().filter_map(|either| match either {
            NameOrKey::Key(key) => Some(key),
            NameOrKey::Name(_) => None,
        });
        self.writes().chain(read)
    }

    /// Limits beyond the default.
    pub fn limits(&self) -> SomeLimits {
        let mut limits = self.granted.limits.clone();
        limits.take(&self.denied.limits);
        limits
    }

    /// What `asked` allows and this does not, in words.
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

    /// What `asked` allows and the operator has neither granted nor denied, in words.
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

/// What is asked for and not allowed.
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

/// From so many patterns on it is quicker to look up what could cover a topic.
const FEW: usize = 16;

/// Whether one of `patterns` covers a topic, or all that a pattern of that text covers.
fn includes(patterns: &BTreeSet<TopicPattern>, text: &Topic) -> bool {
    if patterns.len() <= FEW {
        let wanted = TopicPattern(text.clone());
        return patterns.iter().any(|pattern| pattern == &wanted || pattern.covers(text));
    }
    let has = |pattern: &str| pattern.parse().is_ok_and(|pattern: TopicPattern| patterns.contains(&pattern));
    let text = text.as_str();
    // Below a prefix there is something.
    let prefixes = text.match_indices('.').map(|(at, _)| &text[..at]).filter(|it| text.len() > it.len() + 1);
    has(text) || prefixes.into_iter().any(|prefix| has(&format!("{prefix}.*")))
}

/// The patterns that none of `granted` includes, or of which something is `denied`.
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

    /// Whether all that `other` covers is covered.
    fn includes(&self, other: &TopicPattern) -> bool {
        match other.exact() {
            Some(topic) => self.covers(topic),
            None => self == other || self.covers(&other.0),
        }
    }

    /// Bytes of its text.
    pub fn bytes(&self) -> usize {
        self.0.as_str().len()
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

/// How names begin, as paths, as CIDs of keys in base 36 and 32, and as peer ids.
const NAMES_BEGIN: [&str; 6] = ["/ipns/", "k51", "k2k4", "bafz", "12D3Koo", "Qm"];

impl FromStr for NameOrKey {
    type Err = InvalidWord;

    fn from_str(text: &str) -> Result<Self, InvalidWord> {
        match text.parse() {
            Ok(name) => Ok(Self::Name(name)),
            // What begins as names do is meant as one: a slip of the finger is no key.
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
        // A prefix of which a part is denied is not had as a whole.
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
