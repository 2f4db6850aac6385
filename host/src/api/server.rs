//! Owns the connections of an API: what their headers may take, and how they end.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

use super::admission::{Admission, Place};
use super::extract::Caller;

/// Most bytes of a request's headers.
const HEADER_BYTES: usize = 64 << 10;

/// Most headers of a request.
const HEADERS: usize = 100;

/// How long the headers of a request may take, and how long a connection may be idle.
const HEADER_TIME: Duration = Duration::from_secs(60);

/// How long a caller may read nothing of what it is sent.
const UNREAD: Duration = Duration::from_secs(30);

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

/// Serves until `stop` is cancelled, as many connections at a time as are admitted; the request of one more waits for its
/// turn.
/// Nothing of it is left when this returns.
pub async fn serve(
    listener: impl Accept,
    router: Router,
    admission: Admission,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            loop {
                match listener.accept().await {
                    Ok(accepted) => return accepted,
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
            Some(ended) = connections.join_next() => told(ended),
            (stream, caller) = next => {
                let place = admission.let_in();
                connections.spawn(connection(stream, caller, router.clone(), place, stop.clone()));
            }
        }
    }
    let ending = async {
        while let Some(ended) = connections.join_next().await {
            told(ended);
        }
    };
    if tokio::time::timeout(GRACE, ending).await.is_err() {
        // What is not done by then is broken off.
        connections.shutdown().await;
    }
    Ok(())
}

/// A connection that panics has answered nothing, and harms no other.
fn told(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!("a connection of the API ended badly: {error}");
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    caller: Caller,
    router: Router,
    place: Place,
    stop: CancellationToken,
) {
    let at = place.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(caller.clone()));
        request.extensions_mut().insert(at.clone());
        let mut router = router.clone();
        // A router is always ready.
        async move { Ok::<_, Infallible>(router.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(HEADER_BYTES)
        .max_headers(HEADERS);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(UNREAD));
    let mut served = std::pin::pin!(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
    let ended = tokio::select! {
        biased;
        ended = served.as_mut() => ended,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
        () = place.overstayed() => return,
    };
    if let Err(error) = ended {
        tracing::debug!("a connection of the API ended badly: {error}");
    }
}
