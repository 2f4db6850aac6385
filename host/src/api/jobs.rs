//! `/v1/jobs`: the job tracker, by the words of its domain.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use axum::response::sse::{Event as Sse, KeepAlive, Sse as Stream};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::ApiError;
use super::extract::{Body, Current, Path, Query};
use super::plugins::{command_to, query_to};
use crate::entry::{Entry, Event, Kind};
use crate::host::Host;

const PLUGIN: &str = "job-tracker";

/// How long a change may take from the log to the tracker.
const PATIENCE: Duration = Duration::from_secs(5);

/// Jobs that a watch remembers; when there are more it begins anew, and may tell one twice.
const REMEMBERED: usize = 10_000;

/// Which jobs are asked for.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Jobs by id.
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// One job.
pub async fn show(Current(host): Current, Path(job): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "job_id": job }).to_string()).await
}

/// Removes a job.
pub async fn remove(Current(host): Current, Path(job): Path<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "remove", json!({ "job_id": job }).to_string()).await
}

/// What happened to a job.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    event_type: String,
    data: Option<Value>,
    result: Option<Value>,
    node_id: Option<String>,
    /// When it happened, if that is not now; as in a message of a fleet.
    timestamp: Option<Value>,
}

/// Changes a job and publishes the event.
pub async fn update(
    Current(host): Current,
    Path(job): Path<String>,
    Body(update): Body<Update>,
) -> Result<Response, ApiError> {
    let Update { event_type, data, result, node_id, timestamp } = update;
    let node_id = node_id.map(Value::from);
    let members = [("data", data), ("result", result), ("node_id", node_id), ("timestamp", timestamp)];
    let mut event = json!({ "job_id": job, "event_type": event_type });
    for (name, value) in members {
        if let Some(value) = value {
            event[name] = value;
        }
    }
    command_to(&host, PLUGIN, "update", event.to_string()).await
}

/// Each job as it changes, as server-sent events.
pub async fn watch(Current(host): Current) -> Stream<impl futures::Stream<Item = Result<Sse, Infallible>>> {
    Stream::new(changes(host)).keep_alive(KeepAlive::default())
}

fn changes(host: Arc<Host>) -> impl futures::Stream<Item = Result<Sse, Infallible>> {
    let listener = host.log.listen();
    let watching = Watching { host, listener, told: HashMap::new(), ready: Vec::new() };
    futures::stream::unfold(watching, |mut watching| async {
        let told = watching.next().await?;
        Some((Ok(told), watching))
    })
}

struct Watching {
    host: Arc<Host>,
    listener: tokio::sync::broadcast::Receiver<Arc<Entry>>,
    /// What each job was when it was last told.
    told: HashMap<String, Value>,
    ready: Vec<Value>,
}

impl Watching {
    async fn next(&mut self) -> Option<Sse> {
        use tokio::sync::broadcast::error::RecvError;
        loop {
            while let Some(job) = self.ready.pop() {
                let id = job["job_id"].as_str().unwrap_or_default().to_owned();
                if self.told.len() > REMEMBERED {
                    self.told.clear();
                }
                if self.told.insert(id, job.clone()).as_ref() != Some(&job) {
                    return Some(Sse::default().event("job").data(job.to_string()));
                }
            }
            let next = tokio::select! {
                biased;
                () = self.host.ended.cancelled() => return None,
                next = self.listener.recv() => next,
            };
            match next {
                Ok(entry) => self.look(&entry).await,
                Err(RecvError::Lagged(missed)) => {
                    return Some(Sse::default().event("lagged").data(missed.to_string()));
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    /// Finds the jobs that an entry may have changed.
    async fn look(&mut self, entry: &Entry) {
        let Some((_, tracker)) = self.host.plugins.iter().find(|(name, _)| name.as_str() == PLUGIN) else {
            return;
        };
        let message: Value = match &entry.kind {
            Kind::Event(Event::Message { topic, data, .. }) if tracker.grants.may_subscribe(topic) => {
                serde_json::from_slice(data).unwrap_or_default()
            }
            Kind::Command { plugin, body, .. } if plugin.as_str() == PLUGIN => {
                serde_json::from_str(body).unwrap_or_default()
            }
            _ => return,
        };
        let (method, body) = match (message["job_id"].as_str(), message["node_id"].as_str()) {
            (Some(job), _) => ("get", json!({ "job_id": job })),
            // A verdict on a node is one on the jobs that run there.
            (None, Some(node)) => ("list", json!({ "node_id": node, "status": "running" })),
            (None, None) => return,
        };
        let handled = async {
            while tracker.handle.status().cursor <= entry.offset.0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, handled).await.is_err() {
            return;
        }
        if let Ok(reply) = tracker.handle.query(method.to_owned(), body.to_string()).await {
            match serde_json::from_str(&reply) {
                Ok(Value::Array(jobs)) => self.ready.extend(jobs),
                Ok(job) => self.ready.push(job),
                Err(_) => {}
            }
        }
    }
}
