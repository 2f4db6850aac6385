//! Merges the jobs of other hosts of the fleet from the documents that their trackers publish, and reports differences.
//!
//! Pubsub can lose messages. A merge brings the jobs and changes that this host has missed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::time::Duration;

use dim_guest::log::{self, Level};
use dim_guest::state::{self, Map};
use dim_guest::time::Time;
use dim_guest::{Failure, ipns, timers};
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::job::{self, Job};
use crate::store;
use crate::traces::{self, Known, Trace};
use crate::tracker::JobTracker;

/// The timer that continues a merge.
pub const MORE: &str = "merge";

/// Maximum number of changed jobs in one entry, because the effects of an entry are limited.
const TOGETHER: usize = 2_000;

/// Maximum number of rows that one entry reads, because the time of a call is limited.
const ROWS: usize = 10_000;

/// Minimum age of a change here, at the time of the other host's document, before it counts as missing there.
const GRACE: Duration = Duration::from_secs(60);

/// Maximum number of job ids in a report.
const EXAMPLES: usize = 5;

/// The report of the last merge of each other host, by the name of its document.
const REPORTS: Map<str, Report> = Map::new("merged/");

/// The unfinished merges, by the name of the document.
const ROUNDS: Map<str, Round> = Map::new("merging/");

/// The report of the last merge of another host's jobs, with the differences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the document.
    pub name: String,
    /// The time of the merge.
    pub at: Option<Time>,
    /// The time at which the other host built the document.
    pub updated_at: Option<Time>,
    /// The number of jobs in the document.
    pub jobs: u64,
    /// The total number of jobs that were added or changed by merges of this name.
    pub taken: u64,
    /// The total number of jobs that were removed here because they were removed there.
    pub removed: u64,
    /// The number of rows that are unreadable, or exceed the maximum size of all jobs.
    pub refused: u64,
    /// The number of rows that were merged without a member that cannot be passed on.
    #[serde(default)]
    pub incomplete: u64,
    /// The number of active jobs that the other host lacks.
    pub missing_there: u64,
    /// The number of jobs that the other host has in an earlier state, although the change is more than a minute old.
    pub behind_there: u64,
    /// The ids of some of these jobs.
    pub examples: Vec<String>,
    /// The time since which there are such jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub differs_since: Option<Time>,
    /// Whether the merge of a newer document is in progress.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub under_way: bool,
    /// The reason why the last document could not be merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Report {
    fn differs(&mut self, id: &str) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(id.to_owned());
        }
    }
}

/// Returns the reports of the last merges, including merges in progress.
pub fn reports() -> Result<Vec<Report>, state::Error> {
    let mut reports: BTreeMap<String, Report> = REPORTS.iter(None).collect::<Result<_, _>>()?;
    for round in ROUNDS.iter(None) {
        let (name, Round { report: Report { taken, removed, refused, incomplete, .. }, .. }) = round?;
        let report = reports.entry(name.clone()).or_default();
        (report.name, report.under_way) = (name, true);
        (report.taken, report.removed) = (taken, removed);
        (report.refused, report.incomplete) = (refused, incomplete);
    }
    Ok(reports.into_values().collect())
}

/// Removes the reports and unfinished merges of documents that are no longer followed.
pub fn forget_all_but(names: &[String]) -> Result<(), state::Error> {
    let known: Vec<String> = REPORTS.iter(None).map(|row| Ok(row?.0)).collect::<Result<_, state::Error>>()?;
    for name in known {
        let is_followed =
            names.iter().any(|other| ipns::resolve(other).is_ok_and(|resolved| resolved.name == name));
        // A configured name that does not resolve yet could be this one.
        let may_be = names.iter().any(|other| ipns::resolve(other).is_err());
        if !is_followed && !may_be {
            REPORTS.delete(&name)?;
            ROUNDS.delete(&name)?;
        }
    }
    Ok(())
}

/// Handles a changed name. Starts a merge if the name is one of another host's tracker.
pub fn name_changed(tracker: &JobTracker, name: &str) -> Result<(), Failure> {
    let is = |known: &String| ipns::resolve(known).is_ok_and(|known| known.name == name);
    if ipns::key_id(&tracker.key())? == name || !tracker.others().iter().any(is) {
        return Ok(());
    }
    match ROUNDS.get(name)? {
        // The current merge finishes first; the newer document follows.
        Some(round) => go_on_later(name, Round { again: true, ..round }, Time::now()),
        None => merge(tracker, name),
    }
}

/// Continues the unfinished merges.
pub fn go_on(tracker: &JobTracker) -> Result<(), Failure> {
    let names: Vec<String> = ROUNDS.iter(None).map(|row| Ok(row?.0)).collect::<Result<_, state::Error>>()?;
    for name in names {
        merge(tracker, &name)?;
    }
    Ok(())
}

/// The document of a tracker. Rows are parsed one by one, so that an unreadable row affects only itself.
#[derive(Deserialize)]
struct Document<'a> {
    #[serde(borrow, default)]
    active_jobs: Rows<'a>,
    #[serde(borrow, default)]
    finished_jobs: Rows<'a>,
    #[serde(borrow, default)]
    removed_jobs: Rows<'a>,
    #[serde(borrow, default)]
    left_out: Option<&'a RawValue>,
    #[serde(borrow, default)]
    updated_at: Option<&'a RawValue>,
}

type Rows<'a> = BTreeMap<Id<'a>, &'a RawValue>;

/// The id of a row; none if it is not Unicode.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Id<'a>(Option<Cow<'a, str>>);

impl<'de: 'a, 'a> Deserialize<'de> for Id<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = Id<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
                Ok(Id(std::str::from_utf8(bytes).ok().map(Cow::Borrowed)))
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                Ok(Id(std::str::from_utf8(bytes).ok().map(|text| Cow::Owned(text.to_owned()))))
            }
        }

        // Reads bytes, because a string with half of a surrogate pair would be an error of the whole document.
        deserializer.deserialize_bytes(Bytes)
    }
}

impl Document<'_> {
    /// Returns the time at which the other host built the document, by its clock, but not later than now.
    fn made(&self, now: Time) -> Option<Time> {
        serde_json::from_str::<Time>(self.updated_at?.get()).ok().map(|made| made.min(now))
    }

    /// Returns whether the document lists all active jobs of the other host.
    fn is_whole(&self) -> bool {
        self.left_out.is_none_or(|left_out| left_out.get() == "0")
    }

    fn knows(&self, id: &str) -> bool {
        let id = Id(Some(Cow::Borrowed(id)));
        [&self.active_jobs, &self.finished_jobs, &self.removed_jobs].iter().any(|rows| rows.contains_key(&id))
    }
}

/// An unfinished merge.
#[derive(Default, Serialize, Deserialize)]
struct Round {
    /// The current list of the document: 0 for active, 1 for finished, 2 for removed jobs.
    list: usize,
    /// The last row of this list that was merged.
    after: Option<String>,
    /// Whether a newer document has arrived meanwhile.
    again: bool,
    /// The report so far.
    report: Report,
}

impl Round {
    /// Starts a merge. Its total numbers continue those of the last report.
    fn after(last: &Report) -> Self {
        let report = Report { taken: last.taken, removed: last.removed, ..Report::default() };
        Self { report, ..Self::default() }
    }
}

/// Merges a document, or the next part of it. A second merge of the same document changes nothing, so two hosts that
/// follow each other converge.
fn merge(tracker: &JobTracker, name: &str) -> Result<(), Failure> {
    let now = Time::now();
    let before = REPORTS.get(name)?.unwrap_or_default();
    // The host no longer holds this document because a newer one has arrived, with its own event.
    let Ok(held) = ipns::get_state(name) else { return ROUNDS.delete(name).map_err(Failure::from) };
    let document: Document<'_> = match serde_json::from_slice(&held.data) {
        Ok(document) => document,
        Err(error) => {
            ROUNDS.delete(name)?;
            let error = format!("it is not a document of jobs: {error}");
            log::line(
                Level::Warn,
                "the jobs of another host cannot be merged",
                &[("name", name), ("why", &error)],
            );
            let failed = Report { name: name.to_owned(), at: Some(now), error: Some(error), ..before };
            return Ok(REPORTS.set(name, &failed)?);
        }
    };
    let made = document.made(now);
    let mut round = ROUNDS.get(name)?.unwrap_or_else(|| Round::after(&before));
    let (mut rows, mut changes) = (ROWS, TOGETHER);
    let lists = [&document.active_jobs, &document.finished_jobs, &document.removed_jobs];
    while let Some(list) = lists.get(round.list) {
        let after = round.after.take().map(|after| Id(Some(Cow::Owned(after))));
        let from = after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        for (Id(id), row) in list.range((from, Bound::Unbounded)) {
            if rows == 0 || changes == 0 {
                return go_on_later(name, round, now);
            }
            rows -= 1;
            let Some(id) = id else {
                round.report.refused += 1;
                continue;
            };
            let is_changed = match round.list {
                2 => take_removed(tracker, id, row, now, &mut round.report)?,
                _ => take_row(tracker, id, row, made, now, &mut round.report)?,
            };
            changes -= usize::from(is_changed);
            round.after = Some(id.clone().into_owned());
        }
        (round.list, round.after) = (round.list + 1, None);
    }
    let Round { again, mut report, .. } = round;
    report.name = name.to_owned();
    (report.at, report.updated_at) = (Some(now), made);
    report.jobs = (document.active_jobs.len() + document.finished_jobs.len()) as u64;
    if document.is_whole() {
        count_missing(&document, made, &mut report)?;
    }
    tell(&before, &mut report, now);
    REPORTS.set(name, &report)?;
    if again {
        return go_on_later(name, Round::after(&report), now);
    }
    Ok(ROUNDS.delete(name)?)
}

fn go_on_later(name: &str, round: Round, now: Time) -> Result<(), Failure> {
    ROUNDS.set(name, &round)?;
    Ok(timers::set(MORE, now.timestamp())?)
}

/// Merges a row of active or finished jobs. Returns whether it changed anything.
fn take_row(
    tracker: &JobTracker,
    id: &str,
    row: &RawValue,
    made: Option<Time>,
    now: Time,
    report: &mut Report,
) -> Result<bool, Failure> {
    let Some(told) = read(id, row) else {
        report.refused += 1;
        return Ok(false);
    };
    report.incomplete += u64::from(is_incomplete(&told, row));
    match take(tracker, told.believed(now), now)? {
        Taken::Changed => {
            report.taken += 1;
            return Ok(true);
        }
        Taken::BehindThere(job) if is_settled(&job, made) => {
            report.behind_there += 1;
            report.differs(id);
        }
        Taken::NoRoom => report.refused += 1,
        Taken::BehindThere(_) | Taken::Same => {}
    }
    Ok(false)
}

/// Merges a row of removed jobs. Returns whether it changed anything.
fn take_removed(
    tracker: &JobTracker,
    id: &str,
    at: &RawValue,
    now: Time,
    report: &mut Report,
) -> Result<bool, Failure> {
    let Some(at) = read_time(id, at) else {
        report.refused += 1;
        return Ok(false);
    };
    let is_removed = remove(tracker, id, at.min(now))?;
    report.removed += u64::from(is_removed);
    Ok(is_removed)
}

fn read(id: &str, row: &RawValue) -> Option<Job> {
    let job: Job = serde_json::from_str(row.get()).ok()?;
    let is_sound = job.job_id == id
        && job::check_job_id(id).is_ok()
        && job.node_id.as_ref().is_none_or(|node| job::check_node_id(node).is_ok());
    is_sound.then_some(job)
}

/// Returns whether a row has a `data` or `result` that was dropped because it cannot be passed on.
fn is_incomplete(job: &Job, row: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Said<'a> {
        #[serde(borrow)]
        data: Option<&'a RawValue>,
        #[serde(borrow)]
        result: Option<&'a RawValue>,
    }
    if job.data.is_some() && job.result.is_some() {
        return false;
    }
    let said: Option<Said<'_>> = serde_json::from_str(row.get()).ok();
    let lacks = |said: Option<&RawValue>, has: bool| !has && said.is_some_and(|said| said.get() != "null");
    said.is_some_and(|said| lacks(said.data, job.data.is_some()) || lacks(said.result, job.result.is_some()))
}

/// Reads the time of a removed job. Returns none if the time or the id is invalid.
pub fn read_time(id: &str, at: &RawValue) -> Option<Time> {
    job::check_job_id(id).ok()?;
    // The default time, 1970, stands for no time.
    serde_json::from_str(at.get()).ok().filter(|at| *at > Time::default())
}

/// The result of the merge of a row.
enum Taken {
    /// The row added or changed a job.
    Changed,
    /// Both hosts have the same record, or the row is irrelevant.
    Same,
    /// The maximum size of all jobs is reached.
    NoRoom,
    /// This host has a more recent record.
    BehindThere(Job),
}

fn take(tracker: &JobTracker, told: Job, now: Time) -> Result<Taken, Failure> {
    let known = store::get(&told.job_id)?;
    let Some(known) = known else {
        match traces::of(&told.job_id)? {
            Some(Trace { at, known: Known::Removed {} | Known::Pruned {} }) if told.updated_at <= at => {
                return Ok(Taken::Same);
            }
            // A job whose retention here is over is not added.
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
    let is_alike = known.is_alike(&told);
    // The usual case, which needs no merge.
    if is_alike && known.updated_at >= told.updated_at {
        return Ok(Taken::Same);
    }
    let joined = known.joined(&told);
    if joined == known {
        return Ok(if is_alike { Taken::Same } else { Taken::BehindThere(known) });
    }
    tracker.keep(Some(&known), &tracker.judged(joined)?)?;
    Ok(Taken::Changed)
}

/// Removes a job that was removed on another host at `at`. A job that has changed here since then stays. Returns
/// whether it changed anything.
pub fn remove(tracker: &JobTracker, id: &str, at: Time) -> Result<bool, Failure> {
    match store::get(id)? {
        Some(job) if job.updated_at <= at => {
            tracker.take_away(&job, at)?;
            Ok(true)
        }
        Some(_) => Ok(false),
        // Records the removal, so that a late event does not add the job here either.
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

/// Returns whether the last change of a job was more than a minute old when the other host built its document.
fn is_settled(job: &Job, made: Option<Time>) -> bool {
    made.is_some_and(|made| made.since(job.updated_at) > GRACE)
}

/// Counts the active jobs of this host that the other host lacks.
fn count_missing(document: &Document<'_>, made: Option<Time>, report: &mut Report) -> Result<(), Failure> {
    for row in store::active_raw() {
        let (id, record) = row?;
        if !document.knows(&id) && is_settled(&state::decode(&record)?, made) {
            report.missing_there += 1;
            report.differs(&id);
        }
    }
    Ok(())
}

/// Sets the start of a difference, and logs when a difference starts and ends.
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
        (None, Some(_)) => log::line(
            Level::Warn,
            "another host of the fleet lacks jobs or job changes of this host",
            &fields,
        ),
        (Some(_), None) => log::line(
            Level::Info,
            "another host of the fleet has all jobs and job changes of this host again",
            &fields[..1],
        ),
        _ => {}
    }
}
