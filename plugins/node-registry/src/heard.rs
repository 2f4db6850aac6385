//! What a heartbeat and a watchdog's verdict make of a node. Arrival is life, by the clock of this host; clocks of others
//! order what one of them sends within seconds, and measure durations.

use dim_guest::Failure;
use dim_guest::heartbeat::{check_id, is_overtaken};
use dim_guest::state;
use dim_guest::time::Time;
use serde::Deserialize;

use crate::node::{Before, Node};
use crate::said::Said;

impl Node {
    /// The node after a heartbeat that arrives now; `record` is the node as it stands in the state. A heartbeat that was
    /// overtaken on the way is a sign of life and says nothing else.
    ///
    /// Of the record no more is read than is needed: heartbeats are many, and most bring all of it anew.
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

    /// Takes in what a watchdog says; false if that changes nothing. A verdict makes the node's standing worse, until
    /// its next heartbeat, or until the same observer says that it has recovered.
    pub fn judge(&mut self, verdict: &Verdict, observer: Observer, now: Time) -> bool {
        // What was heard since then proves it wrong.
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

    /// Lifts the verdict that stands if it is one of the same observer.
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

/// The node as it stands, if its last heartbeat was sent after the one that arrives now, by the clock of one sender. What
/// was silent long enough to be suspected did not send it so.
fn overtook(record: Option<&[u8]>, before: &Before<'_>, said: &Said, now: Time) -> Option<Node> {
    let (sent, known) = (said.timestamp?, before.sent_at()?);
    // Most are sent later, and no more is read.
    if sent >= known {
        return None;
    }
    let node: Node = state::decode(record?).ok()?;
    let is_one_sender = node.instance == said.instance && rank(&node.status) == 0;
    (is_one_sender && is_overtaken(sent, now, known, node.last_seen)).then_some(node)
}

/// How bad a status is that a watchdog may give.
fn rank(status: &str) -> u8 {
    match status {
        "dead" => 2,
        "suspect" => 1,
        _ => 0,
    }
}

/// Whose watchdog speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observer {
    /// This host's own: its clock is the one by which the registry hears.
    Own,
    /// Another one, with a clock of its own.
    Other,
}

/// What a watchdog says of a node.
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
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let verdict: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a verdict on a node: {error}")))?;
        check_id(&verdict.node_id).map_err(Failure::Reject)?;
        Ok(verdict)
    }

    /// When the observer heard the node last, by this host's clock. Of another host's clock only the length of the
    /// silence counts.
    fn seen(&self, observer: Observer, now: Time) -> Option<Time> {
        match (observer, self.timestamp, self.last_seen) {
            (Observer::Other, Some(said), Some(seen)) => Some(now.before(said.since(seen))),
            (_, _, seen) => seen,
        }
    }
}
