//! Owns the HTTP API under `/v1`, for programs and the command line. It receives HTTP requests and returns JSON,
//! event streams and metrics. Paths and their descriptions are in the files of the handlers.

mod admission;
mod backup;
mod body_timeout;
mod changes;
mod streamed_body;
mod config;
mod dead_letters;
mod error;
mod events;
mod extract;
mod fleet;
mod grants;
mod jobs;
mod health;
mod keys;
mod unread_body;
mod metrics;
mod names;
mod nodes;
mod openapi;
mod plugins;
mod outbox_quotas;
mod row_list;
mod server;
mod status;
mod stream;
mod token;
mod topics;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::{Extension, Router, middleware};
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use admission::Admission;
pub use error::ApiError;
pub use fleet::MemberLog;
pub use jobs::JobStatus;
pub use openapi::document;
pub use server::serve;
pub use token::Token;

use dim_server::host::Supervised;
use dim_store::plugin_limits::DOCUMENT_BYTES;

/// The maximum size of a body, in bytes: the largest document and a margin.
pub const MAX_BODY: usize = dim_client::MAX_BODY;

const _: () = assert!(MAX_BODY > DOCUMENT_BYTES, "a document is a body");

/// Runs work to its end, also if the caller disconnects meanwhile.
async fn to_its_end<R: Send + 'static>(work: impl Future<Output = R> + Send + 'static) -> R {
    tokio::spawn(work).await.expect("no order panics")
}

/// Returns the routes with their descriptions; the paths are at the handlers.
fn described() -> OpenApiRouter<Arc<Supervised>> {
    let v1 = OpenApiRouter::default()
        .routes(routes!(status::status))
        .routes(routes!(health::acknowledge))
        .routes(routes!(backup::make))
        .routes(routes!(events::export))
        .routes(routes!(openapi::openapi))
        .routes(routes!(config::reload))
        .routes(routes!(plugins::list, plugins::fetch))
        .routes(routes!(plugins::show, plugins::remove))
        .routes(routes!(plugins::install))
        .routes(routes!(grants::show, grants::change))
        .routes(routes!(plugins::history))
        .routes(routes!(plugins::roll_back))
        .routes(routes!(plugins::restore))
        .routes(routes!(plugins::pause))
        .routes(routes!(plugins::resume))
        .routes(routes!(changes::watch))
        .routes(routes!(changes::log))
        .routes(routes!(plugins::command))
        .routes(routes!(plugins::query))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::show, jobs::remove))
        .routes(routes!(jobs::update))
        .routes(routes!(jobs::watch))
        .routes(routes!(nodes::list, nodes::put))
        .routes(routes!(nodes::show, nodes::remove))
        .routes(routes!(nodes::merged))
        .routes(routes!(jobs::merged))
        .routes(routes!(topics::list))
        .routes(routes!(topics::subscribe, topics::publish))
        .routes(routes!(topics::peers))
        .routes(routes!(topics::writers))
        .routes(routes!(topics::alarms))
        .routes(routes!(fleet::show))
        .routes(routes!(fleet::join))
        .routes(routes!(fleet::roster, fleet::put_roster))
        .routes(routes!(fleet::put_record))
        .routes(routes!(fleet::logs))
        .routes(routes!(names::key_id, names::make_key, keys::forget))
        .routes(routes!(keys::list))
        .routes(routes!(keys::import))
        .routes(routes!(names::publish))
        .routes(routes!(names::update_state))
        .routes(routes!(names::adopt))
        .routes(routes!(names::resolve))
        .routes(routes!(names::get_state))
        .routes(routes!(dead_letters::list, dead_letters::remove_all))
        .routes(routes!(dead_letters::replay_all))
        .routes(routes!(dead_letters::show, dead_letters::remove))
        .routes(routes!(dead_letters::replay));
    OpenApiRouter::with_openapi(openapi::Shared::openapi())
        .nest("/v1", v1)
        .routes(routes!(health::health))
        .routes(routes!(health::probes::live))
        .routes(routes!(health::probes::ready))
        .routes(routes!(metrics::metrics))
}

/// Returns all routes. While the host is down, handlers answer with 503.
pub fn router(host: Arc<Supervised>) -> Router {
    guarded(Router::from(described()), MAX_BODY).with_state(host)
}

/// Adds the rules that apply to every route: the maximum size and time of a body, the admission of callers, the
/// refusal of browsers, and readable errors.
pub fn guarded<S: Clone + Send + Sync + 'static>(router: Router<S>, max_body: usize) -> Router<S> {
    router
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(DefaultBodyLimit::max(max_body))
        .layer(middleware::from_fn(admission::enter))
        .layer(middleware::from_fn(error::refuse_browsers))
        .layer(middleware::map_request(body_timeout::limit))
        .layer(middleware::map_request(unread_body::let_it_end))
}

/// A listener of the API.
#[derive(Debug)]
pub enum Listener {
    /// A socket that only the owner can open.
    Unix(UnixListener, Socket),
    /// A loopback address, for callers with the token.
    Tcp(TcpListener, Token),
}

impl Listener {
    /// Listens on the socket in a state directory whose lock the caller holds.
    pub fn unix(state_dir: &Path) -> io::Result<Self> {
        let (listener, socket) = bind_for_owner(&state_dir.join(dim_client::SOCKET))?;
        Ok(Self::Unix(listener, socket))
    }

    /// Listens on a loopback address, for callers with the token. The token is sent in clear text, so other addresses
    /// are an error.
    pub async fn tcp(address: SocketAddr, token: Token) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            let why = format!(
                "the API speaks without TLS and listens on loopback only, not on {address}: put a proxy or a tunnel before it"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Self::Tcp(TcpListener::bind(address).await?, token))
    }

    /// Returns the address in the form that `--api` accepts.
    pub fn address(&self) -> String {
        match self {
            Self::Unix(_, socket) => format!("unix:{}", socket.path.display()),
            Self::Tcp(listener, _) => {
                listener.local_addr().map_or_else(|error| error.to_string(), |at| format!("http://{at}"))
            }
        }
    }

    /// Serves at most `most` parallel connections until `stop` is cancelled, which also ends open streams.
    pub async fn serve(self, host: Arc<Supervised>, most: usize, stop: CancellationToken) -> io::Result<()> {
        let router = router(host);
        match self {
            Self::Unix(listener, _socket) => {
                let router = router.layer(Extension(backup::OwnersOnly));
                server::serve(listener, router, Admission::new(most), stop).await
            }
            Self::Tcp(listener, token) => {
                let router = router.layer(middleware::from_fn_with_state(token, token::require));
                server::serve(listener, router, Admission::new(most), stop).await
            }
        }
    }
}

/// The number of connections that wait to be accepted, as in the standard library.
const BACKLOG: u32 = 128;

/// Makes a socket that only the owner can open, in a directory whose lock the caller holds.
pub fn bind_for_owner(path: &Path) -> io::Result<(UnixListener, Socket)> {
    // The caller holds the lock, so the process that left the file is gone.
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = UnixSocket::new_stream()?;
    // Linux gives the file the mode of the socket, so that no other user can ever open it.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    socket.bind(path)?;
    let listener = socket.listen(BACKLOG)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok((listener, Socket { path: path.to_owned(), inode: std::fs::metadata(path)?.ino() }))
}

/// The file of a socket. It is removed on drop, unless another socket has replaced it.
#[derive(Debug)]
pub struct Socket {
    /// The path of the socket.
    pub path: PathBuf,
    inode: u64,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if std::fs::metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
