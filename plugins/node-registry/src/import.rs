//! Takes over the nodes of a published document.

use dim_guest::foreign::{self, Document, Row};
use dim_guest::heartbeat::check_id;
use dim_guest::time::Time;
use dim_guest::{Refusal, json};
use serde_json::json;

use crate::NodeRegistry;
use crate::node::{NODES, Node};
use crate::query;

/// The known members of a registry document. The job tracker reads `active_jobs` and `jobs`.
const KNOWN: [&str; 5] = ["nodes", "active_jobs", "jobs", "left_out", "updated_at"];

/// The known members of a node. Only the registry itself writes some of them.
const MEMBERS: [&str; 16] = [
    "node_id",
    "status",
    "last_seen",
    "resources",
    "cached_models",
    "sent_at",
    "source",
    "said",
    "observer",
    "hint",
    "ignored",
    "every_ms",
    "instance",
    "others",
    "conflict",
    "put",
];

/// Executes the command `import`: takes over the nodes of a document and publishes the registry. A node that this host
/// knows with the same or a later `last_seen` is unchanged.
pub fn import(registry: &NodeRegistry, body: &str) -> Result<String, Refusal> {
    let document = Document::read(body)?;
    let (mut taken, mut refused) = (0, 0);
    for row in document.rows("nodes", "node_id")? {
        match row.filter(|row| check_id(&row.id).is_ok()) {
            Some(row) => taken += u64::from(take(registry, &row)?),
            None => refused += 1,
        }
    }
    foreign::keep("", &document.unknown(&KNOWN))?;
    registry.publish().map_err(foreign::refusal)?;
    json::write(&json!({ "nodes": taken, "refused": refused }))
}

/// Stores a row of the document. Returns false if the known node is as recent.
fn take(registry: &NodeRegistry, row: &Row) -> Result<bool, Refusal> {
    let now = Time::now();
    let last_seen = row.get("last_seen").filter(|seen| *seen <= now).unwrap_or(now);
    let known = NODES.get_raw(&row.id)?;
    let seen = known.as_deref().and_then(query::read).map(|node| node.last_seen);
    if seen.is_some_and(|seen| seen >= last_seen) {
        return Ok(false);
    }
    let node = Node {
        node_id: row.id.clone(),
        status: row.get("status").unwrap_or_else(|| "unknown".to_owned()),
        last_seen,
        resources: row.get("resources").unwrap_or_default(),
        cached_models: row.get("cached_models").unwrap_or_default(),
        said: row.get("said"),
        observer: row.get("observer"),
        hint: row.get("hint"),
        ..Node::default()
    };
    let bytes = NODES.put(&row.id, &node)?;
    registry.document.counts(known.map(|record| record.len()), Some(bytes))?;
    foreign::keep(&row.id, &row.unknown(&MEMBERS))?;
    Ok(true)
}
