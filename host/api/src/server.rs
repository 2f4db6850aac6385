//! Owns the connections of the API. It receives a listener and the router, and serves HTTP with limits on headers,
//! idle time and parallel connections until it is stopped.

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

use crate::admission::{Admission, Place};
use crate::extract::Caller;

/// The maximum size of the headers of a request, in bytes.
const HEADER_BYTES: usize = 64 << 10;

/// The maximum number of headers of a request.
const HEADERS: usize = 100;

/// The maximum time for the headers of a request, and for an idle connection.
const HEADER_TIME: Duration = Duration::from_secs(60);

/// The time after which a connection ends if the caller reads nothing.
const UNREAD: Duration = Duration::from_secs(30);

/// The grace period for open requests at the end: event streams do not end by themselves.
const GRACE: Duration = Duration::from_secs(2);

/// The pause after the machine could not accept a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// A source of connections.
pub trait Accept: Send + Sync + 'static {
    /// The type of a connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Returns the next connection and its caller.
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

/// Serves until `stop` is cancelled. At most as many connections as `admission` allows are served at a time; others
/// wait. No task of it remains when this returns.
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
                    // The connection failed, or the process has no file descriptor left.
                    Err(error) => {
                        tracing::debug!("the API cannot accept a connection: {error}");
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
        // Requests that are open after the grace period are aborted.
        connections.shutdown().await;
    }
    Ok(())
}

/// Logs the panic of a connection. Its caller gets no answer; other connections continue.
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
        // A router is always ready and returns no error.
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
