//! Owns `/v1/changes` and `/v1/plugins/{plugin}/log`: event streams of the changes of plugins' code and of the log
//! lines of plugins.

use axum::response::Response;
use dim_model::ident::PluginName;
use dim_runtime::Line;
use dim_store::change::Change;

use crate::ApiError;
use crate::extract::{Current, Path};
use crate::stream::{self, OfFeed, Start};

/// Streams each new state of each change of plugins' code, as server-sent events.
///
/// The data of each event `change` is the change at that time. A reconnecting caller sends its last id as
/// `Last-Event-ID` and gets the events since; the host keeps the newest 256 until it restarts. An event `lagged` has
/// the number of missed events, or null if it is unknown.
#[utoipa::path(get, path = "/changes", tag = "plugins", operation_id = "watch_changes",
    params(("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had")),
    responses((status = 200, content_type = "text/event-stream", body = Change)))]
pub async fn watch(Current(host): Current, start: Start) -> Response {
    let changes = OfFeed::from(host.changes().feed(), start, "change", |_| true);
    stream::answer(changes, host.life.ended.clone())
}

/// Streams the log lines of a plugin from now on, as server-sent events.
///
/// The plugin need not exist yet. The data of each event `line` is the line. A reconnecting caller sends its last id
/// as `Last-Event-ID` and gets the lines since; the host keeps the newest 512 of all plugins until it restarts. An
/// event `lagged` has the number of missed lines of all plugins, or null if it is unknown.
#[utoipa::path(get, path = "/plugins/{plugin}/log", tag = "plugins", operation_id = "watch_log",
    params(
        ("plugin" = PluginName, Path, description = "The plugin's name"),
        ("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had"),
    ),
    responses((status = 200, content_type = "text/event-stream", body = Line)))]
pub async fn log(
    Current(host): Current,
    Path(name): Path<String>,
    start: Start,
) -> Result<Response, ApiError> {
    let name: PluginName = name.parse()?;
    let lines = OfFeed::from(host.lines(), start, "line", move |line: &Line| line.plugin == name);
    Ok(stream::answer(lines, host.life.ended.clone()))
}
