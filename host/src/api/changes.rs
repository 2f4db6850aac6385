//! `/v1/changes`, `/v1/plugins/{plugin}/log`: what becomes of plugins' code, and what plugins log, as it
//! happens.

use axum::response::Response;

use super::ApiError;
use super::extract::{Current, Path};
use super::stream::{self, OfFeed, Start};
use crate::change::Change;
use crate::ident::PluginName;
use crate::plugin::Line;

/// Every state that a change of any plugin's code comes to from now on, as server-sent events.
///
/// The data of each event `change` is the change as it stands then. A caller that was cut off sends the last id that it
/// had as `Last-Event-ID`, and gets what came since: the newest 256 are kept until the host is started again. An event
/// `lagged` says how many were missed; its data is null if that is not known.
#[utoipa::path(get, path = "/changes", tag = "plugins", operation_id = "watch_changes",
    params(("Last-Event-ID" = Option<String>, Header, description = "The last id that the caller had")),
    responses((status = 200, content_type = "text/event-stream", body = Change)))]
pub async fn watch(Current(host): Current, start: Start) -> Response {
    let changes = OfFeed::from(host.changes().feed(), start, "change", |_| true);
    stream::answer(changes, host.ended.clone())
}

/// Every line that a plugin logs from now on, as server-sent events.
///
/// The plugin need not be there yet. The data of each event `line` is the line. A caller that was cut off sends the last
/// id that it had as `Last-Event-ID`, and gets what came since: the newest 512 of all plugins are kept until the host is
/// started again. An event `lagged` says how many lines were missed, of all plugins; its data is null if that is not
/// known.
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
    Ok(stream::answer(lines, host.ended.clone()))
}
