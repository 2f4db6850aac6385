//! Executes the commands `put` and `remove`, and removes nodes that have been dead for long.

use std::collections::BTreeSet;
use std::time::Duration;

use dim_guest::foreign;
use dim_guest::heartbeat::check_id;
use dim_guest::time::Time;
use dim_guest::{Failure, Refusal, json};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::merged::{MERGED, source};
use crate::node::{NODES, Node, Row};
use crate::{Named, NodeRegistry, query};

/// Maximum number of nodes that one entry removes, because the effects of an entry are limited.
const TOGETHER: usize = 5_000;

/// The result of a removal of dead nodes: their number, and whether none is left.
pub struct Forgotten {
    pub count: usize,
    pub all: bool,
}

/// The reply of the command `remove`.
#[derive(Serialize)]
struct Removed {
    #[serde(flatten)]
    node: Node,
    /// The merged registry that still lists the node, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    still_in: Option<String>,
}

impl NodeRegistry {
    /// Executes the command `put`: replaces all nodes. A node without `last_seen` gets the time of the command.
    pub fn put(&self, body: &str) -> Result<String, Refusal> {
        let nodes = read_all(&json::read::<Vec<Box<RawValue>>>(body)?)?;
        let mut ids = BTreeSet::new();
        if let Some(twice) = nodes.iter().find(|node| !ids.insert(node.node_id.as_str())) {
            return Err(Refusal::Invalid(format!("node {} occurs twice", twice.node_id)));
        }
        for known in NODES.iter_raw(None) {
            let (id, _) = known?;
            NODES.delete(&id)?;
            foreign::UNKNOWN.delete(&id)?;
            if !ids.contains(id.as_str()) {
                self.speakers.forget(&id)?;
            }
        }
        for node in &nodes {
            NODES.set(&node.node_id, node)?;
        }
        self.document.touch().map_err(refusal)?;
        json::write(&serde_json::json!({ "nodes": nodes.len() }))
    }

    /// Executes the command `remove`: removes a node of this host's own registry. The next heartbeat adds the node
    /// again. A node that only a merged registry lists is a conflict.
    pub(crate) fn remove(&self, Named { node_id }: &Named) -> Result<String, Refusal> {
        check_id(node_id).map_err(Refusal::Invalid)?;
        let still_in = if MERGED.get_raw(node_id)?.is_some() { source()? } else { None };
        let Some(record) = NODES.get_raw(node_id)? else {
            return Err(match still_in {
                Some(registry) => Refusal::Conflict(format!(
                    "only the merged registry {registry} lists node {node_id}: remove it on the host that publishes it"
                )),
                None => Refusal::NotFound(node_id.clone()),
            });
        };
        NODES.delete(node_id)?;
        foreign::UNKNOWN.delete(node_id)?;
        self.speakers.forget(node_id)?;
        self.document.counts(Some(record.len()), None)?;
        self.document.touch().map_err(refusal)?;
        // An unreadable node can still be removed.
        let node =
            query::read(&record).unwrap_or_else(|| Node { node_id: node_id.clone(), ..Node::default() });
        json::write(&Removed { node, still_in })
    }

    /// Removes the nodes that are dead and whose last heartbeat is older than `age`, at most 5,000 at a time.
    pub fn forget_dead(&self, age: Duration) -> Result<Forgotten, Failure> {
        let (now, mut count) = (Time::now(), 0);
        for row in NODES.iter_raw(None) {
            let (id, record) = row?;
            let Some(node) = query::read(&record) else { continue };
            if node.status == "dead" && now.since(node.last_seen) > age {
                if count == TOGETHER {
                    return Ok(Forgotten { count, all: false });
                }
                NODES.delete(&id)?;
                foreign::UNKNOWN.delete(&id)?;
                self.speakers.forget(&id)?;
                count += 1;
            }
        }
        Ok(Forgotten { count, all: true })
    }
}

/// Reads the nodes of the command `put`. Any unreadable member refuses the command, so that the operator can correct
/// it.
fn read_all(rows: &[Box<RawValue>]) -> Result<Vec<Node>, Refusal> {
    rows.iter()
        .map(|row| {
            let row: Row<'_> =
                serde_json::from_str(row.get()).map_err(|error| Refusal::Invalid(error.to_string()))?;
            check_id(&row.node_id).map_err(Refusal::Invalid)?;
            let (node, reasons) = row.read();
            if !reasons.is_empty() {
                return Err(Refusal::Invalid(format!("node {}: {}", node.node_id, reasons.join("; "))));
            }
            let now = Time::now();
            let last_seen = if node.last_seen == Time::default() { now } else { node.last_seen.min(now) };
            Ok(Node { last_seen, put: true, ..node })
        })
        .collect()
}

fn refusal(failure: Failure) -> Refusal {
    Refusal::Other(format!("{failure:?}"))
}
