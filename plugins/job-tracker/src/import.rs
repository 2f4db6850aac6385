//! Takes over the jobs of a published document, in the tracker's own format or in the format of fleets that publish
//! `{"jobs":{ID:{"state",…}}}`.

use dim_guest::foreign::{self, Document, Members, Row};
use dim_guest::time::Time;
use dim_guest::{Refusal, json};
use serde_json::json;

use crate::job::{self, Job, Status};
use crate::merge;
use crate::store;
use crate::tracker::JobTracker;

/// The members of a document that contain jobs.
const LISTS: [&str; 3] = ["active_jobs", "finished_jobs", "jobs"];

/// The known members of a job. Only the tracker itself writes some of them.
const MEMBERS: [&str; 11] = [
    "job_id",
    "status",
    "state",
    "updated_at",
    "timestamp",
    "data",
    "result",
    "result_cid",
    "node_id",
    "node_dead",
    "left_out",
];

/// Executes the command `import`: takes over the jobs of a document and publishes the tracker's document. A known job
/// is unchanged, unless the document has a later status of it.
pub fn import(tracker: &JobTracker, body: &str) -> Result<String, Refusal> {
    let document = Document::read(body)?;
    let (mut taken, mut removed, mut refused) = (0, 0, 0);
    for list in LISTS {
        for row in document.rows(list, "job_id")? {
            match row.as_ref().and_then(read) {
                Some(job) => taken += u64::from(take(tracker, &job, row.as_ref())?),
                None => refused += 1,
            }
        }
    }
    for (id, at) in document.get::<Members>("removed_jobs").unwrap_or_default() {
        match merge::read_time(&id, &at) {
            // A removed job is recorded here, so that late events do not add it again.
            Some(at) => {
                removed +=
                    u64::from(merge::remove(tracker, &id, at.min(Time::now())).map_err(foreign::refusal)?)
            }
            None => refused += 1,
        }
    }
    if document.key == tracker.key() {
        let known = [LISTS.as_slice(), &["removed_jobs", "updated_at", "left_out"]].concat();
        foreign::keep("", &document.unknown(&known))?;
    }
    tracker.publish().map_err(foreign::refusal)?;
    json::write(&json!({ "jobs": taken, "removed": removed, "refused": refused }))
}

/// Reads a job of the document. Returns none without a valid id and status.
fn read(row: &Row) -> Option<Job> {
    job::check_job_id(&row.id).ok()?;
    let status: String = row.get("status").or_else(|| row.get("state"))?;
    let status = Status::of(&status.to_ascii_lowercase())?;
    let updated_at: Option<Time> = row.get("updated_at").or_else(|| row.get("timestamp"));
    let now = Time::now();
    Some(Job {
        job_id: row.id.clone(),
        status,
        updated_at: updated_at.filter(|at| *at <= now).unwrap_or(now),
        data: row.get("data"),
        result: row.get("result"),
        result_cid: row.get("result_cid"),
        node_id: row.get("node_id").filter(|node: &String| job::check_node_id(node).is_ok()),
        node_dead: row.get("node_dead").filter(|_| status == Status::Running),
    })
}

/// Stores a job of the document. Returns false if the known job is as recent.
fn take(tracker: &JobTracker, job: &Job, row: Option<&Row>) -> Result<bool, Refusal> {
    let known = store::get(&job.job_id)?;
    if known.as_ref().is_some_and(|known| !job.comes_after(known)) {
        return Ok(false);
    }
    tracker.keep(known.as_ref(), job).map_err(foreign::refusal)?;
    if let Some(row) = row {
        foreign::keep(&job.job_id, &row.unknown(&MEMBERS))?;
    }
    Ok(true)
}
