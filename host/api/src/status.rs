//! Owns `/v1/status`: reads the state of all stages of the host and returns it as one document.

use std::sync::atomic::Ordering;

use axum::Json;
use dim_model::health::HealthFinding;
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_model::time::Timestamp;
use dim_server::host::Host;
use dim_store::disk_monitor::Shortage;
use dim_store::names::{self, Cause, Hold};
use dim_store::plugin_limits::DOCUMENT_BYTES;
use dim_store::{Usage, dead_letters, outbox};
use serde::Serialize;
use utoipa::ToSchema;

use crate::ApiError;
use crate::extract::Current;
use crate::health::{all_troubles, messages};
use crate::outbox_quotas::{Queue, queues};

/// The state of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// The version of the program.
    version: &'static str,
    /// The identity of the host, which is its identity as an observer.
    id: String,
    /// Whether no health finding is an error.
    healthy: bool,
    /// The health findings as sentences.
    troubles: Vec<String>,
    /// The same findings for programs, in the same order.
    trouble_details: Vec<HealthFinding>,
    /// The time of the start.
    started: Timestamp,
    /// The duration of the start, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    start_took_ms: Option<u64>,
    /// The path of the state directory.
    state_dir: String,
    /// The backend.
    backend: Backend,
    /// The event log.
    log: Log,
    /// The size of the store, and the free space of the disk.
    disk: Disk,
    /// The waiting publishes.
    outbox: Outbox,
    /// The number of dead letters.
    dead_letters: u64,
    /// The number of dead letters that were dropped because there were too many or they were too old.
    dead_letters_dropped: u64,
    /// The transactions of the store.
    commits: Commits,
    /// The host's own names.
    names: Vec<OwnName>,
    /// The number of running plugins.
    plugins: usize,
}

/// The backend of names, topics and content.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusBackend)]
pub struct Backend {
    /// `kubo` or `embedded`.
    name: &'static str,
    /// The address.
    address: String,
}

/// The event log, by offsets.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusLog)]
pub struct Log {
    /// The offset of the next entry.
    head: u64,
    /// The offset of the first entry that the log holds; null if it is empty.
    #[schema(required)]
    first: Option<u64>,
}

/// The size of the store, and the free space of the disk, in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusDisk)]
pub struct Disk {
    /// The free space of the disk.
    free_bytes: u64,
    /// The space that must stay free: below it the intake stops.
    min_free_bytes: u64,
    /// The size of the file of the database.
    file_bytes: u64,
    /// The content of the store.
    held_bytes: Usage,
    /// The maximum content of the store; null without a limit.
    #[schema(required)]
    max_held_bytes: Option<u64>,
    /// The reason why the intake is stopped; null if it is not.
    #[schema(required)]
    shortage: Option<Shortage>,
}

/// The waiting publishes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusOutbox)]
pub struct Outbox {
    /// The number.
    waiting: u64,
    /// The time at which the first of them was committed; null if there is none.
    #[schema(required)]
    oldest: Option<Timestamp>,
    /// The use of each quota.
    queues: Vec<Queue>,
}

/// The transactions of the store since the host started.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusCommits)]
pub struct Commits {
    /// The number.
    count: u64,
    /// The mean duration of a transaction with its sync, in milliseconds.
    mean_ms: f64,
}

/// An own name of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct OwnName {
    /// The key.
    key: KeyName,
    /// The IPNS name; null if the key does not exist any more.
    #[schema(required)]
    name: Option<IpnsName>,
    /// The path that it points to.
    path: ContentPath,
    /// The number of its values.
    sequence: u64,
    /// Whether the backend has accepted the newest value.
    published: bool,
    /// The hold of the name; null if it is not on hold.
    #[schema(required)]
    hold: Option<OnHold>,
    /// The size of the document, in bytes; null if the value is a path.
    #[schema(required)]
    document_bytes: Option<u64>,
    /// The maximum size of the document, in bytes.
    document_limit: usize,
}

/// A name on hold: it points to a path that the host has not published.
#[derive(Debug, Serialize, ToSchema)]
pub struct OnHold {
    /// The cause of the hold.
    cause: Cause,
    /// The path that the name points to; the name itself if the daemon shows no record.
    path: ContentPath,
    /// The sequence number of the record; null if the backend does not show it.
    #[schema(required)]
    sequence: Option<u64>,
    /// The time since which the name is on hold.
    since: Timestamp,
    /// The time of the last change of the record.
    changed: Timestamp,
}

impl From<Hold> for OnHold {
    fn from(Hold { cause, path, sequence, since, changed }: Hold) -> Self {
        Self { cause, path, sequence, since: Timestamp(since), changed: Timestamp(changed) }
    }
}

/// Shows the state of the host.
#[utoipa::path(get, path = "/status", tag = "host", operation_id = "get_status",
    responses((status = 200, body = Status)))]
pub async fn status(Current(host): Current) -> Result<Json<Status>, ApiError> {
    let (waiting, oldest) = outbox::waiting(&host.storage.store)?;
    let troubles = all_troubles(&host).await?;
    let commits = host.storage.commit.counters.commits.load(Ordering::Relaxed);
    let spent = host.storage.commit.counters.nanoseconds.load(Ordering::Relaxed);
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION"),
        id: host.id.clone(),
        healthy: !troubles.iter().any(HealthFinding::is_error),
        troubles: messages(&troubles),
        trouble_details: troubles,
        started: host.life.started,
        start_took_ms: host.start_took().map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
        state_dir: host.storage.store.path().display().to_string(),
        backend: Backend {
            name: host.exchange.links.backend.name,
            address: host.exchange.links.backend.address.clone(),
        },
        log: Log {
            head: host.storage.log.head().0,
            first: host.storage.store.log_start()?.map(|first| first.0),
        },
        disk: disk(&host)?,
        outbox: Outbox { waiting, oldest, queues: queues(&host) },
        dead_letters: dead_letters::count(&host.storage.store)?,
        dead_letters_dropped: dead_letters::dropped(&host.storage.store)?,
        commits: Commits { count: commits, mean_ms: spent as f64 / commits.max(1) as f64 / 1e6 },
        names: own_names(&host)?,
        plugins: host.plugins.all().len(),
    }))
}

fn disk(host: &Host) -> Result<Disk, ApiError> {
    Ok(Disk {
        free_bytes: host.storage.store.free()?,
        min_free_bytes: host.config.now().store.min_free_bytes,
        file_bytes: host.storage.store.file_bytes(),
        held_bytes: Usage::of(&host.storage.store.snapshot()?)?,
        max_held_bytes: host.config.now().store.max_bytes,
        shortage: host.storage.disk.shortage(),
    })
}

/// Returns the host's own names, with the size of each document.
fn own_names(host: &Host) -> Result<Vec<OwnName>, ApiError> {
    let known = names::all(&host.storage.store.snapshot()?)?;
    let described = known.into_iter().map(|(key, known)| OwnName {
        name: host.storage.keys.name(&key),
        published: known.is_published(),
        hold: known.hold.clone().map(OnHold::from),
        path: known.visible_path().clone(),
        sequence: known.sequence,
        document_bytes: known.document,
        document_limit: DOCUMENT_BYTES,
        key,
    });
    Ok(described.collect())
}
