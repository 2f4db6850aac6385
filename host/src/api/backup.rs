//! `/v1/backup`: the host's store and keys, encrypted.

use std::io;

use axum::Extension;
use axum::body::{Body as Stream, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::ToSchema;

use super::ApiError;
use super::extract::{Body, Current};
use super::openapi::Refused;
use crate::backup::{self, Passphrase};
use crate::cause::chain;

/// Chunks of a backup that wait for the caller.
const WAITING: usize = 4;

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
/// It holds the private keys, so it is made over the socket only. If the stream breaks off, so is the
/// backup.
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
    let (to, chunks) = mpsc::channel(WAITING);
    let (store, keys) = (host.store.clone(), host.keys.clone());
    tokio::task::spawn_blocking(move || {
        let made = backup::write(&store, &keys, passphrase, Chunks { to: to.clone() });
        if let Err(error) = made {
            let why = chain(&error);
            tracing::error!("a backup was not finished: {why}");
            // The caller sees the stream break off, and not end.
            let _ = to.blocking_send(Err(io::Error::other(why)));
        }
    });
    let body = Stream::from_stream(ReceiverStream::new(chunks));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// The way of a backup to its caller.
struct Chunks {
    to: mpsc::Sender<io::Result<Bytes>>,
}

impl io::Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the caller has gone");
        self.to.blocking_send(Ok(Bytes::copy_from_slice(bytes))).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
