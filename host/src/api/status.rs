//! `/v1/status`: how the host is doing.

use std::sync::atomic::Ordering;

use axum::Json;
use serde::Serialize;
use utoipa::ToSchema;

use super::ApiError;
use super::extract::Current;
use super::health::{all_troubles, messages};
use super::queues::{Queue, queues};
use crate::host::Host;
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::plugin::DOCUMENT_BYTES;
use crate::room::Shortage;
use crate::store::names::{self, Cause, Hold};
use crate::store::{Usage, dead, outbox};
use crate::time::Timestamp;
use crate::trouble::Trouble;

/// How the host is doing.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// The program's version.
    version: &'static str,
    /// Who the host is as an observer.
    id: String,
    /// Whether no trouble is an error.
    healthy: bool,
    /// What is wrong, each in a sentence.
    troubles: Vec<String>,
    /// The same for programs, in the same order.
    trouble_details: Vec<Trouble>,
    /// When it started.
    started: Timestamp,
    /// How long the start took, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    start_took_ms: Option<u64>,
    /// Where it keeps its state.
    state_dir: String,
    /// What stands behind names and topics.
    backend: Backend,
    /// The event log.
    log: Log,
    /// What the store holds, and what the disk has left.
    disk: Disk,
    /// The publishes that wait.
    outbox: Outbox,
    /// How many dead letters are held.
    dead_letters: u64,
    /// How many there were that went because there were too many, or they were too old.
    dead_letters_dropped: u64,
    /// The transactions of the store.
    commits: Commits,
    /// The host's own names.
    names: Vec<OwnName>,
    /// How many plugins run.
    plugins: usize,
}

/// What stands behind names and topics.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusBackend)]
pub struct Backend {
    /// `kubo` or `embedded`.
    name: &'static str,
    /// Where it is.
    address: String,
}

/// The event log, by offsets.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusLog)]
pub struct Log {
    /// Of the next entry.
    head: u64,
    /// Of the first that is held; null if there is none.
    #[schema(required)]
    first: Option<u64>,
}

/// What the store holds, and what the disk has left, in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusDisk)]
pub struct Disk {
    /// What the disk has left.
    free_bytes: u64,
    /// What is to stay free: with less, nothing is taken in.
    min_free_bytes: u64,
    /// The file of the database.
    file_bytes: u64,
    /// What the store holds.
    held_bytes: Usage,
    /// What it may hold; null for as much as the disk takes.
    #[schema(required)]
    max_held_bytes: Option<u64>,
    /// Why nothing is taken in; null if something is.
    #[schema(required)]
    shortage: Option<Shortage>,
}

/// The publishes that wait.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusOutbox)]
pub struct Outbox {
    /// How many.
    waiting: u64,
    /// When the first of them was committed; null if there is none.
    #[schema(required)]
    oldest: Option<Timestamp>,
    /// How far each quota is used.
    queues: Vec<Queue>,
}

/// The transactions of the store since the host started.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatusCommits)]
pub struct Commits {
    /// How many.
    count: u64,
    /// How long one takes, with its sync, in milliseconds.
    mean_ms: f64,
}

/// A name of the host.
#[derive(Debug, Serialize, ToSchema)]
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
    /// Why nothing is published under the name until the operator decides; null if nothing keeps it.
    #[schema(required)]
    hold: Option<OnHold>,
    /// How large the document is, in bytes; null if it is a path.
    #[schema(required)]
    document_bytes: Option<u64>,
    /// How large it may be, in bytes.
    document_limit: usize,
}

/// A name under which nothing is published: it points to what the host has not published.
#[derive(Debug, Serialize, ToSchema)]
pub struct OnHold {
    /// Why the host does not know it.
    cause: Cause,
    /// What it points to; the name itself if the daemon shows no record of it.
    path: ContentPath,
    /// The record's sequence; null if the backend does not show it.
    #[schema(required)]
    sequence: Option<u64>,
    /// Since when.
    since: Timestamp,
    /// When the record was last seen to change.
    changed: Timestamp,
}

impl From<Hold> for OnHold {
    fn from(Hold { cause, path, sequence, since, changed }: Hold) -> Self {
        Self { cause, path, sequence, since: Timestamp(since), changed: Timestamp(changed) }
    }
}

/// How the host is doing.
#[utoipa::path(get, path = "/status", tag = "host", operation_id = "get_status",
    responses((status = 200, body = Status)))]
pub async fn status(Current(host): Current) -> Result<Json<Status>, ApiError> {
    let (waiting, oldest) = outbox::waiting(&host.store)?;
    let troubles = all_troubles(&host).await?;
    let commits = host.commit.tally.commits.load(Ordering::Relaxed);
    let spent = host.commit.tally.nanoseconds.load(Ordering::Relaxed);
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION"),
        id: host.id.clone(),
        healthy: !troubles.iter().any(Trouble::is_error),
        troubles: messages(&troubles),
        trouble_details: troubles,
        started: host.started,
        start_took_ms: host.start_took().map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
        state_dir: host.store.path().display().to_string(),
        backend: Backend { name: host.backend.name, address: host.backend.address.clone() },
        log: Log { head: host.log.head().0, first: host.store.log_start()?.map(|first| first.0) },
        disk: disk(&host)?,
        outbox: Outbox { waiting, oldest, queues: queues(&host) },
        dead_letters: dead::count(&host.store)?,
        dead_letters_dropped: dead::dropped(&host.store)?,
        commits: Commits { count: commits, mean_ms: spent as f64 / commits.max(1) as f64 / 1e6 },
        names: own_names(&host)?,
        plugins: host.plugins.all().len(),
    }))
}

fn disk(host: &Host) -> Result<Disk, ApiError> {
    Ok(Disk {
        free_bytes: host.store.free()?,
        min_free_bytes: host.config.now().store.min_free_bytes,
        file_bytes: host.store.file_bytes(),
        held_bytes: Usage::of(&host.store.snapshot()?)?,
        max_held_bytes: host.config.now().store.max_bytes,
        shortage: host.room.shortage(),
    })
}

/// The host's own names, and how near each document is to the limit.
fn own_names(host: &Host) -> Result<Vec<OwnName>, ApiError> {
    let known = names::all(&host.store.snapshot()?)?;
    let described = known.into_iter().map(|(key, known)| OwnName {
        name: host.keys.name(&key),
        published: known.is_published(),
        hold: known.hold.map(OnHold::from),
        path: known.path,
        sequence: known.sequence,
        document_bytes: known.document,
        document_limit: DOCUMENT_BYTES,
        key,
    });
    Ok(described.collect())
}
