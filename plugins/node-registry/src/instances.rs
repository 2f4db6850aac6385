//! Detects several agents that send heartbeats under one node id. Each start of an agent creates a new instance; two
//! instances that alternate are two agents.

use std::time::Duration;

use dim_guest::time::Time;
use serde::{Deserialize, Serialize};

use crate::node::Node;

/// Minimum silence after which an instance no longer counts.
const QUIET: Duration = Duration::from_secs(600);
/// Minimum silence after which an instance no longer counts, in heartbeat intervals.
const INTERVALS: u32 = 3;

/// Number of returns of an instance that make a conflict. A single late message of a restarted agent makes none.
const RETURNS: u32 = 2;

/// Maximum number of stored instances, besides the latest one.
const MOST: usize = 7;

/// Other recent instances of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Others {
    heard: Vec<Heard>,
    returns: u32,
}

/// An instance and the time of its last heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Heard {
    instance: String,
    last_seen: Time,
}

/// A conflict of several agents that send heartbeats under one id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conflict {
    /// The instances of the agents.
    pub instances: Vec<String>,
    /// The start of the conflict.
    pub since: Time,
}

impl Node {
    /// Updates the instances of the node after a heartbeat of `instance`. A heartbeat without an instance changes
    /// nothing. The caller updates `last_seen` afterwards.
    pub fn hear_instance(&mut self, instance: Option<String>, now: Time) {
        let Some(instance) = instance else { return };
        let every = Duration::from_millis(self.every_ms.unwrap_or(0)).saturating_mul(INTERVALS);
        let quiet = QUIET.max(every);
        let mut others = self.others.take().unwrap_or_default();
        others.heard.retain(|other| now.since(other.last_seen) <= quiet);
        if self.instance.as_ref() != Some(&instance) {
            others.change(self.instance.replace(instance.clone()), &instance, self.last_seen);
        }
        if others.heard.is_empty() {
            self.conflict = None;
            return;
        }
        if others.returns >= RETURNS {
            let mut instances: Vec<_> = others.heard.iter().map(|other| other.instance.clone()).collect();
            instances.push(instance);
            instances.sort();
            let since = self.conflict.as_ref().map_or(now, |conflict| conflict.since);
            self.conflict = Some(Conflict { instances, since });
        }
        self.others = Some(others);
    }
}

impl Others {
    /// Moves the instance `before` to the other instances, because `heard` is now the latest one.
    fn change(&mut self, before: Option<String>, heard: &str, last_seen: Time) {
        let known = self.heard.len();
        self.heard.retain(|other| other.instance != heard);
        self.returns = match self.heard.len() {
            left if left < known => self.returns.saturating_add(1),
            0 => 0,
            _ => self.returns,
        };
        self.heard.extend(before.map(|instance| Heard { instance, last_seen }));
        let more = self.heard.len().saturating_sub(MOST);
        self.heard.drain(..more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(node: &mut Node, instance: &str, second: i64) -> bool {
        let now = Time::of_millis(1_767_225_600_000 + second * 1_000);
        node.hear_instance(Some(instance.to_owned()), now);
        node.last_seen = now;
        node.conflict.is_some()
    }

    #[test]
    fn two_agents_that_are_heard_in_turn_are_a_conflict_until_one_is_silent() {
        let mut node = Node::default();
        assert!(!heard(&mut node, "a", 0));
        assert!(!heard(&mut node, "b", 1), "an agent that was started anew");
        assert!(!heard(&mut node, "a", 2), "a late message of the one before");
        assert!(heard(&mut node, "b", 3));
        assert_eq!(node.conflict.as_ref().unwrap().instances, ["a", "b"]);
        for second in 1..60 {
            assert!(heard(&mut node, "b", 10 * second), "the other may beat slowly");
        }
        assert!(!heard(&mut node, "b", 610));
        assert_eq!(node.others, None);
    }

    #[test]
    fn an_agent_that_starts_again_and_again_is_no_conflict() {
        let mut node = Node::default();
        for start in 0..100 {
            assert!(!heard(&mut node, &format!("start {start}"), start));
        }
        assert_eq!(node.others.unwrap().heard.len(), MOST);
    }

    #[test]
    fn three_agents_are_a_conflict() {
        let mut node = Node::default();
        let conflicts = (0..9).map(|second| heard(&mut node, ["a", "b", "c"][second as usize % 3], second));
        assert_eq!(conflicts.filter(|conflict| *conflict).count(), 5);
    }
}
