//! `/v1/changes`, `/v1/plugins/{plugin}/log`: what becomes of plugins' code, and what plugins log, as it
//! happens.

use std::convert::Infallible;

use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures::{Stream, StreamExt as _};
use serde::Serialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::ApiError;
use super::extract::{Current, Path};
use crate::change::Change;
use crate::ident::PluginName;
use crate::plugin::Line;

/// Every state that a change of any plugin's code comes to from now on, as server-sent events.
///
/// The data of each event `change` is the change as it stands then; whoever is too slow gets an event `lagged`
/// with how many it missed.
#[utoipa::path(get, path = "/changes", tag = "plugins", operation_id = "watch_changes",
    responses((status = 200, content_type = "text/event-stream", body = Change)))]
pub async fn watch(Current(host): Current) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let changes = told(host.changes().listen(), host.ended.clone());
    let events = changes.map(|change| Ok(event("change", change)));
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// Every line that a plugin logs from now on, as server-sent events.
///
/// The plugin need not be there yet. The data of each event `line` is the line; whoever is too slow gets an
/// event `lagged` with how many lines it missed, of all plugins.
#[utoipa::path(get, path = "/plugins/{plugin}/log", tag = "plugins", operation_id = "watch_log",
    params(("plugin" = PluginName, Path, description = "The plugin's name")),
    responses((status = 200, content_type = "text/event-stream", body = Line)))]
pub async fn log(
    Current(host): Current,
    Path(name): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let name: PluginName = name.parse()?;
    let lines = told(host.lines(), host.ended.clone());
    let of_plugin = lines.filter(move |line| {
        std::future::ready(line.as_ref().map_or_else(|_| true, |line| line.plugin == name))
    });
    let events = of_plugin.map(|line| Ok(event("line", line)));
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// What is told until the host ends; an error is how many were missed.
fn told<T: Clone>(told: Receiver<T>, ended: CancellationToken) -> impl Stream<Item = Result<T, u64>> {
    futures::stream::unfold((told, ended), |(mut told, ended)| async move {
        let next = tokio::select! {
            biased;
            () = ended.cancelled() => return None,
            next = told.recv() => match next {
                Ok(next) => Ok(next),
                Err(RecvError::Lagged(missed)) => Err(missed),
                Err(RecvError::Closed) => return None,
            },
        };
        Some((next, (told, ended)))
    })
}

fn event(kind: &str, told: Result<impl Serialize, u64>) -> Event {
    match told {
        Ok(told) => Event::default().event(kind).json_data(&told).expect("it is plain data"),
        Err(missed) => Event::default().event("lagged").data(missed.to_string()),
    }
}
