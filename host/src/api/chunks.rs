//! Owns answers that are written while they are read: a thread writes, the caller reads, and neither holds more than a
//! few chunks.

use std::error::Error;
use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::cause::chain;

/// Chunks that wait for the caller.
const WAITING: usize = 4;

/// How long a caller may read nothing: meanwhile the database keeps what it has removed.
const PATIENCE: Duration = Duration::from_secs(30);

/// An answer that `write` writes, on a thread that may block. If that fails, or nothing is read for 30 s, or `ended` is
/// cancelled, the answer breaks off: only one that is whole comes to its end.
pub fn stream<E: Error + Send + 'static>(
    content_type: &'static str,
    ended: CancellationToken,
    write: impl FnOnce(Chunks) -> Result<(), E> + Send + 'static,
) -> Response {
    let (to, chunks) = mpsc::channel(WAITING);
    let out = Chunks { to, ended, runtime: Handle::current() };
    let writing = tokio::task::spawn_blocking(move || write(out));
    let end = futures::stream::once(async {
        match writing.await {
            Ok(Ok(())) => Ok(Bytes::new()),
            Ok(Err(error)) => Err(io::Error::other(chain(&error))),
            Err(error) => Err(io::Error::other(error)),
        }
    });
    let body = Body::from_stream(ReceiverStream::new(chunks).map(Ok).chain(end));
    ([(header::CONTENT_TYPE, content_type)], body).into_response()
}

/// The way of an answer to its caller.
pub struct Chunks {
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
