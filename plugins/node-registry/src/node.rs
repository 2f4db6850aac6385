//! A node as the registry knows it, and what changes it.

use dim_guest::Failure;
use dim_guest::foreign;
use dim_guest::list::{Both, Page, SideBySide};
use dim_guest::speaker::Speakers;
use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// The nodes that this host has heard itself.
pub const NODES: Map<str, Node> = Map::new("node/");

/// The nodes of another host's registry.
pub const MERGED: Map<str, Node> = Map::new("merged/");

/// The key of the name of that registry; each of its nodes is told with it.
pub const MERGED_FROM: &[u8] = b"registry";

/// How far ahead of the host's clock a node's clock may be before its time is not believed.
const AHEAD: std::time::Duration = std::time::Duration::from_secs(300);

/// One node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    pub node_id: String,
    #[serde(default = "unknown")]
    pub status: String,
    #[serde(default)]
    pub last_seen: Time,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub cached_models: Vec<String>,
    /// The time that the node put on its last heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Time>,
    /// The registry that it was merged from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

pub fn unknown() -> String {
    "unknown".to_owned()
}

/// What a node has to spare; numbers as the node says them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_available: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_available: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_available: Option<Value>,
}

/// What a node sends.
#[derive(Debug, Deserialize)]
pub struct Heartbeat {
    pub node_id: String,
    #[serde(default)]
    timestamp: Option<Time>,
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    resources: Option<Resources>,
    #[serde(default)]
    cached_models: Option<Vec<String>>,
}

impl Heartbeat {
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let heartbeat: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a heartbeat: {error}")))?;
        check_id(&heartbeat.node_id).map_err(Failure::Reject)?;
        Ok(heartbeat)
    }
}

/// Checks the id of a node.
pub fn check_id(id: &str) -> Result<(), String> {
    dim_guest::id::check("a node_id", id, 256)
}

/// What a heartbeat needs of the node as it stands. The rest is skipped: heartbeats are many, and most
/// bring all of it anew.
#[derive(Debug, Deserialize)]
pub struct Before<'a> {
    #[serde(borrow)]
    resources: &'a RawValue,
    #[serde(borrow)]
    cached_models: &'a RawValue,
    #[serde(default)]
    sent_at: Option<Time>,
}

impl Node {
    /// The node after a heartbeat; none if the heartbeat is older than what is known.
    pub fn heard(known: Option<Before<'_>>, heartbeat: Heartbeat, now: Time) -> Option<Node> {
        let sent_at = heartbeat.timestamp.filter(|sent| sent.since(now) <= AHEAD);
        let known_sent = known.as_ref().and_then(|node| node.sent_at);
        if let (Some(sent), Some(last)) = (sent_at, known_sent)
            && sent < last
        {
            return None;
        }
        let known = known.as_ref();
        let resources = heartbeat.resources.or_else(|| serde_json::from_str(known?.resources.get()).ok());
        let models =
            heartbeat.cached_models.or_else(|| serde_json::from_str(known?.cached_models.get()).ok());
        Some(Node {
            node_id: heartbeat.node_id,
            status: heartbeat.status.unwrap_or_else(|| "online".to_owned()),
            last_seen: now,
            resources: resources.unwrap_or_default(),
            cached_models: models.unwrap_or_default(),
            sent_at: sent_at.or(known_sent),
            source: None,
        })
    }

    /// Marks the node as a watchdog says; false if nothing changes.
    pub fn judge(&mut self, verdict: &Verdict) -> bool {
        let marks = matches!(verdict.status.as_str(), "suspect" | "dead");
        // A verdict that is older than the last heartbeat says nothing of now.
        let stale = verdict.last_seen.is_some_and(|seen| seen < self.last_seen);
        if !marks || stale || self.status == verdict.status {
            return false;
        }
        self.status.clone_from(&verdict.status);
        true
    }
}

/// What a watchdog says of a node.
#[derive(Debug, Deserialize)]
pub struct Verdict {
    pub node_id: String,
    pub status: String,
    #[serde(default)]
    pub last_seen: Option<Time>,
}

impl Verdict {
    pub fn parse(data: &[u8]) -> Result<Self, Failure> {
        let verdict: Self = serde_json::from_slice(data)
            .map_err(|error| Failure::Reject(format!("not a verdict on a node: {error}")))?;
        check_id(&verdict.node_id).map_err(Failure::Reject)?;
        Ok(verdict)
    }
}

/// Nodes that are forgotten at a time: an entry may have a bounded number of effects.
const TOGETHER: usize = 5_000;

/// How many nodes were forgotten, and whether those are all.
pub struct Forgotten {
    pub count: usize,
    pub all: bool,
}

/// Forgets the nodes that are dead and were seen last longer than `age` ago.
pub fn forget_dead(
    now: Time,
    age: std::time::Duration,
    speakers: &Speakers,
) -> Result<Forgotten, state::Error> {
    let mut count = 0;
    for row in NODES.iter(None) {
        let (id, node) = row?;
        if node.status == "dead" && now.since(node.last_seen) > age {
            if count == TOGETHER {
                return Ok(Forgotten { count, all: false });
            }
            NODES.delete(&id)?;
            foreign::UNKNOWN.delete(&id)?;
            speakers.forget(&id)?;
            count += 1;
        }
    }
    Ok(Forgotten { count, all: true })
}

/// Which nodes are asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    status: Option<String>,
    cached_model: Option<String>,
    min_memory: Option<f64>,
    gpu: Option<bool>,
    after: Option<String>,
    limit: Option<usize>,
}

impl Filter {
    fn matches(&self, node: &Node) -> bool {
        let amount = |value: &Option<Value>| match value {
            Some(Value::Bool(true)) => 1.0,
            Some(value) => value.as_f64().unwrap_or(0.0),
            None => 0.0,
        };
        self.status.as_ref().is_none_or(|status| node.status == *status)
            && self.cached_model.as_ref().is_none_or(|model| node.cached_models.contains(model))
            && self.min_memory.is_none_or(|least| amount(&node.resources.memory_available) >= least)
            && self.gpu.is_none_or(|gpu| (amount(&node.resources.gpu_available) > 0.0) == gpu)
    }
}

/// A node, own or merged: what was seen last of it.
pub fn get(id: &str) -> Result<Option<Node>, state::Error> {
    let own = NODES.get(id)?;
    let merged = match MERGED.get(id)? {
        Some(node) => Some(Node { source: state::get_json(MERGED_FROM)?, ..node }),
        None => None,
    };
    Ok(own.into_iter().chain(merged).max_by_key(|node| node.last_seen))
}

/// A page of the nodes that match, own and merged, by id. The next one begins after its last node; an
/// empty one is the end.
pub fn list(filter: &Filter) -> Result<Vec<Node>, state::Error> {
    let after = filter.after.as_deref();
    let source: Option<String> = state::get_json(MERGED_FROM)?;
    let mut page = Page::new(filter.limit);
    let mut rows = SideBySide::new(NODES.iter_raw(after), MERGED.iter_raw(after));
    while page.has_room() {
        let Some(Both { one: own, other: merged }) = rows.next().transpose()? else { break };
        let own = own.map(|record| state::decode::<Node>(&record).map(|node| (node, record.len())));
        let merged = merged.map(|record| {
            let node = state::decode::<Node>(&record)?;
            Ok((Node { source: source.clone(), ..node }, record.len()))
        });
        // Of one that both know, the one that was seen last.
        let known = own.into_iter().chain(merged).collect::<Result<Vec<_>, state::Error>>()?;
        let newest = known.into_iter().max_by_key(|(node, _)| node.last_seen);
        if let Some((node, bytes)) = newest.filter(|(node, _)| filter.matches(node)) {
            page.push(node, bytes);
        }
    }
    Ok(page.into_rows())
}
