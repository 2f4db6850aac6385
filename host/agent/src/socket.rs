//! Owns the agent's socket: an HTTP API with JSON, like a host's API, for programs of the machine's owner. It
//! receives notices and answers once they are on the disk, and returns the status of the agent.

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
use dim_api::{Admission, ApiError, bind_for_owner, guarded, serve};
use dim_model::connectivity::Connectivity;
use dim_model::ident::NodeId;
use dim_model::time::Timestamp;
use dim_store::plugin_limits::MESSAGE_BYTES;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::heartbeat::Beat;
use crate::notice::{Given, Notice};
use crate::spool::{Spool, SpoolError, on_disk};
use crate::transport::Transport;

/// The maximum number of connections at the same time. Further connections wait.
const CONNECTIONS: usize = 64;

/// The name of the socket inside an agent's directory.
pub const SOCKET: &str = "agent.sock";

/// The maximum size of a body, in bytes: the maximum of a message, and space for JSON.
const MAX_BODY: usize = MESSAGE_BYTES + 4096;

/// The state that the handlers use.
#[derive(Debug)]
pub struct Desk {
    /// The node of the agent.
    pub node: NodeId,
    /// The identifier of this start of the agent.
    pub instance: String,
    /// The transport to the receivers.
    pub transport: Arc<dyn Transport>,
    /// The spool that stores notices.
    pub spool: Arc<Spool>,
    /// The state of the connection for notices.
    pub notices: Arc<Connectivity>,
    /// The state of the connection for heartbeats.
    pub heartbeats: Arc<Connectivity>,
    /// The last heartbeat that was sent.
    pub beat: Arc<Mutex<Option<Beat>>>,
    /// The time between two heartbeats.
    pub every: Duration,
    /// The time of the agent's start.
    pub started: Timestamp,
}

/// The listening socket.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: dim_api::Socket,
}

impl Socket {
    /// Listens in a directory. The caller holds the directory's lock.
    pub fn listen(dir: &Path) -> io::Result<Self> {
        let (listener, file) = bind_for_owner(&dir.join(SOCKET))?;
        Ok(Self { listener, file })
    }

    /// Returns the path of the socket.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Serves requests until `stop` is cancelled.
    pub async fn serve(self, desk: Arc<Desk>, stop: CancellationToken) -> io::Result<()> {
        serve(self.listener, router(desk), Admission::new(CONNECTIONS), stop).await
    }
}

fn router(desk: Arc<Desk>) -> Router {
    let router = Router::new().route("/v1/notices", post(give)).route("/v1/status", get(status));
    guarded(router, MAX_BODY).with_state(desk)
}

/// Stores a notice.
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
        Self::unavailable(dim_model::error_chain::chain(&error))
    }
}

/// Returns the status of the agent.
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
    let beat = desk.beat.lock().expect("no thread panics while it holds the last beat").clone();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node_id": desk.node,
        "instance": desk.instance,
        "to": desk.transport.address(),
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
