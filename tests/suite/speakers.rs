//! Who may say what: peers of a topic, a node that is bound to a peer, and callers of the API.

use std::path::Path;
use std::time::Duration;

use dim_ipfs::embedded::new_peer;
use dim_model::ident::PeerName;
use dim_tests::{Program, Setup, SupervisedHost, TOKEN, TestHost, eventually, script, with_token};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");
const BEATS: &str = "dim.nodes.heartbeat";

async fn says(host: &TestHost, peer: &PeerName, topic: &str, data: impl Into<bytes::Bytes>) {
    let topic = topic.parse().unwrap();
    host.listening(&topic).await;
    host.host.exchange.bus.as_ref().unwrap().publish_as(peer, &topic, data.into()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_topic_only_those_are_heard_whom_the_config_names() {
    let (friend, stranger) = (new_peer(), new_peer());
    let yaml = format!("topics: {}\n", json!({ "probe.*": { "peers": [friend.to_string()] } }));
    let open = json!({ "config": { "topics": ["probe.in", "open"] }, "grants": { "subscribe": ["probe.*", "open"] } });
    let host = Setup::default().and_probe("probe", open).yaml(&yaml).start().await;
    let add = || script(json!([{ "do": "add", "key": "count" }])).to_string();
    says(&host, &stranger, "probe.in", add()).await;
    says(&host, &friend, "probe.in", add()).await;
    says(&host, &stranger, "open", add()).await;
    eventually("the friend and the open topic are heard", async || {
        host.state_of("probe", "count").await == 2
    })
    .await;
    let hearing = host.host.exchange.links.listening_records.all()[&"probe.in".parse().unwrap()].clone();
    assert_eq!((hearing.refused, hearing.received), (1, 1));
    assert_eq!(hearing.last_refused, Some(stranger));
    assert!(host.dead_letters().is_empty());
    // What the host's own plugins and callers publish is theirs to say.
    let publish = dim_store::effect::Publish { topic: "probe.in".parse().unwrap(), data: add().into() };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    eventually("this host is heard", async || host.state_of("probe", "count").await == 3).await;
}

async fn nodes(host: &TestHost, plugin: &str) -> Vec<String> {
    let nodes = host.query(plugin, "list", json!({})).await.unwrap();
    nodes.as_array().unwrap().iter().map(|node| node["node_id"].as_str().unwrap().to_owned()).collect()
}

fn beat(node: &str) -> String {
    json!({ "node_id": node, "status": "online" }).to_string()
}

fn binding(config: Value) -> Setup {
    let section = json!({ "config": config });
    Setup::bundled()
        .yaml(&format!("plugins: {}\n", json!({ "node-registry": section, "heartbeat-watchdog": section })))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_bound_to_the_first_peer_that_spoke_for_it() {
    let (first, thief) = (new_peer(), new_peer());
    let setup = binding(json!({ "bind_nodes": "first" }));
    let host = setup.start().await;
    says(&host, &first, BEATS, beat("n1")).await;
    eventually("it is known", async || nodes(&host, "node-registry").await == ["n1"]).await;
    let host = setup.start_in(host.stop().await).await;
    says(&host, &thief, BEATS, json!({ "node_id": "n1", "status": "stolen" }).to_string()).await;
    eventually("both plugins refuse it", async || host.dead_letters().len() == 2).await;
    let why = &host.dead_letters()[0];
    assert!(why.contains(&format!("{thief} may not publish for n1: it is bound to {first}")), "{why}");
    let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await.unwrap();
    assert_eq!(node["status"], "online");
    // This host's own are believed.
    let topic: dim_model::ident::Topic = BEATS.parse().unwrap();
    let publish = dim_store::effect::Publish { topic, data: beat("n1").into() };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    host.settled().await;
    assert_eq!(host.dead_letters().len(), 2);
    // The node has another peer now.
    for plugin in ["node-registry", "heartbeat-watchdog"] {
        let was = host.command(plugin, "unbind", json!({ "node_id": "n1" })).await.unwrap();
        assert_eq!(was["was"], first.to_string());
    }
    says(&host, &thief, BEATS, beat("n1")).await;
    host.settled().await;
    assert_eq!(host.dead_letters().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_speaks_through_the_peers_that_the_operator_names() {
    let (own, other) = (new_peer(), new_peer());
    let listed = json!([format!("n1={own}"), format!("rack=7={own}")]);
    let host = binding(json!({ "bind_nodes": "listed", "node_peers": listed })).start().await;
    says(&host, &other, BEATS, beat("n1")).await;
    says(&host, &own, BEATS, beat("n2")).await;
    says(&host, &own, BEATS, beat("n1")).await;
    says(&host, &own, BEATS, beat("rack=7")).await;
    eventually("it is known", async || nodes(&host, "heartbeat-watchdog").await == ["n1", "rack=7"]).await;
    host.settled().await;
    assert_eq!(nodes(&host, "node-registry").await, ["n1", "rack=7"]);
    assert_eq!(host.dead_letters().len(), 4, "{:?}", host.dead_letters());
    let wrong = binding(json!({ "node_peers": ["n1"] })).start().await;
    let refused = wrong.host.not_loaded();
    assert_eq!(refused.len(), 2, "{refused:?}");
    for it in refused {
        assert!(it.reason.contains("\"n1\" is no pair, as in NODE=PEER"), "{}", it.reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_forgotten_is_bound_to_nobody() {
    let (first, next) = (new_peer(), new_peer());
    let config = json!({
        "bind_nodes": "first", "suspect_after_ms": 100, "dead_after_ms": 200, "forget_after_days": 0,
    });
    let registry = json!({ "bind_nodes": "first", "forget_after_days": 0 });
    let yaml = json!({
        "plugins": { "node-registry": { "config": registry }, "heartbeat-watchdog": { "config": config } },
    });
    let host = Setup::bundled().yaml(&yaml.to_string()).start().await;
    says(&host, &first, BEATS, beat("n1")).await;
    eventually("it is known", async || nodes(&host, "heartbeat-watchdog").await == ["n1"]).await;
    eventually("it is forgotten", async || nodes(&host, "heartbeat-watchdog").await.is_empty()).await;
    says(&host, &next, BEATS, beat("n1")).await;
    eventually("it is back", async || nodes(&host, "heartbeat-watchdog").await == ["n1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_a_token_is_required_and_it_is_shown_nowhere() {
    let host = SupervisedHost::start(&Setup::probe()).await;
    let url = host.serve().await;
    dim_client::install_tls();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for path in ["/v1/status", "/metrics", "/healthz", "/v1/nothing"] {
        for shown in [None, Some(""), Some("wrong"), Some(&TOKEN[1..]), Some(&format!("{TOKEN}x"))] {
            let mut request = client.get(format!("{url}{path}"));
            request = shown.into_iter().fold(request, |request, token| request.bearer_auth(token));
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), 401, "{path} {shown:?}");
            assert_eq!(answer.headers()["www-authenticate"], "Bearer");
            let problem = answer.text().await.unwrap();
            assert!(problem.contains("unauthorized") && !problem.contains(TOKEN), "{problem}");
        }
    }
    let basic = client.get(format!("{url}/v1/status")).basic_auth(TOKEN, Some(TOKEN)).send().await.unwrap();
    assert_eq!(basic.status(), 401);
    assert_eq!(with_token().get(format!("{url}/v1/status")).send().await.unwrap().status(), 200);
    // The owner's socket needs none.
    let socket = host.serve_owner().await;
    let owner = reqwest::Client::builder().no_proxy().unix_socket(socket.as_path()).build().unwrap();
    assert_eq!(owner.get("http://dim/v1/status").send().await.unwrap().status(), 200);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_bodies_and_connections_are_bounded() {
    let host = SupervisedHost::start(&Setup::probe()).await;
    let url = host.serve().await;
    let client = with_token();
    let status = |header: String| client.get(format!("{url}/v1/status")).header("x-long", header).send();
    assert_eq!(status("x".repeat(10_000)).await.unwrap().status(), 200);
    let too_long = status("x".repeat(200_000)).await;
    assert!(too_long.is_err() || too_long.is_ok_and(|answer| answer.status() == 431));
    let many = (0..200).fold(client.get(format!("{url}/v1/status")), |request, number| {
        request.header(format!("x-{number}"), "x")
    });
    assert_eq!(many.send().await.unwrap().status(), 431);
    let body = vec![b' '; dim_api::MAX_BODY + 1];
    let body = client.post(format!("{url}/v1/topics/probe.in/messages")).body(body).send().await.unwrap();
    assert_eq!(body.status(), 413);

    // One more than there may be waits until another goes.
    drop(client);
    let address = url.strip_prefix("http://").unwrap();
    let ask = format!("GET /v1/status HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {TOKEN}\r\n\r\n");
    let mut taken = Vec::new();
    let answers = async |stream: &mut TcpStream| {
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        let read = tokio::time::timeout(Duration::from_secs(1), stream.read_exact(&mut head)).await;
        read.is_ok_and(|read| read.is_ok() && head.ends_with(b"200"))
    };
    // Those of the client end on their own.
    loop {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let is_answered = answers(&mut stream).await;
        taken.push(stream);
        if !is_answered {
            break;
        }
    }
    assert_eq!(taken.len(), 9, "8 at a time");
    let mut last = taken.pop().unwrap();
    taken.pop();
    let mut head = [0; 12];
    last.read_exact(&mut head).await.unwrap();
    assert!(head.ends_with(b"200"), "it was its turn");
    drop((last, taken));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_token_is_let_go_and_takes_nobodys_place() {
    let host = SupervisedHost::start(&Setup::probe()).await;
    let url = host.serve().await;
    let address = url.strip_prefix("http://").unwrap();
    // Many more than there may be, of either kind.
    let mut strangers = Vec::new();
    for number in 0..400 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(b"GET /v1/status HTTP/1.1\r\nhost: dim\r\nx-slow: ").await.unwrap();
        }
        strangers.push(stream);
    }
    let client = with_token();
    let status = async || client.get(format!("{url}/v1/status")).send().await.unwrap().status();
    let asked = std::time::Instant::now();
    assert_eq!(status().await, 200, "beside them");
    assert!(asked.elapsed() < Duration::from_secs(4), "it waits for none of them");
    for mut stream in strangers {
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok() && answer.is_empty(), "it is let go");
    }
    assert_eq!(status().await, 200, "who has shown it stays");
    host.stop().await;
}

#[test]
fn secrets_come_from_the_environment_or_a_file_and_are_shown_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let secret = "a-secret-that-nobody-reads";
    std::fs::write(path("token"), format!("{secret}\n")).unwrap();
    let token = path("token");
    let config = json!({
        "api": { "token": { "file": token } },
        "ipfs": { "api_url": "/unix/nowhere/kubo.sock", "api_authorization": { "file": token } },
    });
    std::fs::write(path("config.yaml"), config.to_string()).unwrap();
    let config = path("config.yaml");
    let args = ["--config", config.to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let host = Program::start(Path::new(PROGRAM), &path("state"), &args);
    assert!(!path("state").join(dim_client::TOKEN).exists(), "the operator's own is used");
    let ask = |token: &str, what: &[&str]| {
        let mut command = std::process::Command::new(PROGRAM);
        command.args(["--api", &host.url()]).args(what).env("DIM_TOKEN", token).env_remove("DIM_TOKEN_FILE");
        command.output().unwrap()
    };
    let taken = ask(secret, &["plugin", "ls"]);
    assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    // Well or not: there is no daemon.
    let status = ask(secret, &["status"]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("unix:/nowhere/kubo.sock"), "{status:?}");
    let wrong = ask("another-one-altogether", &["plugin", "ls"]);
    assert_eq!(wrong.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("the API's token is required"));
    for (shown, what) in [
        (String::from_utf8_lossy(&status.stdout).into_owned(), "the status"),
        (host.log(), "the log"),
        (host.metrics(), "the counts"),
        (
            std::fs::read_to_string(format!("/proc/{}/cmdline", host.pid())).unwrap_or_default(),
            "the arguments",
        ),
    ] {
        assert!(!shown.contains(secret), "{what}");
    }
    // One that stands in the config is refused, and not repeated.
    std::fs::write(path("inline.yaml"), format!("ipfs: {{ api_authorization: {secret} }}\n")).unwrap();
    let mut inline = std::process::Command::new(PROGRAM);
    inline.args(["run", "--config", path("inline.yaml").to_str().unwrap(), "--state-dir"]).arg(path("none"));
    let refused = inline.output().unwrap();
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("{ env: NAME }") && !why.contains(secret), "{why}");
}
