//! Fuzzes the Kubo client with responses of a daemon or of an attacker in its place.
//!
//! The first byte selects the call, and the second one the size of the chunks of a response. The responses follow,
//! separated by `\n--\n`. A response that begins with `!` is an error. A response that begins with `*` is the data of a
//! record, which is signed first.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use dim_ipfs::keys::Key;
use dim_ipfs::kubo::{Settings, backend};
use dim_ipfs::{Backend, BackendError, Current, Publication};
use futures::StreamExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::{APART, ipns_records, parts};

/// Maximum time of a call that the daemon answers immediately.
const PATIENCE: Duration = Duration::from_secs(20);

/// Maximum number of messages that are read of a stream.
const MESSAGES: usize = 64;

/// A fake daemon with prepared responses, and a client of it.
struct Daemon {
    runtime: Runtime,
    backend: Backend,
    answers: Arc<Mutex<Answers>>,
    key: Key,
}

#[derive(Default)]
struct Answers {
    /// The remaining responses in reverse order. The final one is repeated.
    left: Vec<Bytes>,
    piece: usize,
}

impl Daemon {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let answers: Arc<Mutex<Answers>> = Arc::default();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        runtime.spawn(serve(listener, answers.clone()));
        let settings = Settings { address: of(address), authorization: None };
        let backend = backend(&settings).expect("a client");
        Self { runtime, backend, answers, key: Key::Own(Arc::new(ipns_records::key())) }
    }
}

fn of(address: SocketAddr) -> dim_ipfs::kubo::Address {
    format!("http://{address}").parse().expect("an address")
}

async fn serve(listener: TcpListener, answers: Arc<Mutex<Answers>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Responses are short: send them without delay.
        let _ = stream.set_nodelay(true);
        let answers = answers.clone();
        let service = service_fn(move |request| answer(request, answers.clone()));
        tokio::spawn(async move {
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
        });
    }
}

type Body = StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

async fn answer(
    request: http::Request<Incoming>,
    answers: Arc<Mutex<Answers>>,
) -> Result<http::Response<Body>, Infallible> {
    // Read the whole request, so that the connection can be used again.
    let _ = request.into_body().collect().await;
    let (body, piece) = {
        let mut answers = answers.lock().expect("nobody panics with it");
        let last = answers.left.len() <= 1;
        let body = if last { answers.left.last().cloned() } else { answers.left.pop() };
        (body.unwrap_or_default(), answers.piece)
    };
    let (status, body) = match body.strip_prefix(b"!") {
        Some(error) => (500, Bytes::copy_from_slice(error)),
        None => (200, body),
    };
    let size = if piece == 0 { body.len().max(1) } else { piece };
    let pieces: Vec<_> =
        body.chunks(size).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
    let mut response = http::Response::new(StreamBody::new(futures::stream::iter(pieces)));
    *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
    Ok(response)
}

/// Returns the bytes of a response. Signs the data of a record.
fn said(answer: &[u8]) -> Bytes {
    match answer.strip_prefix(b"*") {
        Some(data) => ipns_records::of_data(data).into(),
        None => Bytes::copy_from_slice(answer),
    }
}

/// Makes the selected call. It must end within `PATIENCE`.
pub fn run(data: &[u8]) {
    thread_local! {
        static DAEMON: Daemon = Daemon::new();
    }
    let [call, piece, data @ ..] = data else { return };
    DAEMON.with(|daemon| {
        let mut left: Vec<Bytes> = parts(data).into_iter().map(said).collect();
        left.reverse();
        *daemon.answers.lock().expect("nobody panics with it") = Answers { left, piece: usize::from(*piece) };
        let done = async { tokio::time::timeout(PATIENCE, daemon.call(*call)).await };
        let result = daemon.runtime.block_on(done).expect("a call ends");
        if let Err(error) = result {
            assert!(!error.to_string().is_empty());
        }
    });
}

impl Daemon {
    async fn call(&self, call: u8) -> Result<(), BackendError> {
        let Backend { content, names, pubsub, swarm, .. } = &self.backend;
        let (topic, key_name) = ("t".parse().expect("a topic"), "k".parse().expect("a key's name"));
        let path = "/ipfs/bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy".parse();
        let path: dim_model::ident::ContentPath = path.expect("a path");
        let (cid, _) = path.ipfs().expect("a file");
        match call % 14 {
            0 => {
                let messages = pubsub.subscribe(&topic).await?;
                let mut messages = messages.take(MESSAGES);
                while let Some(message) = messages.next().await {
                    let message = message?;
                    assert!(!message.from.to_string().is_empty());
                }
            }
            1 => pubsub.publish(&topic, Bytes::from_static(b"x")).await?,
            2 => drop(pubsub.peers(&topic).await?),
            3 => drop(pubsub.topics().await?),
            4 => drop(swarm.is_connected().await?),
            5 => drop(swarm.daemon().await?),
            6 => content.put(&cid, Bytes::from_static(b"x")).await?,
            7 => {
                let (_, file) = content.file(&path, 1 << 20).await?;
                assert!(file.len() <= 1 << 20);
            }
            8 => {
                content.is_pinned(&cid).await?;
                content.unpin(&cid).await?;
            }
            9 => drop(names.prepare(&key_name, &self.key).await?),
            10 => {
                let (key, second) = (self.key.clone(), Duration::from_secs(1));
                let publication = Publication {
                    key_name,
                    key,
                    path: path.clone(),
                    sequence: 3,
                    current: Some(Current { path: path.clone(), sequence: Some(2) }),
                    lifetime: second,
                    ttl: second,
                };
                drop(names.publish(&publication).await?);
            }
            11 => drop(names.keys().await?),
            13 => {
                drop(names.current(&self.key.name()).await?);
                drop(names.dnslink(&"fleet.example.org".parse().expect("a domain")).await?);
            }
            _ => {
                let name = self.key.name();
                let record = self.backend.record(&name).await?;
                drop(self.backend.end_of_chain(record.path).await?);
            }
        }
        Ok(())
    }
}

/// Returns responses of a real daemon.
pub fn seeds() -> Vec<Vec<u8>> {
    let message = r#"{"from":"12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf","data":"uaGk","seqno":"uFwQ","topicIDs":["udA"]}"#;
    let error = r#"!{"Message":"not pinned or pinned indirectly","Code":0,"Type":"error"}"#;
    let name = "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w";
    let calls: Vec<(u8, u8, String)> = vec![
        (0, 0, format!("{message}\n{message}\n\n{message}\n")),
        (0, 7, format!("{message}\n{message}")),
        (0, 0, "!{\"Message\":\"experimental pubsub feature not enabled. Run daemon with --enable-pubsub-experiment\"}".to_owned()),
        (1, 0, String::new()),
        (2, 0, r#"{"Strings":["12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"]}"#.to_owned()),
        (3, 0, r#"{"Strings":["udA","uZGltLmpvYnM"]}"#.to_owned()),
        (4, 0, r#"{"Peers":[{"Addr":"/ip4/127.0.0.1/tcp/1","Peer":"12D3"}]}"#.to_owned()),
        (5, 0, r#"{"ID":"12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"}"#.to_owned()),
        (6, 0, r#"{"Name":"x","Hash":"bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy","Size":"1"}"#.to_owned()),
        (7, 0, "x".to_owned()),
        (8, 0, error.to_owned()),
        (9, 0, format!("{{\"Keys\":[{{\"Name\":\"k\",\"Id\":\"{name}\"}}]}}\n--\n{{\"Name\":\"k\",\"Id\":\"{name}\"}}")),
        (9, 0, format!("{{\"Keys\":[]}}\n--\n{{\"Name\":\"k\",\"Id\":\"{name}\"}}")),
        (10, 0, format!("{{\"Keys\":[]}}\n--\n{{\"Name\":\"{name}\",\"Value\":\"/ipfs/x\"}}")),
        (11, 0, format!("{{\"Keys\":[{{\"Name\":\"self\",\"Id\":\"{name}\"}}]}}")),
        (12, 0, "{\"Extra\":\"CAE=\",\"Type\":5}".to_owned()),
    ];
    let mut seeds: Vec<Vec<u8>> =
        calls.into_iter().map(|(call, piece, said)| [&[call, piece], said.as_bytes()].concat()).collect();
    let record = [b"*", ipns_records::data().as_slice()].concat();
    seeds.push([&[12, 0], record.as_slice()].concat());
    seeds.push([&[10, 0], [record.as_slice(), b"{}", &record].join(APART).as_slice()].concat());
    seeds
}
