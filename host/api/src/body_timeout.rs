//! Owns the time limit on the body of a request. It receives a request and returns it with a body that fails when it
//! is late, so that a stalled body cannot keep a connection.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use http_body::{Frame, SizeHint};
use thiserror::Error;
use tokio::time::{Instant, Sleep};

/// The maximum time without any bytes of a body.
const IDLE: Duration = Duration::from_secs(15);

/// The time that every body has, whatever its size.
const LEAST_TIME: Duration = Duration::from_secs(60);

/// The minimum average rate after that time, in bytes per second.
const LEAST_RATE: u64 = 16 << 10;

/// The error for a body that did not arrive in time.
#[derive(Debug, Error)]
#[error(
    "the body does not come in time: nothing for {} s, or less than {LEAST_RATE} bytes a second after {} s",
    IDLE.as_secs(),
    LEAST_TIME.as_secs()
)]
pub struct Late;

impl Late {
    /// Returns whether a late body caused an error.
    pub fn is_cause(error: &(dyn StdError + 'static)) -> bool {
        std::iter::successors(Some(error), |error| (*error).source()).any(|error| error.is::<Late>())
    }
}

/// A body with a time limit, which starts with its first poll.
struct Timed {
    body: Body,
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
    received: u64,
}

/// Limits the time of a request's body.
pub async fn limit(request: Request) -> Request {
    request.map(|body| match body.is_end_stream() {
        true => body,
        false => Body::new(Timed { body, timer: None, received: 0 }),
    })
}

/// Returns the time at which a body with `received` bytes is late.
fn deadline(begun: Instant, received: u64) -> Instant {
    let longest = LEAST_TIME + Duration::from_secs(received / LEAST_RATE);
    (Instant::now() + IDLE).min(begun + longest)
}

impl HttpBody for Timed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let (begun, timer) = this.timer.get_or_insert_with(|| {
            let begun = Instant::now();
            (begun, Box::pin(tokio::time::sleep_until(deadline(begun, 0))))
        });
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some(Ok(Some(data))) = frame.as_ref().map(|frame| frame.as_ref().map(Frame::data_ref)) {
                this.received += data.len() as u64;
                timer.as_mut().reset(deadline(*begun, this.received));
            }
            return Poll::Ready(frame);
        }
        timer.as_mut().poll(cx).map(|()| Some(Err(axum::Error::new(Late))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    /// Returns the time after which a body of pieces of `bytes` bytes, each after a pause, is late; `None` if it
    /// completes.
    async fn late_after(bytes: usize, pause: Duration, pieces: usize) -> Option<Duration> {
        let pieces = futures::stream::unfold(0, move |piece| async move {
            tokio::time::sleep(pause).await;
            (piece < pieces).then(|| (Ok::<_, axum::Error>(Bytes::from(vec![0; bytes])), piece + 1))
        });
        let begun = Instant::now();
        let mut body = limit(Request::new(Body::from_stream(pieces))).await.into_body();
        while let Some(frame) = body.frame().await {
            if let Err(error) = frame {
                assert!(Late::is_cause(&error), "{error}");
                return Some(begun.elapsed());
            }
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_or_trickles_is_late_and_a_slow_one_is_not() {
        let second = Duration::from_secs(1);
        assert_eq!(late_after(1, 100 * second, 1).await.map(|time| time.as_secs()), Some(IDLE.as_secs()));
        let trickling = late_after(1, 10 * second, 100).await;
        assert_eq!(trickling.map(|time| time.as_secs()), Some(LEAST_TIME.as_secs()));
        assert_eq!(late_after(LEAST_RATE as usize * 10, 10 * second, 30).await, None);
    }
}
