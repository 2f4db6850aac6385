//! What a daemon may do to its callers, from `kubo-facts`: each trap once, by a stand-in that
//! answers what it is told and remembers what it was asked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_ipfs::keys::Key;
use dim_ipfs::kubo::{Settings, backend};
use dim_ipfs::{Backend, BackendError, Prepared, Publication, unixfs};
use dim_model::ident::{ContentPath, Topic};
use dim_tests::{Kubo, Setup, eventually};
use futures::StreamExt as _;
use multibase::Base;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A daemon's stand-in: it answers byte for byte what it is told, after a pause.
struct StandIn {
    backend: Backend,
    /// The heads of the requests.
    asked: Arc<Mutex<Vec<String>>>,
    /// The most calls that were under way at one time.
    most_at_once: Arc<AtomicUsize>,
}

/// One answer for every call.
async fn stand_in(answer: &'static [u8], pause: Duration) -> StandIn {
    stand_in_with(vec![("", answer)], pause).await
}

/// Answers by the command that they are for, in order; the last one is given again.
async fn stand_in_with(answers: Vec<(&'static str, &'static [u8])>, pause: Duration) -> StandIn {
    let answers = Arc::new(Mutex::new(answers));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = Settings {
        address: format!("http://{}", listener.local_addr().unwrap()).parse().unwrap(),
        authorization: Some("Bearer secret".into()),
    };
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let (now, most_at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (heads, most) = (asked.clone(), most_at_once.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (heads, now, most) = (heads.clone(), now.clone(), most.clone());
            let answers = answers.clone();
            tokio::spawn(async move {
                let (stream, bytes) = request(stream).await;
                let head = head_of(&bytes);
                let answer = next_answer(&mut answers.lock().unwrap(), &head);
                heads.lock().unwrap().push(head);
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(pause).await;
                now.fetch_sub(1, Ordering::SeqCst);
                reply(stream, answer).await;
            });
        }
    });
    StandIn { backend: backend(&settings).unwrap(), asked, most_at_once }
}

fn next_answer(answers: &mut Vec<(&'static str, &'static [u8])>, head: &str) -> &'static [u8] {
    let is_for = |(command, _): &(&str, &[u8])| head.starts_with(&format!("POST /api/v0/{command}"));
    let first = answers.iter().position(is_for).unwrap_or_else(|| panic!("no answer for {head}"));
    if answers.iter().filter(|answer| is_for(answer)).count() > 1 {
        answers.remove(first).1
    } else {
        answers[first].1
    }
}

fn head_of(request: &[u8]) -> String {
    let text = String::from_utf8_lossy(request);
    text.split_once("\r\n\r\n").map_or(&*text, |(head, _)| head).to_owned()
}

/// Reads a request to its end.
async fn request(mut stream: TcpStream) -> (TcpStream, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some(end) = text.find("\r\n\r\n") {
            let head = text[..end].to_owned();
            let lower = head.to_lowercase();
            let length =
                lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            let whole = match length {
                Some(length) => bytes.len() >= end + 4 + length,
                None => !lower.contains("transfer-encoding: chunked") || text.ends_with("0\r\n\r\n"),
            };
            if whole {
                return (stream, bytes);
            }
        }
        let count = stream.read(&mut chunk).await.unwrap_or(0);
        if count == 0 {
            return (stream, bytes);
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
}

async fn reply(mut stream: TcpStream, answer: &[u8]) {
    // A caller that has gone away is one of the things that are tried.
    let _ = stream.write_all(answer).await;
    let _ = stream.shutdown().await;
}

const AT_ONCE: Duration = Duration::ZERO;
const OK_EMPTY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

fn topic() -> Topic {
    "dim.jobs.updates".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_200_where_json_is_due_is_an_error() {
    let daemon = stand_in(OK_EMPTY, AT_ONCE).await;
    let error = daemon.backend.names.keys().await.unwrap_err();
    assert!(matches!(&error, BackendError::Unbelievable { why, .. } if why.contains("empty")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_in_mid_stream_is_found_in_the_trailer() {
    let daemon = stand_in(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Stream-Error\r\nConnection: close\r\n\r\n\
          5\r\nhello\r\n0\r\nX-Stream-Error: the disk is gone\r\n\r\n",
        AT_ONCE,
    )
    .await;
    let path = ContentPath::of(&unixfs::raw_cid(b"hello"));
    let error = daemon.backend.content.file(&path, 100).await.unwrap_err();
    assert!(
        matches!(&error, BackendError::Refused { message, .. } if message == "the disk is gone"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_in_json_and_in_plain_text_are_told() {
    let daemon = stand_in(
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
          {\"Message\":\"experimental pubsub feature not enabled\",\"Code\":0,\"Type\":\"error\"}",
        AT_ONCE,
    )
    .await;
    let error = daemon.backend.pubsub.publish(&topic(), Bytes::new()).await.unwrap_err().to_string();
    assert!(error.contains("experimental pubsub feature not enabled; `ipfs config"), "{error}");
    let daemon = stand_in(
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n403 - Access Denied\n",
        AT_ONCE,
    )
    .await;
    let error = daemon.backend.pubsub.publish(&topic(), Bytes::new()).await.unwrap_err().to_string();
    assert!(error.contains("403 - Access Denied"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_those_of_their_cid_are_refused() {
    let daemon =
        stand_in(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwrong", AT_ONCE).await;
    let path = ContentPath::of(&unixfs::raw_cid(b"right"));
    let error = daemon.backend.content.file(&path, 100).await.unwrap_err();
    assert!(matches!(error, BackendError::Unbelievable { .. }), "{error}");
    let other = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"Name\":\"file\",\"Hash\":\"bafkqaaa\",\"Size\":\"5\"}\n";
    let daemon = stand_in(other, AT_ONCE).await;
    let error = daemon
        .backend
        .content
        .put(&unixfs::raw_cid(b"right"), Bytes::from_static(b"right"))
        .await
        .unwrap_err();
    assert!(matches!(error, BackendError::Unbelievable { call: "add", .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_go_one_at_a_time_with_their_headers_and_units() {
    let daemon = stand_in(OK_EMPTY, Duration::from_millis(20)).await;
    let publishes = (0..8).map(|_| async {
        daemon.backend.pubsub.publish(&topic(), Bytes::from_static(b"x")).await.unwrap();
    });
    futures::future::join_all(publishes).await;
    assert_eq!(daemon.most_at_once.load(Ordering::SeqCst), 1);
    let asked = daemon.asked.lock().unwrap();
    assert_eq!(asked.len(), 8);
    for head in asked.iter() {
        let (first, rest) = head.split_once("\r\n").unwrap();
        assert!(first.starts_with("POST /api/v0/pubsub/pub?"), "{first}");
        // Topics as multibase base64url; a timeout without a unit answers with nothing.
        assert!(first.contains("arg=uZGltLmpvYnMudXBkYXRlcw") && first.contains("timeout=10s"), "{first}");
        let rest = rest.to_lowercase();
        assert!(rest.contains("authorization: bearer secret"), "{rest}");
        assert!(rest.contains("user-agent: dim/") && !rest.contains("/kubo/"), "{rest}");
        assert!(rest.contains("content-type: multipart/form-data"), "{rest}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_daemon_holds_nobody_up_for_ever() {
    let daemon = stand_in(OK_EMPTY, Duration::from_secs(3_600)).await;
    let begun = Instant::now();
    let error = daemon.backend.pubsub.publish(&topic(), Bytes::new()).await.unwrap_err();
    assert!(matches!(error, BackendError::Timeout("pubsub/pub")), "{error}");
    assert!(!error.certainly_not_sent(), "it may have been sent");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_come_from_a_stream_until_it_turns_to_nonsense() {
    let daemon = stand_in(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
          {\"from\":\"12D3KooWPr7UWisY9hP3jK3M3moYS6yS3PH28b8by5MVeuzk2eTT\",\"data\":\"uAAH_\",\
          \"seqno\":\"uAAAAAAAAAAc\",\"topicIDs\":[\"udG9waWM\"]}\n\nnonsense\n",
        AT_ONCE,
    )
    .await;
    let mut messages = daemon.backend.pubsub.subscribe(&topic()).await.unwrap();
    let message = messages.next().await.unwrap().unwrap();
    assert_eq!((&message.data[..], &message.sequence[..]), (&[0, 1, 255][..], &[0, 0, 0, 0, 0, 0, 0, 7][..]));
    assert!(matches!(messages.next().await, Some(Err(BackendError::Unbelievable { .. }))));
    assert!(messages.next().await.is_none());
}

const TAKEN: &[u8] =
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
    {\"Message\":\"key with name 'fleet' already exists\",\"Code\":0,\"Type\":\"error\"}";
const NO_KEYS: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"Keys\":[]}";
const ONE_KEY: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"Keys\":[{\"Name\":\"fleet\",\
    \"Id\":\"k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w\"}]}";

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_someone_else_made_meanwhile_is_found_by_listing_again() {
    let answers = vec![("key/list", NO_KEYS), ("key/import", TAKEN), ("key/list", ONE_KEY)];
    let daemon = stand_in_with(answers, AT_ONCE).await;
    let pair = libp2p_identity::Keypair::generate_ed25519();
    let prepared = daemon.backend.names.prepare(&"fleet".parse().unwrap(), &Key::Own(Arc::new(pair))).await;
    let theirs = "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w".parse().unwrap();
    assert_eq!(prepared.unwrap(), Prepared::Taken(theirs));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_published_without_waiting_for_its_content() {
    let not_found =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"routing: not found\",\"Code\":0,\"Type\":\"error\"}";
    let daemon = stand_in_with(vec![("name/get", not_found), ("name/publish", OK_EMPTY)], AT_ONCE).await;
    let publication = Publication {
        key_name: "fleet".parse().unwrap(),
        key: Key::Own(Arc::new(libp2p_identity::Keypair::generate_ed25519())),
        path: ContentPath::of(&unixfs::raw_cid(b"hello")),
        sequence: 7,
        current: None,
        lifetime: Duration::from_secs(3_600),
        ttl: Duration::from_secs(60),
    };
    assert_eq!(daemon.backend.names.publish(&publication).await.unwrap().sequence, 7);
    let asked = daemon.asked.lock().unwrap();
    let publish = asked.iter().find(|head| head.contains("name/publish")).unwrap();
    for option in
        ["resolve=false", "allow-offline=true", "lifetime=3600s", "ttl=60s", "sequence=7", "key=fleet"]
    {
        assert!(publish.contains(option), "{option} in {publish}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_has_looked_in_vain_is_told_from_one_that_does_not_answer() {
    let gave_up =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"context deadline exceeded\",\"Code\":0,\"Type\":\"error\"}";
    let name = dim_ipfs::keys::name_of(&libp2p_identity::Keypair::generate_ed25519());
    let daemon = stand_in(gave_up, AT_ONCE).await;
    assert!(daemon.backend.names.current(&name).await.unwrap_err().is_deadline_of_daemon());
    let nobody = Settings { address: "http://127.0.0.1:1".parse().unwrap(), authorization: None };
    let refused = backend(&nobody).unwrap().names.current(&name).await.unwrap_err();
    assert!(!refused.is_deadline_of_daemon(), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_added_in_a_form_that_no_configuration_changes() {
    let added = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\
        {\"Name\":\"file\",\"Hash\":\"bafkreibm6jg3ux5qumhcn2b3flc3tyu6dmlb4xa7u5bf44yegnrjhc4yeq\",\"Size\":\"5\"}\n";
    let daemon = stand_in(added, AT_ONCE).await;
    let cid = unixfs::file_cid(b"hello");
    daemon.backend.content.put(&cid, Bytes::from_static(b"hello")).await.unwrap();
    let asked = daemon.asked.lock().unwrap();
    for option in ["chunker=size-1048576", "raw-leaves=true", "cid-version=1", "pin=true"] {
        assert!(asked[0].contains(option), "{option} in {}", asked[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_found_is_told_by_two_messages() {
    let could_not =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"could not resolve name\",\"Code\":0,\"Type\":\"error\"}";
    let not_found =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"routing: not found\",\"Code\":0,\"Type\":\"error\"}";
    let daemon = stand_in_with(vec![("name/get", could_not), ("name/get", not_found)], AT_ONCE).await;
    let name = "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w".parse().unwrap();
    for _ in 0..2 {
        let error = daemon.backend.names.record(&name).await.unwrap_err();
        assert!(matches!(error, BackendError::NotFound(_)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_publish_is_sent_again_until_it_is_accepted_and_in_order() {
    let ignored =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"validation ignored\",\"Code\":0,\"Type\":\"error\"}";
    let publish = |topic: &str| format!("pubsub/pub?arg={}", multibase::encode(Base::Base64Url, topic));
    let (one, two) = (publish("probe.one"), publish("probe.two"));
    let one_is = |answer| (&*one.clone().leak(), answer);
    let answers = vec![
        one_is(&ignored[..]),
        one_is(&ignored[..]),
        one_is(OK_EMPTY),
        ("pubsub/pub", OK_EMPTY),
        ("", NO_KEYS),
    ];
    let daemon = stand_in_with(answers, AT_ONCE).await;
    let host = Setup::probe().on_kubo(&daemon.backend.address).start().await;
    host.run(json!([
        { "do": "publish", "topic": "probe.one", "data": "x" },
        { "do": "publish", "topic": "probe.two", "data": "x" },
    ]))
    .await;
    eventually("both are sent", async || {
        dim_store::outbox::waiting(&host.host.storage.store).unwrap().0 == 0
    })
    .await;
    let asked = daemon.asked.lock().unwrap();
    let sent = |head: &String| [&one, &two].into_iter().position(|publish| head.contains(publish));
    let sent: Vec<_> = asked.iter().filter_map(sent).collect();
    assert_eq!(sent, [0, 0, 0, 1], "the first one three times, then the second");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_no_daemon_accepts_expires() {
    let ignored =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
        {\"Message\":\"validation ignored\",\"Code\":0,\"Type\":\"error\"}";
    let daemon = stand_in(ignored, AT_ONCE).await;
    let setup = Setup::probe().yaml("outbox:\n  expire_after: 1\n").on_kubo(&daemon.backend.address);
    let host = setup.start().await;
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "x" }])).await;
    eventually("it is given up", async || host.host.exchange.sent.expired.load(Ordering::SeqCst) == 1).await;
    eventually("it waits no more", async || {
        dim_store::outbox::waiting(&host.host.storage.store).unwrap().0 == 0
    })
    .await;
    let asked = daemon.asked.lock().unwrap();
    assert!(asked.iter().any(|head| head.contains("pubsub/pub")), "it was tried");
}

/// Stands before a daemon and refuses one command for as long as it is told to; returns its address.
async fn refusing(daemon: &Kubo, command: &'static str, refuses: Arc<AtomicBool>) -> String {
    let port = daemon.api().rsplit('/').next().unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (port, refuses) = (port.clone(), refuses.clone());
            tokio::spawn(async move {
                let (mut stream, request) = request(stream).await;
                if refuses.load(Ordering::SeqCst) && head_of(&request).contains(command) {
                    return reply(stream, UNAVAILABLE).await;
                }
                // One request for each connection, so that each is looked at.
                let end = request.windows(2).position(|pair| pair == b"\r\n").unwrap_or(0);
                let closing = [&request[..end], b"\r\nConnection: close", &request[end..]].concat();
                let Ok(mut daemon) = TcpStream::connect(format!("127.0.0.1:{port}")).await else { return };
                if daemon.write_all(&closing).await.is_ok() {
                    let _ = tokio::io::copy_bidirectional(&mut daemon, &mut stream).await;
                }
            });
        }
    });
    address
}

const UNAVAILABLE: &[u8] = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n\
    Connection: close\r\n\r\n{\"Message\":\"told to refuse\",\"Code\":0,\"Type\":\"error\"}";

#[tokio::test(flavor = "multi_thread")]
async fn documents_whose_names_were_refused_are_unpinned_when_a_newer_one_is_accepted() {
    let Some(kubo) = Kubo::start() else { return };
    let refuses = Arc::new(AtomicBool::new(true));
    let address = refusing(&kubo, "name/publish", refuses.clone()).await;
    let host = Setup::probe().on_kubo(&address).start().await;
    let pins = || kubo.ipfs(&["pin", "ls", "--type=recursive", "-q"]);
    let cid = |number: usize| unixfs::file_cid(format!("{number}").as_bytes()).to_string();
    for number in 0..4 {
        let data = format!("{number}");
        host.run(json!([{ "do": "update-state", "key": "probe-key", "data": data }])).await;
        eventually("it is pinned", async || pins().contains(&cid(number))).await;
    }
    refuses.store(false, Ordering::SeqCst);
    eventually("all but the newest are unpinned", async || {
        (0..4).map(|number| pins().contains(&cid(number))).eq([false, false, false, true])
    })
    .await;
}
