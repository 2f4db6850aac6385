//! The tracker's document: `{"active_jobs":{ID:job},"finished_jobs":{ID:job},"updated_at"}`; `"removed_jobs":{ID:time}`
//! if jobs were removed by order, and `"left_out"` with the number of active jobs for which there is no room, if there
//! are any.

use dim_guest::Failure;
use dim_guest::document::Document;
use dim_guest::foreign::Kept;
use dim_guest::time::Time;

use crate::store;
use crate::traces;

/// Bytes that finished jobs may take: as many as fit, newest first.
const FINISHED_BYTES: usize = 1 << 20;

/// Bytes that removed jobs may take: as many as fit, newest first.
const REMOVED_BYTES: usize = 128 << 10;

/// What is around them.
const FRAME_BYTES: usize = 256;

/// Builds the document in as many bytes as there is room for.
pub fn build(of: &Document) -> Result<Vec<u8>, Failure> {
    let (room, kept) = (of.room()?, Kept::read()?);
    let member = |object: &mut Vec<u8>, id: &str, job: &[u8]| member(object, id, &kept.with(id, job));
    let mut document = b"{\"active_jobs\":{".to_vec();
    let finished = FINISHED_BYTES.min(room / 8);
    let removed = removed(REMOVED_BYTES.min(room / 16))?;
    let active = room.saturating_sub(finished + removed.len() + FRAME_BYTES);
    let left_out = of.fill(&mut document, active, store::active_raw, member)?;
    document.extend(b"},\"finished_jobs\":{");
    let begin = document.len();
    for id in store::finished_ids() {
        let id = id?;
        let Some(job) = store::finished_raw(&id)? else { continue };
        let before = document.len();
        member(&mut document, &id, &job);
        if document.len() - begin > finished {
            document.truncate(before);
            break;
        }
    }
    document.push(b'}');
    document.extend(&removed);
    kept.append(&mut document, room - FRAME_BYTES);
    if left_out > 0 {
        document.extend(format!(",\"left_out\":{left_out}").into_bytes());
    }
    document.extend(format!(",\"updated_at\":\"{}\"}}", Time::now()).into_bytes());
    Ok(document)
}

/// The member with the jobs that were removed by order, in `room` bytes; nothing if there are none.
fn removed(room: usize) -> Result<Vec<u8>, Failure> {
    let mut removed = b",\"removed_jobs\":{".to_vec();
    let empty = removed.len();
    for row in traces::removed() {
        let (id, at) = row?;
        let before = removed.len();
        member(&mut removed, &id, format!("\"{at}\"").as_bytes());
        if removed.len() >= room {
            removed.truncate(before);
            break;
        }
    }
    if removed.len() == empty {
        return Ok(Vec::new());
    }
    removed.push(b'}');
    Ok(removed)
}

/// Adds a member to an open object. Records are JSON already.
fn member(object: &mut Vec<u8>, id: &str, job: &[u8]) {
    if object.last() != Some(&b'{') {
        object.push(b',');
    }
    object.extend(serde_json::to_string(id).expect("a string is JSON").into_bytes());
    object.push(b':');
    object.extend(job);
}
