//! Owns the unread rest of a request's body. It keeps reading for a while after an early answer, because a caller
//! that is still sending would otherwise get a broken connection instead of the answer.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::runtime::Handle;

/// The time for which the rest of a body is read after its handler has dropped it.
const LINGER: Duration = Duration::from_secs(5);

/// A body whose rest is read and discarded after it is dropped.
struct Lingering(Body);

/// Wraps the body of a request so that its rest is read.
pub async fn let_it_end(request: Request) -> Request {
    // A caller that sends `Expect` waits for a sign before it sends the body.
    if request.headers().contains_key(header::EXPECT) {
        return request;
    }
    request.map(|body| if body.is_end_stream() { body } else { Body::new(Lingering(body)) })
}

impl HttpBody for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        if self.0.is_end_stream() {
            return;
        }
        let mut rest = std::mem::take(&mut self.0);
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let read = async { while let Some(Ok(_)) = rest.frame().await {} };
                let _ = tokio::time::timeout(LINGER, read).await;
            });
        }
    }
}
