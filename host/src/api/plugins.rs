//! `/v1/plugins`: what runs, orders and questions to a plugin.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ApiError;
use super::extract::{Current, Path, Plain};
use crate::host::{Host, Loaded};
use crate::ident::PluginName;
use crate::plugin::{Reply, ReplyError};

/// How long a caller waits for a plugin.
const TIMEOUT: Duration = Duration::from_secs(60);

/// All plugins, those that were not loaded too.
pub async fn list(Current(host): Current) -> Json<Value> {
    let head = host.log.head().0;
    let loaded = host.plugins.iter().map(|(name, plugin)| describe(name, plugin, head));
    let refused = host
        .not_loaded
        .iter()
        .map(|refused| json!({ "name": refused.name, "state": "refused", "reason": refused.reason }));
    Json(loaded.chain(refused).collect())
}

/// One plugin, with its manifest and its grants.
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let (name, plugin) = find(&host, &name)?;
    let mut described = describe(&name, plugin, host.log.head().0);
    described["inspection"] = json!(*plugin.prepared.inspection);
    described["grants"] = json!(*plugin.grants);
    Ok(Json(described))
}

fn describe(name: &PluginName, plugin: &Loaded, head: u64) -> Value {
    let status = plugin.handle.status();
    let mut described = json!(status);
    described["name"] = json!(name);
    described["version"] = json!(plugin.prepared.inspection.manifest.version);
    described["digest"] = json!(plugin.prepared.inspection.digest);
    described["source"] = json!(plugin.source);
    described["behind"] = json!(head.saturating_sub(status.cursor));
    described
}

/// Gives an order; the answer comes once its effects are durable.
pub async fn command(
    Current(host): Current,
    Path((plugin, method)): Path<(String, String)>,
    Plain(body): Plain<String>,
) -> Result<Response, ApiError> {
    command_to(&host, &plugin, &method, body).await
}

/// Asks a question.
pub async fn query(
    Current(host): Current,
    Path((plugin, method)): Path<(String, String)>,
    Plain(body): Plain<String>,
) -> Result<Response, ApiError> {
    query_to(&host, &plugin, &method, body).await
}

/// Gives an order to a plugin by name.
pub async fn command_to(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<Response, ApiError> {
    let (_, found) = find(host, plugin)?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.command(method.to_owned(), json_body(body)?)).await)
}

/// Asks a plugin by name.
pub async fn query_to(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<Response, ApiError> {
    let (_, found) = find(host, plugin)?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.query(method.to_owned(), json_body(body)?)).await)
}

fn find<'a>(host: &'a Host, name: &str) -> Result<(PluginName, &'a Loaded), ApiError> {
    let name: PluginName = name.parse()?;
    match host.plugins.get(&name) {
        Some(plugin) => Ok((name, plugin)),
        None => Err(ReplyError::NoPlugin(name.to_string()).into()),
    }
}

/// No body is an empty object.
fn json_body(body: String) -> Result<String, ApiError> {
    if body.trim().is_empty() {
        return Ok("{}".to_owned());
    }
    match serde_json::from_str::<&serde_json::value::RawValue>(&body) {
        Ok(_) => Ok(body),
        Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
    }
}

fn json_or(reply: Result<Reply, tokio::time::error::Elapsed>) -> Result<Response, ApiError> {
    let late = |_| ReplyError::Unavailable(format!("no answer within {TIMEOUT:?}"));
    let reply = reply.map_err(late)??;
    // The plugin's JSON as it is.
    Ok(([(header::CONTENT_TYPE, "application/json")], reply).into_response())
}
