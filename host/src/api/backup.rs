//! `/v1/backup`: the host's store and keys, encrypted.

use std::io;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body as Stream, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::ApiError;
use super::extract::{Body, Current};
use super::openapi::Refused;
use crate::backup::{self, Passphrase};
use crate::cause::chain;

/// Chunks of a backup that wait for the caller.
const WAITING: usize = 4;

/// How long a caller may read nothing: meanwhile the database keeps what it has removed.
const PATIENCE: Duration = Duration::from_secs(30);

/// On requests over the socket, which only the owner can open.
#[derive(Clone, Copy, Debug)]
pub struct OwnersOnly;

/// What a backup is made with.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BackupOrder)]
pub struct Order {
    /// What the backup is encrypted with, and can be restored with.
    #[schema(min_length = 8)]
    passphrase: String,
}

/// Makes a backup of the running host, as of now.
///
/// It holds the private keys, so it is made over the socket only, and one at a time. If the stream breaks
/// off, so is the backup; so it is when nothing is read for 30 s.
#[utoipa::path(post, path = "/backup", tag = "host", operation_id = "make_backup", request_body = Order,
    responses((status = 200, description = "The backup, a file of age",
        content(("application/octet-stream"))), Refused))]
pub async fn make(
    Current(host): Current,
    owner: Option<Extension<OwnersOnly>>,
    Body(order): Body<Order>,
) -> Result<Response, ApiError> {
    if owner.is_none() {
        let why = "a backup holds the host's private keys: it is made over the socket in the state directory";
        return Err(ApiError::forbidden(why));
    }
    let passphrase = Passphrase::new(order.passphrase).map_err(ApiError::invalid)?;
    let Ok(turn) = host.backups.clone().try_acquire_owned() else {
        return Err(ApiError::unavailable("another backup is being made: wait for it"));
    };
    let (to, chunks) = mpsc::channel(WAITING);
    let (store, keys, ended) = (host.store.clone(), host.keys.clone(), host.ended.clone());
    drop(host);
    let out = Chunks { to, ended, runtime: Handle::current() };
    let making = tokio::task::spawn_blocking(move || {
        let made = backup::write(&store, &keys, passphrase, out);
        drop((store, keys, turn));
        made.inspect_err(|error| tracing::error!("a backup was not finished: {}", chain(error)))
    });
    // Only one that is finished ends the stream: the caller of any other sees it break off.
    let end = futures::stream::once(async {
        match making.await {
            Ok(Ok(())) => Ok(Bytes::new()),
            Ok(Err(error)) => Err(io::Error::other(chain(&error))),
            Err(error) => Err(io::Error::other(error)),
        }
    });
    let body = Stream::from_stream(ReceiverStream::new(chunks).map(Ok).chain(end));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// The way of a backup to its caller.
struct Chunks {
    to: mpsc::Sender<Bytes>,
    /// The host's end, which does not wait for a caller.
    ended: CancellationToken,
    runtime: Handle,
}

impl io::Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = Bytes::copy_from_slice(bytes);
        let sending = self.ended.run_until_cancelled(self.to.send_timeout(chunk, PATIENCE));
        let why = match self.runtime.block_on(sending) {
            Some(Ok(())) => return Ok(bytes.len()),
            Some(Err(SendTimeoutError::Closed(_))) => "the caller has gone",
            Some(Err(SendTimeoutError::Timeout(_))) => "the caller has read nothing for 30 s",
            None => "the host ends",
        };
        Err(io::Error::new(io::ErrorKind::BrokenPipe, why))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
