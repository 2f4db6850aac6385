//! Reads heartbeats and defines their order, for all plugins that receive them.
//!
//! A JSON object with a valid `node_id` is a heartbeat, whatever its other members are. So all plugins agree about
//! which nodes are alive.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::Failure;
use crate::time::Time;

/// A heartbeat of a node. [`Members`](crate::member::Members) reads its optional members.
#[derive(Debug, Deserialize)]
pub struct Heartbeat<'a> {
    /// The id of the node.
    pub node_id: String,
    /// The time at which it was sent, a [`Time`].
    #[serde(borrow, default)]
    pub timestamp: Option<&'a RawValue>,
    /// The node's status, a string.
    #[serde(borrow, default)]
    pub status: Option<&'a RawValue>,
    /// The free resources of the node, an object.
    #[serde(borrow, default)]
    pub resources: Option<&'a RawValue>,
    /// The models that the node has cached, a list of strings.
    #[serde(borrow, default)]
    pub cached_models: Option<&'a RawValue>,
    /// The instance of the agent that sent it, a string. It changes with each start of the agent.
    #[serde(borrow, default)]
    pub instance: Option<&'a RawValue>,
    /// The time between two heartbeats, in milliseconds.
    #[serde(borrow, default)]
    pub every_ms: Option<&'a RawValue>,
}

impl<'a> Heartbeat<'a> {
    /// Reads a message. A message without a valid `node_id` is rejected.
    pub fn parse(data: &'a [u8]) -> Result<Self, Failure> {
        Self::read(text(data)?)
    }

    /// Reads the text of a message. A message without a valid `node_id` is rejected.
    pub fn read(text: &'a str) -> Result<Self, Failure> {
        let heartbeat: Self = serde_json::from_str(text)
            .map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))?;
        check_id(&heartbeat.node_id).map_err(Failure::Reject)?;
        Ok(heartbeat)
    }
}

/// Returns the data of a message as text. Data that is not UTF-8 is rejected.
pub fn text(data: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(data).map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))
}

/// Checks the id of a node. The error is a text for the operator.
pub fn check_id(id: &str) -> Result<(), String> {
    crate::id::check("a node_id", id, 256)
}

/// The maximum difference between the arrival times, and between the send times, of two messages that the sender's
/// clock can order. Network delays are shorter; a clock that was adjusted usually differs by more.
const ORDERED_WITHIN: Duration = Duration::from_secs(10);

/// Returns whether a message was overtaken by an earlier arrived message of the same sender.
///
/// The sender sent this message at `sent` and the other one at `known`, by its own clock. This message arrives at `now`
/// and the other one arrived at `arrived`, by the clock of this host. The sender's clock counts only if both messages
/// were sent and arrived within 10 s; otherwise the later arrival is the later message.
pub fn is_overtaken(sent: Time, now: Time, known: Time, arrived: Time) -> bool {
    sent < known && known.since(sent) <= ORDERED_WITHIN && now.since(arrived) <= ORDERED_WITHIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_orders_only_what_arrives_within_seconds() {
        let at = |seconds: i64| Time::of_millis(1_767_225_600_000 + seconds * 1_000);
        assert!(is_overtaken(at(99), at(100), at(100), at(100)));
        assert!(is_overtaken(at(90), at(110), at(100), at(100)));
        assert!(!is_overtaken(at(100), at(100), at(100), at(100)), "the same time");
        assert!(!is_overtaken(at(90), at(111), at(100), at(100)), "it arrived long after");
        assert!(!is_overtaken(at(89), at(100), at(100), at(100)), "a clock that went back");
        assert!(!is_overtaken(at(101), at(101), at(340), at(100)), "a clock that was ahead");
    }

    #[test]
    fn whatever_has_an_id_is_a_heartbeat() {
        for text in [
            r#"{"node_id":"n1"}"#,
            r#"{"node_id":"n1","timestamp":1767268800000,"status":3,"resources":[],"cached_models":{}}"#,
            r#"{"node_id":"n1","timestamp":null,"every_ms":-1,"other":[[[]]]}"#,
        ] {
            assert_eq!(Heartbeat::parse(text.as_bytes()).unwrap().node_id, "n1");
        }
        for text in ["", "[]", "{}", r#"{"node_id":""}"#, r#"{"node_id":1}"#] {
            assert!(matches!(Heartbeat::parse(text.as_bytes()), Err(Failure::Reject(_))), "{text}");
        }
    }
}
