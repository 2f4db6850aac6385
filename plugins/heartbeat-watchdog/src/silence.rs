//! What the watchdog remembers of each node, and how several of them fell silent.

use std::time::Duration;

use dim_guest::state::Records;
use dim_guest::time::Time;
use dim_guest::{Failure, Refusal, json};
use serde::{Deserialize, Serialize};

/// The nodes that were ever heard.
pub const NODES: Records<Node> = Records::new("node/");

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
    /// Whether its timer is set.
    pub armed: bool,
}

/// Whether there are at least `least` living nodes, none of them was heard after `newest`, and all
/// were heard within `span`.
pub fn fell_silent_together(least: usize, newest: Time, span: Duration) -> Result<bool, Failure> {
    let (mut first, mut last, mut count) = (None, None, 0);
    for row in NODES.iter(None) {
        let (_, node) = row?;
        if node.standing == Standing::Dead {
            continue;
        }
        if node.last_seen > newest {
            return Ok(false);
        }
        count += 1;
        first = Some(first.map_or(node.last_seen, |first: Time| first.min(node.last_seen)));
        last = Some(last.map_or(node.last_seen, |last: Time| last.max(node.last_seen)));
    }
    let (Some(first), Some(last)) = (first, last) else { return Ok(false) };
    Ok(count >= least && last.since(first) <= span)
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
