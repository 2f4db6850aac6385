//! Owns `/v1/jobs`, `/v1/merged-jobs` and `/v1/watch/jobs`. It converts requests about jobs to commands and queries
//! of the plugin `job-tracker`, and its answers to JSON and event streams.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use dim_model::entry::{Entry, Event, Kind, Offset, Origin};
use dim_model::feed::Missed;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_server::host::{Host, Loaded};
use dim_store::batch::ReplyError;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::ApiError;
use crate::extract::{Body, Current, Path, Query};
use crate::openapi::{Conflict, Missing, Refused};
use crate::plugins::{command_to, query_to};
use crate::stream::{self, Delivery, Entries, Source, Start};

const PLUGIN: &str = "job-tracker";

/// The first pause between two checks whether the tracker has handled an entry.
const LOOK: Duration = Duration::from_millis(5);

/// The longest pause between two checks, for a tracker that is paused or absent.
const RARE_LOOK: Duration = Duration::from_millis(200);

/// The maximum number of jobs that a watch remembers, each by a digest of its last event. Above it the watch starts
/// over and may repeat an event.
const REMEMBERED: usize = 10_000;

/// The maximum number of nodes whose jobs a watch queries at a time. If there are verdicts on more, it sends an event
/// `lagged`.
const NODES: usize = 64;

/// The number of jobs of a node in one query.
const NODE_JOBS: usize = 100;

/// The size of the events that a watch makes at a time, in bytes; the last event may exceed it.
const EVENT_BYTES: usize = 1 << 20;

/// A job, in the form of the job tracker.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Job {
    /// The id: 1 to 128 bytes.
    job_id: String,
    /// The status.
    status: JobStatus,
    /// The time of the last change.
    updated_at: Timestamp,
    /// The data of its last event that had data.
    data: Option<Value>,
    /// The result.
    result: Option<Value>,
    /// The CID of the result, if it is stored.
    #[schema(nullable = false)]
    result_cid: Option<String>,
    /// The node that it runs on.
    #[schema(nullable = false)]
    node_id: Option<String>,
    /// Present while the node of a running job is dead.
    #[schema(nullable = false)]
    node_dead: Option<NodeDead>,
}

/// The status of a job. Completed, failed and cancelled are final.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It waits for a node.
    Queued,
    /// It runs on a node.
    Running,
    /// It is completed.
    Completed,
    /// It has failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// A verdict that the node of a job is dead.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct NodeDead {
    /// The id of the host whose watchdog reported it.
    observer: String,
    /// The time since which the node is dead.
    since: Timestamp,
}

/// The filter and the page of a list of jobs.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Only jobs with this status
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<JobStatus>,
    /// Only jobs on this node
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    /// Only jobs after the one with this id, which is the last one of the page before
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    /// The maximum number of jobs, at most 1,000
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Lists jobs by id, in pages.
///
/// The next page begins after the last job of this one. An empty page is the end.
#[utoipa::path(get, path = "/jobs", tag = "jobs", operation_id = "list_jobs",
    params(Filter), responses((status = 200, body = [Job])))]
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// Shows one job.
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

/// The result of the last merge of another host's jobs, and the differences.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct MergedJobs {
    /// The name of the other host's document.
    pub name: String,
    /// The time of the merge.
    #[schema(required)]
    at: Option<Timestamp>,
    /// The time at which the other host made the document.
    #[schema(required)]
    updated_at: Option<Timestamp>,
    /// The number of jobs in it.
    jobs: u64,
    /// The number of jobs that were ever taken over from it.
    taken: u64,
    /// The number of jobs that were ever removed because they were removed there.
    removed: u64,
    /// The number of its rows that cannot be read.
    refused: u64,
    /// The number of rows that were taken over without a member that cannot be passed on.
    #[serde(default)]
    #[schema(required = false)]
    incomplete: u64,
    /// The number of active jobs of this host that are missing there.
    pub missing_there: u64,
    /// The number of jobs that have had an earlier state there for more than a minute.
    pub behind_there: u64,
    /// The ids of some of those jobs.
    pub examples: Vec<String>,
    /// The time since which there are differences.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub differs_since: Option<Timestamp>,
    /// Whether a newer document is being merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    under_way: bool,
    /// The reason why the last document could not be merged.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
}

/// Shows the last merge of each other host's jobs, and the differences.
///
/// The config has the names of the documents, in `ipfs.jobs_ipns`.
#[utoipa::path(get, path = "/merged-jobs", tag = "jobs", operation_id = "get_merged_jobs",
    responses((status = 200, body = [MergedJobs])))]
pub async fn merged(Current(host): Current) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "merged", String::new()).await
}

/// Returns the results of the last merges; an empty list if the tracker merges nothing or does not answer.
pub async fn reports(host: &Host) -> Vec<MergedJobs> {
    let Some(tracker) = host.plugins.get(PLUGIN).filter(|tracker| merges(tracker)) else { return Vec::new() };
    let reply = tracker.handle.query("merged".to_owned(), String::new()).await;
    reply.ok().and_then(|reports| serde_json::from_str(&reports).ok()).unwrap_or_default()
}

/// Returns whether a tracker merges the jobs of other hosts.
fn merges(tracker: &Loaded) -> bool {
    !tracker.handle.code().reach.granted.read.is_empty()
}

/// Returns the number of jobs that were ever taken over from other hosts or removed with them.
async fn merged_so_far(host: &Host) -> u64 {
    reports(host).await.iter().map(|report| report.taken + report.removed).sum()
}

/// An event of a job.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = JobUpdate)]
pub struct Update {
    /// `queued`, `running`, `completed`, `failed` or `cancelled`, or a synonym that fleets use: `created`,
    /// `submitted`, `pending`; `started`, `assigned`, `progress`; `succeeded`; `error`; `canceled`.
    event_type: String,
    /// Data of the event; its member `node_id` names the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    data: Option<Box<RawValue>>,
    /// The result of the job.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    result: Option<Box<RawValue>>,
    /// The node that the job runs on: 1 to 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    /// The time of the event, in the form of a fleet's messages. Absent: now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    timestamp: Option<Box<RawValue>>,
}

/// Changes a job and publishes the event, both or neither.
///
/// The answer comes once both are durable. An event that changes nothing is a conflict.
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

/// Streams each job as it changes, as server-sent events.
///
/// The data of an event `job` is the job at that time. Several changes in short order may become one event. While the
/// tracker is paused the stream is silent; it continues when the tracker resumes. A reconnecting caller sends its
/// last id as `Last-Event-ID` and gets the jobs that have changed since. An event `lagged` has the number of entries
/// that were missed because the log does not hold them any more, or null if the number is unknown. After null any job
/// may have changed. The stream continues after it. An event `lagged` with null is also sent when jobs were merged
/// from another host or imported, and when there are verdicts on more than 64 nodes at once.
// The path is not below `/jobs/`, where an id of a job could be the same.
#[utoipa::path(get, path = "/watch/jobs", tag = "jobs", operation_id = "watch_jobs",
    params(("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had")),
    responses((status = 200, body = Job, content_type = "text/event-stream",
        description = "A stream without end; the schema is that of the data of an event `job`")))]
pub async fn watch(Current(host): Current, start: Start) -> Response {
    let ended = host.life.ended.clone();
    // A caller that reconnects may have missed a merge.
    let merged = if matches!(start, Start::Now) { Some(merged_so_far(&host).await) } else { None };
    let entries = Entries::from(&host, start);
    let (told, questions) = (Remembered::default(), Questions::default());
    let upto = entries.opening().unwrap_or_default();
    let watching = Watching { host, entries, told, merged, questions, upto, resumes_at: upto };
    stream::answer(watching, ended)
}

struct Watching {
    host: Arc<Host>,
    entries: Entries,
    told: Remembered,
    /// The number of jobs that were merged from other hosts, at the last check.
    merged: Option<u64>,
    /// The open questions about the entries that were read last.
    questions: Questions,
    /// The id after those entries.
    upto: u64,
    /// The id before those entries, until all questions are answered, so that a caller that reconnects meanwhile
    /// misses nothing.
    resumes_at: u64,
}

/// A question to the tracker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// A job.
    Job(String),
    /// The jobs that run on a node, because a verdict on the node applies to them.
    Node {
        /// The node.
        node: String,
        /// The last job of the page before.
        after: Option<String>,
    },
    /// The number of jobs that were merged from other hosts.
    Merged,
    /// All jobs: a document was imported, or a rollback restored an earlier state and entries are handled again.
    All,
}

/// The questions about entries that were read together, each once.
#[derive(Debug, Default)]
struct Questions {
    /// The tracker must have handled all entries before this offset.
    after: Offset,
    waiting: VecDeque<Question>,
}

impl Questions {
    /// Returns the questions about these entries, and whether some were dropped because there are too many.
    fn of(entries: &VecDeque<Arc<Entry>>, tracker: &Loaded) -> (Self, Missed) {
        let (mut questions, mut missed) = (Self::default(), Missed::Nothing);
        let (mut known, mut nodes) = (HashSet::new(), 0);
        let verdicts = Verdicts::of(tracker);
        for entry in entries {
            let Some(question) = question(entry, tracker, &verdicts) else { continue };
            questions.after = Offset(entry.offset.0 + 1);
            if !known.insert(question.clone()) {
                continue;
            }
            nodes += usize::from(matches!(question, Question::Node { .. }));
            if matches!(question, Question::Node { .. }) && nodes > NODES {
                missed = Missed::Unknown;
            } else {
                questions.waiting.push_back(question);
            }
        }
        (questions, missed)
    }
}

/// The last state of each job that was sent.
#[derive(Default)]
struct Remembered {
    /// The hash has a random key, so that nobody can make two jobs with one digest.
    digests: RandomState,
    /// The digests of the states, by the digest of the id.
    told: HashMap<u64, u64>,
}

impl Remembered {
    /// Returns whether a job differs from the state that was sent last.
    fn is_news(&mut self, id: &str, job: &str) -> bool {
        if self.told.len() >= REMEMBERED {
            self.told.clear();
        }
        let digest = self.digests.hash_one(job);
        self.told.insert(self.digests.hash_one(id), digest) != Some(digest)
    }
}

impl Source for Watching {
    fn opening(&self) -> Option<u64> {
        self.entries.opening()
    }

    async fn read(&mut self) -> Option<Delivery> {
        let mut told = Delivery::default();
        if self.questions.waiting.is_empty() {
            let (read, entries) = self.entries.read().await?;
            let tracker = self.tracker(Offset(0)).await;
            let (questions, missed) = Questions::of(&entries, &tracker);
            self.upto = read.upto;
            self.questions = questions;
            told.missed = read.missed.and(missed);
        }
        self.ask_some(&mut told).await;
        if self.questions.waiting.is_empty() {
            self.resumes_at = self.upto;
        }
        told.upto = self.resumes_at;
        Some(told)
    }
}

impl Watching {
    /// Asks the open questions until there are enough events.
    async fn ask_some(&mut self, told: &mut Delivery) {
        if self.questions.waiting.is_empty() {
            return;
        }
        let tracker = self.tracker(self.questions.after).await;
        let mut bytes = 0;
        while bytes < EVENT_BYTES {
            let Some(question) = self.questions.waiting.pop_front() else { break };
            let jobs = match &question {
                Question::Job(job) => of_job(&tracker, job).await,
                Question::Node { node, after } => on_node(&tracker, node, after.as_deref()).await,
                Question::Merged if !self.has_merged().await => continue,
                // The number of changed jobs is too large for single events.
                Question::Merged | Question::All => {
                    told.missed = Missed::Unknown;
                    continue;
                }
            };
            let jobs = jobs.unwrap_or_else(|error| {
                tracing::debug!("the tracker does not answer about jobs that may have changed: {error}");
                told.missed = Missed::Unknown;
                Vec::new()
            });
            if let (Question::Node { node, .. }, Some((last, _))) = (question, jobs.last()) {
                let after = Some(last.clone());
                self.questions.waiting.push_front(Question::Node { node, after });
            }
            for (id, job) in jobs {
                if self.told.is_news(&id, &job) {
                    bytes += job.len();
                    told.events.push((None, "job", job));
                }
            }
        }
    }

    /// Returns the tracker once it has handled all entries before an offset; it may be paused or absent meanwhile.
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

    /// Returns whether jobs were merged from other hosts since the last call.
    async fn has_merged(&mut self) -> bool {
        let merged = merged_so_far(&self.host).await;
        self.merged.replace(merged) != Some(merged)
    }
}

/// The rules by which the tracker accepts messages as verdicts on nodes.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Verdicts {
    /// The topic.
    status_topic: Option<Topic>,
    /// The peers whose verdicts are believed, in addition to this host.
    trusted_observers: HashSet<String>,
}

impl Verdicts {
    /// Reads the rules from the tracker's config. A part that cannot be read counts as absent.
    fn of(tracker: &Loaded) -> Self {
        serde_json::from_str(&tracker.handle.code().config).unwrap_or_default()
    }

    /// Returns whether the tracker believes a verdict with this topic and origin.
    fn believes(&self, topic: &Topic, origin: &Origin) -> bool {
        let is_heard = self.status_topic.as_ref().is_none_or(|status| status == topic);
        is_heard
            && match origin {
                Origin::Peer(peer) => self.trusted_observers.contains(peer.as_str()),
                Origin::Member(event) => self.trusted_observers.contains(event.writer.peer().as_str()),
                Origin::Plugin(_) | Origin::Host => true,
            }
    }

    /// Returns whether a status decides that a node is dead or not.
    fn is_one(status: &str) -> bool {
        matches!(status, "dead" | "alive" | "recovered")
    }
}

/// Returns the question to the tracker that an entry causes.
fn question(entry: &Entry, tracker: &Loaded, verdicts: &Verdicts) -> Option<Question> {
    let event = match &entry.kind {
        Kind::Event(event) => event,
        Kind::Again { plugin, event, .. } if plugin.as_str() == PLUGIN => event,
        Kind::Command { plugin, method, .. } if plugin.as_str() == PLUGIN && method == "import" => {
            return Some(Question::All);
        }
        Kind::Code { plugin, voids: Some(_), .. } if plugin.as_str() == PLUGIN => return Some(Question::All),
        Kind::Command { plugin, body, .. } if plugin.as_str() == PLUGIN => {
            return Named::read(body.as_bytes())?.job_id.map(Question::Job);
        }
        // A merge continues by a timer.
        Kind::Tick(plugin) if plugin.as_str() == PLUGIN && merges(tracker) => return Some(Question::Merged),
        _ => return None,
    };
    match event {
        Event::Message { topic, data, origin } if tracker.handle.code().reach.may_subscribe(topic) => {
            match Named::read(data)? {
                Named { job_id: Some(job), .. } => Some(Question::Job(job)),
                Named { node_id: Some(node), status: Some(status), .. }
                    if Verdicts::is_one(&status) && verdicts.believes(topic, origin) =>
                {
                    Some(Question::Node { node, after: None })
                }
                Named { .. } => None,
            }
        }
        Event::NameChanged(_) if merges(tracker) => Some(Question::Merged),
        _ => None,
    }
}

/// The subjects of a message or a command. A member that is no text is absent.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Named {
    #[serde(deserialize_with = "text")]
    job_id: Option<String>,
    #[serde(deserialize_with = "text")]
    node_id: Option<String>,
    #[serde(deserialize_with = "text")]
    status: Option<String>,
}

impl Named {
    fn read(message: &[u8]) -> Option<Self> {
        serde_json::from_slice(message).ok()
    }
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let member = Box::<RawValue>::deserialize(deserializer)?;
    Ok(serde_json::from_str(member.get()).ok())
}

/// The id of a job, and the job as the tracker answers it.
type Answered = (String, String);

/// Sends a query to the tracker and returns the answer.
async fn ask(tracker: &Loaded, method: &str, body: Value) -> Result<String, ReplyError> {
    tracker.handle.query(method.to_owned(), body.to_string()).await
}

fn read<'a, T: Deserialize<'a>>(answer: &'a str) -> Result<T, ReplyError> {
    serde_json::from_str(answer).map_err(|error| ReplyError::Failed(error.to_string()))
}

/// Returns a job with its id, on one line, because line breaks have no meaning in JSON.
fn answered(job: &RawValue) -> Result<Answered, ReplyError> {
    let Named { job_id, .. } = read(job.get())?;
    Ok((job_id.unwrap_or_default(), job.get().replace(['\n', '\r'], " ")))
}

/// Returns a job; an empty list if there is none.
async fn of_job(tracker: &Loaded, job: &str) -> Result<Vec<Answered>, ReplyError> {
    match ask(tracker, "get", json!({ "job_id": job })).await {
        Ok(job) => Ok(vec![answered(read(&job)?)?]),
        // The id is invalid, or the job was removed.
        Err(ReplyError::NotFound(_) | ReplyError::Invalid(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Returns some jobs that run on a node, by id, after one; an empty list at the end.
async fn on_node(tracker: &Loaded, node: &str, after: Option<&str>) -> Result<Vec<Answered>, ReplyError> {
    let mut filter = json!({ "node_id": node, "status": "running", "limit": NODE_JOBS });
    if let Some(after) = after {
        filter["after"] = json!(after);
    }
    match ask(tracker, "list", filter).await {
        Ok(page) => read::<Vec<&RawValue>>(&page)?.into_iter().map(answered).collect(),
        // The id is invalid, so no node has it.
        Err(ReplyError::Invalid(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
