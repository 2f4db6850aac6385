//! `/healthz`: whether all is well, and what is not, each in a sentence with the time since when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::ApiError;
use super::queues::{Queue, queues};
use crate::host::{Host, NotLoaded, Standing, Supervised};
use crate::ident::{KeyName, PluginName};
use crate::plugin::{DOCUMENT_BYTES, roster};
use crate::room::Shortage;
use crate::store::names::{self, Known};
use crate::store::{self, META, Snapshot, outbox};
use crate::time::Timestamp;

/// One line: whether all is well, and what is not.
#[utoipa::path(get, path = "/healthz", tag = "host", operation_id = "get_health", responses(
    (status = 200, body = String, description = "All is well"),
    (status = 503, body = String, description = "What is not well")))]
pub async fn health(State(host): State<Arc<Supervised>>) -> Result<Response, ApiError> {
    let troubles = match host.standing() {
        Standing::Running(host) => troubles(&host)?,
        Standing::Down { reason, since } => vec![format!("down since {since}: {reason}")],
    };
    Ok(if troubles.is_empty() {
        (StatusCode::OK, "ok\n".to_owned()).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", troubles.join("; "))).into_response()
    })
}

/// A publish that waits for longer than this is a trouble.
const LATE: Duration = Duration::from_secs(30);

/// What is wrong.
pub fn troubles(host: &Host) -> Result<Vec<String>, ApiError> {
    let (snapshot, now) = (host.store.snapshot()?, Timestamp::wall());
    let mut troubles = host.lost();
    if let Some(Shortage { reason, since, .. }) = host.room.shortage() {
        troubles.push(format!("nothing is taken in since {since}: {reason}"));
    }
    troubles.extend(of_plugins(host));
    troubles.extend(deaf(host, now));
    troubles.extend(waiting(host, now)?);
    troubles.extend(overlong_log(host, &snapshot)?);
    for (key, known) in names::all(&snapshot)? {
        troubles.extend(of_name(&key, &known, now));
    }
    Ok(troubles)
}

fn of_plugins(host: &Host) -> Vec<String> {
    let refused = |refused: &NotLoaded| format!("plugin {} is not loaded: {}", refused.name, refused.reason);
    let mut troubles: Vec<String> = host.not_loaded().iter().map(refused).collect();
    let loading = host.loading();
    if !loading.is_empty() {
        let names: Vec<_> = loading.iter().map(PluginName::as_str).collect();
        troubles.push(format!("these plugins are not loaded yet: {}", names.join(", ")));
    }
    for (name, plugin) in host.plugins.all() {
        let status = plugin.handle.status();
        if let Some(reason) = status.reason {
            let since = status.failing_since.unwrap_or(host.started);
            troubles.push(match status.state {
                "quarantined" => format!(
                    "plugin {name} is quarantined since {since}, `dim plugin resume {name}` or a new version lets it go on: {reason}"
                ),
                _ => format!("plugin {name} does not start since {since}: {reason}"),
            });
        }
        for (key, limit) in status.too_large {
            troubles.push(format!("the document of {key} has more than {limit} bytes and is not published"));
        }
    }
    troubles
}

/// Publishes that are late, and queues that are full.
fn waiting(host: &Host, now: Timestamp) -> Result<Vec<String>, ApiError> {
    let late = match outbox::waiting(&host.store)? {
        (waiting, Some(oldest)) if now.since(oldest) > LATE => {
            Some(format!("{waiting} publishes wait since {oldest}"))
        }
        _ => None,
    };
    let is_full = |queue: &Queue| queue.waiting >= queue.limit;
    let full = queues(host).into_iter().filter(is_full);
    let full =
        full.map(|Queue { owner, limit, .. }| format!("{limit} publishes of {owner} wait: more are refused"));
    Ok(late.into_iter().chain(full).collect())
}

/// An own name that is late, nearly over, someone else's too, or nearly too large.
fn of_name(key: &KeyName, known: &Known, now: Timestamp) -> Vec<String> {
    let mut troubles = Vec::new();
    if known.is_waiting() && now.since(Timestamp(known.since)) > LATE {
        troubles.push(format!("name {key} is not published since {}", Timestamp(known.since)));
    }
    if let Some(accepted) = known.published.as_ref().filter(|accepted| accepted.is_nearly_over(now)) {
        troubles.push(format!("the record of {key} ends at {}", accepted.valid_until()));
    }
    if let Some(hold) = &known.hold {
        troubles.push(format!("{key} is on hold since {}: {}", Timestamp(hold.since), hold.explain(key)));
    }
    let document = known.document.unwrap_or_default();
    if document > DOCUMENT_BYTES as u64 / 10 * 9 {
        troubles.push(format!("the document of {key} has {document} bytes; {DOCUMENT_BYTES} are the limit"));
    }
    troubles
}

/// A log that has grown past its size, for one of the plugins has not read it.
fn overlong_log(host: &Host, snapshot: &Snapshot) -> Result<Option<String>, ApiError> {
    let (bytes, most) = (store::log::bytes(&snapshot.table(META)?)?, host.config.store.log.max_bytes);
    // A little more than may be is trimmed in a moment.
    if bytes <= most.saturating_mul(2) {
        return Ok(None);
    }
    let loaded = host.plugins.all();
    let refused = host.not_loaded();
    let configured = loaded.keys().chain(refused.iter().map(|plugin| &plugin.name));
    Ok(roster::furthest_behind(snapshot, configured)?.map(|(cursor, name)| {
        format!(
            "the log has {bytes} of {most} bytes and waits for plugin {name}, which has read up to {cursor}: mend it or disable it"
        )
    }))
}

/// The topics that are not listened to for certain; those with one reason are told together.
fn deaf(host: &Host, now: Timestamp) -> Vec<String> {
    let mut by_reason: BTreeMap<String, (Timestamp, Vec<String>)> = BTreeMap::new();
    for (topic, hearing) in host.hearings.all() {
        let proven = hearing.proven_until.unwrap_or(host.started);
        if now.since(proven) > LATE {
            let why = hearing.deaf.unwrap_or_else(|| "no proof has come".to_owned());
            let (since, topics) = by_reason.entry(why).or_insert((proven, Vec::new()));
            *since = proven.min(*since);
            topics.push(topic.to_string());
        }
    }
    let told = by_reason.into_iter().map(|(why, (since, topics))| {
        format!("listening is not proven since {since} on {}: {why}", topics.join(", "))
    });
    told.collect()
}
