//! Owns `/v1/plugins`: the list of plugins, the changes of their code, commands and queries. It converts requests to
//! orders of the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use dim_client::masked;
use dim_model::entry::Offset;
use dim_model::ident::{ContentPath, Digest, PluginName};
use dim_model::time::Timestamp;
use dim_runtime::{Inspection, PluginStatus};
use dim_server::host::{Grant, Host, Loaded, Proposal, ReplaceError, RolledBack};
use dim_store::batch::{Reply, ReplyError};
use dim_store::change::{Change, SOURCE_BYTES, State};
use dim_store::change_history;
use dim_store::grants::Reach;
use dim_store::plugin_registry::Pending;
use dim_store::{checkpoint, plugin_registry};
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{self, Caller, Current, Path, Plain, Query};
use crate::openapi::{Binary, Conflict, Missing, Refused};
use crate::{ApiError, row_list, to_its_end};

/// The maximum time that a caller waits for a reply of a plugin.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A plugin that was loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct Plugin {
    /// The name.
    name: PluginName,
    /// The version.
    version: String,
    /// The digest of its component.
    digest: Digest,
    /// `bundled`, or the source of its component.
    source: String,
    /// The number of entries of the log that wait for it, without those that do not concern it.
    behind: u64,
    /// The change of its code that is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change: Option<Change>,
    /// The time since which the change has its present state.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change_since: Option<Timestamp>,
    /// The last change of its code, if that was rolled back automatically.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    taken_back: Option<Change>,
    /// The component that waits until it is granted what it requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pending: Option<Pending>,
    #[serde(flatten)]
    status: PluginStatus,
}

/// A plugin that is not loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct RefusedPlugin {
    /// The name.
    name: PluginName,
    /// The state.
    state: RefusedState,
    /// The reason.
    reason: String,
    /// The change under way, if it is being installed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change: Option<Change>,
    /// The time since which the change has its present state.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = String, format = DateTime)]
    change_since: Option<Timestamp>,
}

/// Returns the time at which a change reached its present state.
fn since(change: Option<&Change>) -> Option<Timestamp> {
    Some(change?.steps.last()?.at)
}

/// The state of a plugin that is not loaded.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RefusedState {
    /// It could not be loaded.
    Refused,
    /// It is not loaded yet.
    Loading,
}

/// A plugin in the list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ListedPlugin {
    /// A plugin that was loaded.
    Loaded(Box<Plugin>),
    /// A plugin that is not loaded.
    Refused(Box<RefusedPlugin>),
}

/// The details of a plugin that was loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct PluginDetail {
    #[serde(flatten)]
    plugin: Plugin,
    /// The inspection of its component.
    inspection: Inspection,
    /// Its permissions.
    grants: Reach,
}

/// Lists all plugins, including those that are not loaded.
#[utoipa::path(get, path = "/plugins", tag = "plugins", operation_id = "list_plugins",
    responses((status = 200, body = [ListedPlugin])))]
pub async fn list(Current(host): Current) -> Result<Json<Vec<ListedPlugin>>, ApiError> {
    let mut under_way = host.changes().under_way();
    let mut taken_back = change_history::taken_back(&host.storage.store.snapshot()?)?;
    let mut listed = BTreeMap::new();
    for (name, plugin) in host.plugins.all() {
        let plugin =
            describe(&host, name.clone(), &plugin, under_way.remove(&name), taken_back.remove(&name));
        listed.insert(name, ListedPlugin::Loaded(Box::new(plugin)));
    }
    let refused = host.not_loaded().into_iter().map(|it| (it.name, RefusedState::Refused, it.reason, None));
    let loading = host.loading().into_iter();
    let loading =
        loading.map(|name| (name, RefusedState::Loading, "it is judged and compiled".to_owned(), None));
    // New plugins, and refused ones that are installed again.
    let coming = under_way.into_iter().map(|(name, change)| {
        let reason = format!("it is installed from {}", change.source);
        (name, RefusedState::Loading, reason, Some(change))
    });
    for (name, state, reason, change) in refused.chain(loading).chain(coming) {
        let change_since = since(change.as_ref());
        let refused = RefusedPlugin { name: name.clone(), state, reason, change, change_since };
        listed.insert(name, ListedPlugin::Refused(Box::new(refused)));
    }
    Ok(Json(listed.into_values().collect()))
}

/// Shows a plugin with its manifest and its grants.
#[utoipa::path(get, path = "/plugins/{plugin}", tag = "plugins", operation_id = "get_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = PluginDetail), Missing))]
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<PluginDetail>, ApiError> {
    let (name, plugin) = find(&host, &name).await?;
    let under_way = host.changes().under_way().remove(&name);
    let taken_back = change_history::taken_back(&host.storage.store.snapshot()?)?.remove(&name);
    Ok(Json(PluginDetail {
        plugin: describe(&host, name, &plugin, under_way, taken_back),
        inspection: (*plugin.handle.code().prepared.inspection).clone(),
        grants: (*plugin.handle.code().reach).clone(),
    }))
}

fn describe(
    host: &Host,
    name: PluginName,
    plugin: &Loaded,
    under_way: Option<Change>,
    taken_back: Option<Change>,
) -> Plugin {
    let status = plugin.handle.status();
    let code = plugin.handle.code();
    let inspection = &code.prepared.inspection;
    let snapshot = host.storage.store.snapshot().ok();
    let row = || plugin_registry::known_row(snapshot.as_ref()?, &name).ok()?;
    let row = row();
    // After the takeover the change is no longer under way, but on probation.
    let on_probation = || {
        status.probation?;
        let snapshot = snapshot.as_ref()?;
        let (_, checkpoint) = checkpoint::of_probation(snapshot, row.as_ref()?.id).ok()??;
        change_history::get(snapshot, checkpoint.change).ok()?
    };
    let change = under_way.or_else(on_probation);
    Plugin {
        taken_back,
        change_since: since(change.as_ref()),
        change,
        pending: row.and_then(|row| row.pending),
        behind: host.storage.log.waiting(&name, Offset(status.cursor)),
        name,
        version: inspection.manifest.version.clone(),
        digest: inspection.digest,
        source: code.source.clone(),
        status,
    }
}

/// The source of a component, and the grants of a new plugin.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Origin {
    /// The source to record: a file name or a URL, at most 2,048 bytes
    #[serde(default = "unnamed")]
    source: String,
    /// Whether to grant all permissions that it requests. Otherwise a component that requests more than its plugin is
    /// granted waits.
    #[serde(default)]
    grant: bool,
    /// The SHA-256 of the component, in hex, with which the caller vouches for it. Required for a component from the
    /// network without a trusted signature
    #[serde(default)]
    #[param(value_type = Option<String>)]
    trust: Option<Digest>,
}

fn unnamed() -> String {
    "the API".to_owned()
}

/// Installs a component as a plugin's code. The answer comes once that is durable.
///
/// A running plugin of this name is replaced without a stop. The host judges, compiles and rehearses the new code,
/// which then takes over between two entries. It keeps the state, the timers, the subscriptions and the grants, and
/// is on probation. If anything fails, the old code continues. A component that requests more than the plugin is
/// granted waits (`pending`) until the operator grants or denies it. The installation survives a restart of the host.
/// `/v1/changes` reports the progress.
#[utoipa::path(put, path = "/plugins/{plugin}/component", tag = "plugins", operation_id = "install_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Origin),
    request_body(content = inline(Binary), content_type = "application/octet-stream",
        description = "The component, with any content type"),
    responses((status = 200, body = Change), Conflict, Refused))]
pub async fn install(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Origin { source, grant, trust }): Query<Origin>,
    Caller(by): Caller,
    body: Body,
) -> Result<Json<Change>, ApiError> {
    let plugin: PluginName = name.parse()?;
    if source.len() > SOURCE_BYTES {
        return Err(ApiError::invalid(format!(
            "`source` has {} bytes; it may have {SOURCE_BYTES}",
            source.len()
        )));
    }
    let source = masked(&source);
    let change = Change::new(plugin.clone(), State::Fetching, by.clone(), source.clone());
    let mut under_way = host.changes().begin(change);
    let most = host.config.now().limits.component_bytes;
    let component = match whole(body, most, |bytes| under_way.received(bytes)).await {
        Ok(component) => Bytes::from(component),
        Err(error) => {
            let why = ReplaceError::Refused(error.detail().to_owned());
            let _ = host.conclude(under_way, Err(why)).await;
            return Err(error);
        }
    };
    let proposal = Proposal { plugin, component, source, by, follows: None, is_named: false, trust };
    let grants = if grant { Grant::AllThatIsAsked } else { Grant::AsBefore };
    let installing = async move { host.install_under_way(under_way, proposal, grants).await };
    Ok(Json(to_its_end(installing).await?))
}

/// Reads a component of at most `most` bytes. Calls `received` with the number of bytes so far.
async fn whole(body: Body, most: usize, mut received: impl FnMut(u64)) -> Result<Vec<u8>, ApiError> {
    let (mut component, mut chunks) = (Vec::new(), body.into_data_stream());
    loop {
        let Some(chunk) = chunks.next().await else { return Ok(component) };
        component.extend_from_slice(&chunk.map_err(ApiError::of_body)?);
        if component.len() > most {
            return Err(ApiError::too_large(format!("a component has at most {most} bytes")));
        }
        received(component.len() as u64);
    }
}

/// A component that the host fetches.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// The path: `/ipfs/CID`, or `/ipns/NAME`, which the plugin then follows
    #[schema(value_type = String)]
    from: ContentPath,
    /// The SHA-256 that the file must have, in hex. Required unless the config trusts `from` or the signer
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    trust: Option<Digest>,
    /// The plugin that gets the component. Absent: the name in its manifest
    #[serde(default)]
    name: Option<PluginName>,
    /// Whether to grant all permissions that it requests
    #[serde(default)]
    grant: bool,
}

/// Fetches a component through IPFS and installs it as a plugin's code.
///
/// A plugin that comes from a name follows it. When the name moves, the host replaces the plugin if the config trusts
/// the name (`replacement.trusted`) or the signer of the component.
#[utoipa::path(post, path = "/plugins", tag = "plugins", operation_id = "fetch_plugin",
    request_body = Fetch, responses((status = 200, body = Change), Conflict, Refused))]
pub async fn fetch(
    Current(host): Current,
    Caller(by): Caller,
    extract::Body(Fetch { from, trust, name, grant }): extract::Body<Fetch>,
) -> Result<Json<Change>, ApiError> {
    let grant = if grant { Grant::AllThatIsAsked } else { Grant::AsBefore };
    let fetching = async move { host.install_from(from, trust, name, grant, by).await };
    Ok(Json(to_its_end(fetching).await?))
}

/// Restores the component that the config names. For a bundled plugin this is the bundled component.
#[utoipa::path(post, path = "/plugins/{plugin}/restore", tag = "plugins", operation_id = "restore_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = Change), Refused))]
pub async fn restore(
    Current(host): Current,
    Path(name): Path<String>,
    Caller(by): Caller,
) -> Result<Json<Change>, ApiError> {
    let name: PluginName = name.parse()?;
    Ok(Json(to_its_end(async move { host.restore(&name, &by).await }).await?))
}

/// Pauses a plugin from the next entry on. Its entries wait.
///
/// Queries are answered, commands are refused. The pause survives a restart of the host.
#[utoipa::path(post, path = "/plugins/{plugin}/pause", tag = "plugins", operation_id = "pause_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = Change), Missing))]
pub async fn pause(
    Current(host): Current,
    Path(name): Path<String>,
    Caller(by): Caller,
) -> Result<Json<Change>, ApiError> {
    let (name, _) = find(&host, &name).await?;
    Ok(Json(host.pause(&name, true, &by).await?))
}

/// Resumes a paused plugin, and ends a quarantine.
#[utoipa::path(post, path = "/plugins/{plugin}/resume", tag = "plugins", operation_id = "resume_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = Change), Missing))]
pub async fn resume(
    Current(host): Current,
    Path(name): Path<String>,
    Caller(by): Caller,
) -> Result<Json<Change>, ApiError> {
    let (name, _) = find(&host, &name).await?;
    Ok(Json(host.pause(&name, false, &by).await?))
}

/// The decision about the state of a removed plugin.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Whether to delete the state of the plugin
    #[serde(default)]
    purge: bool,
}

/// Unloads a plugin after it has handled the entries that are in the log now.
///
/// Its state is kept for a later installation, or purged. The removal survives a restart of the host, also for a
/// plugin of the config.
#[utoipa::path(delete, path = "/plugins/{plugin}", tag = "plugins", operation_id = "remove_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Removal),
    responses((status = 200, body = Change), Missing))]
pub async fn remove(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Removal { purge }): Query<Removal>,
    Caller(by): Caller,
) -> Result<Json<Change>, ApiError> {
    let name: PluginName = name.parse()?;
    host.loaded(name.as_str()).await;
    Ok(Json(to_its_end(async move { host.remove(&name, purge, &by).await }).await?))
}

/// The size of a list of changes.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Recent {
    /// The maximum number of changes, newest first; at most 1,000, and at most 8 MiB
    #[serde(default = "page")]
    limit: usize,
}

fn page() -> usize {
    100
}

/// Lists the changes of a plugin's code, newest first.
///
/// The list includes refused components. It stays when the plugin is removed.
#[utoipa::path(get, path = "/plugins/{plugin}/history", tag = "plugins", operation_id = "plugin_history",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Recent),
    responses((status = 200, body = [Change])))]
pub async fn history(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Recent { limit }): Query<Recent>,
) -> Result<Response, ApiError> {
    let name: PluginName = name.parse()?;
    row_list::list(limit.min(1_000), move |rows| {
        Ok(change_history::walk(&host.storage.store.snapshot()?, &name, |change| rows.push(&change))?)
    })
    .await
}

/// The target of a rollback.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Back {
    /// The version to return to. Absent: the version before the running one
    to: Option<String>,
}

/// Rolls a plugin back to earlier code, with the state of that time. Later entries are handled again.
///
/// Unsent publishes of the later code are dropped; sent ones stay sent. A rollback is possible for as long as
/// `replacement.undo_time` and `replacement.undo_bytes` of the config allow.
#[utoipa::path(post, path = "/plugins/{plugin}/rollback", tag = "plugins", operation_id = "roll_back_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Back),
    responses((status = 200, body = RolledBack), Missing, Conflict))]
pub async fn roll_back(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Back { to }): Query<Back>,
    Caller(by): Caller,
) -> Result<Json<RolledBack>, ApiError> {
    let name: PluginName = name.parse()?;
    Ok(Json(to_its_end(async move { host.roll_back(&name, to.as_deref(), &by).await }).await?))
}

/// Sends a command to a plugin. The answer comes once its effects are durable.
///
/// The plugin defines its commands and their replies. An absent body is an empty object.
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

/// Sends a query to a plugin. A query has no effects.
///
/// The plugin defines its queries and their replies. An absent body is an empty object.
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

/// Sends a command to a plugin by name.
pub async fn command_to(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<Response, ApiError> {
    let (_, found) = find(host, plugin).await?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.command(method.to_owned(), json_body(body)?)).await)
}

/// Sends a query to a plugin by name.
pub async fn query_to(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<Response, ApiError> {
    let (_, found) = find(host, plugin).await?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.query(method.to_owned(), json_body(body)?)).await)
}

/// Sends a query to a plugin by name and returns the reply as text.
pub async fn reply_of(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<String, ApiError> {
    let (_, found) = find(host, plugin).await?;
    reply_in_time(tokio::time::timeout(TIMEOUT, found.handle.query(method.to_owned(), body)).await)
}

/// Returns a plugin by its name. Waits while it is being loaded.
async fn find(host: &Host, name: &str) -> Result<(PluginName, Arc<Loaded>), ApiError> {
    let name: PluginName = name.parse()?;
    host.loaded(name.as_str()).await;
    match host.plugins.get(&name) {
        Some(plugin) => Ok((name, plugin)),
        None => Err(ReplyError::NoPlugin(name.to_string()).into()),
    }
}

/// Checks that a body is JSON. An absent body is an empty object.
fn json_body(body: String) -> Result<String, ApiError> {
    if body.trim().is_empty() {
        return Ok("{}".to_owned());
    }
    match serde_json::from_str::<&serde_json::value::RawValue>(&body) {
        Ok(_) => Ok(body),
        Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
    }
}

fn reply_in_time(reply: Result<Reply, tokio::time::error::Elapsed>) -> Result<String, ApiError> {
    let late = |_| ReplyError::Unavailable(format!("no answer within {TIMEOUT:?}"));
    Ok(reply.map_err(late)??)
}

fn json_or(reply: Result<Reply, tokio::time::error::Elapsed>) -> Result<Response, ApiError> {
    let reply = reply_in_time(reply)?;
    // The reply is passed on unchanged.
    Ok(([(header::CONTENT_TYPE, "application/json")], reply).into_response())
}
