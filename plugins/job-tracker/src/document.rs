//! Builds the tracker's document: `{"active_jobs":{ID:job},"finished_jobs":{ID:job},"updated_at"}`.
//!
//! If jobs were removed by command it contains `"removed_jobs":{ID:time}`. If not all active jobs fit, `"left_out"` is
//! the number of the others.

use dim_guest::Failure;
use dim_guest::document::Document;
use dim_guest::foreign::Kept;
use dim_guest::time::Time;

use crate::store;
use crate::traces;

/// Maximum size of the finished jobs in bytes. The newest ones that fit are included.
const FINISHED_BYTES: usize = 1 << 20;

/// Maximum size of the removed jobs in bytes. The newest ones that fit are included.
const REMOVED_BYTES: usize = 128 << 10;

/// Bytes reserved for the other members.
const FRAME_BYTES: usize = 256;

/// Builds the document within the known size limit.
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

/// Returns the member with the jobs that were removed by command, in at most `room` bytes. Empty if there are none.
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

/// Appends a member to a JSON object that is not closed yet. `job` is JSON.
fn member(object: &mut Vec<u8>, id: &str, job: &[u8]) {
    if object.last() != Some(&b'{') {
        object.push(b',');
    }
    object.extend(serde_json::to_string(id).expect("a string is JSON").into_bytes());
    object.push(b':');
    object.extend(job);
}
