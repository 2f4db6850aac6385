//! The record of a node, and its tolerant parser.

use std::borrow::Cow;

use dim_guest::member::Members;
use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::instances::{Conflict, Others};
use crate::resources::{self, Resources};

/// The nodes of this host's own registry, by id.
pub const NODES: Map<str, Node> = Map::new("node/");

/// A node of the registry.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Node {
    pub node_id: String,
    pub status: String,
    /// The time of the last heartbeat; absent if unknown.
    #[serde(skip_serializing_if = "is_unknown")]
    pub last_seen: Time,
    pub resources: Resources,
    pub cached_models: Vec<String>,
    /// The timestamp in the last heartbeat, by the node's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Time>,
    /// The name of the merged registry that lists the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The status that the node reported, while a verdict replaces it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
    /// The observer of that verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observer: Option<String>,
    /// The hint of the watchdog with its verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The unreadable members of the last heartbeat, with the reasons.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
    /// The interval of its heartbeats, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_ms: Option<u64>,
    /// The instance of the agent that sent the last heartbeat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Other recent instances that sent heartbeats under this id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub others: Option<Others>,
    /// The conflict, while several agents send heartbeats under this id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conflict: Option<Conflict>,
    /// Whether the command `put` added the node and no heartbeat has arrived since.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub put: bool,
}

fn is_unknown(time: &Time) -> bool {
    *time == Time::default()
}

/// A node of the state or of a document, with unparsed members.
#[derive(Debug, Deserialize)]
pub struct Row<'a> {
    pub node_id: String,
    #[serde(borrow, default)]
    status: Option<&'a RawValue>,
    #[serde(borrow, default)]
    last_seen: Option<&'a RawValue>,
    #[serde(borrow, default)]
    resources: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cached_models: Option<&'a RawValue>,
    #[serde(borrow, default)]
    sent_at: Option<&'a RawValue>,
    #[serde(borrow, default)]
    said: Option<&'a RawValue>,
    #[serde(borrow, default)]
    observer: Option<&'a RawValue>,
    #[serde(borrow, default)]
    hint: Option<&'a RawValue>,
    #[serde(borrow, default)]
    ignored: Option<&'a RawValue>,
    #[serde(borrow, default)]
    every_ms: Option<&'a RawValue>,
    #[serde(borrow, default)]
    instance: Option<&'a RawValue>,
    #[serde(borrow, default)]
    others: Option<&'a RawValue>,
    #[serde(borrow, default)]
    conflict: Option<&'a RawValue>,
    #[serde(borrow, default)]
    put: Option<&'a RawValue>,
}

impl Row<'_> {
    /// Parses the node. Unreadable members are absent, and their reasons are returned.
    pub fn read(&self) -> (Node, Vec<String>) {
        let mut of = Members::default();
        let status: Option<String> = of.read("status", self.status);
        let node = Node {
            node_id: self.node_id.clone(),
            status: status.unwrap_or_else(|| "unknown".to_owned()),
            last_seen: of.read("last_seen", self.last_seen).unwrap_or_default(),
            resources: of.read("resources", self.resources).unwrap_or_default(),
            cached_models: of.read("cached_models", self.cached_models).unwrap_or_default(),
            sent_at: of.read("sent_at", self.sent_at),
            source: None,
            said: of.read("said", self.said),
            observer: of.read("observer", self.observer),
            hint: of.read("hint", self.hint),
            ignored: of.read("ignored", self.ignored).unwrap_or_default(),
            every_ms: of.read("every_ms", self.every_ms),
            instance: of.read("instance", self.instance),
            others: of.read("others", self.others),
            conflict: of.read("conflict", self.conflict),
            put: of.read("put", self.put).unwrap_or_default(),
        };
        (node, of.into_reasons())
    }
}

/// The members of a stored node that a heartbeat needs, unparsed. Other members are skipped.
#[derive(Debug, Default, Deserialize)]
pub struct Before<'a> {
    #[serde(borrow, default)]
    sent_at: Option<&'a RawValue>,
    #[serde(borrow, default)]
    last_seen: Option<&'a RawValue>,
    #[serde(borrow, default)]
    resources: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cached_models: Option<&'a RawValue>,
    #[serde(borrow, default)]
    ignored: Option<&'a RawValue>,
    #[serde(borrow, default)]
    every_ms: Option<&'a RawValue>,
    #[serde(borrow, default)]
    instance: Option<&'a RawValue>,
    #[serde(borrow, default)]
    others: Option<&'a RawValue>,
    #[serde(borrow, default)]
    conflict: Option<&'a RawValue>,
}

impl Before<'_> {
    /// Returns the timestamp in the last heartbeat, by the node's clock.
    pub fn sent_at(&self) -> Option<Time> {
        one(self.sent_at)
    }

    /// Returns the free resources.
    pub fn resources(&self) -> Option<Resources> {
        one(self.resources)
    }

    /// Returns the cached models.
    pub fn cached_models(&self) -> Option<Vec<String>> {
        one(self.cached_models)
    }

    /// Returns the interval of the heartbeats, in milliseconds.
    pub fn every_ms(&self) -> Option<u64> {
        one(self.every_ms)
    }

    /// Returns the unreadable members of the last heartbeat, with the reasons.
    pub fn ignored(&self) -> Vec<String> {
        one(self.ignored).unwrap_or_default()
    }

    /// Returns whether several agents send heartbeats under this id.
    pub fn is_in_conflict(&self) -> bool {
        self.conflict.is_some()
    }

    /// Returns a node with only the members about instances. `last_seen` is parsed only if there is an instance.
    pub fn instances(&self) -> Node {
        let instance: Option<String> = one(self.instance);
        let last_seen = instance.as_ref().and_then(|_| one(self.last_seen)).unwrap_or_default();
        Node {
            last_seen,
            instance,
            others: one(self.others),
            conflict: one(self.conflict),
            ..Node::default()
        }
    }
}

/// Parses a member. Returns none if it is absent or unreadable.
fn one<'a, T: Deserialize<'a>>(raw: Option<&'a RawValue>) -> Option<T> {
    serde_json::from_str(raw?.get()).ok()
}

/// Ignores unreadable members, because older versions of this plugin stored members that cannot be parsed again.
impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Row::deserialize(deserializer)?.read().0)
    }
}

/// Returns a record in a form that every JSON reader accepts, or none if it is not a node.
pub fn readable(record: &[u8]) -> Option<Cow<'_, [u8]>> {
    if !resources::may_be_unreadable(record) {
        return Some(Cow::Borrowed(record));
    }
    let node: Node = state::decode(record).ok()?;
    serde_json::to_vec(&node).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_cannot_be_read_costs_itself() {
        let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
        let record = format!(
            r#"{{"node_id":"n1","status":"busy","resources":{{"memory_available":{deep}}},"cached_models":null}}"#
        );
        let written = readable(record.as_bytes()).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&written).unwrap();
        assert_eq!(read["status"], "busy");
        assert_eq!(read["resources"], serde_json::json!({}));
        assert!(readable(deep.as_bytes()).is_none());
        let half = record.replace(&deep, "\"\\ud800\"");
        let read: serde_json::Value = serde_json::from_slice(&readable(half.as_bytes()).unwrap()).unwrap();
        assert_eq!(
            (&read["status"], &read["resources"]),
            (&serde_json::json!("busy"), &serde_json::json!({}))
        );
    }

    #[test]
    fn a_record_of_the_code_before_is_read() {
        let record = r#"{"node_id":"n1","status":"dead","last_seen":"2026-01-01T00:00:00.000Z","resources":{"cpu_available":2.5},"cached_models":["m"],"sent_at":"2026-01-01T00:00:00.000Z"}"#;
        let node: Node = state::decode(record.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&node).unwrap(), record);
    }
}
