//! What an operator orders of the registry, and what it forgets by itself.

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

/// Nodes that are forgotten at a time: an entry may have a bounded number of effects.
const TOGETHER: usize = 5_000;

/// How many nodes were forgotten, and whether those are all.
pub struct Forgotten {
    pub count: usize,
    pub all: bool,
}

/// A node that was removed.
#[derive(Serialize)]
struct Removed {
    #[serde(flatten)]
    node: Node,
    /// The merged registry that still lists it, if one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    still_in: Option<String>,
}

impl NodeRegistry {
    /// Replaces the registry. A node without `last_seen` was seen at the time of the order.
    pub fn put(&self, body: &str) -> Result<String, Refusal> {
        let nodes = read_all(&json::read::<Vec<Box<RawValue>>>(body)?)?;
        let mut ids = BTreeSet::new();
        if let Some(twice) = nodes.iter().find(|node| !ids.insert(node.node_id.as_str())) {
            return Err(Refusal::Invalid(format!("node {} is there twice", twice.node_id)));
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

    /// Removes a node that this host has heard itself. The node comes back with its next heartbeat. What another host's
    /// registry lists is that host's to remove.
    pub(crate) fn remove(&self, Named { node_id }: &Named) -> Result<String, Refusal> {
        check_id(node_id).map_err(Refusal::Invalid)?;
        let still_in = if MERGED.get_raw(node_id)?.is_some() { source()? } else { None };
        let Some(record) = NODES.get_raw(node_id)? else {
            return Err(match still_in {
                Some(registry) => Refusal::Conflict(format!(
                    "node {node_id} is in the merged registry {registry} alone: remove it on the host that publishes it"
                )),
                None => Refusal::NotFound(node_id.clone()),
            });
        };
        NODES.delete(node_id)?;
        foreign::UNKNOWN.delete(node_id)?;
        self.speakers.forget(node_id)?;
        self.document.counts(Some(record.len()), None)?;
        self.document.touch().map_err(refusal)?;
        // One that cannot be read can still be removed.
        let node =
            query::read(&record).unwrap_or_else(|| Node { node_id: node_id.clone(), ..Node::default() });
        json::write(&Removed { node, still_in })
    }

    /// Forgets the nodes that are dead and were seen last longer than `age` ago.
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

/// The nodes of an order, each of them whole: what is wrong is the operator's to mend.
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
