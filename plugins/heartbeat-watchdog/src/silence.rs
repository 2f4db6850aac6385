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
    for row in NODES.iter(None) {
        living += usize::from(row?.1.standing != Standing::Dead);
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

/// The nodes that stand so.
pub fn list(filter: &Filter) -> Result<String, Refusal> {
    #[derive(Serialize)]
    struct Row {
        node_id: String,
        #[serde(flatten)]
        node: Node,
    }
    let rows: Vec<Row> = NODES
        .iter(None)
        .map(|row| row.map(|(node_id, node)| Row { node_id, node }))
        .filter(|row| {
            row.as_ref().map_or(true, |row| filter.standing.is_none_or(|wanted| row.node.standing == wanted))
        })
        .collect::<Result<_, _>>()?;
    json::write(&rows)
}
