//! Owns `/v1/events`: streams the entries of the log as lines of JSON.

use axum::response::Response;
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Since;
use dim_server::event_export::{self, Wanted};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::extract::{Current, Query};
use crate::openapi::Missing;
use crate::{ApiError, streamed_body};

/// The filter of an export.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// Only entries that this plugin can react to: its topics, its names and its commands
    plugin: Option<PluginName>,
    /// Only entries about this topic
    topic: Option<Topic>,
    /// Only entries that were appended at this time or later
    since: Option<Since>,
}

/// Exports the entries that came from outside, as far back as the log has them.
///
/// The first line describes the host, and each further line one entry. The export is aborted if the caller reads
/// nothing for 30 s. A stream that ends early is incomplete.
#[utoipa::path(get, path = "/events", tag = "host", operation_id = "export_events", params(Asked),
    responses((status = 200, description = "Lines of JSON", body = String, content_type = "application/x-ndjson"), Missing))]
pub async fn export(Current(host): Current, Query(asked): Query<Asked>) -> Result<Response, ApiError> {
    let Asked { plugin, topic, since } = asked;
    if let Some(plugin) = plugin.as_ref().filter(|plugin| host.plugins.get(*plugin).is_none()) {
        return Err(ApiError::not_found(format!("there is no plugin {plugin}")));
    }
    let Ok(turn) = host.permits.exports.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("other exports are being read: wait for one to end"));
    };
    let ended = host.life.ended.clone();
    let source = event_export::Source::of(&host);
    let since = since.map(|since| since.before(host.storage.log.now()));
    drop(host);
    let wanted = Wanted { plugin, topic, since };
    Ok(streamed_body::stream("application/x-ndjson", ended, move |out| {
        let written = event_export::write(&source, &wanted, out);
        drop(turn);
        written
    }))
}
