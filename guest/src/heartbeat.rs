//! What a node sends: one reader for every plugin that hears heartbeats, and one rule for their order.
//!
//! A message that is an object with a valid `node_id` is a sign of life when it arrives, whatever its other members are.
//! So no plugin counts a node as alive that another one does not know.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::Failure;
use crate::time::Time;

/// A heartbeat. Its optional members are read with [`Members`](crate::member::Members).
#[derive(Debug, Deserialize)]
pub struct Heartbeat<'a> {
    /// The node that it speaks for.
    pub node_id: String,
    /// When it was sent, a [`Time`].
    #[serde(borrow, default)]
    pub timestamp: Option<&'a RawValue>,
    /// The node's status, a string.
    #[serde(borrow, default)]
    pub status: Option<&'a RawValue>,
    /// What the node has to spare, an object.
    #[serde(borrow, default)]
    pub resources: Option<&'a RawValue>,
    /// The models that the node holds, strings.
    #[serde(borrow, default)]
    pub cached_models: Option<&'a RawValue>,
    /// Which agent of the node sent it, a string; another one after each start of the agent.
    #[serde(borrow, default)]
    pub instance: Option<&'a RawValue>,
    /// The time between two heartbeats, in milliseconds.
    #[serde(borrow, default)]
    pub every_ms: Option<&'a RawValue>,
}

impl<'a> Heartbeat<'a> {
    /// Reads a message. What has no valid `node_id` is set aside.
    pub fn parse(data: &'a [u8]) -> Result<Self, Failure> {
        Self::read(text(data)?)
    }

    /// Reads a message that is text.
    pub fn read(text: &'a str) -> Result<Self, Failure> {
        let heartbeat: Self = serde_json::from_str(text)
            .map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))?;
        check_id(&heartbeat.node_id).map_err(Failure::Reject)?;
        Ok(heartbeat)
    }
}

/// The text of a message; JSON is UTF-8.
pub fn text(data: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(data).map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))
}

/// Checks the id of a node.
pub fn check_id(id: &str) -> Result<(), String> {
    crate::id::check("a node_id", id, 256)
}

/// How close together two messages of one sender must arrive, and be sent, for its clock to order them. A network
/// delays a message by less; a clock that was set differs by more, or is right again after this time.
const ORDERED_WITHIN: Duration = Duration::from_secs(10);

/// Whether a message that was `sent` then, as its sender says, was overtaken by one of the same sender: one that
/// `arrived` before it, at a time of this host, and was sent at `known`.
///
/// A sender's clock says no more than this. What arrives later was sent later, unless both came within seconds.
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
