//! Owns responses that are written while the caller reads. A thread writes chunks to a short queue, and the caller
//! reads them from it, so that the response never is in memory as a whole.

use std::error::Error;
use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use dim_model::error_chain::chain;
use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// The number of chunks that wait for the caller.
const WAITING: usize = 4;

/// The maximum time without reading. Meanwhile the snapshot keeps removed data in the database.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns a response that `write` writes on a thread that may block. The response is aborted if `write` fails, if
/// the caller reads nothing for 30 s, or if `ended` is cancelled. Only a complete response ends regularly.
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

/// The writer of a response.
pub struct Chunks {
    to: mpsc::Sender<Bytes>,
    /// The end of the host, which does not wait for callers.
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
