//! `/v1/jobs`: the job tracker, by the words of its domain.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::ApiError;
use super::extract::{Body, Current, Path, Query};
use super::openapi::{Conflict, Missing, Refused};
use super::plugins::{command_to, query_to};
use super::stream::{self, Entries, Source, Start, Told};
use crate::entry::{Entry, Event, Kind, Offset, Origin};
use crate::feed::Missed;
use crate::host::{Host, Loaded};
use crate::ident::Topic;
use crate::plugin::ReplyError;
use crate::time::Timestamp;

const PLUGIN: &str = "job-tracker";

/// How often it is looked whether the tracker has handled an entry.
const LOOK: Duration = Duration::from_millis(5);

/// The same for one that is paused, or away, for long.
const RARE_LOOK: Duration = Duration::from_millis(200);

/// Jobs that a watch remembers, each by a digest of what it told; when there are more it begins anew, and may tell one
/// twice.
const REMEMBERED: usize = 10_000;

/// Nodes of which a watch asks for the jobs at a time. When there are verdicts on more it says that it has missed
/// something.
const NODES: usize = 64;

/// Jobs of a node that are asked for at a time.
const NODE_JOBS: usize = 100;

/// Bytes of events that a watch makes at a time; the last one may go beyond.
const EVENT_BYTES: usize = 1 << 20;

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
/// were taken over from another host, or imported, are told so, too: with an event `lagged` whose data is null. So are
/// the jobs of nodes where watchdogs speak on more than 64 nodes at once.
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
    let (told, questions) = (Remembered::default(), Questions::default());
    let upto = entries.opening().unwrap_or_default();
    let watching = Watching { host, entries, told, merged, questions, upto, resumes_at: upto };
    stream::answer(watching, ended)
}

struct Watching {
    host: Arc<Host>,
    entries: Entries,
    told: Remembered,
    /// How many jobs were taken over from other hosts, or removed with them, when it was last looked.
    merged: Option<u64>,
    /// What is still to be asked because of the entries that were read last.
    questions: Questions,
    /// The id after those entries.
    upto: u64,
    /// The id before them, until all of that was asked: a caller that is cut off meanwhile goes on before them.
    resumes_at: u64,
}

/// What is asked of the tracker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Question {
    /// A job.
    Job(String),
    /// The jobs that run on a node: a verdict on it is one on them.
    Node {
        /// Which.
        node: String,
        /// Those after this one.
        after: Option<String>,
    },
    /// How many jobs were taken over from other hosts.
    Merged,
    /// All of them: the operator has had a document taken over, or they are as they were before code that was taken back,
    /// and what came since is handled again.
    All,
}

/// What is to be asked because of the entries that were read together: each question once.
#[derive(Debug, Default)]
struct Questions {
    /// They are asked once the tracker has handled what lies before this offset.
    after: Offset,
    waiting: VecDeque<Question>,
}

impl Questions {
    /// The questions because of these entries, and whether there would be too many.
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

/// What each job was when it was last told.
#[derive(Default)]
struct Remembered {
    /// Keyed, so that nobody can make two jobs that look alike.
    digests: RandomState,
    /// By the digest of its id.
    told: HashMap<u64, u64>,
}

impl Remembered {
    /// Whether a job is not as it was told last.
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

    async fn read(&mut self) -> Option<Told> {
        let mut told = Told::default();
        if self.questions.waiting.is_empty() {
            let (read, entries) = self.entries.read().await?;
            let tracker = self.tracker(Offset(0)).await;
            let (questions, missed) = Questions::of(&entries, &tracker);
            self.upto = read.upto;
            self.questions = questions;
            told.missed = if missed == Missed::Nothing { read.missed } else { missed };
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
    /// Asks what is to be asked, until there is enough to tell.
    async fn ask_some(&mut self, told: &mut Told) {
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
                // More jobs than can be told of one by one.
                Question::Merged | Question::All => {
                    told.missed = Missed::Unknown;
                    continue;
                }
            };
            let jobs = jobs.unwrap_or_else(|error| {
                tracing::debug!("jobs may have changed, and the tracker does not say: {error}");
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
}

/// Which messages the tracker takes for verdicts on nodes.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Verdicts {
    /// The topic.
    status_topic: Option<Topic>,
    /// The peers that are believed beside this host.
    trusted_observers: HashSet<String>,
}

impl Verdicts {
    /// By the tracker's config. What cannot be read there counts as absent.
    fn of(tracker: &Loaded) -> Self {
        serde_json::from_str(&tracker.handle.code().config).unwrap_or_default()
    }

    /// Whether the tracker believes what comes on a topic from there.
    fn believes(&self, topic: &Topic, origin: &Origin) -> bool {
        let is_heard = self.status_topic.as_ref().is_none_or(|status| status == topic);
        is_heard
            && match origin {
                Origin::Peer(peer) => self.trusted_observers.contains(peer.as_str()),
                Origin::Plugin(_) | Origin::Host => true,
            }
    }

    /// Whether a status says whether a node is dead.
    fn is_one(status: &str) -> bool {
        matches!(status, "dead" | "alive" | "recovered")
    }
}

/// What to ask the tracker because of an entry.
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
        // A merge goes on by a timer.
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

/// What a message or an order is about. A member that is no text is absent.
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

/// A job as the tracker answers it, with its id.
type Answered = (String, String);

/// What the tracker answers.
async fn ask(tracker: &Loaded, method: &str, body: Value) -> Result<String, ReplyError> {
    tracker.handle.query(method.to_owned(), body.to_string()).await
}

fn read<'a, T: Deserialize<'a>>(answer: &'a str) -> Result<T, ReplyError> {
    serde_json::from_str(answer).map_err(|error| ReplyError::Failed(error.to_string()))
}

/// A job with its id, on one line: a line break in JSON means nothing.
fn answered(job: &RawValue) -> Result<Answered, ReplyError> {
    let Named { job_id, .. } = read(job.get())?;
    Ok((job_id.unwrap_or_default(), job.get().replace(['\n', '\r'], " ")))
}

/// A job, if it is one.
async fn of_job(tracker: &Loaded, job: &str) -> Result<Vec<Answered>, ReplyError> {
    match ask(tracker, "get", json!({ "job_id": job })).await {
        Ok(job) => Ok(vec![answered(read(&job)?)?]),
        // It is none, or gone by now.
        Err(ReplyError::NotFound(_) | ReplyError::Invalid(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Some jobs that run on a node, by id, after one; none at the end.
async fn on_node(tracker: &Loaded, node: &str, after: Option<&str>) -> Result<Vec<Answered>, ReplyError> {
    let mut filter = json!({ "node_id": node, "status": "running", "limit": NODE_JOBS });
    if let Some(after) = after {
        filter["after"] = json!(after);
    }
    match ask(tracker, "list", filter).await {
        Ok(page) => read::<Vec<&RawValue>>(&page)?.into_iter().map(answered).collect(),
        // No node has such an id.
        Err(ReplyError::Invalid(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
