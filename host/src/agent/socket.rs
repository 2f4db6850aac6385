//! Owns the agent's socket: HTTP and JSON, as a host's API, for the programs of this machine's owner.
//! A notice is answered once it is on the disk.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use super::heartbeat::Beat;
use super::notice::{Given, Notice};
use super::spool::{Spool, SpoolError, on_disk};
use super::way::Way;
use crate::api::{self, Admission, ApiError, bind_for_owner, guarded, serve};
use crate::contact::Contact;
use crate::ident::NodeId;
use crate::plugin::MESSAGE_BYTES;
use crate::time::Timestamp;

/// How many programs of the node may be connected at a time; one more waits.
const CONNECTIONS: usize = 64;

/// The name of the socket inside an agent's directory.
pub const SOCKET: &str = "agent.sock";

/// Largest body, in bytes: the largest message, and a little.
const MAX_BODY: usize = MESSAGE_BYTES + 4096;

/// What the socket answers from.
#[derive(Debug)]
pub struct Desk {
    /// Who the agent speaks for.
    pub node: NodeId,
    /// The name of this agent's instance.
    pub instance: String,
    /// To whom.
    pub way: Arc<dyn Way>,
    /// Where notices go.
    pub spool: Arc<Spool>,
    /// How notices get through.
    pub notices: Arc<Contact>,
    /// How heartbeats get through.
    pub heartbeats: Arc<Contact>,
    /// The last one that did.
    pub beat: Arc<Mutex<Option<Beat>>>,
    /// How often they are sent.
    pub every: Duration,
    /// When the agent started.
    pub started: Timestamp,
}

/// The socket, which listens.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: api::Socket,
}

impl Socket {
    /// Listens in a directory whose lock the caller holds.
    pub fn listen(dir: &Path) -> io::Result<Self> {
        let (listener, file) = bind_for_owner(&dir.join(SOCKET))?;
        Ok(Self { listener, file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Answers until `stop` is cancelled.
    pub async fn serve(self, desk: Arc<Desk>, stop: CancellationToken) -> io::Result<()> {
        serve(self.listener, router(desk), Admission::new(CONNECTIONS), stop).await
    }
}

fn router(desk: Arc<Desk>) -> Router {
    let router = Router::new().route("/v1/notices", post(give)).route("/v1/status", get(status));
    guarded(router, MAX_BODY).with_state(desk)
}

/// Takes a notice.
async fn give(
    State(desk): State<Arc<Desk>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(),
        _ => rejection.into(),
    })?;
    let given: Given = serde_json::from_slice(&body)
        .map_err(|error| ApiError::invalid(format!("this is no notice: {error}")))?;
    let (job, word) = given.read().map_err(ApiError::invalid)?;
    let notice = Notice { job, given: Timestamp::wall(), word };
    if notice.message(&desk.node).len() > MESSAGE_BYTES {
        return Err(too_large());
    }
    let Notice { job, word, .. } = notice;
    let number = on_disk(&desk.spool, move |spool| spool.keep(job, word)).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({ "number": number }))))
}

fn too_large() -> ApiError {
    ApiError::too_large(format!("a notice is a message of at most {MESSAGE_BYTES} bytes"))
}

impl From<SpoolError> for ApiError {
    fn from(error: SpoolError) -> Self {
        Self::unavailable(crate::cause::chain(&error))
    }
}

/// How the agent is doing.
async fn status(State(desk): State<Arc<Desk>>) -> Result<Json<Value>, ApiError> {
    let contents = on_disk(&desk.spool, Spool::contents).await?;
    let refusals: Vec<Value> = contents
        .refusals
        .iter()
        .map(|refusal| {
            json!({
                "job_id": refusal.notice.job,
                "notice": refusal.notice.word.name(),
                "given": refusal.notice.given,
                "refused": refusal.refused,
                "reason": refusal.reason,
            })
        })
        .collect();
    let beat = desk.beat.lock().expect("no one panics while holding the last beat").clone();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node_id": desk.node,
        "instance": desk.instance,
        "to": desk.way.address(),
        "started": desk.started,
        "notices": {
            "contact": desk.notices.state(),
            "waiting": contents.waiting,
            "waiting_bytes": contents.bytes,
            "oldest": contents.oldest,
            "taken": contents.taken,
            "refused": contents.refused,
        },
        "refused": refusals,
        "heartbeats": {
            "contact": desk.heartbeats.state(),
            "every_seconds": desk.every.as_secs(),
            "last": beat,
        },
    })))
}
