//! Stores the status of each node and the time of the last heartbeat of any node.

use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use dim_guest::{Failure, Refusal, json};
use serde::{Deserialize, Serialize};

/// The known nodes by id.
pub const NODES: Map<str, Node> = Map::new("node/");

/// The status of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    Alive,
    Suspect,
    Dead,
    /// Only in verdicts: a suspect or dead node sent a heartbeat again.
    Recovered,
}

impl Standing {
    pub fn is_worse_than(self, other: Standing) -> bool {
        let rank = |standing| match standing {
            Standing::Alive | Standing::Recovered => 0,
            Standing::Suspect => 1,
            Standing::Dead => 2,
        };
        rank(self) > rank(other)
    }
}

/// The record of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    pub last_seen: Time,
    pub standing: Standing,
    /// The interval of its heartbeats in milliseconds, if the heartbeats contain it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_ms: Option<u64>,
    /// Whether the operator removed the node while it was dead. It is not listed, but its return is still published.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

/// The key of the time of the last heartbeat of any node.
const LAST_HEARD: &[u8] = b"last-heard";

/// Stores the time of a heartbeat of any node.
pub fn heard_someone(now: Time) -> Result<(), Failure> {
    Ok(state::set_json(LAST_HEARD, &now)?)
}

/// Returns the time of the last heartbeat of any node.
pub fn last_heard() -> Result<Time, Failure> {
    Ok(state::get_json(LAST_HEARD)?.unwrap_or_default())
}

/// Returns whether at least `least` nodes are not dead.
pub fn living_at_least(least: usize) -> Result<bool, Failure> {
    let mut living = 0;
    for row in NODES.iter_raw(None) {
        let node: Option<Node> = state::decode(&row?.1).ok();
        living += usize::from(node.is_some_and(|node| node.standing != Standing::Dead));
        if living >= least {
            return Ok(true);
        }
    }
    Ok(least == 0)
}

/// The body of the query `list`: a filter of nodes.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    standing: Option<Standing>,
}

/// Answers the query `list` with the nodes that match the filter. `hint` returns the hint of a node, if any.
pub fn list(filter: &Filter, hint: impl Fn(&Node) -> Option<String>) -> Result<String, Refusal> {
    #[derive(Serialize)]
    struct Row {
        node_id: String,
        #[serde(flatten)]
        node: Node,
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    }
    let mut rows = Vec::new();
    for row in NODES.iter_raw(None) {
        let (node_id, record) = row?;
        // An unreadable record affects only itself.
        let Ok(node) = state::decode::<Node>(&record) else { continue };
        if !node.removed && filter.standing.is_none_or(|wanted| node.standing == wanted) {
            rows.push(Row { node_id, hint: hint(&node), node });
        }
    }
    json::write(&rows)
}
