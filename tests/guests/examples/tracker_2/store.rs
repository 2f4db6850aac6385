//! Stores jobs in version 2: under one prefix, with indices of open jobs, of finished jobs by age and of running jobs
//! by node.

use std::time::Duration;

use dim_guest::Failure;
use dim_guest::list::Page;
use dim_guest::state::{self, Error, Map};
use dim_guest::time::Time;

use crate::job::Job;

#[path = "../../../../plugins/job-tracker/src/store.rs"]
#[expect(dead_code, reason = "what has another layout now is below")]
mod version_1;

use version_1::indices;
pub use version_1::{
    Filter, LastVerdict, Left, finished_ids, result_time, set_result_time, set_verdict, verdict_on,
};

const JOBS: Map<str, Job> = Map::new("job/");
const OPEN: Map<str, ()> = Map::new("open/");
const BY_AGE: Map<str, String> = Map::new("age/");
const BY_NODE: Map<str, String> = Map::new("node/");

/// The open jobs of version 1.
const ACTIVE: Map<str, Job> = Map::new("active/");
const FINISHED: Map<str, Job> = Map::new("finished/");

/// Migrates the state of version 1: moves all jobs under one prefix. The other indices are unchanged.
pub fn migrate() -> Result<(), Error> {
    for (records, is_open) in [(&ACTIVE, true), (&FINISHED, false)] {
        // Collects all ids first, because an iteration must not see its own changes.
        let ids: Vec<String> =
            records.iter_raw(None).map(|row| row.map(|(id, _)| id)).collect::<Result<_, _>>()?;
        for id in ids {
            let Some(job) = records.get(&id)? else { continue };
            JOBS.set(&id, &job)?;
            if is_open {
                OPEN.set(&id, &())?;
            }
            records.delete(&id)?;
        }
    }
    Ok(())
}

pub fn get(id: &str) -> Result<Option<Job>, Error> {
    JOBS.get(id)
}

/// Replaces `before` by `job`. Returns the size of the stored job, in bytes.
pub fn put(before: Option<&Job>, job: &Job) -> Result<usize, Error> {
    if let Some(before) = before {
        take_away(before)?;
    }
    let bytes = JOBS.put(&job.job_id, job)?;
    let (age, node) = indices(job);
    match age {
        Some(age) => BY_AGE.set(&age, &job.job_id)?,
        None => OPEN.set(&job.job_id, &())?,
    }
    node.map_or(Ok(()), |node| BY_NODE.set(&node, &job.job_id))?;
    Ok(bytes)
}

/// Removes a job with its result time, unknown members and index entries.
pub fn remove(job: &Job) -> Result<(), Error> {
    // This also removes the result time.
    version_1::remove(job)?;
    take_away(job)
}

fn take_away(job: &Job) -> Result<(), Error> {
    JOBS.delete(&job.job_id)?;
    OPEN.delete(&job.job_id)?;
    let (age, node) = indices(job);
    age.map_or(Ok(()), |age| BY_AGE.delete(&age))?;
    node.map_or(Ok(()), |node| BY_NODE.delete(&node))
}

pub fn running_on(node: &str) -> Result<Vec<Job>, Error> {
    let prefix = format!("{node}\n");
    let rows = BY_NODE.iter(Some(&prefix));
    let ids = rows.take_while(|row| row.as_ref().is_ok_and(|(key, _)| key.starts_with(&prefix)));
    ids.filter_map(|row| row.and_then(|(_, id)| JOBS.get(&id)).transpose()).collect()
}

/// Iterates over the stored bytes of the open jobs, sorted by id.
pub fn active_raw() -> impl Iterator<Item = Result<(String, Vec<u8>), Error>> {
    OPEN.iter_raw(None).filter_map(|row| {
        let found = row.and_then(|(id, _)| Ok(JOBS.get_raw(&id)?.map(|job| (id, job))));
        found.transpose()
    })
}

/// Returns the stored bytes of a finished job.
pub fn finished_raw(id: &str) -> Result<Option<Vec<u8>>, Error> {
    JOBS.get_raw(id)
}

/// Removes finished jobs older than `age`, and the oldest ones beyond `keep`.
pub fn prune(now: Time, keep: usize, age: Duration) -> Result<Left, Failure> {
    let mut kept = 0;
    for row in BY_AGE.iter(None) {
        let (_, id) = row?;
        let Some(job) = JOBS.get(&id)? else { continue };
        if kept < keep && now.since(job.updated_at) <= age {
            kept += 1;
        } else {
            remove(&job)?;
        }
    }
    Ok(if kept > 0 { Left::Kept } else { Left::Nothing })
}

/// Returns a page of the matching jobs, sorted by id.
pub fn list(filter: &Filter) -> Result<Vec<Job>, Error> {
    let mut page = Page::new(filter.limit);
    for row in JOBS.iter_raw(filter.after.as_deref()) {
        let (_, record) = row?;
        let job: Job = state::decode(&record)?;
        if filter.matches(&job) {
            page.push(job, record.len());
        }
        if !page.has_room() {
            break;
        }
    }
    Ok(page.into_rows())
}
