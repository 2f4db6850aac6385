//! `/v1/nodes`: the node registry, by the words of its domain.

use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::ApiError;
use super::extract::{Current, Path, Plain, Query};
use super::plugins::{command_to, query_to};

const PLUGIN: &str = "node-registry";

/// Which nodes are asked for.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cached_model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_memory: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<usize>,
}

/// Nodes by id.
pub async fn list(Current(host): Current, Query(filter): Query<Filter>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "list", json!(filter).to_string()).await
}

/// One node.
pub async fn show(Current(host): Current, Path(node): Path<String>) -> Result<Response, ApiError> {
    query_to(&host, PLUGIN, "get", json!({ "node_id": node }).to_string()).await
}

/// Replaces the registry.
pub async fn put(Current(host): Current, Plain(body): Plain<String>) -> Result<Response, ApiError> {
    command_to(&host, PLUGIN, "put", body).await
}
