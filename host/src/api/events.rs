//! `/v1/events`: what the log holds, as lines of JSON.

use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Current, Query};
use super::openapi::Missing;
use super::{ApiError, chunks};
use crate::export::{self, Wanted};
use crate::ident::{PluginName, Topic};
use crate::time::Since;

/// Which entries are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// Only what this plugin can react to: its topics, its names and its commands
    plugin: Option<PluginName>,
    /// Only what concerns this topic
    topic: Option<Topic>,
    /// Only what was appended at this time or later
    since: Option<Since>,
}

/// What came from outside, as far back as the log holds it.
///
/// The first line tells of the host, each other one of an entry. If the stream breaks off, it is not whole; so it is
/// when nothing is read for 30 s.
#[utoipa::path(get, path = "/events", tag = "host", operation_id = "export_events", params(Asked),
    responses((status = 200, description = "Lines of JSON", body = String, content_type = "application/x-ndjson"), Missing))]
pub async fn export(Current(host): Current, Query(asked): Query<Asked>) -> Result<Response, ApiError> {
    let Asked { plugin, topic, since } = asked;
    if let Some(plugin) = plugin.as_ref().filter(|plugin| host.plugins.get(*plugin).is_none()) {
        return Err(ApiError::not_found(format!("there is no plugin {plugin}")));
    }
    let Ok(turn) = host.exports.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("other exports are being read: wait for one to end"));
    };
    let ended = host.ended.clone();
    let source = export::Source::of(&host);
    let since = since.map(|since| since.before(host.log.now()));
    drop(host);
    let wanted = Wanted { plugin, topic, since };
    Ok(chunks::stream("application/x-ndjson", ended, move |out| {
        let written = export::write(&source, &wanted, out);
        drop(turn);
        written
    }))
}
