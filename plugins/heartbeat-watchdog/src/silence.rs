//! What the watchdog remembers of each node, and how several of them fell silent.

use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use dim_guest::{Failure, Refusal, json};
use serde::{Deserialize, Serialize};

/// The nodes that were ever heard.
pub const NODES: Map<str, Node> = Map::new("node/");

/// How a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    Alive,
    Suspect,
    Dead,
    /// Said once, when a suspect or dead node is heard again.
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

/// What is remembered of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    pub last_seen: Time,
    pub standing: Standing,
    /// The time between two of its heartbeats, in milliseconds, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_ms: Option<u64>,
    /// An operator has removed it while it was dead. It is listed no more, and its return is still said.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
}

/// When any node was last heard.
const LAST_HEARD: &[u8] = b"last-heard";

/// Notes that some node was heard.
pub fn heard_someone(now: Time) -> Result<(), Failure> {
    Ok(state::set_json(LAST_HEARD, &now)?)
}

/// When any node was last heard.
pub fn last_heard() -> Result<Time, Failure> {
    Ok(state::get_json(LAST_HEARD)?.unwrap_or_default())
}

/// Whether at least `least` nodes are not dead.
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

/// Which nodes are asked for.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    standing: Option<Standing>,
}

/// The nodes that stand so. `hint` says what is wrong with one, if something is.
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
        // One that cannot be read costs nobody the others.
        let Ok(node) = state::decode::<Node>(&record) else { continue };
        if !node.removed && filter.standing.is_none_or(|wanted| node.standing == wanted) {
            rows.push(Row { node_id, hint: hint(&node), node });
        }
    }
    json::write(&rows)
}
