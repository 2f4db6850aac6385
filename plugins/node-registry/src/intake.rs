//! Applies heartbeats and verdicts to a node.
//!
//! A node is alive when a heartbeat arrives, by the clock of this host. Clocks of other machines only order messages of
//! one sender within seconds, and measure durations.

use dim_guest::Failure;
use dim_guest::heartbeat::{check_id, is_overtaken};
use dim_guest::state;
use dim_guest::time::Time;
use serde::Deserialize;

use crate::heartbeat::Said;
use crate::node::{Before, Node};

impl Node {
    /// Returns the node after a heartbeat that arrives at `now`. `record` is the stored node, if there is one. A
    /// heartbeat that was overtaken by a later one only updates `last_seen` and the instance.
    ///
    /// Only the needed members of the record are parsed: heartbeats are frequent, and most replace all members.
    pub fn heard(record: Option<&[u8]>, before: &Before<'_>, said: Said, now: Time) -> Node {
        if let Some(mut node) = overtook(record, before, &said, now) {
            node.hear_instance(said.instance, now);
            node.last_seen = now;
            return node;
        }
        let mut node = Node {
            node_id: said.node_id,
            status: said.status.unwrap_or_else(|| "online".to_owned()),
            resources: said.resources.or_else(|| before.resources()).unwrap_or_default(),
            cached_models: said.cached_models.or_else(|| before.cached_models()).unwrap_or_default(),
            sent_at: said.timestamp.or_else(|| before.sent_at()),
            ignored: said.ignored,
            every_ms: said.every_ms.or_else(|| before.every_ms()),
            ..before.instances()
        };
        node.hear_instance(said.instance, now);
        node.last_seen = now;
        node
    }

    /// Applies a verdict. Returns false if it changes nothing.
    ///
    /// A verdict makes the status worse, until the next heartbeat or until the same observer reports a recovery.
    pub fn judge(&mut self, verdict: &Verdict, observer: Observer, now: Time) -> bool {
        // A later heartbeat disproves the verdict.
        if verdict.seen(observer, now).is_some_and(|seen| !self.put && seen < self.last_seen) {
            return false;
        }
        if matches!(verdict.status.as_str(), "alive" | "recovered") {
            return self.recovers(verdict);
        }
        let (is, was) = (rank(&verdict.status), rank(&self.status));
        let takes_over =
            observer == Observer::Own && is > 0 && is == was && self.observer != verdict.observer;
        if is <= was && !takes_over {
            return false;
        }
        let said = std::mem::replace(&mut self.status, verdict.status.clone());
        self.said = self.said.take().or((was == 0).then_some(said));
        self.observer.clone_from(&verdict.observer);
        self.hint.clone_from(&verdict.hint);
        true
    }

    /// Revokes the current verdict if it is from the same observer. Returns false if it changes nothing.
    fn recovers(&mut self, verdict: &Verdict) -> bool {
        let is_its_own = verdict.observer.is_some() && verdict.observer == self.observer;
        if !is_its_own || rank(&self.status) == 0 {
            return false;
        }
        self.status = self.said.take().unwrap_or_else(|| "online".to_owned());
        (self.observer, self.hint) = (None, None);
        true
    }
}

/// Returns the stored node if its last heartbeat was sent after the one that arrives now, by the same sender's clock.
///
/// A node under a verdict was silent for too long, so its next heartbeat cannot have been overtaken.
fn overtook(record: Option<&[u8]>, before: &Before<'_>, said: &Said, now: Time) -> Option<Node> {
    let (sent, known) = (said.timestamp?, before.sent_at()?);
    // The usual case, decided without parsing the record.
    if sent >= known {
        return None;
    }
    let node: Node = state::decode(record?).ok()?;
    let is_one_sender = node.instance == said.instance && rank(&node.status) == 0;
    (is_one_sender && is_overtaken(sent, now, known, node.last_seen)).then_some(node)
}

/// The part of a silence, one in so many, by which it may be shorter at this host than at the observer.
const SHORTER: u32 = 10;

/// Returns the severity of a status: 2 for dead, 1 for suspect, 0 otherwise.
fn rank(status: &str) -> u8 {
    match status {
        "dead" => 2,
        "suspect" => 1,
        _ => 0,
    }
}

/// The kind of an observer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observer {
    /// The watchdog of this host, which has the same clock as the registry.
    Own,
    /// Another observer, with its own clock.
    Other,
}

/// A verdict of a watchdog on a node.
#[derive(Debug, Deserialize)]
pub struct Verdict {
    pub node_id: String,
    pub status: String,
    #[serde(default)]
    last_seen: Option<Time>,
    #[serde(default)]
    timestamp: Option<Time>,
    #[serde(default)]
    observer: Option<String>,
    #[serde(default)]
    hint: Option<String>,
}

impl Verdict {
    /// Reads a message. Invalid JSON or an invalid `node_id` rejects the event.
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let verdict: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a verdict on a node: {error}")))?;
        check_id(&verdict.node_id).map_err(Failure::Reject)?;
        Ok(verdict)
    }

    /// Returns the time of the node's last heartbeat at the observer, by this host's clock. From another host's clock
    /// only the duration of the silence is used, less the part by which it may be shorter here: the heartbeat may have
    /// been longer on its way to this host than the verdict.
    fn seen(&self, observer: Observer, now: Time) -> Option<Time> {
        match (observer, self.timestamp, self.last_seen) {
            (Observer::Other, Some(said), Some(seen)) => {
                let silence = said.since(seen);
                Some(now.before(silence - silence / SHORTER))
            }
            (_, _, seen) => seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_believed_if_the_silence_here_is_a_little_shorter() {
        let at = |milliseconds: i64| Time::of_millis(1_767_225_600_000 + milliseconds);
        let verdict = Verdict::parse(
            serde_json::json!({
                "node_id": "n1", "status": "dead", "observer": "other",
                "last_seen": at(0), "timestamp": at(3_000),
            })
            .to_string()
            .as_bytes(),
        );
        let verdict = verdict.unwrap();
        let status_of = |last_seen| {
            let mut node = Node { status: "online".to_owned(), last_seen, ..Node::default() };
            let changes = node.judge(&verdict, Observer::Other, at(3_010));
            (node.status, changes)
        };
        // The heartbeat arrived 300 ms later here, and the verdict 10 ms.
        assert_eq!(status_of(at(310)), ("dead".to_owned(), true));
        assert_eq!(status_of(at(311)), ("online".to_owned(), false), "the node was heard meanwhile");
    }
}
