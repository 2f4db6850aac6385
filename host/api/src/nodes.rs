//! Owns `/v1/nodes` and `/v1/merged-registry`. It converts requests about nodes to commands and queries of the plugin
//! `node-registry`, and returns its answers.

use std::sync::Arc;

use axum::response::Response;
use dim_model::error_chain::listed;
use dim_model::ident::IpnsName;
use dim_model::suggestion::nearest;
use dim_model::time::Timestamp;
use dim_server::host::Host;
use dim_store::interest::Subscriber;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::ApiError;
use crate::extract::{Current, Path, Plain, Query};
use crate::openapi::Missing;
use crate::plugins::{command_to, query_to, reply_of};

const PLUGIN: &str = "node-registry";
const WATCHDOG: &str = "heartbeat-watchdog";

/// The statuses that the registry and the watchdog assign. A node may report any other.
const STATUSES: [&str; 4] = ["online", "suspect", "dead", "unknown"];

/// A node, in the form of the node registry.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Node {
    /// The id: 1 to 256 bytes.
    node_id: String,
    /// The status that the node reports, or `suspect` or `dead` by a watchdog's verdict.
    status: String,
    /// The time of its last heartbeat; absent if it is unknown.
    #[schema(nullable = false)]
    last_seen: Option<Timestamp>,
    /// The free resources.
    resources: Resources,
    /// The models that it holds.
    cached_models: Vec<String>,
    /// The time in its last heartbeat.
    #[schema(nullable = false)]
    sent_at: Option<Timestamp>,
    /// The registry that it was merged from.
    #[schema(nullable = false)]
    source: Option<IpnsName>,
    /// The status that the node reports while a watchdog's verdict overrides it.
    #[schema(nullable = false)]
    said: Option<String>,
    /// The id of the host whose verdict that is.
    #[schema(nullable = false)]
    observer: Option<String>,
    /// A hint of the watchdog, for example that the node sends heartbeats too rarely.
    #[schema(nullable = false)]
    hint: Option<String>,
    /// The members of its last heartbeat that could not be read, with reasons; absent if there are none.
    #[schema(nullable = false)]
    ignored: Option<Vec<String>>,
    /// The time between two of its heartbeats, in milliseconds, if they contain it.
    #[schema(nullable = false)]
    every_ms: Option<u64>,
    /// The agent that sent the last heartbeat, if the heartbeat names it. Each start of an agent has another
    /// instance.
    #[schema(nullable = false)]
    instance: Option<String>,
    /// Other agents that recently sent heartbeats under this id.
    #[schema(nullable = false)]
    others: Option<Others>,
    /// Present while several agents send heartbeats under this id.
    #[schema(nullable = false)]
    conflict: Option<Conflict>,
    /// Present if a command put the node into the registry and it has sent no heartbeat since.
    #[schema(nullable = false)]
    put: Option<bool>,
}

/// Other agents that recently sent heartbeats under a node's id.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Others {
    /// The agents, with the time of their last heartbeat.
    heard: Vec<HeardInstance>,
    /// The number of times that an agent returned after another one was heard.
    returns: u32,
}

/// An agent, and the time of its last heartbeat.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct HeardInstance {
    /// The instance of the agent.
    instance: String,
    /// The time of its last heartbeat.
    last_seen: Timestamp,
}

/// Several agents that send heartbeats under one id.
#[derive(ToSchema)]
#[schema(as = NodeConflict)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Conflict {
    /// The instances of the agents.
    instances: Vec<String>,
    /// The time since which there are several.
    since: Timestamp,
}

/// A removed node in its last state.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct RemovedNode {
    #[serde(flatten)]
    node: Node,
    /// The merged registry that still contains the node, if there is one. The node is then shown as that registry has
    /// it.
    #[schema(nullable = false)]
    still_in: Option<IpnsName>,
}

/// The result of the last merge of another host's registry.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct MergeReport {
    /// The name of the registry; absent if none was merged.
    #[schema(nullable = false)]
    registry: Option<IpnsName>,
    /// The time of the merge.
    #[schema(nullable = false)]
    at: Option<Timestamp>,
    /// The number of nodes that were taken over.
    nodes: u64,
    /// The number of rows that cannot be read, have a malformed id, or repeat a node.
    set_aside: u64,
    /// The number of nodes that were taken over without a member that cannot be read.
    incomplete: u64,
    /// The first few reasons.
    reasons: Vec<String>,
    /// The reason why the last document could not be merged. Nodes of earlier merges stay.
    #[schema(nullable = false)]
    error: Option<String>,
}

/// The failure of a merge of another host's registry.
#[derive(Debug, Deserialize)]
pub struct MergeFailure {
    /// The name of the registry.
    pub registry: IpnsName,
    /// The reason.
    pub error: String,
}

/// Returns the failure of the last merge; `None` if it succeeded or nothing is merged.
pub async fn report(host: &Host) -> Option<MergeFailure> {
    // The plugin follows the name of its jobs, so a second followed name is the merged registry.
    let party = Subscriber::Plugin(PLUGIN.parse().ok()?);
    let followed = host
        .exchange
        .links
        .interest
        .followers()
        .into_values()
        .filter(|parties| parties.contains(&party))
        .count();
    let registry = host.plugins.get(PLUGIN).filter(|_| followed > 1)?;
    let reply = registry.handle.query("merged".to_owned(), String::new()).await.ok()?;
    serde_json::from_str(&reply).ok()
}

/// A node to put into the registry. Absent members are unknown.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin reads it")]
pub struct NewNode {
    /// The id: 1 to 256 bytes, no control characters, neither `.` nor `..`.
    node_id: String,
    /// The status that the node reports.
    #[schema(nullable = false)]
    status: Option<String>,
    /// The time of its last heartbeat. The time of the command, if it is absent or later than that.
    #[schema(nullable = false)]
    last_seen: Option<Timestamp>,
    /// The free resources.
    #[schema(nullable = false)]
    resources: Option<Resources>,
    /// The models that it holds.
    #[schema(nullable = false)]
    cached_models: Option<Vec<String>>,
}

/// The free resources of a node, usually numbers, in the units of the fleet.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Resources {
    /// The free CPU.
    cpu_available: Option<Value>,
    /// The free memory.
    memory_available: Option<Value>,
    /// The free GPU: a number, or whether there is one.
    gpu_available: Option<Value>,
}

/// The number of nodes in the registry after a replacement.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Replaced {
    /// The number.
    nodes: usize,
}

/// The filter and the page of a list of nodes.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Only nodes with this status: `online`, `suspect`, `dead`, `unknown`, or one that nodes report
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    /// Only nodes that hold this model
    #[serde(skip_serializing_if = "Option::is_none")]
    cached_model: Option<String>,
    /// Only nodes with at least this much `memory_available`
    #[serde(skip_serializing_if = "Option::is_none")]
    min_memory: Option<f64>,
    /// Only nodes with a free GPU, or only nodes without
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<bool>,
    /// Only nodes after the one with this id, which is the last one of the page before
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    /// The maximum number of nodes, at most 1,000
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Lists nodes by id, in pages.
///
/// The next page begins after the last node of this one. An empty page is the end.
#[utoipa::path(get, path = "/nodes", tag = "nodes", operation_id = "list_nodes",
    params(Filter), responses((status = 200, body = [Node])))]
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    if let Some(status) = &filter.status {
        check_status(&host, status).await?;
    }
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// Refuses a status that is probably misspelt and that no node has, because it must not look like an empty list. Any
/// other word can be the status that a node reports.
async fn check_status(host: &Arc<Host>, status: &str) -> Result<(), ApiError> {
    let Some(meant) = nearest(status, STATUSES).filter(|meant| *meant != status) else { return Ok(()) };
    let filter = json!({ "status": status, "limit": 1 }).to_string();
    if reply_of(host, PLUGIN, "list", filter).await? != "[]" {
        return Ok(());
    }
    let known = listed(&STATUSES.map(str::to_owned));
    Err(ApiError::invalid(format!(
        "no node has the status {status:?}; did you mean {meant:?}? There are {known}, and the statuses that nodes report"
    )))
}

/// Shows one node.
#[utoipa::path(get, path = "/nodes/{node}", tag = "nodes", operation_id = "get_node",
    params(("node", description = "The node's id", min_length = 1, max_length = 256)),
    responses((status = 200, body = Node), Missing))]
pub async fn show(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "node_id": node }).to_string()).await
}

/// Removes a node.
///
/// The registry and the watchdog forget the node. A node that still sends heartbeats returns with the next one. A
/// node that only a merged registry contains is a conflict: remove it on the host that publishes that registry.
#[utoipa::path(delete, path = "/nodes/{node}", tag = "nodes", operation_id = "remove_node",
    params(("node", description = "The node's id", min_length = 1, max_length = 256)),
    responses((status = 200, body = RemovedNode, description = "The node as it was"), Missing, super::openapi::Conflict))]
pub async fn remove(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    let body = json!({ "node_id": node }).to_string();
    let removed = command_to(&host, PLUGIN, "remove", body.clone()).await?;
    // The answer of the registry is the result. The watchdog may be absent or may not know the node.
    if let Err(error) = command_to(&host, WATCHDOG, "remove", body).await {
        tracing::debug!(node, "the watchdog did not remove the node: {}", error.detail());
    }
    Ok(removed)
}

/// Shows the result of the last merge of another host's registry.
#[utoipa::path(get, path = "/merged-registry", tag = "nodes", operation_id = "get_merged_registry",
    responses((status = 200, body = MergeReport)))]
pub async fn merged(Current(host): Current) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "merged", String::new()).await
}

/// Replaces the registry. Nodes that are not in the body are removed.
#[utoipa::path(put, path = "/nodes", tag = "nodes", operation_id = "replace_nodes",
    request_body = [NewNode], responses((status = 200, body = Replaced)))]
pub async fn put(Current(host): Current, Plain(body): Plain<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "put", body).await
}
