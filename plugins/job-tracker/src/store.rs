//! Where jobs lie: active and finished apart, finished ones also by age, running ones by node.

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
/// Newest first: the key counts down.
const BY_AGE: Map<str, String> = Map::new("age/");
const BY_NODE: Map<str, String> = Map::new("node/");

/// The last verdict on each node that there was one on.
const VERDICTS: Map<str, LastVerdict> = Map::new("verdict/");

/// The last verdict on a node; an earlier one that comes later says nothing any more.
#[derive(Serialize, Deserialize)]
pub struct LastVerdict {
    /// When it was spoken.
    pub at: Time,
    /// Who declared the node dead, and when, if it is.
    pub dead: Option<NodeDead>,
}

/// Keeps the last verdict on a node.
pub fn set_verdict(node: &str, verdict: &LastVerdict) -> Result<(), Error> {
    VERDICTS.set(node, verdict)
}

/// The last verdict on a node, if there was one.
pub fn verdict_on(node: &str) -> Result<Option<LastVerdict>, Error> {
    VERDICTS.get(node)
}

/// When the result of a job was ready; an earlier one that comes later is not the job's result.
const RESULT_TIMES: Map<str, Time> = Map::new("result/");

/// Keeps when the result of a job was ready.
pub fn set_result_time(job: &str, at: Time) -> Result<(), Error> {
    RESULT_TIMES.set(job, &at)
}

/// When the result of a job was ready, if there is one.
pub fn result_time(job: &str) -> Result<Option<Time>, Error> {
    RESULT_TIMES.get(job)
}

pub fn get(id: &str) -> Result<Option<Job>, Error> {
    match ACTIVE.get(id)? {
        Some(job) => Ok(Some(job)),
        None => FINISHED.get(id),
    }
}

/// Keeps `job` in place of `before`; returns how many bytes it has in the state.
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

/// Removes a job and all that is kept beside it.
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

/// The keys of a job in the two indices: by age, and by node.
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

/// The running jobs of a node as they stand in the state, by id, after one.
fn running_raw(node: &str, after: Option<&str>) -> impl Iterator<Item = Result<Vec<u8>, Error>> {
    let prefix = format!("{node}\n");
    let rows = BY_NODE.iter_raw(Some(&format!("{prefix}{}", after.unwrap_or_default())));
    let of_node = rows.map_while(move |row| match row {
        Ok((key, _)) => key.strip_prefix(&prefix).map(|id| Ok(id.to_owned())),
        Err(error) => Some(Err(error)),
    });
    of_node.filter_map(|id| id.and_then(|id| active_record(&id)).transpose())
}

/// An active job as it stands in the state.
fn active_record(id: &str) -> Result<Option<Vec<u8>>, Error> {
    state::get(format!("active/{id}").as_bytes())
}

/// The active jobs as they stand in the state, by id.
pub fn active_raw() -> state::Pages {
    ACTIVE.iter_raw(None)
}

/// The ids of finished jobs, newest first.
pub fn finished_ids() -> impl Iterator<Item = Result<String, Error>> {
    BY_AGE.iter(None).map(|row| Ok(row?.1))
}

/// A finished job as it stands in the state.
pub fn finished_raw(id: &str) -> Result<Option<Vec<u8>>, Error> {
    state::get(format!("finished/{id}").as_bytes())
}

/// What pruning has left to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    /// No finished job.
    Nothing,
    /// Jobs that may stay.
    Kept,
    /// More to remove than one entry should.
    More,
}

/// Jobs that are removed at a time: an entry may have a bounded number of effects.
const TOGETHER: usize = 5_000;

/// Removes finished jobs beyond `keep` and older than `age`, a bounded number at a time.
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

/// The time in a key of [`BY_AGE`].
fn finished_at(key: &str) -> Option<Time> {
    let counted_down = i64::from_str_radix(key.split_once('/')?.0, 16).ok()?;
    Some(Time::of_millis(i64::MAX - counted_down))
}

/// Which jobs are asked for.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    status: Option<Status>,
    node_id: Option<String>,
    /// Jobs after this one only.
    pub after: Option<String>,
    /// How many at most.
    pub limit: Option<usize>,
}

impl Filter {
    /// Whether a job is one of those.
    pub fn matches(&self, job: &Job) -> bool {
        self.status.is_none_or(|status| job.status == status)
            && self.node_id.as_ref().is_none_or(|node| job.node_id.as_ref() == Some(node))
    }
}

/// A page of the jobs that match, by id. The next one begins after its last job; an empty one is the
/// end. Finished jobs are not read where none can match.
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
