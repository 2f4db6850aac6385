//! The config file: what is read from it, what is said of it, and how a running host reads it again.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

use dim_ipfs::embedded::new_peer;
use dim_model::ident::{IpnsName, PeerName};
use dim_tests::{Program, Setup, eventually, soon};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A peer id in the forms of a CID: `k51…` and `bafz…`.
fn as_cids(peer: &PeerName) -> [String; 2] {
    let name: IpnsName = peer.as_str().parse().unwrap();
    let cid = cid::Cid::try_from(name.as_str()).unwrap();
    [name.to_string(), cid.to_string()]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_and_false_are_what_the_documentation_says_of_bind_nodes() {
    for no in ["no", "No", "false", "off", "'no'", ""] {
        let yaml = format!(
            "plugins:\n  node-registry:\n    config:\n      bind_nodes: {no}\n  heartbeat-watchdog: {{ config: {{ bind_nodes: {no} }} }}\n"
        );
        let yaml = yaml.replace("bind_nodes:  }", "bind_nodes: ~ }");
        let host = Setup::bundled().yaml(&yaml).start().await;
        assert_eq!(host.host.not_loaded(), [], "{no}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_the_same_in_every_form_wherever_the_config_names_one() {
    let (friend, own) = (new_peer(), new_peer());
    let [base36, base32] = as_cids(&friend);
    assert!(base36.starts_with("k51") && base32.starts_with("bafz"), "{base36} {base32}");
    let trusts = json!({ "config": { "trusted_observers": [base36, base32, friend.to_string()] } });
    let node_peers: Vec<String> = as_cids(&own).iter().map(|peer| format!("n1={peer}")).collect();
    let binds = json!({ "config": { "node_peers": node_peers } });
    let plugins = json!({ "job-tracker": trusts, "node-registry": trusts, "heartbeat-watchdog": binds });
    let topics = json!({ "dim.nodes.*": { "peers": [base32, as_cids(&own)[0]] } });
    let host = Setup::bundled().yaml(&format!("plugins: {plugins}\ntopics: {topics}\n")).start().await;
    assert_eq!(host.host.not_loaded(), []);
    let says = async |peer: &PeerName, topic: &str, message: Value| {
        let topic = topic.parse().unwrap();
        host.listening(&topic).await;
        host.host.exchange.bus.as_ref().unwrap().publish_as(peer, &topic, message.to_string().into()).await;
    };
    says(&own, "dim.nodes.heartbeat", json!({ "node_id": "n1", "status": "online" })).await;
    says(&friend, "dim.nodes.heartbeat", json!({ "node_id": "n1", "status": "online" })).await;
    eventually("the watchdog has set aside what another peer says of the node", async || {
        host.dead_letters().len() == 1
    })
    .await;
    let now = jiff::Timestamp::now();
    let verdict =
        json!({ "node_id": "n1", "status": "dead", "observer": "f", "timestamp": now, "last_seen": now });
    says(&friend, "dim.nodes.status", verdict).await;
    eventually("its verdict is believed", async || {
        let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await;
        node.is_ok_and(|node| node["status"] == "dead")
    })
    .await;
    for wrong in
        ["", "12D3KooWnobody", "/ipns/k51", "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"]
    {
        let trusts = json!({ "job-tracker": { "config": { "trusted_observers": [wrong] } } });
        let host = Setup::bundled().yaml(&format!("plugins: {trusts}\n")).start().await;
        let refused = host.host.not_loaded();
        assert_eq!(refused.len(), 1, "{wrong}");
        assert!(refused[0].reason.contains("config value \"trusted_observers\": peer id"), "{refused:?}");
    }
}

fn check(dir: &Path, text: &str, args: &[&str]) -> Output {
    let file = dir.join("config.yaml");
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(PROGRAM);
    command
        .args(["config", "check"])
        .arg(&file)
        .args(args)
        .env_remove("DIM_CONFIG")
        .env("RUST_BACKTRACE", "0");
    command.output().unwrap()
}

#[test]
fn a_check_tells_all_that_is_wrong_or_suspicious_at_once_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let text = "ipfs:\n  api_url: nowhere\n  registry_ipns: ../x\ntopic:\nstore:\n  max_byte: 4\ntopics:\n  a:\n    peers:\n\
                plugins:\n  node-registry:\n    config: { bind_nodes: frist, node_peers: [n1], trusted: [] }\n\
                \x20 mine: { file: nowhere.wasm }\napi: { token: { env: DIM_NO_SUCH_VARIABLE } }\norchestrator: {}\n";
    let checked = check(dir.path(), text, &["--output", "json"]);
    assert_eq!(checked.status.code(), Some(1));
    let shown: Value = serde_json::from_slice(&checked.stdout).unwrap();
    let findings = shown["findings"].as_array().unwrap();
    let short = |it: &Value| {
        format!("{} {} {}", it["line"], it["severity"].as_str().unwrap(), it["path"].as_str().unwrap())
    };
    assert_eq!(
        findings.iter().map(short).collect::<Vec<_>>(),
        [
            "2 error ipfs.api_url",
            "3 warning ipfs.registry_ipns",
            "4 warning topic",
            "6 error store.max_byte",
            "9 warning topics.a.peers",
            "12 error plugins.node-registry.config.bind_nodes",
            "12 error plugins.node-registry.config.node_peers",
            "12 error plugins.node-registry.config.trusted",
            "13 error plugins.mine.file",
            "14 warning api.token",
            "15 note orchestrator",
        ]
    );
    assert_eq!((&shown["errors"], &shown["warnings"]), (&json!(6), &json!(4)));
    let told = |path: &str| findings.iter().find(|it| it["path"] == path).unwrap()["message"].to_string();
    assert!(told("plugins.node-registry.config.bind_nodes").contains("did you mean `first`?"));
    let table = check(dir.path(), text, &[]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.starts_with("SEVERITY") && table.lines().count() == 12, "{table}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was started");
}

#[test]
fn a_component_that_is_a_pipe_is_refused_and_nobody_waits_for_its_writer() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.wasm");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let text = format!("plugins: {{ mine: {{ file: {} }} }}\n", pipe.display());
    let checked = check(dir.path(), &text, &[]);
    let shown = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.code() == Some(1) && shown.contains("it is no regular file"), "{checked:?}");
}

#[test]
fn a_check_of_a_right_file_is_well_and_without_a_file_the_one_of_run_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let right = "ipfs: { follow_every: 3 }\nplugins: { node-registry: { config: { bind_nodes: no } } }\nregistry: {}\n";
    let checked = check(dir.path(), right, &[]);
    assert!(checked.status.success(), "{checked:?}");
    let unnamed = |file: Option<&str>| {
        let mut command = Command::new(PROGRAM);
        command.args(["config", "check", "--output", "json"]).env_remove("DIM_CONFIG");
        command.envs(file.map(|file| ("DIM_CONFIG", dir.path().join(file))));
        command.output().unwrap()
    };
    let of_run: Value = serde_json::from_slice(&unnamed(Some("config.yaml")).stdout).unwrap();
    assert!(of_run["file"].as_str().unwrap().ends_with("config.yaml"), "{of_run}");
    let of_defaults: Value = serde_json::from_slice(&unnamed(None).stdout).unwrap();
    assert_eq!((&of_defaults["file"], &of_defaults["findings"]), (&Value::Null, &json!([])));
    assert_eq!(unnamed(Some("nowhere.yaml")).status.code(), Some(1));
    let completions = Command::new(PROGRAM).args(["completions", "bash"]).output().unwrap();
    let completions = String::from_utf8_lossy(&completions.stdout).into_owned();
    assert!(
        completions.contains("dim__subcmd__config__subcmd__check")
            || completions.contains("dim__config__check")
    );
}

#[test]
fn limits_and_topics_with_which_nothing_works_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let text = "limits:\n  plugins: 0\n  default: { memory: 99999999999 }\nstore: { max_bytes: 1 }\n\
                ipfs:\n  pubsub: { job_updates: same, node_heartbeat: same }\n";
    let output = check(dir.path(), text, &["--output", "json"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let paths = told["findings"].as_array().unwrap().iter().map(|it| it["path"].as_str().unwrap());
    let expected = ["limits.plugins", "limits.default", "store.max_bytes", "ipfs.pubsub.node_heartbeat"];
    assert_eq!(paths.collect::<Vec<_>>(), expected, "{told}");
    let slip = check(dir.path(), "ipfs: { registry_ipns: k51abc, jobs_ipns: [k51abc] }\n", &[]);
    let told = String::from_utf8_lossy(&slip.stdout);
    assert!(told.contains("ipfs.registry_ipns") && told.contains("ipfs.jobs_ipns"), "{told}");
    let quoted = check(dir.path(), "plugins: { job-tracker: { disabled: \"true\" } }\n", &[]);
    assert!(quoted.status.success(), "{}", String::from_utf8_lossy(&quoted.stdout));
}

fn hang_up(host: &Program) {
    let sent = Command::new("kill").args(["-HUP", &host.pid().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn a_hangup_has_a_running_host_take_over_what_can_change_and_never_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).unwrap();
    std::fs::write(&config, "plugins: { heartbeat-watchdog: { config: { bind_nodes: no } } }\n").unwrap();
    let host =
        Program::start(Path::new(PROGRAM), &state, &["--embedded", "--config", config.to_str().unwrap()]);
    let is_restricted = || {
        let topics = host.json(&["topic", "ls"]);
        let beats =
            topics.as_array().unwrap().iter().find(|it| it["topic"] == "dim.nodes.heartbeat").cloned();
        beats.is_some_and(|it| it["is_restricted"] == true)
    };
    let reload = || host.json(&["config", "reload"]);
    assert!(!is_restricted());
    assert_eq!((&reload()["changed"], &reload()["needs_restart"]), (&json!([]), &json!([])));
    let peer = new_peer();
    let text = format!(
        "topics: {{ dim.nodes.heartbeat: {{ peers: [{peer}] }} }}\nstore: {{ max_bytes: 1073741824 }}\n\
         plugins: {{ heartbeat-watchdog: {{ config: {{ bind_nodes: first }} }} }}\n"
    );
    std::fs::write(&config, text).unwrap();
    hang_up(&host);
    soon(is_restricted);
    // The last line of the log may be there in part.
    let told = || {
        let log = host.log();
        let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let mut told = lines.filter(|line| line.contains("the config file was read again"));
        told.find(|line| line.contains("SIGHUP")).map(str::to_owned)
    };
    soon(|| told().is_some());
    let told = told().expect("it is in the log");
    for key in
        ["plugins.heartbeat-watchdog.config.bind_nodes", "topics.dim.nodes.heartbeat", "store.max_bytes"]
    {
        assert!(told.contains(key), "{told}");
    }
    let again = reload();
    assert_eq!((&again["changed"], &again["needs_restart"]), (&json!([]), &json!(["store.max_bytes"])));
    // A file with an error changes nothing.
    std::fs::write(&config, "topics: {}\nplugins: { node-registry: { config: { bind_nodes: frist } } }\n")
        .unwrap();
    let refused = host.dim(&["config", "reload"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(5), "{why}");
    assert!(why.contains("line 2, column") && why.contains("did you mean `first`?"), "{why}");
    std::fs::remove_file(&config).unwrap();
    for _ in 0..3 {
        hang_up(&host);
    }
    soon(|| host.log().matches("the config file was not taken over").count() >= 2);
    assert!(is_restricted(), "the host goes on with what it had");
}

#[test]
fn a_file_that_is_half_written_or_no_file_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, "ipfs:\n  follow_every: 7\n").unwrap();
    let args = ["--embedded", "--config", file.to_str().unwrap()];
    let host = Program::start(Path::new(PROGRAM), &dir.path().join("state"), &args);
    let refused = |why: &str| {
        let output = host.dim(&["config", "reload"]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(why), "{error}");
    };
    std::fs::write(&file, "\n").unwrap();
    refused("it is empty");
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    refused("no regular file");
}

#[test]
fn a_hangup_does_not_end_a_host_without_a_config_file() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let host = Program::start(Path::new(PROGRAM), &state, &["--embedded"]);
    hang_up(&host);
    soon(|| host.log().contains("the host runs without a config file"));
    assert_eq!(host.json(&["plugin", "ls"]).as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_goes_on_with_the_state_of_a_plugin_under_its_new_config() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let write = |suspect: u64| {
        let plugins = json!({ "heartbeat-watchdog": { "config": { "suspect_after_ms": suspect, "dead_after_ms": 5000 } } });
        std::fs::write(&file, json!({ "plugins": plugins }).to_string()).unwrap();
    };
    write(4000);
    let text = std::fs::read_to_string(&file).unwrap();
    let host = Setup::bundled().yaml(&text).from_file(&file).start().await;
    let beat = || json!({ "node_id": "n1", "status": "online" }).to_string();
    host.from_peer("dim.nodes.heartbeat", beat()).await;
    let known = async || host.query("heartbeat-watchdog", "list", json!({})).await.unwrap();
    eventually("it is heard", async || known().await.as_array().unwrap().len() == 1).await;
    // Started with these values it would not run.
    write(6000);
    let why = host.host.reload("a test").await.unwrap_err().to_string();
    assert!(why.contains("plugins.heartbeat-watchdog: ") && why.contains("dead_after_ms"), "{why}");
    let config = || host.plugin("heartbeat-watchdog").handle.code().config.clone();
    assert!(config().contains("\"suspect_after_ms\":4000"), "{}", config());
    write(300);
    let reloaded = host.host.reload("a test").await.unwrap();
    assert_eq!(reloaded.changed, ["plugins.heartbeat-watchdog.config.suspect_after_ms"]);
    assert_eq!(reloaded.needs_restart, [] as [String; 0]);
    assert!(config().contains("\"suspect_after_ms\":300"), "{}", config());
    assert_eq!(known().await.as_array().unwrap().len(), 1, "what it knew it knows");
    // It counts for what is heard from then on.
    host.from_peer("dim.nodes.heartbeat", beat()).await;
    eventually("the node is suspect", async || known().await[0]["standing"] == "suspect").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_back_and_gives_what_the_config_grants() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.yaml");
    let write = |subscribe: Value, memory: u64| {
        let section = json!({
            "file": dim_tests::PROBE,
            "grants": { "subscribe": subscribe, "publish": ["probe.*"] },
            "limits": { "memory": memory },
        });
        let others = json!({ "disabled": true });
        let plugins = json!({
            "probe": section, "job-tracker": others, "node-registry": others, "heartbeat-watchdog": others,
        });
        std::fs::write(&file, json!({ "plugins": plugins }).to_string()).unwrap();
    };
    write(json!(["probe.*"]), 32 << 20);
    let text = std::fs::read_to_string(&file).unwrap();
    let host = Setup::default().yaml(&text).from_file(&file).start().await;
    let topics = async || host.run(json!([{ "do": "topics" }])).await;
    assert_eq!(topics().await, [json!(["probe.in"])]);
    write(json!([]), 48 << 20);
    let reloaded = host.host.reload("a test").await.unwrap();
    let (grants, limits) = ("plugins.probe.grants.subscribe", "plugins.probe.limits.memory");
    assert_eq!(reloaded.changed, [grants, limits]);
    assert_eq!(topics().await, [json!([])]);
    assert_eq!(host.plugin("probe").handle.code().limits.memory, 48 << 20);
    write(json!(["probe.*"]), 48 << 20);
    assert_eq!(host.host.reload("a test").await.unwrap().changed, [grants]);
    eventually("it is subscribed again", async || topics().await == [json!(["probe.in"])]).await;
}

/// A server that answers whatever it is sent with a component, and passes on the heads of the requests.
fn server(component: Vec<u8>) -> (u16, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (to, heads) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let mut reader = BufReader::new(stream);
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).is_ok_and(|read| read > 0) {}
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.and_then(|length| length.parse().ok()).unwrap_or(0);
            let _ = std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink());
            let mut stream = reader.into_inner();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                component.len()
            );
            let _ = stream.write_all(answer.as_bytes()).and_then(|()| stream.write_all(&component));
            if to.send(head.to_lowercase()).is_err() {
                return;
            }
        }
    });
    (port, heads)
}

#[test]
fn a_secret_in_a_url_is_used_and_shown_nowhere() {
    let (port, heads) = server(std::fs::read(dim_tests::PROBE).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).unwrap();
    let text = json!({
        "ipfs": { "api_url": format!("http://ada:hush@127.0.0.1:{port}") },
        "telemetry": { "otlp_endpoint": format!("http://bob:hush@127.0.0.1:{port}/?key=hush") },
    });
    std::fs::write(&config, text.to_string()).unwrap();
    let host = Program::start(Path::new(PROGRAM), &state, &["--config", config.to_str().unwrap()]);
    let url = format!("http://eve:hush@127.0.0.1:{port}/p.wasm?token=hush");
    let digest = dim_model::ident::Digest::of(&std::fs::read(dim_tests::PROBE).unwrap()).to_string();
    let installed = host.dim(&["plugin", "install", &url, "--grant", "--trust", &digest]);
    let mut shown = vec![
        String::from_utf8_lossy(&installed.stdout).into_owned(),
        String::from_utf8_lossy(&installed.stderr).into_owned(),
    ];
    assert!(installed.status.success(), "{shown:?}");
    let (mut daemon, mut collector, mut download) = (false, false, false);
    while !(daemon && collector && download) {
        let head = heads.recv_timeout(Duration::from_secs(30)).unwrap();
        // base64 of NAME:hush
        daemon |= head.starts_with("post /api/v0/") && head.contains("authorization: basic ywrhomh1c2g=");
        collector |=
            head.starts_with("post /v1/logs?key=hush ") && head.contains("authorization: basic ym9iomh1c2g=");
        download |=
            head.starts_with("get /p.wasm?token=hush ") && head.contains("authorization: basic zxzlomh1c2g=");
    }
    for args in [
        &["status"][..],
        &["status", "--output", "json"],
        &["plugin", "history", "probe", "--output", "json"],
        &["plugin", "ls", "--output", "json"],
        &["plugin", "inspect", "probe", "--output", "json"],
        &["config", "check", config.to_str().unwrap()],
        &["plugin", "install", &url.replace("p.wasm", "p.wasm#hush"), "--name", "No_Name"],
        &["plugin", "install", "http://ada:hush@127.0.0.1:1/p.wasm?token=hush"],
        &["--api", "http://ada:hush@127.0.0.1:1", "status"],
    ] {
        let output = host.dim(args);
        shown.push(String::from_utf8_lossy(&output.stdout).into_owned());
        shown.push(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    shown.extend([host.log(), host.metrics()]);
    assert!(shown.iter().any(|text| text.contains(&format!("http://***@127.0.0.1:{port}"))));
    for text in shown {
        assert!(!text.contains("hush"), "{text}");
    }
}
