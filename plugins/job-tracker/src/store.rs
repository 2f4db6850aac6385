//! Stores jobs: active and finished ones under separate prefixes, with an index of finished jobs by age and of running
//! jobs by node.

use std::time::Duration;

use dim_guest::Failure;
use dim_guest::foreign;
use dim_guest::list::{Both, Page, SideBySide};
use dim_guest::state::{self, Error, Map};
use dim_guest::time::Time;
use serde::{Deserialize, Serialize};

use crate::job::{Job, NodeDead, Status};
use crate::traces::{self, Known, Trace};

const ACTIVE: Map<str, Job> = Map::new("active/");
const FINISHED: Map<str, Job> = Map::new("finished/");
/// Finished jobs, newest first: the key contains the inverted time.
const BY_AGE: Map<str, String> = Map::new("age/");
const BY_NODE: Map<str, String> = Map::new("node/");

/// The last verdict on each node.
const VERDICTS: Map<str, LastVerdict> = Map::new("verdict/");

/// The last verdict on a node. It is stored to detect earlier verdicts that arrive later.
#[derive(Serialize, Deserialize)]
pub struct LastVerdict {
    /// The time of the verdict.
    pub at: Time,
    /// The observer and the time of death; none if the node is alive.
    pub dead: Option<NodeDead>,
}

/// Stores the last verdict on a node.
pub fn set_verdict(node: &str, verdict: &LastVerdict) -> Result<(), Error> {
    VERDICTS.set(node, verdict)
}

/// Returns the last verdict on a node, if any.
pub fn verdict_on(node: &str) -> Result<Option<LastVerdict>, Error> {
    VERDICTS.get(node)
}

/// The time at which the result of each job was ready. It is stored to detect earlier results that arrive later.
const RESULT_TIMES: Map<str, Time> = Map::new("result/");

/// Stores the time at which the result of a job was ready.
pub fn set_result_time(job: &str, at: Time) -> Result<(), Error> {
    RESULT_TIMES.set(job, &at)
}

/// Returns the time at which the result of a job was ready, if any.
pub fn result_time(job: &str) -> Result<Option<Time>, Error> {
    RESULT_TIMES.get(job)
}

pub fn get(id: &str) -> Result<Option<Job>, Error> {
    match ACTIVE.get(id)? {
        Some(job) => Ok(Some(job)),
        None => FINISHED.get(id),
    }
}

/// Replaces `before` by `job`. Returns the size of the stored job, in bytes.
pub fn put(before: Option<&Job>, job: &Job) -> Result<usize, Error> {
    if let Some(before) = before.filter(|before| indices(before) != indices(job)) {
        take_away(before)?;
    }
    let records = if job.status.is_final() { &FINISHED } else { &ACTIVE };
    let bytes = records.put(&job.job_id, job)?;
    let (age, node) = indices(job);
    if let Some(age) = age {
        BY_AGE.set(&age, &job.job_id)?;
    }
    if let Some(node) = node {
        BY_NODE.set(&node, &job.job_id)?;
    }
    Ok(bytes)
}

/// Removes a job with its result time, unknown members and index entries.
pub fn remove(job: &Job) -> Result<(), Error> {
    RESULT_TIMES.delete(&job.job_id)?;
    foreign::UNKNOWN.delete(&job.job_id)?;
    take_away(job)
}

fn take_away(job: &Job) -> Result<(), Error> {
    ACTIVE.delete(&job.job_id)?;
    FINISHED.delete(&job.job_id)?;
    let (age, node) = indices(job);
    age.map_or(Ok(()), |age| BY_AGE.delete(&age))?;
    node.map_or(Ok(()), |node| BY_NODE.delete(&node))
}

/// Returns the keys of a job in the indices by age and by node; none if it is not in the index.
pub fn indices(job: &Job) -> (Option<String>, Option<String>) {
    let age =
        job.status.is_final().then(|| format!("{:016x}/{}", i64::MAX - job.updated_at.millis(), job.job_id));
    let running = job.status == Status::Running;
    let node = job.node_id.as_ref().filter(|_| running).map(|node| format!("{node}\n{}", job.job_id));
    (age, node)
}

pub fn running_on(node: &str) -> Result<Vec<Job>, Error> {
    running_raw(node, None).map(|record| state::decode(&record?)).collect()
}

/// Iterates over the stored bytes of a node's running jobs, sorted by id, after the id `after`.
fn running_raw(node: &str, after: Option<&str>) -> impl Iterator<Item = Result<Vec<u8>, Error>> {
    let prefix = format!("{node}\n");
    let rows = BY_NODE.iter_raw(Some(&format!("{prefix}{}", after.unwrap_or_default())));
    let of_node = rows.map_while(move |row| match row {
        Ok((key, _)) => key.strip_prefix(&prefix).map(|id| Ok(id.to_owned())),
        Err(error) => Some(Err(error)),
    });
    of_node.filter_map(|id| id.and_then(|id| active_record(&id)).transpose())
}

/// Returns the stored bytes of an active job.
fn active_record(id: &str) -> Result<Option<Vec<u8>>, Error> {
    state::get(format!("active/{id}").as_bytes())
}

/// Iterates over the stored bytes of the active jobs, sorted by id.
pub fn active_raw() -> state::Pages {
    ACTIVE.iter_raw(None)
}

/// Iterates over the ids of finished jobs, newest first.
pub fn finished_ids() -> impl Iterator<Item = Result<String, Error>> {
    BY_AGE.iter(None).map(|row| Ok(row?.1))
}

/// Returns the stored bytes of a finished job.
pub fn finished_raw(id: &str) -> Result<Option<Vec<u8>>, Error> {
    state::get(format!("finished/{id}").as_bytes())
}

/// The rest after a pruning step.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    /// No record is left.
    Nothing,
    /// Only records within the limits are left.
    Kept,
    /// More records must be removed, in another entry.
    More,
}

/// Maximum number of jobs that one entry removes, because the effects of an entry are limited.
const TOGETHER: usize = 5_000;

/// Removes finished jobs older than `age`, and the oldest ones beyond `keep`; at most 5,000 at a time.
pub fn prune(now: Time, keep: usize, age: Duration) -> Result<Left, Failure> {
    let (mut kept, mut removed) = (0, 0);
    for row in BY_AGE.iter(None) {
        let (key, id) = row?;
        if kept < keep && finished_at(&key).is_some_and(|at| now.since(at) <= age) {
            kept += 1;
            continue;
        }
        if removed == TOGETHER {
            return Ok(Left::More);
        }
        FINISHED.delete(&id)?;
        RESULT_TIMES.delete(&id)?;
        foreign::UNKNOWN.delete(&id)?;
        BY_AGE.delete(&key)?;
        traces::leave(&id, &Trace { at: now, known: Known::Pruned {} })?;
        removed += 1;
    }
    Ok(if kept > 0 { Left::Kept } else { Left::Nothing })
}

/// Returns the time in a key of [`BY_AGE`].
fn finished_at(key: &str) -> Option<Time> {
    let counted_down = i64::from_str_radix(key.split_once('/')?.0, 16).ok()?;
    Some(Time::of_millis(i64::MAX - counted_down))
}

/// The body of the query `list`: a filter of jobs and a page.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    status: Option<Status>,
    node_id: Option<String>,
    /// The id after which the page starts.
    pub after: Option<String>,
    /// The maximum number of jobs.
    pub limit: Option<usize>,
}

impl Filter {
    /// Returns whether a job matches the filter.
    pub fn matches(&self, job: &Job) -> bool {
        self.status.is_none_or(|status| job.status == status)
            && self.node_id.as_ref().is_none_or(|node| job.node_id.as_ref() == Some(node))
    }
}

/// Returns a page of the matching jobs, sorted by id. The next page starts after its last job; an empty page is the
/// end. Finished jobs are not read if none can match.
pub fn list(filter: &Filter) -> Result<Vec<Job>, Error> {
    let after = filter.after.as_deref();
    match (filter.status, &filter.node_id) {
        (Some(Status::Running), Some(node)) => page_of(filter, running_raw(node, after)),
        (Some(status), _) if status.is_final() => page_of(filter, records(FINISHED.iter_raw(after))),
        (Some(_), _) => page_of(filter, records(ACTIVE.iter_raw(after))),
        (None, _) => {
            let rows = SideBySide::new(ACTIVE.iter_raw(after), FINISHED.iter_raw(after));
            // No job is in both.
            let record = |Both { one: active, other: finished }: Both| active.or(finished);
            page_of(filter, rows.filter_map(|row| row.map(record).transpose()))
        }
    }
}

fn records(rows: state::Pages) -> impl Iterator<Item = Result<Vec<u8>, Error>> {
    rows.map(|row| Ok(row?.1))
}

fn page_of(
    filter: &Filter,
    records: impl IntoIterator<Item = Result<Vec<u8>, Error>>,
) -> Result<Vec<Job>, Error> {
    let (mut page, mut records) = (Page::new(filter.limit), records.into_iter());
    while page.has_room() {
        let Some(record) = records.next().transpose()? else { break };
        let job: Job = state::decode(&record)?;
        if filter.matches(&job) {
            page.push(job, record.len());
        }
    }
    Ok(page.into_rows())
}
