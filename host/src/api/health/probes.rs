//! `/livez` and `/readyz`: what an orchestrator asks before it restarts a host, or sends it requests.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use crate::host::{Host, Standing, Supervised};
use crate::ident::PluginName;
use crate::room::Shortage;

/// Whether the process works. It answers with 200 whatever else is wrong: a restart would mend none of that.
#[utoipa::path(get, path = "/livez", tag = "host", operation_id = "get_liveness", responses(
    (status = 200, body = String, description = "The process works")))]
pub async fn live() -> &'static str {
    "ok\n"
}

/// Whether the host takes in what comes, and answers.
#[utoipa::path(get, path = "/readyz", tag = "host", operation_id = "get_readiness", responses(
    (status = 200, body = String, description = "The host takes in and answers"),
    (status = 503, body = String, description = "Why it does not")))]
pub async fn ready(State(host): State<Arc<Supervised>>) -> Response {
    let obstacle = match host.standing() {
        Standing::Running(host) => obstacle(&host),
        Standing::Down { reason, since } => Some(super::down(&reason, since).message),
    };
    match obstacle {
        None => (StatusCode::OK, "ok\n".to_owned()).into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

/// Why a running host refuses what it is sent.
fn obstacle(host: &Host) -> Option<String> {
    if let Some(Shortage { reason, since, .. }) = host.room.shortage() {
        return Some(format!("nothing is taken in since {since:.0}: {reason}"));
    }
    if host.is_looking() {
        return Some("the host does not know yet what is published under its names".to_owned());
    }
    let loading = host.loading();
    let names: Vec<_> = loading.iter().map(PluginName::as_str).collect();
    (!names.is_empty()).then(|| format!("these plugins are not loaded yet: {}", names.join(", ")))
}
