//! Fuzzes the API with requests of an authorized caller.
//!
//! The input is a request as text: a line with method and path, one line for each header, an empty line, and the body.
//! An input that begins with the line `RAW` is sent unchanged over a socket.

use std::cell::RefCell;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use dim_api::Listener;
use dim_server::config::Config;
use dim_server::host::{Options, Supervised};
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

/// Maximum time until a response begins.
const PATIENCE: Duration = Duration::from_secs(30);

/// Maximum number of bytes that are read of a response body. Event streams never end.
const BODY_BYTES: usize = 64 << 10;
/// Maximum time for which a response body is read.
const BODY_TIME: Duration = Duration::from_millis(20);

/// Number of requests to one host. Then a new host is started, because the state of the old one grows.
const REQUESTS: usize = 5_000;

/// Maximum number of simultaneous connections.
const CONNECTIONS: usize = 8;

struct Api {
    runtime: Runtime,
    router: Router,
    stop: CancellationToken,
    running: JoinHandle<()>,
    dir: TempDir,
    asked: usize,
}

impl Api {
    /// Starts a host. It takes the compiled components from the directory of the previous host.
    fn new(before: Option<&TempDir>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        if let Some(before) = before {
            let compiled = "compiled";
            std::fs::rename(before.path().join(compiled), dir.path().join(compiled))
                .expect("it was compiled");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let config = Config::parse("").expect("a config");
        let started = async {
            let host = Supervised::start(Options::new(config, dir.path())).await.expect("a host");
            if let dim_server::host::Standing::Running(host) = host.standing() {
                host.all_loaded().await;
            }
            host
        };
        let host = runtime.block_on(started);
        let (router, stop) = (dim_api::router(host.clone()), CancellationToken::new());
        let listener = {
            let _within = runtime.enter();
            // The fuzzer's `main` is not Rust's, so SIGPIPE is not ignored and would end the process.
            drop(signal(SignalKind::pipe()).expect("signals can be taken"));
            Listener::unix(dir.path()).expect("a free place")
        };
        let running = runtime.spawn({
            let stop = stop.clone();
            async move {
                let serving = tokio::spawn(listener.serve(host.clone(), CONNECTIONS, stop.clone()));
                host.run(stop).await;
                serving.await.expect("serving does not panic").expect("it serves");
            }
        });
        Self { runtime, router, stop, running, dir, asked: 0 }
    }

    fn end(self) -> TempDir {
        let Self { runtime, router, stop, running, dir, .. } = self;
        drop(router);
        stop.cancel();
        runtime.block_on(running).expect("the host ends");
        dir
    }

    /// Sends bytes over the socket. The response must be HTTP or empty.
    fn send(&mut self, bytes: &[u8]) {
        self.asked += 1;
        let socket = self.dir.path().join(dim_client::SOCKET);
        let answer = self.runtime.block_on(async {
            let mut stream = UnixStream::connect(socket).await.expect("the API listens");
            // The host may close the connection at any time, so errors are ignored.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = tokio::time::timeout(BODY_TIME, stream.read_to_end(&mut answer)).await;
            answer
        });
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{}", String::from_utf8_lossy(&answer));
    }

    fn ask(&mut self, request: Request<Body>) -> Response<Vec<u8>> {
        self.asked += 1;
        let Self { runtime, router, .. } = self;
        let path = request.uri().path().to_owned();
        runtime.block_on(async {
            let answer = tokio::time::timeout(PATIENCE, router.call(request));
            let answer = answer.await.unwrap_or_else(|_| panic!("{path} does not answer"));
            let (parts, body) = answer.unwrap_or_else(|never| match never {}).into_parts();
            Response::from_parts(parts, read(body).await)
        })
    }
}

async fn read(mut body: Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reading = async {
        while bytes.len() < BODY_BYTES {
            let Some(Ok(frame)) = body.frame().await else { break };
            bytes.extend_from_slice(frame.data_ref().map_or(&[], AsRef::as_ref));
        }
    };
    // At the time limit, the bytes received so far are the body.
    let _ = tokio::time::timeout(BODY_TIME, reading).await;
    bytes
}

/// Sends a request and checks the response.
pub fn run(data: &[u8]) {
    thread_local! {
        static API: RefCell<Option<Api>> = const { RefCell::new(None) };
    }
    API.with_borrow_mut(|known| {
        if known.as_ref().is_some_and(|api| api.asked > REQUESTS) {
            let dir = known.take().map(Api::end);
            *known = Some(Api::new(dir.as_ref()));
        }
        let api = known.get_or_insert_with(|| Api::new(None));
        if let Some(raw) = data.strip_prefix(b"RAW\n") {
            return api.send(raw);
        }
        let Some(request) = request(data) else { return };
        let asked = format!("{} {}", request.method(), request.uri());
        let is_of_a_page = request.headers().contains_key(header::ORIGIN);
        let answer = api.ask(request);
        check(&asked, &answer);
        assert!(!is_of_a_page || answer.status() == StatusCode::FORBIDDEN, "{asked}: a page is answered");
        if api.asked % 256 == 0 {
            let status = Request::get("/v1/status").body(Body::empty()).expect("a request");
            assert_eq!(api.ask(status).status(), StatusCode::OK, "the host is down after {asked}");
        }
    });
}

fn request(data: &[u8]) -> Option<Request<Body>> {
    let end = data.windows(2).position(|two| two == b"\n\n");
    let (head, body) = end.map_or((data, &data[data.len()..]), |end| (&data[..end], &data[end + 2..]));
    let mut lines = std::str::from_utf8(head).ok()?.lines();
    let (method, path) = lines.next()?.split_once(' ')?;
    let mut headers = HeaderMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ")?;
        headers.insert(name.parse::<header::HeaderName>().ok()?, value.parse().ok()?);
    }
    let mut request = Request::builder().method(method).uri(path).body(Body::from(body.to_vec())).ok()?;
    *request.headers_mut() = headers;
    Some(request)
}

fn check(asked: &str, answer: &Response<Vec<u8>>) {
    let (status, body) = (answer.status(), answer.body());
    let said = String::from_utf8_lossy(body);
    assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{asked}: {said}");
    let kind = answer.headers().get(header::CONTENT_TYPE).map(|kind| kind.to_str().expect("text"));
    if status.is_client_error() || status.is_server_error() {
        assert_eq!(kind, Some("application/problem+json"), "{asked}: {status} {said}");
        let problem: serde_json::Value = serde_json::from_slice(body).expect("a problem is JSON");
        assert!(problem["type"].is_string() && problem["status"] == status.as_u16(), "{asked}: {said}");
    } else if kind == Some("application/json") && body.len() < BODY_BYTES {
        assert!(serde_json::from_slice::<serde_json::Value>(body).is_ok(), "{asked}: {said}");
    }
}

/// Returns a request of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let json = "\ncontent-type: application/json\n\n";
    let mut seeds: Vec<String> = [
        "/healthz",
        "/metrics",
        "/v1/status",
        "/v1/changes",
        "/v1/dead-letters?plugin=job-tracker&topic=t&since=2026-01-01T00:00:00Z&after=1&limit=2",
        "/v1/dead-letters/1",
        "/v1/jobs?status=running&node_id=n&after=a&limit=3",
        "/v1/jobs/j",
        "/v1/keys/k",
        "/v1/names/k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w",
        "/v1/names/dim-state-key/state",
        "/v1/nodes?status=alive&cached_model=m&min_memory=1&gpu=true&after=a&limit=1",
        "/v1/nodes/n",
        "/v1/openapi.json",
        "/v1/plugins",
        "/v1/plugins/job-tracker",
        "/v1/plugins/job-tracker/grants",
        "/v1/plugins/job-tracker/history?limit=2",
        "/v1/plugins/job-tracker/log",
        "/v1/topics",
        "/v1/topics/dim.jobs.updates/messages",
        "/v1/topics/dim.jobs.updates/peers",
        "/v1/watch/jobs",
    ]
    .map(|path| format!("GET {path}"))
    .to_vec();
    seeds.extend(
        [
            "DELETE /v1/dead-letters?plugin=p",
            "POST /v1/dead-letters/replay?since=2026-01-01T00:00:00Z",
            "DELETE /v1/dead-letters/7",
            "POST /v1/dead-letters/7/replay",
            "DELETE /v1/jobs/j",
            "PUT /v1/keys/k",
            "DELETE /v1/plugins/heartbeat-watchdog?purge=true",
            "POST /v1/plugins/heartbeat-watchdog/pause",
            "POST /v1/plugins/heartbeat-watchdog/resume",
            "POST /v1/plugins/job-tracker/restore",
            "POST /v1/plugins/job-tracker/rollback?to=1",
            "PUT /v1/keys/k/state?lifetime_seconds=60\n\nhello",
            "POST /v1/topics/dim.jobs.updates/messages\n\n{\"job_id\":\"j\",\"event_type\":\"queued\"}",
            "PUT /v1/plugins/x/component?source=s&grant=true\ncontent-type: application/wasm\n\n\0asm\r\0\x01\0",
            "GET /v1/status\norigin: http://evil.example\nhost: evil.example",
        ]
        .map(str::to_owned),
    );
    seeds.extend(
        [
            ("POST /v1/backup", r#"{"passphrase":""}"#),
            ("POST /v1/jobs/j/events", r#"{"event_type":"running","node_id":"n"}"#),
            (
                "PUT /v1/keys/k/path",
                r#"{"path":"/ipfs/bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"}"#,
            ),
            ("PUT /v1/nodes", r#"[{"node_id":"n","status":"alive"}]"#),
            (
                "POST /v1/plugins",
                r#"{"from":"/ipfs/bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy","name":"x"}"#,
            ),
            ("POST /v1/plugins/job-tracker/grants", r#"{"allow":{"publish":["a.*"]},"deny":{"read":["k"]}}"#),
            ("POST /v1/plugins/job-tracker/commands/update", r#"{"job_id":"j","event_type":"queued"}"#),
            ("POST /v1/plugins/job-tracker/queries/list", "{}"),
        ]
        .map(|(request, body)| format!("{request}{json}{body}")),
    );
    let raw = |text: &str| format!("RAW\n{}", text.replace('\n', "\r\n"));
    seeds.extend([
        raw("GET /v1/status HTTP/1.1\nhost: dim\n\nGET /v1/jobs HTTP/1.1\nhost: dim\nconnection: close\n\n"),
        raw("POST /v1/jobs/j/events HTTP/1.1\nhost: dim\ncontent-type: application/json\ntransfer-encoding: chunked\n\n1b\n{\"event_type\":\"queued\",\"a\":\n2\n1}\n0\n\n"),
        raw("PUT /v1/nodes HTTP/1.1\nhost: dim\nexpect: 100-continue\ncontent-type: application/json\ncontent-length: 2\n\n[]"),
    ]);
    seeds.into_iter().map(String::into_bytes).collect()
}
