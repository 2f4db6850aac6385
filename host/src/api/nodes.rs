//! `/v1/nodes`: the node registry, by the words of its domain.

use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::ApiError;
use super::extract::{Current, Path, Plain, Query};
use super::openapi::Missing;
use super::plugins::{command_to, query_to};
use crate::ident::IpnsName;
use crate::time::Timestamp;

const PLUGIN: &str = "node-registry";

/// A node, as the node registry answers it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the plugin's JSON is handed on as it is")]
pub struct Node {
    /// Its id: 1 to 256 bytes.
    node_id: String,
    /// What it says of itself, or `suspect` or `dead` as a watchdog says.
    status: String,
    /// When it was last heard.
    last_seen: Timestamp,
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
    /// When it was last heard.
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
    /// Nodes with this status only
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
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// One node.
#[utoipa::path(get, path = "/nodes/{node}", tag = "nodes", operation_id = "get_node",
    params(("node", description = "The node's id", min_length = 1, max_length = 256)),
    responses((status = 200, body = Node), Missing))]
pub async fn show(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "node_id": node }).to_string()).await
}

/// Replaces the registry: what is not sent is forgotten.
#[utoipa::path(put, path = "/nodes", tag = "nodes", operation_id = "replace_nodes",
    request_body = [NewNode], responses((status = 200, body = Replaced)))]
pub async fn put(Current(host): Current, Plain(body): Plain<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "put", body).await
}
