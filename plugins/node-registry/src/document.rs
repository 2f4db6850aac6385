//! Builds the registry's document in the format that existing fleets read.

use dim_guest::document::Document;
use dim_guest::foreign::Kept;
use dim_guest::time::Time;
use dim_guest::{Failure, ipns};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::node::{NODES, readable};

/// Bytes reserved for the members around nodes and jobs.
const FRAME_BYTES: usize = 256;

/// Builds `{"nodes":[…],"active_jobs":{…},"updated_at"}` within the known size limit.
///
/// If not all nodes fit, the member `"left_out"` is their number. Merged nodes are not published again. If the jobs
/// need more than half of the size limit and do not fit beside the nodes, only the job tracker's own document contains
/// them.
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

/// Appends a record to a JSON list that is not closed yet. Leaves out a record that readers cannot parse.
fn item(list: &mut Vec<u8>, _: &str, record: &[u8]) {
    let Some(record) = readable(record) else { return };
    if list.last() != Some(&b'[') {
        list.push(b',');
    }
    list.extend(record.as_ref());
}

/// Returns the active jobs of the job tracker's document as JSON; `{}` until the document is known.
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
