//! Owns the connections of an API: how many there may be, what their headers may take, and how they end.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_service::Service as _;

use super::extract::Caller;

/// Most bytes of a request's headers.
const HEADER_BYTES: usize = 64 << 10;

/// Most headers of a request.
const HEADERS: usize = 100;

/// How long the headers of a request may take, and how long a connection may be idle.
const HEADER_TIME: Duration = Duration::from_secs(60);

/// How long what is under way may take to end: streams of events do not end by themselves.
const GRACE: Duration = Duration::from_secs(2);

/// How long it is waited when the machine takes no connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Where connections come from.
pub trait Accept: Send + Sync + 'static {
    /// One of them.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next one, and who it is.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Caller)>> + Send;
}

impl Accept for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Caller)> {
        let (stream, _) = UnixListener::accept(self).await?;
        let caller = match stream.peer_cred() {
            Ok(peer) => format!("the API, user {}", peer.uid()),
            Err(_) => "the API".to_owned(),
        };
        Ok((stream, Caller(caller)))
    }
}

impl Accept for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Caller)> {
        let (stream, from) = TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream, Caller(format!("the API, from {from}"))))
    }
}

/// Serves until `stop` is cancelled, over `most` connections at a time; one more waits for its turn.
pub async fn serve(
    listener: impl Accept,
    router: Router,
    most: usize,
    stop: CancellationToken,
) -> io::Result<()> {
    let (room, connections) = (Arc::new(Semaphore::new(most)), TaskTracker::new());
    loop {
        let next = async {
            let room = room.clone().acquire_owned().await.expect("it is never closed");
            loop {
                match listener.accept().await {
                    Ok((stream, caller)) => return (stream, caller, room),
                    // It is the connection's trouble, or there is no room for one more.
                    Err(error) => {
                        tracing::debug!("the API takes no connection: {error}");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            (stream, caller, room) = next => {
                connections.spawn(connection(stream, caller, router.clone(), room, stop.clone()));
            }
        }
    }
    connections.close();
    // What is not done by then is broken off.
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
    Ok(())
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    caller: Caller,
    router: Router,
    _room: OwnedSemaphorePermit,
    stop: CancellationToken,
) {
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(caller.clone()));
        let mut router = router.clone();
        // A router is always ready.
        async move { Ok::<_, Infallible>(router.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(HEADER_BYTES)
        .max_headers(HEADERS);
    let mut served = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        biased;
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection of the API ended badly: {error}");
    }
}
