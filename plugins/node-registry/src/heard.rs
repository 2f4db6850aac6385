//! What a heartbeat and a watchdog's verdict make of a node. Arrival is life, by the clock of this host; clocks of others
//! order what one of them sends within seconds, and measure durations.

use dim_guest::heartbeat::{Heartbeat, check_id, is_overtaken};
use dim_guest::member::Members;
use dim_guest::time::Time;
use dim_guest::{Failure, id};
use serde::Deserialize;

use crate::node::{Node, Row};
use crate::resources::Resources;

/// How far ahead of the host's clock a node's clock may be before its time is not believed.
const AHEAD: std::time::Duration = std::time::Duration::from_secs(300);

impl Node {
    /// The node after a heartbeat that arrives now. One that was overtaken on the way is a sign of life and says nothing
    /// else. Of the node as it stands no more is read than is needed: heartbeats are many, and most bring all of it anew.
    pub fn heard(known: Option<&Row<'_>>, heartbeat: Heartbeat<'_>, now: Time) -> Node {
        let mut of = Members::default();
        let sent_at = sent_at(&mut of, &heartbeat, now);
        let instance = instance(&mut of, &heartbeat);
        if let Some(known) = known.filter(|known| known.overtook(sent_at, instance.as_deref(), now)) {
            let mut node = known.read().0;
            node.hear_instance(instance, now);
            node.last_seen = now;
            return node;
        }
        let unknown = Row::default();
        let known = known.unwrap_or(&unknown);
        let status: Option<String> = of.read("status", heartbeat.status);
        let resources: Option<Resources> = of.read("resources", heartbeat.resources);
        let models: Option<Vec<String>> = of.read("cached_models", heartbeat.cached_models);
        let every_ms: Option<u64> = of.read("every_ms", heartbeat.every_ms);
        let mut node = Node {
            node_id: heartbeat.node_id,
            status: status.unwrap_or_else(|| "online".to_owned()),
            resources: resources.or_else(|| known.resources()).unwrap_or_default(),
            cached_models: models.or_else(|| known.cached_models()).unwrap_or_default(),
            sent_at: sent_at.or_else(|| known.sent_at()),
            ignored: of.into_reasons(),
            every_ms: every_ms.or_else(|| known.every_ms()),
            ..known.instances()
        };
        node.hear_instance(instance, now);
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

impl Row<'_> {
    /// Whether the last heartbeat was sent after the one that arrives now, by the clock of one sender. What was silent
    /// long enough to be suspected was not.
    fn overtook(&self, sent: Option<Time>, instance: Option<&str>, now: Time) -> bool {
        let (Some(sent), Some(known)) = (sent, self.sent_at()) else { return false };
        // Most are not: what follows is read for the few.
        sent < known && is_overtaken(sent, now, known, self.last_seen()) && {
            let (node, _) = self.read();
            node.instance.as_deref() == instance && rank(&node.status) == 0
        }
    }
}

/// How bad a status is that a watchdog may give.
fn rank(status: &str) -> u8 {
    match status {
        "dead" => 2,
        "suspect" => 1,
        _ => 0,
    }
}

fn sent_at(of: &mut Members, heartbeat: &Heartbeat<'_>, now: Time) -> Option<Time> {
    let sent: Time = of.read("timestamp", heartbeat.timestamp)?;
    let ahead = sent.since(now);
    if ahead > AHEAD {
        of.refuse("timestamp", &format!("it is {} s ahead of this host's clock", ahead.as_secs()));
        return None;
    }
    Some(sent)
}

fn instance(of: &mut Members, heartbeat: &Heartbeat<'_>) -> Option<String> {
    let instance: String = of.read("instance", heartbeat.instance)?;
    match id::check("an instance", &instance, 64) {
        Ok(()) => Some(instance),
        Err(why) => {
            of.refuse("instance", &why);
            None
        }
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
