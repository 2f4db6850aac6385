//! Jobs and nodes of the fleet, from the bundled plugins.

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::http::Http;
use crate::pubsub::Subscription;
use crate::{ClientError, Pubsub};

/// Access to the jobs and nodes of a host's fleet.
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
    /// The job's id.
    pub job_id: String,
    /// `queued`, `running`, `completed`, `failed` or `cancelled`.
    pub status: String,
    /// The time of the last change.
    pub updated_at: jiff::Timestamp,
    /// The data of its events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// The result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// The CID of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_cid: Option<String>,
    /// The id of the node that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<String>,
    /// The verdict that the node is dead, while the job is running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_dead: Option<NodeDead>,
}

/// A verdict that the node of a job is dead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDead {
    /// The observer: the id of the host whose watchdog published the verdict.
    pub observer: String,
    /// The time of the verdict.
    pub since: jiff::Timestamp,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The node's id.
    pub node_id: String,
    /// The status that the node reports, or `suspect` or `dead` after a verdict of a watchdog.
    pub status: String,
    /// The time of the last heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<jiff::Timestamp>,
    /// The free resources: `cpu_available`, `memory_available`, `gpu_available`.
    #[serde(default)]
    pub resources: serde_json::Map<String, Value>,
    /// The models that the node has cached.
    #[serde(default)]
    pub cached_models: Vec<String>,
    /// The timestamp in the last heartbeat, by the node's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<jiff::Timestamp>,
    /// The name of the registry of another host that lists the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The conflict, while several agents send heartbeats under this id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<NodeConflict>,
    /// The unreadable members of the last heartbeat, with the reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
    /// The hint of the watchdog with its verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// A conflict of several agents that send heartbeats under one id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConflict {
    /// The instances of the agents. Each start of an agent creates a new instance.
    pub instances: Vec<String>,
    /// The start of the conflict.
    pub since: jiff::Timestamp,
}

/// An event of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct JobUpdate {
    /// `queued`, `running`, `completed`, `failed` or `cancelled`.
    pub event_type: String,
    /// Further data of any shape. A `node_id` in it names the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// The job's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
}

impl JobUpdate {
    /// Creates an update without data.
    pub fn new(event_type: impl Into<String>) -> Self {
        Self { event_type: event_type.into(), ..Self::default() }
    }

    /// Adds data.
    pub fn data(mut self, data: Value) -> Self {
        self.data = Some(data);
        self
    }

    /// Adds the job's result.
    pub fn result(mut self, result: Value) -> Self {
        self.result = Some(result);
        self
    }
}

impl Fleet {
    pub(crate) fn new(http: Http, pubsub: Pubsub, stop: CancellationToken) -> Self {
        Self { http, pubsub, stop }
    }

    /// Changes a job and publishes the event, both or neither. Returns the job when the change is durable.
    ///
    /// # Errors
    ///
    /// An update that changes nothing is a [`ClientError::Problem`] with status 409.
    pub async fn update_job_status(&self, job_id: &str, update: &JobUpdate) -> Result<Job, ClientError> {
        self.http.send_json(Method::POST, &["jobs", job_id, "events"], &[], update).await
    }

    /// Publishes a job event on `topic`, like other programs of the fleet. The job tracker validates the event when it
    /// receives it. Returns when the publish is durable.
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

    /// Subscribes to jobs: each item is a job after a change.
    pub async fn subscribe_to_job_updates(&self) -> Result<Subscription<Job>, ClientError> {
        let events = self.http.events(&["watch", "jobs"]).await?;
        let http = self.http.clone();
        Ok(Subscription::new(events, self.stop.clone(), move |event| {
            event.check_lagged()?;
            serde_json::from_str(&event.data).map_err(|error| http.strange(error.to_string()))
        }))
    }

    /// Returns a job.
    ///
    /// # Errors
    ///
    /// An unknown job is a [`ClientError::Problem`] with status 404.
    pub async fn get_job(&self, job_id: &str) -> Result<Job, ClientError> {
        self.http.get(&["jobs", job_id], &[]).await
    }

    /// Removes a node and returns it as it was. A node that still sends heartbeats is added again by the next one.
    ///
    /// # Errors
    ///
    /// An unknown node is a [`ClientError::Problem`] with status 404. For a node that only a merged registry lists the
    /// status is 409.
    pub async fn remove_node(&self, node_id: &str) -> Result<Node, ClientError> {
        let removed = self.http.delete(&["nodes", node_id]).await?;
        serde_json::from_value(removed).map_err(|error| self.http.strange(error.to_string()))
    }

    /// Replaces all nodes of the registry by `nodes`.
    pub async fn update_node_registry(&self, nodes: &[Node]) -> Result<(), ClientError> {
        let body = serde_json::to_vec(nodes).expect("nodes are plain data");
        self.http.send_bytes::<Value>(Method::PUT, &["nodes"], &[], body).await.map(drop)
    }

    /// Returns all nodes, sorted by id.
    pub async fn get_node_registry(&self) -> Result<Vec<Node>, ClientError> {
        self.http.rows(&["nodes"], &[], "node_id", None).await
    }
}
