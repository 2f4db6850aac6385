//! `/v1/status` and `/healthz`: how the host is doing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::ApiError;
use super::extract::Current;
use crate::host::{Host, Loaded, Standing, Supervised};
use crate::ident::{ContentPath, IpnsName, KeyName, PluginName};
use crate::outbox::API_QUOTA;
use crate::plugin::{DOCUMENT_BYTES, roster};
use crate::room::Shortage;
use crate::store::{self, META, Snapshot, Usage, dead, names, outbox};
use crate::time::Timestamp;

/// How the host is doing.
#[utoipa::path(get, path = "/status", tag = "host", operation_id = "get_status",
    responses((status = 200, body = Status)))]
pub async fn status(Current(host): Current) -> Result<Json<Value>, ApiError> {
    let (waiting, oldest) = outbox::waiting(&host.store)?;
    let troubles = troubles(&host)?;
    let commits = host.commit.tally.commits.load(Ordering::Relaxed);
    let spent = host.commit.tally.nanoseconds.load(Ordering::Relaxed);
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "id": host.id,
        "healthy": troubles.is_empty(),
        "troubles": troubles,
        "started": host.started,
        "start_took_ms": host.start_took.as_millis(),
        "state_dir": host.store.path(),
        "backend": { "name": host.backend.name, "address": host.backend.address },
        "log": {
            "head": host.log.head(),
            "first": host.store.log_start()?,
        },
        "disk": {
            "free_bytes": host.store.free()?,
            "min_free_bytes": host.config.store.min_free_bytes,
            "file_bytes": host.store.file_bytes(),
            "held_bytes": Usage::of(&host.store.snapshot()?)?,
            "max_held_bytes": host.config.store.max_bytes,
            "shortage": host.room.shortage(),
        },
        "outbox": { "waiting": waiting, "oldest": oldest, "queues": queues(&host) },
        "dead_letters": dead::count(&host.store)?,
        "commits": { "count": commits, "mean_ms": spent as f64 / commits.max(1) as f64 / 1e6 },
        "names": own_names(&host)?,
        "plugins": host.plugins.len(),
    })))
}

/// The publishes of one owner that wait.
#[derive(Debug, serde::Serialize)]
pub struct Queue {
    /// The plugin; `api` for callers of the API.
    pub owner: String,
    /// How many wait.
    pub waiting: usize,
    /// How many may; one more is refused.
    pub limit: usize,
}

/// How far each quota of the outbox is used.
pub fn queues(host: &Host) -> Vec<Queue> {
    let waiting = |owner: Option<&PluginName>| host.backlog.length(owner).load(Ordering::Relaxed);
    let of_plugin = |(name, plugin): (&PluginName, &Loaded)| Queue {
        owner: name.to_string(),
        waiting: waiting(Some(name)),
        limit: plugin.limits.outbox,
    };
    let api = Queue { owner: "api".to_owned(), waiting: waiting(None), limit: API_QUOTA };
    std::iter::once(api).chain(host.plugins.iter().map(of_plugin)).collect()
}

/// The host's own names, and how near each document is to the limit.
fn own_names(host: &Host) -> Result<Vec<Value>, ApiError> {
    let snapshot = host.store.snapshot()?;
    let mut described = Vec::new();
    for (key, known) in names::all(&snapshot)? {
        described.push(json!({
            "key": key,
            "name": host.keys.name(&key),
            "path": known.path,
            "sequence": known.sequence,
            "published": known.is_published(),
            "document_bytes": known.document,
            "document_limit": DOCUMENT_BYTES,
        }));
    }
    Ok(described)
}

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
const LATE: std::time::Duration = std::time::Duration::from_secs(30);

/// For how long it is told that someone else published under a key.
const RECENT: std::time::Duration = std::time::Duration::from_secs(3_600);

fn troubles(host: &Host) -> Result<Vec<String>, ApiError> {
    let mut troubles = host.lost.clone();
    if let Some(Shortage { reason, since, .. }) = host.room.shortage() {
        troubles.push(format!("nothing is taken in since {since}: {reason}"));
    }
    for refused in &host.not_loaded {
        troubles.push(format!("plugin {} is not loaded: {}", refused.name, refused.reason));
    }
    for (name, plugin) in &host.plugins {
        let status = plugin.handle.status();
        if let Some(reason) = status.reason {
            let since = status.failing_since.unwrap_or(host.started);
            troubles.push(format!("plugin {name} does not start since {since}: {reason}"));
        }
        for (key, limit) in status.too_large {
            troubles.push(format!("the document of {key} has more than {limit} bytes and is not published"));
        }
    }
    let now = Timestamp::wall();
    troubles.extend(deaf(host, now));
    if let (waiting, Some(oldest)) = outbox::waiting(&host.store)?
        && now.since(oldest) > LATE
    {
        troubles.push(format!("{waiting} publishes wait since {oldest}"));
    }
    for Queue { owner, limit, .. } in queues(host).into_iter().filter(|queue| queue.waiting >= queue.limit) {
        troubles.push(format!("{limit} publishes of {owner} wait: more are refused"));
    }
    let snapshot = host.store.snapshot()?;
    troubles.extend(overlong_log(host, &snapshot)?);
    for (key, known) in names::all(&snapshot)? {
        let overdue = now.since(Timestamp(known.since)) > LATE;
        if !known.is_published() && overdue {
            troubles.push(format!("name {key} is not published since {}", Timestamp(known.since)));
        }
        if let Some(accepted) = &known.published
            && accepted.is_nearly_over(now)
        {
            troubles.push(format!("the record of {key} ends at {}", accepted.valid_until()));
        }
        let stranger_at = known.published.as_ref().and_then(|accepted| accepted.stranger_at).map(Timestamp);
        if let Some(at) = stranger_at.filter(|at| now.since(*at) < RECENT) {
            troubles.push(format!(
                "someone else published under {key}, last at {at}: two hosts on one daemon need keys of their own, see ipfs.ipns_key_name"
            ));
        }
        let document = known.document.unwrap_or_default();
        if document > DOCUMENT_BYTES as u64 / 10 * 9 {
            troubles
                .push(format!("the document of {key} has {document} bytes; {DOCUMENT_BYTES} are the limit"));
        }
    }
    Ok(troubles)
}

/// A log that has grown past its size, for one of the plugins has not read it.
fn overlong_log(host: &Host, snapshot: &Snapshot) -> Result<Option<String>, ApiError> {
    let (bytes, most) = (store::log::bytes(&snapshot.table(META)?)?, host.config.store.log.max_bytes);
    // A little more than may be is trimmed in a moment.
    if bytes <= most.saturating_mul(2) {
        return Ok(None);
    }
    let configured = host.plugins.keys().chain(host.not_loaded.iter().map(|plugin| &plugin.name));
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

/// How the host is doing: what will always be there. There may be more.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it is put together where it is told")]
pub struct Status {
    /// The program's version.
    version: String,
    /// Who the host is as an observer.
    id: String,
    /// Whether there is no trouble.
    healthy: bool,
    /// What is wrong, each in a sentence.
    troubles: Vec<String>,
    /// When it started.
    started: Timestamp,
    /// How long the start took, in milliseconds.
    start_took_ms: u64,
    /// Where it keeps its state.
    state_dir: String,
    /// What stands behind names and topics: its `name` and its `address`.
    #[schema(value_type = Object)]
    backend: Value,
    /// The event log: the offset of its `head`, where the next entry will be, and of its `first` entry.
    #[schema(value_type = Object)]
    log: Value,
    /// The publishes that are `waiting`, and since when the `oldest` does.
    #[schema(value_type = Object)]
    outbox: Value,
    /// How many dead letters are held.
    dead_letters: u64,
    /// The transactions of the store: their `count`, and how long one takes, as `mean_ms`.
    #[schema(value_type = Object)]
    commits: Value,
    /// The host's own names.
    names: Vec<OwnName>,
    /// How many plugins run.
    plugins: usize,
    #[serde(flatten)]
    more: BTreeMap<String, Value>,
}

/// A name of the host.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it is put together where it is told")]
pub struct OwnName {
    /// Its key.
    key: KeyName,
    /// The name; null if the key is gone.
    #[schema(required)]
    name: Option<IpnsName>,
    /// What it points to.
    path: ContentPath,
    /// Counts its values.
    sequence: u64,
    /// Whether the backend has accepted the newest.
    published: bool,
    /// How large the document is, in bytes; null if it is a path.
    #[schema(required)]
    document_bytes: Option<u64>,
    /// How large it may be, in bytes.
    document_limit: u64,
}
