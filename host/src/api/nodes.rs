//! `/v1/nodes`: the node registry, by the words of its domain.

use std::sync::Arc;

use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::ApiError;
use super::extract::{Current, Path, Plain, Query};
use super::openapi::Missing;
use super::plugins::{command_to, query_to, reply_of};
use crate::cause::listed;
use crate::config::findings::nearest;
use crate::host::Host;
use crate::ident::IpnsName;
use crate::interest::Party;
use crate::time::Timestamp;

const PLUGIN: &str = "node-registry";
const WATCHDOG: &str = "heartbeat-watchdog";

/// What the registry and the watchdog call a node's status. A node may give itself another one.
const STATUSES: [&str; 4] = ["online", "suspect", "dead", "unknown"];

/// A node, as the node registry answers it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Node {
    /// Its id: 1 to 256 bytes.
    node_id: String,
    /// What it says of itself, or `suspect` or `dead` as a watchdog says.
    status: String,
    /// When it was last heard; absent if that is not known.
    #[schema(nullable = false)]
    last_seen: Option<Timestamp>,
    /// What it has to spare.
    resources: Resources,
    /// The models that it holds.
    cached_models: Vec<String>,
    /// The time that the node put on its last heartbeat.
    #[schema(nullable = false)]
    sent_at: Option<Timestamp>,
    /// The registry that it was merged from.
    #[schema(nullable = false)]
    source: Option<IpnsName>,
    /// The status that the node gave itself, while a watchdog's verdict stands in its place.
    #[schema(nullable = false)]
    said: Option<String>,
    /// Whose verdict that is: a host's id.
    #[schema(nullable = false)]
    observer: Option<String>,
    /// What the watchdog adds to its verdict: that the node sends heartbeats too rarely, for example.
    #[schema(nullable = false)]
    hint: Option<String>,
    /// What could not be read in its last heartbeat, and why; absent if all could.
    #[schema(nullable = false)]
    ignored: Option<Vec<String>>,
    /// The time between two of its heartbeats, in milliseconds, if they say so.
    #[schema(nullable = false)]
    every_ms: Option<u64>,
    /// The agent that sent the last heartbeat, another one after each start, if the heartbeat says so.
    #[schema(nullable = false)]
    instance: Option<String>,
    /// Other agents that were heard under this id lately.
    #[schema(nullable = false)]
    others: Option<Others>,
    /// Set while several agents send heartbeats under this id.
    #[schema(nullable = false)]
    conflict: Option<Conflict>,
    /// Set if an order put it into the registry and it was not heard since.
    #[schema(nullable = false)]
    put: Option<bool>,
}

/// Other agents that were heard under a node's id lately.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Others {
    /// Each of them, and when it was heard last.
    heard: Vec<HeardInstance>,
    /// How often one returned after another was heard.
    returns: u32,
}

/// An agent, and when it was heard last.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct HeardInstance {
    /// Its instance.
    instance: String,
    /// When it was heard last.
    last_seen: Timestamp,
}

/// Several agents that send heartbeats under one id.
#[derive(ToSchema)]
#[schema(as = NodeConflict)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Conflict {
    /// Their instances.
    instances: Vec<String>,
    /// Since when.
    since: Timestamp,
}

/// A node that was removed, as it was.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct RemovedNode {
    #[serde(flatten)]
    node: Node,
    /// The merged registry that still lists it, if one does: it is shown as that registry has it.
    #[schema(nullable = false)]
    still_in: Option<IpnsName>,
}

/// How the last merge of another host's registry went.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct MergeReport {
    /// The registry's name; absent if none was merged.
    #[schema(nullable = false)]
    registry: Option<IpnsName>,
    /// When it was merged.
    #[schema(nullable = false)]
    at: Option<Timestamp>,
    /// Nodes that were taken.
    nodes: u64,
    /// Rows that cannot be read, whose id is malformed, or whose node is there twice.
    set_aside: u64,
    /// Nodes that were taken without a member that cannot be read.
    incomplete: u64,
    /// Why, the first few.
    reasons: Vec<String>,
    /// Why the last document could not be merged; what was merged before it stays.
    #[schema(nullable = false)]
    error: Option<String>,
}

/// Why another host's registry could not be merged.
#[derive(Debug, Deserialize)]
pub struct MergeFailure {
    /// The registry's name.
    pub registry: IpnsName,
    /// Why.
    pub error: String,
}

/// Why the registry of another host could not be merged; none if it could, or if no registry merges any.
pub async fn report(host: &Host) -> Option<MergeFailure> {
    // It follows the jobs that it publishes, and the registry that it merges.
    let party = Party::Plugin(PLUGIN.parse().ok()?);
    let followed = host.interest.followers().into_values().filter(|parties| parties.contains(&party)).count();
    let registry = host.plugins.get(PLUGIN).filter(|_| followed > 1)?;
    let reply = registry.handle.query("merged".to_owned(), String::new()).await.ok()?;
    serde_json::from_str(&reply).ok()
}

/// A node to be put into the registry. What is absent is unknown.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin reads it")]
pub struct NewNode {
    /// Its id: 1 to 256 bytes, no control characters, neither `.` nor `..`.
    node_id: String,
    /// What it says of itself.
    #[schema(nullable = false)]
    status: Option<String>,
    /// When it was last heard: the time of the order, if absent or later than that.
    #[schema(nullable = false)]
    last_seen: Option<Timestamp>,
    /// What it has to spare.
    #[schema(nullable = false)]
    resources: Option<Resources>,
    /// The models that it holds.
    #[schema(nullable = false)]
    cached_models: Option<Vec<String>>,
}

/// What a node has to spare, in the words and units of the fleet: numbers, as a rule.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Resources {
    /// CPU.
    cpu_available: Option<Value>,
    /// Memory.
    memory_available: Option<Value>,
    /// GPU: a number, or whether there is one.
    gpu_available: Option<Value>,
}

/// How many nodes the registry has now.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Replaced {
    /// Their number.
    nodes: usize,
}

/// Which nodes are asked for.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Nodes with this status only: `online`, `suspect`, `dead`, `unknown`, or what nodes call themselves
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    /// Nodes that hold this model only
    #[serde(skip_serializing_if = "Option::is_none")]
    cached_model: Option<String>,
    /// Nodes with at least this much `memory_available` only
    #[serde(skip_serializing_if = "Option::is_none")]
    min_memory: Option<f64>,
    /// Nodes with a GPU to spare only, or those without
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<bool>,
    /// Nodes after the one with this id only: the last of the page before
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    /// How many at most; more than 1,000 are never told at once
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Nodes by id, in pages.
///
/// The next page begins after the last node of this one; an empty page is the end.
#[utoipa::path(get, path = "/nodes", tag = "nodes", operation_id = "list_nodes",
    params(Filter), responses((status = 200, body = [Node])))]
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    if let Some(status) = &filter.status {
        check_status(&host, status).await?;
    }
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// Refuses a status that is a slip of the finger: it is no empty list. Any other word may be what a node calls itself,
/// today or tomorrow.
async fn check_status(host: &Arc<Host>, status: &str) -> Result<(), ApiError> {
    let Some(meant) = nearest(status, STATUSES).filter(|meant| *meant != status) else { return Ok(()) };
    let filter = json!({ "status": status, "limit": 1 }).to_string();
    if reply_of(host, PLUGIN, "list", filter).await? != "[]" {
        return Ok(());
    }
    let known = listed(&STATUSES.map(str::to_owned));
    Err(ApiError::invalid(format!(
        "no node has the status {status:?}; did you mean {meant:?}? There are {known}, and what nodes call themselves"
    )))
}

/// One node.
#[utoipa::path(get, path = "/nodes/{node}", tag = "nodes", operation_id = "get_node",
    params(("node", description = "The node's id", min_length = 1, max_length = 256)),
    responses((status = 200, body = Node), Missing))]
pub async fn show(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "node_id": node }).to_string()).await
}

/// Removes a node.
///
/// The registry and the watchdog forget it. A node that still sends heartbeats comes back with the next one. A node of a
/// merged registry alone is a conflict: it is removed on the host that publishes that registry.
#[utoipa::path(delete, path = "/nodes/{node}", tag = "nodes", operation_id = "remove_node",
    params(("node", description = "The node's id", min_length = 1, max_length = 256)),
    responses((status = 200, body = RemovedNode, description = "The node as it was"), Missing, super::openapi::Conflict))]
pub async fn remove(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    let body = json!({ "node_id": node }).to_string();
    let removed = command_to(&host, PLUGIN, "remove", body.clone()).await?;
    // The registry's answer counts. Without a watchdog, or if it has never heard the node, there is nothing to forget.
    if let Err(error) = command_to(&host, WATCHDOG, "remove", body).await {
        tracing::debug!(node, "the watchdog does not forget the node: {}", error.detail());
    }
    Ok(removed)
}

/// How the last merge of another host's registry went.
#[utoipa::path(get, path = "/merged-registry", tag = "nodes", operation_id = "get_merged_registry",
    responses((status = 200, body = MergeReport)))]
pub async fn merged(Current(host): Current) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "merged", String::new()).await
}

/// Replaces the registry: what is not sent is forgotten.
#[utoipa::path(put, path = "/nodes", tag = "nodes", operation_id = "replace_nodes",
    request_body = [NewNode], responses((status = 200, body = Replaced)))]
pub async fn put(Current(host): Current, Plain(body): Plain<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "put", body).await
}
