//! `/v1/plugins`: what runs, orders and questions to a plugin.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ApiError;
use super::extract::{Current, Path, Plain, Query};
use super::openapi::{Conflict, Missing, Refused};
use crate::host::{Host, Loaded, NotLoaded, Replacement};
use crate::ident::{Digest, PluginName};
use crate::plugin::{Grants, Inspection, PluginStatus, Reply, ReplyError};

/// How long a caller waits for a plugin.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A plugin that was loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct Plugin {
    /// Its name.
    name: PluginName,
    /// Its version.
    version: String,
    /// The digest of its component.
    digest: Digest,
    /// `bundled`, or the file that it came from.
    source: String,
    /// How many entries of the log it has yet to read.
    behind: u64,
    #[serde(flatten)]
    status: PluginStatus,
}

/// A plugin that was not loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct RefusedPlugin {
    /// Its name.
    name: PluginName,
    /// That it was not loaded.
    state: RefusedState,
    /// Why.
    reason: String,
}

/// How a plugin stands that was not loaded.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RefusedState {
    /// It was not loaded.
    Refused,
}

/// A plugin of the config.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ListedPlugin {
    /// One that was loaded.
    Loaded(Box<Plugin>),
    /// One that was not.
    Refused(RefusedPlugin),
}

/// All about a plugin that was loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct PluginDetail {
    #[serde(flatten)]
    plugin: Plugin,
    /// What its component says of itself.
    inspection: Inspection,
    /// What it may reach.
    grants: Grants,
}

/// All plugins, those that were not loaded too.
#[utoipa::path(get, path = "/plugins", tag = "plugins", operation_id = "list_plugins",
    responses((status = 200, body = [ListedPlugin])))]
pub async fn list(Current(host): Current) -> Json<Vec<ListedPlugin>> {
    let head = host.log.head().0;
    let loaded = host
        .plugins
        .all()
        .into_iter()
        .map(|(name, plugin)| ListedPlugin::Loaded(Box::new(describe(name, &plugin, head))));
    let refused = host.not_loaded.iter().map(|plugin| {
        let NotLoaded { name, reason } = plugin.clone();
        ListedPlugin::Refused(RefusedPlugin { name, state: RefusedState::Refused, reason })
    });
    Json(loaded.chain(refused).collect())
}

/// One plugin, with its manifest and its grants.
#[utoipa::path(get, path = "/plugins/{plugin}", tag = "plugins", operation_id = "get_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = PluginDetail), Missing))]
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<PluginDetail>, ApiError> {
    let (name, plugin) = find(&host, &name)?;
    Ok(Json(PluginDetail {
        plugin: describe(name, &plugin, host.log.head().0),
        inspection: (*plugin.prepared.inspection).clone(),
        grants: (*plugin.grants).clone(),
    }))
}

fn describe(name: PluginName, plugin: &Loaded, head: u64) -> Plugin {
    let status = plugin.handle.status();
    let inspection = &plugin.prepared.inspection;
    Plugin {
        name,
        version: inspection.manifest.version.clone(),
        digest: inspection.digest,
        source: plugin.source.clone(),
        behind: head.saturating_sub(status.cursor),
        status,
    }
}

/// Where a component came from.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Origin {
    /// What is told of it: a file's name, a URL.
    #[serde(default = "unnamed")]
    source: String,
}

fn unnamed() -> String {
    "the API".to_owned()
}

/// Replaces a plugin's code while it runs; the answer comes once that is durable.
///
/// The new code takes over between two entries, with the state, the timers, the subscriptions and the
/// grants of the old one. It is judged, compiled and rehearsed before; whatever is wrong with it, the old
/// code goes on. It stays over a restart of the host.
#[utoipa::path(put, path = "/plugins/{plugin}/component", tag = "plugins", operation_id = "replace_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Origin),
    request_body(content = String, content_type = "application/wasm", description = "The component"),
    responses((status = 200, body = Replacement), Missing, Refused))]
pub async fn replace(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Origin { source }): Query<Origin>,
    Plain(component): Plain<Bytes>,
) -> Result<Json<Replacement>, ApiError> {
    let name: PluginName = name.parse()?;
    // Also when the caller goes away: what has begun comes to its end.
    let replacing = tokio::spawn(async move { host.replace(&name, component.into(), source).await });
    Ok(Json(replacing.await.expect("a replacement does not panic")?))
}

/// Gives an order; the answer comes once its effects are durable.
///
/// What a plugin can be told, and what it answers, is the plugin's. No body is an empty object.
#[utoipa::path(post, path = "/plugins/{plugin}/commands/{method}", tag = "plugins",
    operation_id = "command_plugin",
    params(
        ("plugin" = PluginName, Path, description = "The plugin's name"),
        ("method" = String, Path, description = "A method of the plugin's commands"),
    ),
    request_body = Option<Value>, responses((status = 200, body = Value), Missing, Conflict, Refused))]
pub async fn command(
    Current(host): Current,
    Path((plugin, method)): Path<(String, String)>,
    Plain(body): Plain<String>,
) -> Result<Response, ApiError> {
    command_to(&host, &plugin, &method, body).await
}

/// Asks a question, which has no effects.
///
/// What a plugin can be asked, and what it answers, is the plugin's. No body is an empty object.
#[utoipa::path(post, path = "/plugins/{plugin}/queries/{method}", tag = "plugins",
    operation_id = "query_plugin",
    params(
        ("plugin" = PluginName, Path, description = "The plugin's name"),
        ("method" = String, Path, description = "A method of the plugin's queries"),
    ),
    request_body = Option<Value>, responses((status = 200, body = Value), Missing))]
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

fn find(host: &Host, name: &str) -> Result<(PluginName, Arc<Loaded>), ApiError> {
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
