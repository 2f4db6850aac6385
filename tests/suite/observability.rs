//! What is seen of a host from outside: counts, and the log at a collector.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use dim_ipfs::embedded::new_peer;
use dim_tests::{Program, Setup, SupervisedHost, eventually, soon};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

fn host(dir: &Path, args: &[&str], config: &Value) -> Program {
    let (state, file) = (dir.join("state"), dir.join("config.yaml"));
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(&file, config.to_string()).unwrap();
    let args = [&["--config", file.to_str().unwrap()], args].concat();
    Program::start(Path::new(PROGRAM), &state, &args)
}

/// The value of a series.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{metrics}")).parse().unwrap()
}

#[test]
fn counts_tell_of_plugins_topics_names_the_outbox_and_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), &["--embedded"], &json!({}));
    host.json(&["job", "update", "j1", "running"]);
    host.json(&["topic", "pub", "dim.jobs.updates", "no event"]);
    soon(|| value(&host.metrics(), "dim_dead_letters") == 1.0);
    soon(|| value(&host.metrics(), "dim_outbox_waiting") == 0.0);
    let handled = "dim_plugin_handled_total{plugin=\"job-tracker\"}";
    soon(|| value(&host.metrics(), handled) >= 2.0);
    let metrics = host.metrics();
    let of_tracker = |name: &str| value(&metrics, &format!("dim_plugin_{name}{{plugin=\"job-tracker\"}}"));
    assert_eq!(of_tracker("failures_total"), 1.0);
    assert_eq!(of_tracker("dead_letters_total"), 1.0);
    assert!(of_tracker("state_writes_total") >= 1.0 && of_tracker("name_updates_total") >= 1.0);
    assert_eq!(of_tracker("publishes_total"), 1.0);
    assert!(of_tracker("cpu_seconds_total") > 0.0 && of_tracker("memory_bytes") > 65_536.0);
    assert!(of_tracker("behind") <= 10.0 && of_tracker("behind_seconds") < 20.0);
    assert_eq!(of_tracker("failing"), 0.0);
    let of_topic = |name: &str| value(&metrics, &format!("dim_topic_{name}{{topic=\"dim.jobs.updates\"}}"));
    assert_eq!((of_topic("connected"), of_topic("lost_total"), of_topic("gaps_total")), (1.0, 0.0, 0.0));
    soon(|| value(&host.metrics(), "dim_topic_listening{topic=\"dim.jobs.updates\"}") == 1.0);
    assert_eq!(value(&metrics, "dim_outbox_queue_limit{owner=\"api\"}"), 10_000.0);
    let age = "dim_name_confirmed_age_seconds{key=\"dim-state-key-jobs\"}";
    soon(|| host.metrics().contains(age));
    assert!(value(&host.metrics(), age) < 20.0);
    assert!(value(&metrics, "dim_store_bytes{part=\"log\"}") > 0.0);
    assert!(value(&metrics, "dim_disk_free_bytes") > 0.0);
    assert_eq!(value(&metrics, "dim_intake_stopped"), 0.0);
    assert!(value(&metrics, "dim_commit_sync_seconds_count") >= 2.0);
    assert!(value(&metrics, "dim_commit_sync_seconds_sum") > 0.0);
    assert!(metrics.ends_with("# EOF\n"));
}

#[test]
fn status_and_health_say_what_is_wrong_and_since_when() {
    let dir = tempfile::tempdir().unwrap();
    // More than any disk has.
    let config = json!({ "store": { "min_free_bytes": 1_u64 << 60 } });
    let host = host(dir.path(), &["--embedded"], &config);
    let status = host.json(&["status"]);
    assert_eq!(status["healthy"], false);
    let trouble = status["troubles"][0].as_str().unwrap();
    assert!(trouble.starts_with("the intake is stopped since 20"), "{trouble}");
    assert!(trouble.contains("1152921504606846976 must stay free"), "{trouble}");
    let refused = host.dim(&["job", "update", "j1", "running"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("the intake is stopped"), "{error}");
    assert!(host.dim(&["job", "ls"]).status.success(), "questions are answered");
    let details = &status["trouble_details"][0];
    assert_eq!((&details["code"], &details["severity"]), (&json!("intake-stopped"), &json!("error")));
    assert_eq!(details["message"], trouble);
    assert_eq!(host.dim(&["status"]).status.code(), Some(1));
    let (ready, why) = get(&host.socket(), "/readyz", "*/*");
    assert!(ready == 503 && why.starts_with("the intake is stopped since 20"), "{ready} {why}");
    assert_eq!(get(&host.socket(), "/livez", "*/*"), (200, "ok\n".to_owned()));
    let text = String::from_utf8(host.dim(&["status"]).stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with("disk ")), "{text}");
}

/// A collector that passes on what it is sent: the head and the body of each request.
fn collector() -> (u16, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (to, sent) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let (mut bytes, mut chunk) = (Vec::new(), [0; 65_536]);
            let head = loop {
                let Ok(length @ 1..) = stream.read(&mut chunk) else { break None };
                bytes.extend_from_slice(&chunk[..length]);
                if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                    break Some(
                        String::from_utf8_lossy(&bytes.drain(..end + 4).collect::<Vec<_>>()).into_owned(),
                    );
                }
            };
            let Some(head) = head else { continue };
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            while bytes.len() < length.unwrap_or(0) {
                let Ok(length @ 1..) = stream.read(&mut chunk) else { break };
                bytes.extend_from_slice(&chunk[..length]);
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            if to.send((head, bytes)).is_err() {
                return;
            }
        }
    });
    (port, sent)
}

#[test]
fn the_log_goes_to_a_collector_where_the_config_says_so() {
    let (port, sent) = collector();
    let dir = tempfile::tempdir().unwrap();
    let config = json!({ "telemetry": {
        "otlp_endpoint": format!("http://127.0.0.1:{port}"),
        "service_name": "fleet-one", "headers": { "x-fleet": "one" },
    } });
    let host = host(dir.path(), &["--embedded"], &config);
    let holds = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    let next = || sent.recv_timeout(Duration::from_secs(20)).unwrap();
    let (head, body) = std::iter::repeat_with(next).find(|(_, body)| holds(body, "the API is at")).unwrap();
    assert!(head.starts_with("POST /v1/logs ") && head.contains("x-fleet: one"), "{head}");
    assert!(head.contains("application/x-protobuf"), "{head}");
    assert!(holds(&body, "fleet-one"));
    // What is logged last is sent before the end.
    host.interrupt();
    assert!(host.wait().success());
    let rest: Vec<Vec<u8>> = sent.try_iter().map(|(_, body)| body).collect();
    assert!(rest.iter().any(|body| holds(body, "shutting down")), "{} more", rest.len());
    assert!(!rest.iter().any(|body| holds(body, "hyper")), "exporting is not exported");
}

/// The status and the body of an answer.
fn get(socket: &Path, path: &str, accept: &str) -> (u16, String) {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--write-out", "\n%{http_code}", "--header", &format!("accept: {accept}")]);
    let asked = curl.arg("--unix-socket").arg(socket).arg(format!("http://dim{path}")).output().unwrap();
    let text = String::from_utf8(asked.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

/// Sends a signal to a process.
fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Whether a process ends within `longest`.
fn ends_within(child: &mut Child, longest: Duration) -> bool {
    let deadline = Instant::now() + longest;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

#[test]
fn a_log_that_nobody_reads_blocks_neither_commands_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir_all(&state).unwrap();
    dim_tests::warm(&state);
    let mut host = Command::new(PROGRAM)
        .args(["run", "--embedded", "--state-dir"])
        .arg(&state)
        .env("DIM_LOG", "trace")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let dim = |args: &[&str]| {
        let asked = Command::new(PROGRAM).args(args).arg("--state-dir").arg(&state).output().unwrap();
        asked.status.success()
    };
    soon(|| dim(&["job", "ls"]));
    // Each logs several lines; a pipe takes 64 KiB and the queue 1 MiB.
    let counts = || get(&state.join("api.sock"), "/metrics", "*/*").1;
    soon(|| {
        assert!(dim(&["job", "update", "j1", "running"]), "an order is carried out");
        value(&counts(), "dim_log_lines_dropped_total") > 0.0
    });
    signal(host.id(), "TERM");
    let is_ended = ends_within(&mut host, Duration::from_secs(15));
    if !is_ended {
        host.kill().unwrap();
    }
    assert!(is_ended && host.wait().unwrap().success(), "the first signal ends the host in order");
}

#[test]
fn two_signals_at_once_are_one_request_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), &["--embedded"], &json!({}));
    // As `timeout` does: one to the process, one to its group.
    signal(host.pid(), "TERM");
    signal(host.pid(), "INT");
    let log = dir.path().join("state.log");
    assert!(host.wait().success(), "{}", std::fs::read_to_string(log).unwrap());
}

#[test]
fn a_daemon_that_is_killed_shows_in_seconds_and_the_host_stays_alive_and_ready() {
    let Some(mut kubo) = dim_tests::Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), &["--kubo", kubo.api()], &json!({}));
    let health = |accept: &str| get(&host.socket(), "/healthz", accept);
    soon(|| health("*/*") == (200, "ok\n".to_owned()));
    let well: Value = serde_json::from_str(&health("application/json").1).unwrap();
    assert_eq!(well, json!({ "healthy": true, "troubles": [] }));
    assert_eq!(host.dim(&["status"]).status.code(), Some(0));
    kubo.kill();
    let killed = Instant::now();
    soon(|| health("*/*").0 == 503);
    // 2 s, and what a busy machine adds; silence alone is a trouble after 30 s only.
    assert!(killed.elapsed() < Duration::from_secs(8), "{:?}", killed.elapsed());
    let (status, body) = health("text/html, application/json;q=0.9");
    let ill: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &ill["healthy"]), (503, &json!(false)));
    let trouble = &ill["troubles"][0];
    assert_eq!((&trouble["code"], &trouble["severity"]), (&json!("not-listening"), &json!("error")));
    assert!(trouble["since"].is_string() && trouble["subject"].is_string(), "{trouble}");
    assert_eq!(host.dim(&["status"]).status.code(), Some(1));
    assert_eq!(get(&host.socket(), "/livez", "*/*").0, 200, "a restart would not mend it");
    assert_eq!(get(&host.socket(), "/readyz", "*/*").0, 200, "what comes is taken in");
    kubo.restart();
    soon(|| health("*/*").0 == 200);
}

#[test]
fn a_plugin_that_is_paused_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let host = host(dir.path(), &["--embedded"], &json!({}));
    let health = || {
        let (status, body) = get(&host.socket(), "/healthz", "application/json");
        (status, serde_json::from_str::<Value>(&body).unwrap()["troubles"].clone())
    };
    soon(|| health() == (200, json!([])));
    host.json(&["plugin", "pause", "job-tracker"]);
    soon(|| health().1[0]["code"] == "plugin-paused" && health().1[0]["subject"] == "job-tracker");
    assert_eq!((health().0, &health().1[0]["severity"]), (200, &json!("warning")));
    host.json(&["plugin", "resume", "job-tracker"]);
    soon(|| health() == (200, json!([])));
}

#[test]
fn a_daemon_that_is_away_shows_in_seconds_though_nothing_listens() {
    let Some(mut kubo) = dim_tests::Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disabled = json!({ "disabled": true });
    let plugins =
        json!({ "job-tracker": disabled, "node-registry": disabled, "heartbeat-watchdog": disabled });
    let host = host(dir.path(), &["--kubo", kubo.api()], &json!({ "plugins": plugins }));
    let health = || get(&host.socket(), "/healthz", "application/json");
    soon(|| health().0 == 200);
    kubo.kill();
    let killed = Instant::now();
    soon(|| health().0 == 503);
    assert!(killed.elapsed() < Duration::from_secs(8), "{:?}", killed.elapsed());
    let ill: Value = serde_json::from_str(&health().1).unwrap();
    assert_eq!(ill["troubles"][0]["code"], "daemon-away", "{ill}");
    kubo.restart();
    soon(|| health().0 == 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_first_start_acknowledges_before_its_plugins_are_loaded_is_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let options = dim_server::host::Options::new(dim_tests::Setup::bundled().config(), dir.path());
    let host = dim_server::host::Host::begin(options).await.unwrap();
    let update = json!({ "job_id": "early", "event_type": "running" });
    let topic = host.config.now().ipfs.pubsub.job_updates.clone();
    let early = dim_store::effect::Publish { topic, data: update.to_string().into() };
    host.storage.commit.publish(early, host.storage.log.now()).await.unwrap();
    host.load().await.unwrap();
    let tracker = host.plugins.get("job-tracker").unwrap();
    dim_tests::eventually("the tracker knows the job", async || {
        let reply = tracker.handle.query("list".to_owned(), "{}".to_owned()).await.unwrap();
        reply.contains("early")
    })
    .await;
    host.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_is_behind_by_what_waits_for_it_and_not_by_what_others_read() {
    let idle = json!({ "config": { "topics": ["probe.idle"] } });
    let host = dim_tests::Setup::probe().and_probe("idle", idle).start().await;
    let behind = || {
        let cursor = host.plugin("idle").handle.status().cursor;
        host.host.storage.log.waiting(&"idle".parse().unwrap(), dim_model::entry::Offset(cursor))
    };
    host.from_peer("probe.idle", "{}").await;
    host.settled().await;
    for _ in 0..300 {
        host.from_peer("probe.in", "{}").await;
        assert_eq!(behind(), 0, "nothing waits for it");
    }
    host.plugin("idle").handle.pause(true);
    dim_tests::eventually("it is paused", async || host.plugin("idle").handle.status().state == "paused")
        .await;
    for _ in 0..3 {
        host.from_peer("probe.in", "{}").await;
        host.from_peer("probe.idle", "{}").await;
    }
    dim_tests::eventually("three messages wait for it", async || behind() == 3).await;
    host.plugin("idle").handle.pause(false);
    dim_tests::eventually("it has read them", async || behind() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_past_event_is_shown_until_it_is_acknowledged_and_when_it_happens_again() {
    let (friend, stranger) = (new_peer(), new_peer());
    let yaml = format!("topics: {}\n", json!({ "probe.in": { "peers": [friend.to_string()] } }));
    let setup = Setup::probe().yaml(&yaml);
    let host = SupervisedHost::start(&setup).await;
    let api = format!("unix:{}", host.serve_owner().await.display());
    let dim = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).args(["--api", &api]);
        tokio::task::block_in_place(|| command.output().unwrap())
    };
    let json = |args: &[&str]| -> Value {
        let output = dim(&[args, &["--output", "json"]].concat());
        assert!(
            output.status.success(),
            "a warning is no error: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let topic: dim_model::ident::Topic = "probe.in".parse().unwrap();
    let running = host.host().unwrap();
    let is_heard = async || {
        running
            .exchange
            .links
            .listening_records
            .all()
            .get(&topic)
            .is_some_and(|it| it.connected_since.is_some())
    };
    eventually("the topic is listened to", is_heard).await;
    let is_refused = |times: &'static str| {
        move |status: Value| {
            let trouble = &status["trouble_details"][0];
            trouble["code"] == "messages-refused"
                && trouble["past"] == true
                && trouble["message"].as_str().unwrap().contains(times)
        }
    };
    for times in ["the host started: 1,", "the host started: 2,"] {
        running.exchange.bus.as_ref().unwrap().publish_as(&stranger, &topic, "from a stranger".into()).await;
        eventually("it is shown", async || is_refused(times)(json(&["status"]))).await;
        let shown = String::from_utf8(dim(&["status"]).stdout).unwrap();
        assert!(shown.contains("well, with warnings") && shown.contains("--acknowledge"), "{shown}");
        let put_aside = json(&["status", "--acknowledge"]);
        assert_eq!(
            (&put_aside[0]["code"], &put_aside[0]["subject"]),
            (&json!("messages-refused"), &json!("probe.in"))
        );
        assert_eq!(json(&["status"])["trouble_details"], json!([]));
        assert_eq!(json(&["status", "--acknowledge"]), json!([]), "it is put aside once");
        let shown = String::from_utf8(dim(&["status"]).stdout).unwrap();
        assert!(shown.contains("all is well"), "{shown}");
    }
    drop(running);
    host.stop().await;
}
