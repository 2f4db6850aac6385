//! `/v1/jobs`: the job tracker, by the words of its domain.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::ApiError;
use super::extract::{Body, Current, Path, Query};
use super::openapi::{Conflict, Missing, Refused};
use super::plugins::{command_to, query_to};
use super::stream::{self, Entries, Source, Start, Told};
use crate::entry::{Entry, Event, Kind, Offset};
use crate::feed::Missed;
use crate::host::{Host, Loaded};
use crate::plugin::ReplyError;
use crate::time::Timestamp;

const PLUGIN: &str = "job-tracker";

/// How often it is looked whether the tracker has handled an entry.
const LOOK: Duration = Duration::from_millis(5);

/// The same for one that is paused, or away, for long.
const RARE_LOOK: Duration = Duration::from_millis(200);

/// Jobs that a watch remembers; when there are more it begins anew, and may tell one twice.
const REMEMBERED: usize = 10_000;

/// A job, as the job tracker answers it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Job {
    /// Its id: 1 to 128 bytes.
    job_id: String,
    /// How it stands.
    status: JobStatus,
    /// When it last changed.
    updated_at: Timestamp,
    /// What came with its last event that had data.
    data: Option<Value>,
    /// Its result.
    result: Option<Value>,
    /// The CID of its result, if that is stored.
    #[schema(nullable = false)]
    result_cid: Option<String>,
    /// The node that it runs on.
    #[schema(nullable = false)]
    node_id: Option<String>,
    /// Set while the node of a running job is dead.
    #[schema(nullable = false)]
    node_dead: Option<NodeDead>,
}

/// How a job stands. Completed, failed and cancelled are final.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It waits for a node.
    Queued,
    /// A node works on it.
    Running,
    /// It is done.
    Completed,
    /// It has failed.
    Failed,
    /// Nobody wants it any more.
    Cancelled,
}

/// Who says since when that a job's node is dead.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct NodeDead {
    /// Whose watchdog: a host's id.
    observer: String,
    /// Since when.
    since: Timestamp,
}

/// Which jobs are asked for.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Jobs with this status only
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<JobStatus>,
    /// Jobs on this node only
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    /// Jobs after the one with this id only: the last of the page before
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    /// How many at most; more than 1,000 are never told at once
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Jobs by id, in pages.
///
/// The next page begins after the last job of this one; an empty page is the end.
#[utoipa::path(get, path = "/jobs", tag = "jobs", operation_id = "list_jobs",
    params(Filter), responses((status = 200, body = [Job])))]
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// One job.
#[utoipa::path(get, path = "/jobs/{job}", tag = "jobs", operation_id = "get_job",
    params(("job", description = "The job's id", min_length = 1, max_length = 128)),
    responses((status = 200, body = Job), Missing))]
pub async fn show(Current(host): Current, Path(job): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "job_id": job }).to_string()).await
}

/// Removes a job.
#[utoipa::path(delete, path = "/jobs/{job}", tag = "jobs", operation_id = "remove_job",
    params(("job", description = "The job's id", min_length = 1, max_length = 128)),
    responses((status = 200, body = Job, description = "The job as it was"), Missing))]
pub async fn remove(Current(host): Current, Path(job): Path<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "remove", json!({ "job_id": job }).to_string()).await
}

/// How the last merge of another host's jobs went, and what differs.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct MergedJobs {
    /// The name of the other host's document.
    pub name: String,
    /// When it was merged.
    #[schema(required)]
    at: Option<Timestamp>,
    /// When the other host has made it.
    #[schema(required)]
    updated_at: Option<Timestamp>,
    /// The jobs in it.
    jobs: u64,
    /// Jobs that were taken over from it, ever.
    taken: u64,
    /// Jobs that were removed because they were removed there, ever.
    removed: u64,
    /// Rows of it that cannot be read.
    refused: u64,
    /// Rows that are taken without a member that cannot be passed on.
    #[serde(default)]
    #[schema(required = false)]
    incomplete: u64,
    /// Active jobs of this host that it should have and does not.
    pub missing_there: u64,
    /// Jobs of which it has an earlier state than this host for more than a minute.
    pub behind_there: u64,
    /// Some of those, by their ids.
    pub examples: Vec<String>,
    /// Since when there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub differs_since: Option<Timestamp>,
    /// Whether a newer document is being merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    under_way: bool,
    /// Why the last document could not be merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
}

/// How the last merge of each other host's jobs went, and what differs.
///
/// The names of their documents are in the config, `ipfs.jobs_ipns`.
#[utoipa::path(get, path = "/merged-jobs", tag = "jobs", operation_id = "get_merged_jobs",
    responses((status = 200, body = [MergedJobs])))]
pub async fn merged(Current(host): Current) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "merged", String::new()).await
}

/// How the last merges went; none if no tracker that merges any can say so.
pub async fn reports(host: &Host) -> Vec<MergedJobs> {
    let Some(tracker) = host.plugins.get(PLUGIN).filter(|tracker| merges(tracker)) else { return Vec::new() };
    let reply = tracker.handle.query("merged".to_owned(), String::new()).await;
    reply.ok().and_then(|reports| serde_json::from_str(&reports).ok()).unwrap_or_default()
}

/// Whether a tracker merges the jobs of other hosts.
fn merges(tracker: &Loaded) -> bool {
    !tracker.handle.code().reach.granted.read.is_empty()
}

/// How many jobs were taken over from other hosts, or removed with them, ever.
async fn merged_so_far(host: &Host) -> u64 {
    reports(host).await.iter().map(|report| report.taken + report.removed).sum()
}

/// What happened to a job.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = JobUpdate)]
pub struct Update {
    /// `queued`, `running`, `completed`, `failed` or `cancelled`, or another word that fleets use for
    /// one of these: `created`, `submitted`, `pending`; `started`, `assigned`, `progress`; `succeeded`;
    /// `error`; `canceled`.
    event_type: String,
    /// Whatever goes with it; a `node_id` in it names the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    data: Option<Box<RawValue>>,
    /// The job's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    result: Option<Box<RawValue>>,
    /// The node that it runs on: 1 to 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    /// When it happened, if that is not now; as in a message of a fleet.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    timestamp: Option<Box<RawValue>>,
}

/// Changes a job and publishes the event, both or neither.
///
/// The answer comes once that is durable. An event that changes nothing is a conflict.
#[utoipa::path(post, path = "/jobs/{job}/events", tag = "jobs", operation_id = "update_job",
    params(("job", description = "The job's id", min_length = 1, max_length = 128)),
    request_body = Update, responses((status = 200, body = Job), Conflict, Refused))]
pub async fn update(
    Current(host): Current,
    Path(job): Path<String>,
    Body(update): Body<Update>,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Event {
        job_id: String,
        #[serde(flatten)]
        update: Update,
    }
    let event = serde_json::to_string(&Event { job_id: job, update }).expect("an update is plain data");
    command_to(&host, PLUGIN, "update", event).await
}

/// Each job as it changes, as server-sent events.
///
/// The data of an event `job` is the job as it stands then: changes that follow each other closely may be told as one.
/// While the tracker is paused nothing is told; it is as soon as it goes on. A caller that was cut off sends the last id
/// that it had as `Last-Event-ID`, and gets the jobs that have changed since. An event `lagged` says how many entries of
/// the log were missed, because the log does not hold them any more; its data is null if that is not known, and then any
/// job may have changed. The stream goes on. Jobs that
/// were taken over from another host, or imported, are told so, too: with an event `lagged` whose data is null.
// No id of a job stands in its way.
#[utoipa::path(get, path = "/watch/jobs", tag = "jobs", operation_id = "watch_jobs",
    params(("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had")),
    responses((status = 200, body = Job, content_type = "text/event-stream",
        description = "A stream without end; the schema is that of the data of an event `job`")))]
pub async fn watch(Current(host): Current, start: Start) -> Response {
    let ended = host.ended.clone();
    // Whoever goes on may have missed a merge.
    let merged = if matches!(start, Start::Now) { Some(merged_so_far(&host).await) } else { None };
    let entries = Entries::from(&host, start);
    stream::answer(Watching { host, entries, told: HashMap::new(), merged }, ended)
}

struct Watching {
    host: Arc<Host>,
    entries: Entries,
    /// What each job was when it was last told.
    told: HashMap<String, Value>,
    /// How many jobs were taken over from other hosts, or removed with them, when it was last looked.
    merged: Option<u64>,
}

/// What is asked of the tracker.
#[derive(Debug, PartialEq, Eq)]
enum Question {
    /// A job.
    Job(String),
    /// The jobs that run on a node: a verdict on it is one on them.
    Node(String),
    /// How many jobs were taken over from other hosts.
    Merged,
    /// All of them: the operator has had a document taken over, or they are as they were before code that was taken back,
    /// and what came since is handled again.
    All,
}

impl Source for Watching {
    fn opening(&self) -> Option<u64> {
        self.entries.opening()
    }

    async fn read(&mut self) -> Option<Told> {
        let (mut told, entries) = self.entries.read().await?;
        let tracker = self.tracker(Offset(0)).await;
        let (mut questions, mut last) = (Vec::new(), None);
        for entry in &entries {
            if let Some(question) = question(entry, &tracker) {
                last = Some(entry.offset);
                if !questions.contains(&question) {
                    questions.push(question);
                }
            }
        }
        if let Some(last) = last {
            let tracker = self.tracker(Offset(last.0 + 1)).await;
            for question in questions {
                let jobs = match question {
                    Question::Job(job) => of_job(&tracker, &job).await,
                    Question::Node(node) => on_node(&tracker, &node).await,
                    Question::Merged if !self.has_merged().await => continue,
                    // More jobs than can be told of one by one.
                    Question::Merged | Question::All => {
                        told.missed = Missed::Unknown;
                        continue;
                    }
                };
                match jobs {
                    Ok(jobs) => told.events.extend(jobs.into_iter().filter_map(|job| self.news(job))),
                    Err(error) => {
                        tracing::debug!("jobs may have changed, and the tracker does not say: {error}");
                        told.missed = Missed::Unknown;
                    }
                }
            }
        }
        Some(told)
    }
}

impl Watching {
    /// The tracker, once it has handled all that lies before an offset: it may be paused, or away.
    async fn tracker(&self, handled: Offset) -> Arc<Loaded> {
        let mut pause = LOOK;
        loop {
            if let Some(tracker) = self.host.plugins.get(PLUGIN)
                && tracker.handle.status().cursor >= handled.0
            {
                return tracker;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RARE_LOOK);
        }
    }

    /// Whether jobs were taken over from other hosts since this was last asked.
    async fn has_merged(&mut self) -> bool {
        let merged = merged_so_far(&self.host).await;
        self.merged.replace(merged) != Some(merged)
    }

    /// The event that tells of a job, if it is not as it was told last.
    fn news(&mut self, job: Value) -> Option<(Option<u64>, &'static str, String)> {
        let id = job["job_id"].as_str().unwrap_or_default().to_owned();
        if self.told.len() > REMEMBERED {
            self.told.clear();
        }
        let data = job.to_string();
        let before = self.told.insert(id, job.clone());
        (before != Some(job)).then_some((None, "job", data))
    }
}

/// What to ask the tracker because of an entry.
fn question(entry: &Entry, tracker: &Loaded) -> Option<Question> {
    let event = match &entry.kind {
        Kind::Event(event) => event,
        Kind::Again { plugin, event, .. } if plugin.as_str() == PLUGIN => event,
        Kind::Command { plugin, method, .. } if plugin.as_str() == PLUGIN && method == "import" => {
            return Some(Question::All);
        }
        Kind::Code { plugin, voids: Some(_), .. } if plugin.as_str() == PLUGIN => return Some(Question::All),
        Kind::Command { plugin, body, .. } if plugin.as_str() == PLUGIN => return asked_by(body.as_bytes()),
        // A merge goes on by a timer.
        Kind::Tick(plugin) if plugin.as_str() == PLUGIN && merges(tracker) => return Some(Question::Merged),
        _ => return None,
    };
    match event {
        Event::Message { topic, data, .. } if tracker.handle.code().reach.may_subscribe(topic) => {
            asked_by(data)
        }
        Event::NameChanged(_) if merges(tracker) => Some(Question::Merged),
        _ => None,
    }
}

fn asked_by(message: &[u8]) -> Option<Question> {
    let message: Value = serde_json::from_slice(message).ok()?;
    match (message["job_id"].as_str(), message["node_id"].as_str()) {
        (Some(job), _) => Some(Question::Job(job.to_owned())),
        (None, Some(node)) => Some(Question::Node(node.to_owned())),
        (None, None) => None,
    }
}

/// What the tracker answers.
async fn ask(tracker: &Loaded, method: &str, body: Value) -> Result<Value, ReplyError> {
    let reply = tracker.handle.query(method.to_owned(), body.to_string()).await?;
    serde_json::from_str(&reply).map_err(|error| ReplyError::Failed(error.to_string()))
}

/// A job, if it is one.
async fn of_job(tracker: &Loaded, job: &str) -> Result<Vec<Value>, ReplyError> {
    match ask(tracker, "get", json!({ "job_id": job })).await {
        Ok(job) => Ok(vec![job]),
        // It is none, or gone by now.
        Err(ReplyError::NotFound(_) | ReplyError::Invalid(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The jobs that run on a node.
async fn on_node(tracker: &Loaded, node: &str) -> Result<Vec<Value>, ReplyError> {
    let mut jobs: Vec<Value> = Vec::new();
    loop {
        let after = jobs.last().map_or(Value::Null, |job| job["job_id"].clone());
        let mut filter = json!({ "node_id": node, "status": "running" });
        if !after.is_null() {
            filter["after"] = after;
        }
        match ask(tracker, "list", filter).await {
            Ok(Value::Array(page)) if !page.is_empty() => jobs.extend(page),
            // No node has such an id.
            Ok(_) | Err(ReplyError::Invalid(_)) => return Ok(jobs),
            Err(error) => return Err(error),
        }
    }
}
