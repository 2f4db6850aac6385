//! The registry's document: made for the readers of existing fleets, and read from another host.

use std::collections::BTreeSet;

use dim_guest::document::Document;
use dim_guest::foreign::Kept;
use dim_guest::state::{self, set_json};
use dim_guest::time::Time;
use dim_guest::{Failure, ipns};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::node::{MERGED, MERGED_FROM, NODES, Node, check_id};

/// What is around nodes and jobs, in bytes.
const FRAME_BYTES: usize = 256;

/// Builds `{"nodes":[…],"active_jobs":{…},"updated_at"}` in as many bytes as there is room for, with `"left_out"` and
/// the number of nodes for which there is none, if there are any. Merged nodes are not published again. Jobs that take
/// more than half of the room and do not fit beside the nodes are left to the job tracker's own document.
pub fn build(of: &Document, jobs: &str) -> Result<Vec<u8>, Failure> {
    let (jobs, room) = (active_jobs(jobs), of.room()?.saturating_sub(FRAME_BYTES));
    let kept = Kept::read()?;
    let item = |list: &mut Vec<u8>, id: &str, record: &[u8]| item(list, id, &kept.with(id, record));
    let mut document = b"{\"nodes\":[".to_vec();
    let for_nodes = room - jobs.len().min(room / 2);
    let left_out = of.fill(&mut document, for_nodes, || NODES.iter_raw(None), item)?;
    document.extend(b"],\"active_jobs\":");
    let fits = document.len() + jobs.len() <= room;
    document.extend(if fits { &jobs } else { b"{}".as_slice() });
    kept.append(&mut document, room);
    if left_out > 0 {
        document.extend(format!(",\"left_out\":{left_out}").into_bytes());
    }
    document.extend(format!(",\"updated_at\":\"{}\"}}", Time::now()).into_bytes());
    Ok(document)
}

/// Adds an item to an open list. Records are JSON already.
fn item(list: &mut Vec<u8>, _: &str, record: &[u8]) {
    if list.last() != Some(&b'[') {
        list.push(b',');
    }
    list.extend(record);
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
