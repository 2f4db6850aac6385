//! The registry's document: made for the readers of existing fleets, and read from another host.

use std::collections::BTreeSet;

use dim_guest::state::{self, set_json};
use dim_guest::time::Time;
use dim_guest::{Failure, ipns};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::node::{MERGED, MERGED_FROM, NODES, Node, check_id};

/// Builds `{"nodes":[…],"active_jobs":{…},"updated_at"}`. Merged nodes are not published again.
pub fn build(jobs: &str) -> Result<Vec<u8>, Failure> {
    let mut document = b"{\"nodes\":[".to_vec();
    for (index, row) in NODES.iter_raw(None).enumerate() {
        if index > 0 {
            document.push(b',');
        }
        // Records are JSON already.
        document.extend(row?.1);
    }
    document.extend(b"],\"active_jobs\":");
    document.extend(active_jobs(jobs));
    document.extend(format!(",\"updated_at\":\"{}\"}}", Time::now()).into_bytes());
    Ok(document)
}

/// The jobs of the document that the job tracker publishes; none until it is known.
fn active_jobs(jobs: &str) -> Vec<u8> {
    #[derive(Deserialize)]
    struct Jobs<'a> {
        #[serde(borrow)]
        active_jobs: &'a RawValue,
    }
    let document = ipns::get_state(jobs);
    let active =
        document.as_ref().ok().and_then(|document| serde_json::from_slice::<Jobs<'_>>(&document.data).ok());
    active.map_or_else(|| b"{}".to_vec(), |jobs| jobs.active_jobs.get().as_bytes().to_vec())
}

/// Forgets what was merged from a registry that is followed no more.
pub fn forget_merged() -> Result<(), state::Error> {
    if state::get(MERGED_FROM)?.is_none() {
        return Ok(());
    }
    for row in MERGED.iter_raw(None) {
        MERGED.delete(&row?.0)?;
    }
    state::delete(MERGED_FROM)
}

/// Takes in the registry that another host publishes under `name`. In one entry, so that no one
/// sees half of it: a document that can be published has no more than an entry may change.
pub fn merge(name: &str) -> Result<(), Failure> {
    #[derive(Deserialize)]
    struct Registry {
        nodes: Vec<Node>,
    }
    // Not held any more: a newer one has come, and with it another event.
    let Ok(document) = ipns::get_state(name) else { return Ok(()) };
    let registry: Registry = serde_json::from_slice(&document.data)
        .map_err(|error| Failure::Reject(format!("{name} holds no registry: {error}")))?;
    set_json(MERGED_FROM, &name)?;
    let mut gone: BTreeSet<String> =
        MERGED.iter_raw(None).map(|row| Ok(row?.0)).collect::<Result<_, Failure>>()?;
    for node in registry.nodes.into_iter().filter(|node| check_id(&node.node_id).is_ok()) {
        gone.remove(&node.node_id);
        let id = node.node_id.clone();
        MERGED.set(&id, &Node { source: None, ..node })?;
    }
    for id in gone {
        MERGED.delete(&id)?;
    }
    Ok(())
}
