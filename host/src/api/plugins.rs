//! `/v1/plugins`: what runs, orders and questions to a plugin.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use dim_client::masked;
use futures::StreamExt as _;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{self, Caller, Current, Path, Plain, Query};
use super::openapi::{Binary, Conflict, Missing, Refused};
use super::{ApiError, rows, to_its_end};
use crate::change::{Change, SOURCE_BYTES, State};
use crate::entry::Offset;
use crate::host::{Grant, Host, Loaded, Proposal, ReplaceError, RolledBack};
use crate::ident::{ContentPath, Digest, PluginName};
use crate::plugin::roster::Pending;
use crate::plugin::{Inspection, PluginStatus, Reach, Reply, ReplyError};
use crate::plugin::{mark, roster};
use crate::store::history;
use crate::time::Timestamp;

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
    /// How many entries of the log wait for it: those that concern it.
    behind: u64,
    /// A change of its code that is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change: Option<Change>,
    /// Since when it is in that state.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change_since: Option<Timestamp>,
    /// The last change of its code, if that was taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    taken_back: Option<Change>,
    /// A component that waits until it is granted what it asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pending: Option<Pending>,
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
    /// How far it has come, if it is being installed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    change: Option<Change>,
    /// Since when it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, value_type = String, format = DateTime)]
    change_since: Option<Timestamp>,
}

/// When a change came to the state that it is in.
fn since(change: Option<&Change>) -> Option<Timestamp> {
    Some(change?.steps.last()?.at)
}

/// How a plugin stands that was not loaded.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RefusedState {
    /// It was not loaded.
    Refused,
    /// It is not loaded yet.
    Loading,
}

/// A plugin of the config.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ListedPlugin {
    /// One that was loaded.
    Loaded(Box<Plugin>),
    /// One that was not.
    Refused(Box<RefusedPlugin>),
}

/// All about a plugin that was loaded.
#[derive(Debug, Serialize, ToSchema)]
pub struct PluginDetail {
    #[serde(flatten)]
    plugin: Plugin,
    /// What its component says of itself.
    inspection: Inspection,
    /// What it may reach.
    grants: Reach,
}

/// All plugins, those that were not loaded too.
#[utoipa::path(get, path = "/plugins", tag = "plugins", operation_id = "list_plugins",
    responses((status = 200, body = [ListedPlugin])))]
pub async fn list(Current(host): Current) -> Result<Json<Vec<ListedPlugin>>, ApiError> {
    let mut under_way = host.changes().under_way();
    let mut taken_back = history::taken_back(&host.store.snapshot()?)?;
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
    // Those that are new, and those that were refused before.
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

/// One plugin, with its manifest and its grants.
#[utoipa::path(get, path = "/plugins/{plugin}", tag = "plugins", operation_id = "get_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, body = PluginDetail), Missing))]
pub async fn show(Current(host): Current, Path(name): Path<String>) -> Result<Json<PluginDetail>, ApiError> {
    let (name, plugin) = find(&host, &name).await?;
    let under_way = host.changes().under_way().remove(&name);
    let taken_back = history::taken_back(&host.store.snapshot()?)?.remove(&name);
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
    let snapshot = host.store.snapshot().ok();
    let row = || roster::known_row(snapshot.as_ref()?, &name).ok()?;
    let row = row();
    // Once it has taken over it is not under way any more, and watched.
    let on_probation = || {
        status.probation?;
        let snapshot = snapshot.as_ref()?;
        let (_, mark) = mark::of_probation(snapshot, row.as_ref()?.id).ok()??;
        history::get(snapshot, mark.change).ok()?
    };
    let change = under_way.or_else(on_probation);
    Plugin {
        taken_back,
        change_since: since(change.as_ref()),
        change,
        pending: row.and_then(|row| row.pending),
        behind: host.log.waiting(&name, Offset(status.cursor)),
        name,
        version: inspection.manifest.version.clone(),
        digest: inspection.digest,
        source: code.source.clone(),
        status,
    }
}

/// Where a component came from, and what it may if it is new.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Origin {
    /// What is told of it: a file's name, a URL. At most 2,048 bytes
    #[serde(default = "unnamed")]
    source: String,
    /// Whether it is granted all that it asks for. Otherwise what asks for more than its plugin is granted waits.
    #[serde(default)]
    grant: bool,
    /// The SHA-256 of the component, in hex, for which the caller vouches: for what comes over the network and nobody
    /// who is trusted has signed
    #[serde(default)]
    #[param(value_type = Option<String>)]
    trust: Option<Digest>,
}

fn unnamed() -> String {
    "the API".to_owned()
}

/// Installs a component as a plugin's code; the answer comes once that is durable.
///
/// What runs under the name already is replaced while it runs: the new code takes over between two entries,
/// with the state, the timers, the subscriptions and the grants of the old one, and is on probation. It is
/// judged, compiled and rehearsed before; whatever is wrong with it, the old code goes on. If it asks for more
/// than the plugin is granted it waits (`pending`) until that is granted or denied. It stays over a
/// restart of the host. How far it has come is told at `/v1/changes`.
#[utoipa::path(put, path = "/plugins/{plugin}/component", tag = "plugins", operation_id = "install_plugin",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Origin),
    request_body(content = inline(Binary), content_type = "application/octet-stream",
        description = "The component, whatever its content type"),
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

/// Reads a component of at most `most` bytes as it comes; `received` hears how many bytes have.
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

/// A component that the host is to fetch.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// Where it lies: `/ipfs/CID`, or `/ipns/NAME`, which is followed from then on
    #[schema(value_type = String)]
    from: ContentPath,
    /// The SHA-256 of the file that it must be, in hex; needed unless the config trusts `from` or who has signed it
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    trust: Option<Digest>,
    /// The plugin whose code it is; absent: the one that its manifest names
    #[serde(default)]
    name: Option<PluginName>,
    /// Whether it is granted all that it asks for
    #[serde(default)]
    grant: bool,
}

/// Fetches a component through IPFS and installs it as a plugin's code.
///
/// A plugin that comes from a name follows it: when the name moves, the plugin is replaced, if the config
/// trusts the name (`replacement.trusted`).
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

/// Goes back to the component that the config names: of a bundled plugin, to the one that comes with the host.
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

/// Has a plugin handle nothing from the next entry on; what comes meanwhile waits.
///
/// Questions are answered, orders are refused. It stays so over a restart of the host.
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

/// Has a plugin go on that was paused.
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

/// What becomes of what a plugin has.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Whether its state goes too
    #[serde(default)]
    purge: bool,
}

/// Unloads a plugin once it has handled what has come by then.
///
/// What it has is kept, for the day on which it is installed again, or purged. It stays away over a restart
/// of the host, also one of the config.
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

/// Which changes are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Recent {
    /// How many at most, newest first; no more than 1,000, and no more than 8 MiB
    #[serde(default = "page")]
    limit: usize,
}

fn page() -> usize {
    100
}

/// What has become of the components that were to run as a plugin, newest first.
///
/// Those that were refused, too. They stay on record when the plugin is gone.
#[utoipa::path(get, path = "/plugins/{plugin}/history", tag = "plugins", operation_id = "plugin_history",
    params(("plugin" = PluginName, Path, description = "The plugin's name"), Recent),
    responses((status = 200, body = [Change])))]
pub async fn history(
    Current(host): Current,
    Path(name): Path<String>,
    Query(Recent { limit }): Query<Recent>,
) -> Result<Response, ApiError> {
    let name: PluginName = name.parse()?;
    rows::list(limit.min(1_000), move |rows| {
        Ok(history::walk(&host.store.snapshot()?, &name, |change| rows.push(&change))?)
    })
    .await
}

/// Where to go back to.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Back {
    /// The version that ran before. Absent: the one that was confirmed last before what runs
    to: Option<String>,
}

/// Goes back to the code that ran before, with the state from then; what came since is handled again.
///
/// What the code that is taken back had not sent yet is dropped; what it had sent stays sent. There is a way
/// back for as long as `replacement.undo_hours` and `replacement.undo_bytes` of the config say.
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
    let (_, found) = find(host, plugin).await?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.command(method.to_owned(), json_body(body)?)).await)
}

/// Asks a plugin by name.
pub async fn query_to(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<Response, ApiError> {
    let (_, found) = find(host, plugin).await?;
    json_or(tokio::time::timeout(TIMEOUT, found.handle.query(method.to_owned(), json_body(body)?)).await)
}

/// Asks a plugin by name; returns its reply.
pub async fn reply_of(
    host: &Arc<Host>,
    plugin: &str,
    method: &str,
    body: String,
) -> Result<String, ApiError> {
    let (_, found) = find(host, plugin).await?;
    reply_in_time(tokio::time::timeout(TIMEOUT, found.handle.query(method.to_owned(), body)).await)
}

/// A plugin by its name; one that is being loaded is waited for.
async fn find(host: &Host, name: &str) -> Result<(PluginName, Arc<Loaded>), ApiError> {
    let name: PluginName = name.parse()?;
    host.loaded(name.as_str()).await;
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

fn reply_in_time(reply: Result<Reply, tokio::time::error::Elapsed>) -> Result<String, ApiError> {
    let late = |_| ReplyError::Unavailable(format!("no answer within {TIMEOUT:?}"));
    Ok(reply.map_err(late)??)
}

fn json_or(reply: Result<Reply, tokio::time::error::Elapsed>) -> Result<Response, ApiError> {
    let reply = reply_in_time(reply)?;
    // The plugin's JSON as it is.
    Ok(([(header::CONTENT_TYPE, "application/json")], reply).into_response())
}
