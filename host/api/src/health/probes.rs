//! Owns `/livez` and `/readyz`, the probes with which an orchestrator decides to restart a host or to send it
//! requests.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dim_model::ident::PluginName;
use dim_server::host::{Host, Standing, Supervised};
use dim_store::disk_monitor::Shortage;

/// Reports that the process works. The answer is 200 also for a host with other problems, because a restart would not
/// fix them.
#[utoipa::path(get, path = "/livez", tag = "host", operation_id = "get_liveness", responses(
    (status = 200, body = String, description = "The process works")))]
pub async fn live() -> &'static str {
    "ok\n"
}

/// Reports whether the host accepts messages and requests.
#[utoipa::path(get, path = "/readyz", tag = "host", operation_id = "get_readiness", responses(
    (status = 200, body = String, description = "The host accepts messages and requests"),
    (status = 503, body = String, description = "The reason why it does not")))]
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

/// Returns the reason why a running host is not ready.
fn obstacle(host: &Host) -> Option<String> {
    if let Some(Shortage { reason, since, .. }) = host.storage.disk.shortage() {
        return Some(format!("the intake is stopped since {since:.0}: {reason}"));
    }
    if host.is_looking() {
        return Some("the host does not know yet what is published under its names".to_owned());
    }
    let loading = host.loading();
    let names: Vec<_> = loading.iter().map(PluginName::as_str).collect();
    (!names.is_empty()).then(|| format!("these plugins are not loaded yet: {}", names.join(", ")))
}
