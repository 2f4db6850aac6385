//! The plugin itself: handles events, commands and queries.

use std::time::Duration;

use dim_guest::document::{self as documents, Document};
use dim_guest::heartbeat::is_overtaken;
use dim_guest::time::Time;
use dim_guest::{Event, Failure, Message, Origin, Plugin, Refusal, ipns, json, pubsub, timers};
use serde::Deserialize;

use crate::document;
use crate::import;
use crate::job::{self, Death, Job, JobEvent, ResultReady, Verdict};
use crate::merge;
use crate::store::{self, LastVerdict, Left};
use crate::traces::{self, Known, Trace};

/// Interval of pruning while finished jobs exist.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
const PRUNE: &str = "prune";

/// Interval of pruning while only traces exist.
const FORGET_EVERY: Duration = Duration::from_secs(3_600);

/// The records of the document, as errors name them.
const RECORDS: &str = "active jobs";

/// The config of the plugin. The manifest describes the fields.
#[derive(Debug, Deserialize)]
pub struct Config {
    updates_topic: String,
    results_topic: String,
    status_topic: String,
    ipns_key_name: String,
    trusted_observers: Vec<String>,
    publish_every_ms: u64,
    keep_finished: usize,
    keep_finished_days: u64,
    remember_removed_days: u64,
    #[serde(default)]
    jobs_ipns: Vec<String>,
}

/// The plugin `job-tracker`.
pub struct JobTracker {
    config: Config,
    document: Document,
}

impl Plugin for JobTracker {
    type Config = Config;

    fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
        for name in &config.jobs_ipns {
            ipns::follow(name).map_err(|error| format!("cannot follow {name}: {error:?}"))?;
        }
        merge::forget_all_but(&config.jobs_ipns).map_err(|error| format!("{error:?}"))?;
        let every = Duration::from_millis(config.publish_every_ms);
        let document = Document::new(format!("{}-jobs", config.ipns_key_name), "document", every);
        Ok(Self { config, document })
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Message(message) if message.topic == self.config.updates_topic => {
                self.take_in(&JobEvent::parse(&message.data)?)?;
                Ok(())
            }
            Event::Message(message) if message.topic == self.config.results_topic => {
                self.result(ResultReady::parse(&message.data)?)
            }
            Event::Message(message) if message.topic == self.config.status_topic => self.verdict(&message),
            Event::Timer(timer) if self.document.is_due(&timer) => self.publish(),
            Event::Timer(timer) if timer.key == PRUNE => self.prune(),
            Event::Timer(timer) if timer.key == merge::MORE => merge::go_on(self),
            Event::NameChanged(changed) => merge::name_changed(self, &changed.name),
            Event::Message(_) | Event::Timer(_) | Event::Gap(_) => Ok(()),
        }
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "update" => self.update(json::read(body)?),
            "import" => import::import(self, body),
            "remove" => {
                let Named { job_id } = json::read(body)?;
                job::check_job_id(&job_id).map_err(Refusal::Invalid)?;
                self.remove(&job_id)
            }
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "get" => {
                let Named { job_id } = json::read(body)?;
                job::check_job_id(&job_id).map_err(Refusal::Invalid)?;
                json::write(&store::get(&job_id)?.ok_or(Refusal::NotFound(job_id))?)
            }
            "list" => json::write(&store::list(&json::read(body)?)?),
            "merged" => json::write(&merge::reports()?),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

#[derive(Deserialize)]
struct Named {
    job_id: String,
}

impl JobTracker {
    /// Applies an event. Returns the job if it changed.
    fn take_in(&self, event: &JobEvent) -> Result<Option<Job>, Failure> {
        let known = store::get(&event.job_id)?;
        if known.is_none() {
            self.document.check_room(RECORDS)?;
        }
        let now = Time::now();
        let trace = if known.is_none() { traces::of(&event.job_id)? } else { None };
        let result_cid = match trace {
            // A repeated or late event does not add a removed job again.
            Some(Trace { at, known: Known::Removed {} | Known::Pruned {} })
                if !Job::comes_back(event, at, now) =>
            {
                return Ok(None);
            }
            Some(Trace { at, known: Known::ResultCid(cid) }) => {
                store::set_result_time(&event.job_id, at)?;
                Some(cid)
            }
            _ => None,
        };
        let Some(mut job) = Job::after(known.as_ref(), event, now) else { return Ok(None) };
        if known.is_none() {
            traces::take(&job.job_id)?;
            job.result_cid = result_cid;
        }
        let job = self.judged(job)?;
        self.keep(known.as_ref(), &job)?;
        Ok(Some(job))
    }

    /// Returns a job with the last verdict on its node. The verdict may be older than the job.
    pub fn judged(&self, job: Job) -> Result<Job, Failure> {
        let Some(node) = &job.node_id else { return Ok(job) };
        let dead = store::verdict_on(node)?.and_then(|verdict| verdict.dead);
        Ok(job.on_node(dead.as_ref()).unwrap_or(job))
    }

    fn result(&self, ready: ResultReady) -> Result<(), Failure> {
        let (known, now) = (store::get(&ready.job_id)?, Time::now());
        let at = ready.time(now);
        let Some(known) = known else { return self.result_before_its_job(ready, at) };
        if store::result_time(&ready.job_id)?.is_some_and(|known| known > at) {
            return Ok(());
        }
        store::set_result_time(&ready.job_id, at)?;
        match known.with_result(&ready.result_cid) {
            Some(job) => self.keep(Some(&known), &job),
            None => Ok(()),
        }
    }

    /// Stores a result until an event of its job arrives, because a result alone does not make a job. Drops the result
    /// of a removed job.
    fn result_before_its_job(&self, ready: ResultReady, at: Time) -> Result<(), Failure> {
        let is_news =
            traces::of(&ready.job_id)?.is_none_or(|trace| trace.known != Known::Removed {} && trace.at <= at);
        if is_news {
            let known = Known::ResultCid(ready.result_cid);
            traces::leave(&ready.job_id, &Trace { at, known })?;
            self.prune_later()?;
        }
        Ok(())
    }

    /// Applies a verdict to the running jobs of the node. Ignores verdicts of peers that are not in
    /// `trusted_observers`.
    fn verdict(&self, message: &Message) -> Result<(), Failure> {
        let verdict = Verdict::parse(&message.data)?;
        let trusted = &self.config.trusted_observers;
        let believed = message.origin.peer().is_none_or(|peer| trusted.iter().any(|it| it == peer));
        let now = Time::now();
        let dead = match verdict.death(now) {
            Death::Dead(dead) if believed => Some(dead),
            Death::Alive if believed => None,
            _ => return Ok(()),
        };
        let at = verdict.time(now);
        // Verdicts of this host's watchdog arrive in order, by one clock, and always apply. Another observer can only
        // revoke its own verdict, and its clock only orders messages within seconds. The node registry has the same
        // rule.
        if let Some(known) = store::verdict_on(&verdict.node_id)?
            && !matches!(message.origin, Origin::Plugin(_))
        {
            let has_a_say = match (&known.dead, &dead) {
                (None, _) => true,
                (Some(stands), None) => stands.observer == verdict.observer,
                (Some(_), Some(_)) => false,
            };
            if !has_a_say || is_overtaken(at, now, known.at, known.at) {
                return Ok(());
            }
        }
        let last = LastVerdict { at, dead: dead.clone() };
        store::set_verdict(&verdict.node_id, &last)?;
        for job in store::running_on(&verdict.node_id)? {
            if let Some(marked) = job.on_node(dead.as_ref()) {
                self.keep(Some(&job), &marked)?;
            }
        }
        Ok(())
    }

    /// Returns the names of the documents of other hosts' trackers.
    pub fn others(&self) -> &[String] {
        &self.config.jobs_ipns
    }

    /// Rejects a new job while the active jobs exceed their maximum size.
    pub fn check_room(&self) -> Result<(), Failure> {
        self.document.check_room(RECORDS)
    }

    /// Returns the key under which the jobs are published.
    pub fn key(&self) -> String {
        format!("{}-jobs", self.config.ipns_key_name)
    }

    /// Builds and publishes the document.
    pub fn publish(&self) -> Result<(), Failure> {
        self.document.publish(&document::build(&self.document)?)
    }

    /// Stores a job, in place of `before`, and schedules a document.
    pub fn keep(&self, before: Option<&Job>, job: &Job) -> Result<(), Failure> {
        let bytes = store::put(before, job)?;
        self.document.counts(before.and_then(size), is_active(job).then_some(bytes))?;
        if job.status.is_final() {
            self.prune_later()?;
        }
        self.document.touch()
    }

    /// Returns whether a finished job is older than the retention of finished jobs.
    pub fn is_old(&self, job: &Job, now: Time) -> bool {
        now.since(job.updated_at) > self.kept()
    }

    /// Returns the retention of finished jobs.
    fn kept(&self) -> Duration {
        Duration::from_secs(self.config.keep_finished_days.saturating_mul(86_400))
    }

    /// Sets the timer of pruning, unless it is set.
    pub fn prune_later(&self) -> Result<(), Failure> {
        if timers::get(PRUNE)?.is_none() {
            timers::set(PRUNE, Time::now().after(PRUNE_EVERY).timestamp())?;
        }
        Ok(())
    }

    fn prune(&self) -> Result<(), Failure> {
        let age = self.kept();
        let remembered = Duration::from_secs(self.config.remember_removed_days.saturating_mul(86_400));
        let left = (
            store::prune(Time::now(), self.config.keep_finished, age)?,
            traces::prune(Time::now().before(remembered))?,
        );
        let pause = match left {
            (Left::Nothing, Left::Nothing) => None,
            (Left::More, _) | (_, Left::More) => Some(Duration::ZERO),
            // Traces are kept for days, so their pruning can wait.
            (Left::Nothing, Left::Kept) => Some(FORGET_EVERY),
            (Left::Kept, _) => Some(PRUNE_EVERY),
        };
        if let Some(pause) = pause {
            timers::set(PRUNE, Time::now().after(pause).timestamp())?;
        }
        self.document.touch()
    }

    /// Executes the command `update`: changes a job and publishes the event, both or neither. A caller that reports
    /// late sets `timestamp`.
    fn update(&self, mut event: JobEvent) -> Result<String, Refusal> {
        event.check().map_err(Refusal::Invalid)?;
        event.timestamp.get_or_insert(Time::now());
        let job = self.take_in(&event).map_err(|failure| Refusal::Other(format!("{failure:?}")))?;
        let Some(job) = job else {
            let known = store::get(&event.job_id)?;
            let status = known.map_or("removed", |job| job.status.name());
            return Err(Refusal::Conflict(format!(
                "job {} is {status}, which {} does not change",
                event.job_id, event.event_type
            )));
        };
        let message = json::write(&event)?;
        pubsub::publish(&self.config.updates_topic, message.as_bytes())?;
        json::write(&job)
    }

    fn remove(&self, id: &str) -> Result<String, Refusal> {
        let job = store::get(id)?.ok_or_else(|| Refusal::NotFound(id.to_owned()))?;
        self.take_away(&job, Time::now()).map_err(|failure| Refusal::Other(format!("{failure:?}")))?;
        json::write(&job)
    }

    /// Removes a job and records that it was removed by command at `at`.
    pub fn take_away(&self, job: &Job, at: Time) -> Result<(), Failure> {
        store::remove(job)?;
        traces::leave(&job.job_id, &Trace { at, known: Known::Removed {} })?;
        self.prune_later()?;
        self.document.counts(size(job), None)?;
        self.document.touch()
    }
}

/// Returns the size of an active job in the document, in bytes; none for a finished job.
fn size(job: &Job) -> Option<usize> {
    is_active(job).then(|| documents::size(job))
}

fn is_active(job: &Job) -> bool {
    !job.status.is_final()
}
