//! The tracker's document: `{"active_jobs":{ID:job},"finished_jobs":{ID:job},"updated_at"}`.

use dim_guest::Failure;
use dim_guest::time::Time;

use crate::store;

/// Bytes that finished jobs may take: as many as fit, newest first.
const FINISHED_BYTES: usize = 1 << 20;

pub fn build() -> Result<Vec<u8>, Failure> {
    let mut document = b"{\"active_jobs\":{".to_vec();
    for row in store::active_raw() {
        let (id, job) = row?;
        member(&mut document, &id, &job);
    }
    document.extend(b"},\"finished_jobs\":{");
    let begin = document.len();
    for id in store::finished_ids() {
        let id = id?;
        let Some(job) = store::finished_raw(&id)? else { continue };
        if document.len() - begin + id.len() + job.len() > FINISHED_BYTES {
            break;
        }
        member(&mut document, &id, &job);
    }
    document.extend(format!("}},\"updated_at\":\"{}\"}}", Time::now()).into_bytes());
    Ok(document)
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
