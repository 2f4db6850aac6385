//! Takes over what other hosts of the fleet know of jobs, from the documents that their trackers publish, and says where
//! they differ. A topic on plain pubsub loses messages: what one host has missed, it learns here.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use dim_guest::log::{self, Level};
use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use dim_guest::{Failure, ipns, timers};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::job::{self, Job};
use crate::store;
use crate::traces::{self, Known, Trace};
use crate::tracker::JobTracker;

/// The timer that goes on with a merge.
pub const MORE: &str = "merge";

/// Jobs that are taken over at a time: an entry may have a bounded number of effects.
const TOGETHER: usize = 2_000;

/// What has changed here for less than this, as of the other's document, has not come to the other yet.
const GRACE: Duration = Duration::from_secs(60);

/// Ids that a report names.
const EXAMPLES: usize = 5;

/// How the last merge of each other host's jobs went, by the name of its document.
const REPORTS: Map<str, Report> = Map::new("merged/");

/// The names whose documents are not taken over to the end.
const HALF_MERGED: Map<str, bool> = Map::new("merging/");

/// How the last merge of another host's jobs went, and what differs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the document.
    pub name: String,
    /// When it was merged.
    pub at: Option<Time>,
    /// When the other host has made it.
    pub updated_at: Option<Time>,
    /// The jobs in it.
    pub jobs: u64,
    /// Jobs that were taken over from it, ever.
    pub taken: u64,
    /// Jobs that were removed because they were removed there, ever.
    pub removed: u64,
    /// Rows of it that cannot be read, or for which there is no room.
    pub refused: u64,
    /// Active jobs that it should have and does not: the other host has missed that they exist.
    pub missing_there: u64,
    /// Jobs of which it has an earlier status than this host for more than a minute.
    pub behind_there: u64,
    /// Some of those, by their ids.
    pub examples: Vec<String>,
    /// Since when there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differs_since: Option<Time>,
}

impl Report {
    fn differs(&mut self, id: &str) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(id.to_owned());
        }
    }
}

/// How the last merges went.
pub fn reports() -> Result<Vec<Report>, state::Error> {
    REPORTS.iter(None).map(|row| Ok(row?.1)).collect()
}

/// Forgets the documents that are followed no more.
pub fn forget_all_but(names: &[String]) -> Result<(), state::Error> {
    let known: Vec<String> = REPORTS.iter(None).map(|row| Ok(row?.0)).collect::<Result<_, state::Error>>()?;
    for name in known {
        let is_followed =
            names.iter().any(|other| ipns::resolve(other).is_ok_and(|resolved| resolved.name == name));
        // What is not known yet will be.
        let may_be = names.iter().any(|other| ipns::resolve(other).is_err());
        if !is_followed && !may_be {
            REPORTS.delete(&name)?;
            HALF_MERGED.delete(&name)?;
        }
    }
    Ok(())
}

/// A document that another host has published, or this one.
pub fn name_changed(tracker: &JobTracker, name: &str) -> Result<(), Failure> {
    let is = |known: &String| ipns::resolve(known).is_ok_and(|known| known.name == name);
    if ipns::key_id(&tracker.key())? == name || !tracker.others().iter().any(is) {
        return Ok(());
    }
    merge(tracker, name)
}

/// Goes on with the documents that are not taken over to the end.
pub fn go_on(tracker: &JobTracker) -> Result<(), Failure> {
    let names: Vec<String> =
        HALF_MERGED.iter(None).map(|row| Ok(row?.0)).collect::<Result<_, state::Error>>()?;
    for name in names {
        merge(tracker, &name)?;
    }
    Ok(())
}

/// What a tracker publishes. Rows are read one by one: a bad one costs itself.
#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow, default)]
    active_jobs: BTreeMap<Cow<'a, str>, &'a RawValue>,
    #[serde(borrow, default)]
    finished_jobs: BTreeMap<Cow<'a, str>, &'a RawValue>,
    #[serde(borrow, default)]
    removed_jobs: BTreeMap<Cow<'a, str>, &'a RawValue>,
    #[serde(default)]
    left_out: u64,
    #[serde(default)]
    updated_at: Option<Time>,
}

/// Takes over a document, a bounded number of jobs at a time. Merged twice, it changes nothing any more: two hosts that
/// follow each other come to rest.
fn merge(tracker: &JobTracker, name: &str) -> Result<(), Failure> {
    // Not held any more: a newer one has come, and with it another event.
    let Ok(held) = ipns::get_state(name) else { return HALF_MERGED.delete(name).map_err(Failure::from) };
    let document: Document<'_> = serde_json::from_slice(&held.data)
        .map_err(|error| Failure::Reject(format!("{name} holds no jobs: {error}")))?;
    let now = Time::now();
    let before = REPORTS.get(name)?.unwrap_or_default();
    let mut report = Report {
        name: name.to_owned(),
        at: Some(now),
        updated_at: document.updated_at,
        jobs: (document.active_jobs.len() + document.finished_jobs.len()) as u64,
        taken: before.taken,
        removed: before.removed,
        ..Report::default()
    };
    let mut left = TOGETHER;
    let rows = document.active_jobs.iter().chain(&document.finished_jobs);
    for (id, row) in rows {
        if left == 0 {
            break;
        }
        let Some(told) = read(id, row) else {
            report.refused += 1;
            continue;
        };
        match take(tracker, told.as_told(now), now)? {
            Taken::Changed => (left, report.taken) = (left - 1, report.taken + 1),
            Taken::BehindThere(job) if is_settled(&job, &document) => {
                report.behind_there += 1;
                report.differs(id);
            }
            Taken::NoRoom => report.refused += 1,
            Taken::BehindThere(_) | Taken::Same => {}
        }
    }
    for (id, at) in &document.removed_jobs {
        if left == 0 {
            break;
        }
        let Some(at) = read_time(id, at) else {
            report.refused += 1;
            continue;
        };
        if remove(tracker, id, at.min(now))? {
            (left, report.removed) = (left - 1, report.removed + 1);
        }
    }
    if left == 0 {
        HALF_MERGED.set(name, &true)?;
        timers::set(MORE, now.timestamp())?;
    } else {
        HALF_MERGED.delete(name)?;
    }
    count_missing(&document, &mut report)?;
    tell(&before, &mut report, now);
    Ok(REPORTS.set(name, &report)?)
}

fn read(id: &str, row: &RawValue) -> Option<Job> {
    let job: Job = serde_json::from_str(row.get()).ok()?;
    let is_sound = job.job_id == id
        && job::check_job_id(id).is_ok()
        && job.node_id.as_ref().is_none_or(|node| job::check_node_id(node).is_ok());
    is_sound.then_some(job)
}

fn read_time(id: &str, at: &RawValue) -> Option<Time> {
    job::check_job_id(id).ok()?;
    serde_json::from_str(at.get()).ok()
}

/// What became of a row.
enum Taken {
    /// It was taken over.
    Changed,
    /// Both know the same.
    Same,
    /// There is no room for one job more.
    NoRoom,
    /// This host knows more.
    BehindThere(Job),
}

fn take(tracker: &JobTracker, told: Job, now: Time) -> Result<Taken, Failure> {
    let known = store::get(&told.job_id)?;
    let Some(known) = known else {
        match traces::of(&told.job_id)? {
            Some(Trace { at, known: Known::Removed {} | Known::Pruned {} }) if told.updated_at <= at => {
                return Ok(Taken::Same);
            }
            // What had been finished for long, here or there, is of no use to anyone.
            _ if told.status.is_final() && tracker.is_old(&told, now) => return Ok(Taken::Same),
            _ => {}
        }
        if tracker.check_room().is_err() {
            return Ok(Taken::NoRoom);
        }
        let trace = traces::take(&told.job_id)?;
        let result_cid = match trace.map(|trace| trace.known) {
            Some(Known::ResultCid(cid)) => told.result_cid.clone().or(Some(cid)),
            _ => told.result_cid.clone(),
        };
        tracker.keep(None, &tracker.judged(Job { result_cid, ..told })?)?;
        return Ok(Taken::Changed);
    };
    let joined = known.joined(&told);
    if joined == known {
        let is_behind = Job { node_dead: None, ..known.clone() } != told;
        return Ok(if is_behind { Taken::BehindThere(known) } else { Taken::Same });
    }
    tracker.keep(Some(&known), &tracker.judged(joined)?)?;
    Ok(Taken::Changed)
}

/// Removes a job that was removed there; one that has changed here since stays.
fn remove(tracker: &JobTracker, id: &str, at: Time) -> Result<bool, Failure> {
    match store::get(id)? {
        Some(job) if job.updated_at <= at => {
            tracker.take_away(&job, at)?;
            Ok(true)
        }
        Some(_) => Ok(false),
        // No late notice is to bring it back here, either.
        None => match traces::of(id)? {
            Some(Trace { known: Known::Removed {} | Known::Pruned {}, .. }) => Ok(false),
            _ => {
                traces::leave(id, &Trace { at, known: Known::Removed {} })?;
                tracker.prune_later()?;
                Ok(true)
            }
        },
    }
}

/// Whether the other host has had time to learn of a job's last change before it made its document.
fn is_settled(job: &Job, document: &Document<'_>) -> bool {
    document.updated_at.is_some_and(|made| made.since(job.updated_at) > GRACE)
}

/// Counts the active jobs of this host that the other does not know.
fn count_missing(document: &Document<'_>, report: &mut Report) -> Result<(), Failure> {
    // It does not say which ones it has left out.
    if document.left_out > 0 {
        return Ok(());
    }
    for row in store::active_raw() {
        let (id, record) = row?;
        let is_there = [&document.active_jobs, &document.finished_jobs, &document.removed_jobs]
            .iter()
            .any(|jobs| jobs.contains_key(id.as_str()));
        if !is_there && is_settled(&state::decode(&record)?, document) {
            report.missing_there += 1;
            report.differs(&id);
        }
    }
    Ok(())
}

/// Notes since when there is a difference, and tells the operator when there begins to be one and when it ends.
fn tell(before: &Report, report: &mut Report, now: Time) {
    let differs = report.missing_there + report.behind_there > 0;
    report.differs_since = differs.then(|| before.differs_since.unwrap_or(now));
    let (missing, behind) = (report.missing_there.to_string(), report.behind_there.to_string());
    let fields = [
        ("name", report.name.as_str()),
        ("missing_there", &missing),
        ("behind_there", &behind),
        ("examples", &report.examples.join(", ")),
    ];
    match (before.differs_since, report.differs_since) {
        (None, Some(_)) => {
            log::line(Level::Warn, "another host of the fleet lacks what this one knows of jobs", &fields)
        }
        (Some(_), None) => log::line(Level::Info, "both hosts know the same of jobs again", &fields[..1]),
        _ => {}
    }
}
