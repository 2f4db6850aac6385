//! Jobs and nodes, as the bundled plugins keep them.

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::http::Http;
use crate::pubsub::Subscription;
use crate::{ClientError, Pubsub};

/// The jobs and nodes of a host's fleet.
#[derive(Clone, Debug)]
pub struct Fleet {
    http: Http,
    pubsub: Pubsub,
    stop: CancellationToken,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Job {
    /// Its id.
    pub job_id: String,
    /// `queued`, `running`, `completed`, `failed` or `cancelled`.
    pub status: String,
    /// When it last changed.
    pub updated_at: jiff::Timestamp,
    /// What came with its events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// Its result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// Where its result is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_cid: Option<String>,
    /// The node that it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
    /// Set while the node of a running job is dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_dead: Option<NodeDead>,
}

/// Who says since when that a job's node is dead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDead {
    /// Whose watchdog: a host's id.
    pub observer: String,
    /// Since when.
    pub since: jiff::Timestamp,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub node_id: String,
    /// What it says of itself, or `suspect` or `dead` as a watchdog says.
    pub status: String,
    /// When it was last heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<jiff::Timestamp>,
    /// What it has to spare: `cpu_available`, `memory_available`, `gpu_available`.
    #[serde(default)]
    pub resources: serde_json::Map<String, Value>,
    /// The models that it holds.
    #[serde(default)]
    pub cached_models: Vec<String>,
    /// The time that the node put on its last heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<jiff::Timestamp>,
    /// The registry that it was merged from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Set while several agents send heartbeats under this id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<NodeConflict>,
    /// What could not be read in its last heartbeat, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
    /// What the watchdog adds to its verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Several agents that send heartbeats under one id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConflict {
    /// Their instances: each start of an agent is another one.
    pub instances: Vec<String>,
    /// Since when.
    pub since: jiff::Timestamp,
}

/// What happened to a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JobUpdate {
    /// `queued`, `running`, `completed`, `failed` or `cancelled`.
    pub event_type: String,
    /// Whatever goes with it; a `node_id` in it names the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// The job's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
}

impl JobUpdate {
    /// An update without data.
    pub fn new(event_type: impl Into<String>) -> Self {
        Self { event_type: event_type.into(), ..Self::default() }
    }

    /// With data.
    pub fn data(mut self, data: Value) -> Self {
        self.data = Some(data);
        self
    }

    /// With the job's result.
    pub fn result(mut self, result: Value) -> Self {
        self.result = Some(result);
        self
    }
}

impl Fleet {
    pub(crate) fn new(http: Http, pubsub: Pubsub, stop: CancellationToken) -> Self {
        Self { http, pubsub, stop }
    }

    /// Changes a job and publishes the event, both or neither; returns the job once that is durable.
    /// An update that changes nothing is a problem with status 409.
    pub async fn update_job_status(&self, job_id: &str, update: &JobUpdate) -> Result<Job, ClientError> {
        self.http.send_json(Method::POST, &["jobs", job_id, "events"], &[], update).await
    }

    /// Publishes a job event on `topic`, as any program of the fleet does: the job tracker judges it
    /// when it comes. Returns once it is durable.
    pub async fn publish_job_event(
        &self,
        topic: &str,
        job_id: &str,
        update: &JobUpdate,
    ) -> Result<(), ClientError> {
        let mut event = json!(update);
        event["job_id"] = json!(job_id);
        event["timestamp"] = json!(jiff::Timestamp::now());
        self.pubsub.publish(topic, event.to_string()).await
    }

    /// Each job as it changes.
    pub async fn subscribe_to_job_updates(&self) -> Result<Subscription<Job>, ClientError> {
        let events = self.http.events(&["watch", "jobs"]).await?;
        let http = self.http.clone();
        Ok(Subscription::new(events, self.stop.clone(), move |event| {
            event.check_lagged()?;
            serde_json::from_str(&event.data).map_err(|error| http.strange(error.to_string()))
        }))
    }

    /// One job.
    pub async fn get_job(&self, job_id: &str) -> Result<Job, ClientError> {
        self.http.get(&["jobs", job_id], &[]).await
    }

    /// Removes a node and returns it as it was. One that still sends heartbeats comes back with the next one. An unknown
    /// node is a problem with status 404, one of a merged registry alone with status 409.
    pub async fn remove_node(&self, node_id: &str) -> Result<Node, ClientError> {
        let removed = self.http.delete(&["nodes", node_id]).await?;
        serde_json::from_value(removed).map_err(|error| self.http.strange(error.to_string()))
    }

    /// Replaces the registry by `nodes`.
    pub async fn update_node_registry(&self, nodes: &[Node]) -> Result<(), ClientError> {
        let body = serde_json::to_vec(nodes).expect("nodes are plain data");
        self.http.send_bytes::<Value>(Method::PUT, &["nodes"], &[], body).await.map(drop)
    }

    /// All nodes, by id.
    pub async fn get_node_registry(&self) -> Result<Vec<Node>, ClientError> {
        self.http.rows(&["nodes"], &[], "node_id", None).await
    }
}
