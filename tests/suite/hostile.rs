//! Messages that no plugin should trip over: each ends as a dead letter or changes nothing, and the
//! line goes on.

use std::sync::atomic::{AtomicBool, Ordering};

use dim_tests::{Setup, TestHost, eventually};
use serde_json::{Value, json};

const JOBS: &str = "dim.jobs.updates";
const RESULTS: &str = "dim.results.ready";
const BEATS: &str = "dim.nodes.heartbeat";
const VERDICTS: &str = "dim.nodes.status";

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Set aside by so many plugins.
    Dead(usize),
    /// Handled, and nothing has changed.
    Nothing,
    /// A sign of life of this node, of which a member costs itself and is named.
    Partly(&'static str),
}

use Fate::{Dead, Nothing, Partly};

/// Each kind: the topic, the bytes, and what becomes of it. Job `done` is completed and job `busy`
/// is running on `n1`, which is alive.
fn kinds() -> Vec<(&'static str, &'static str, Vec<u8>, Fate)> {
    let text = |text: &str| text.as_bytes().to_vec();
    let value = |value: Value| value.to_string().into_bytes();
    let long = "x".repeat(300);
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let wide =
        format!("{{\"job_id\":\"wide\",\"event_type\":\"queued\",\"data\":\"{}\"}}", "y".repeat(1 << 20));
    vec![
        // No JSON, or no object.
        ("empty", JOBS, text(""), Dead(1)),
        ("blank", JOBS, text(" \n"), Dead(1)),
        ("not UTF-8", JOBS, vec![0xff, 0xfe, 0x80], Dead(1)),
        ("zero bytes", JOBS, vec![0; 64], Dead(1)),
        ("words", JOBS, text("job 1 is done"), Dead(1)),
        ("cut off", JOBS, text("{\"job_id\":\"a\",\"event_type\":\"runn"), Dead(1)),
        ("two values", JOBS, text("{} {}"), Dead(1)),
        ("a number", JOBS, text("7"), Dead(1)),
        ("a list", JOBS, text("[]"), Dead(1)),
        ("null", JOBS, text("null"), Dead(1)),
        ("nested ten thousand deep", JOBS, deep.clone().into_bytes(), Dead(1)),
        ("NaN", JOBS, text("{\"job_id\":\"a\",\"event_type\":\"queued\",\"timestamp\":NaN}"), Dead(1)),
        ("a byte order mark", JOBS, text("\u{feff}{\"job_id\":\"a\",\"event_type\":\"queued\"}"), Dead(1)),
        // Members that are missing or wrong.
        ("no job_id", JOBS, value(json!({ "event_type": "queued" })), Dead(1)),
        ("no event_type", JOBS, value(json!({ "job_id": "a" })), Dead(1)),
        ("job_id a number", JOBS, value(json!({ "job_id": 1, "event_type": "queued" })), Dead(1)),
        ("job_id null", JOBS, value(json!({ "job_id": null, "event_type": "queued" })), Dead(1)),
        ("job_id empty", JOBS, value(json!({ "job_id": "", "event_type": "queued" })), Dead(1)),
        ("job_id too long", JOBS, value(json!({ "job_id": long, "event_type": "queued" })), Dead(1)),
        (
            "job_id with a control character",
            JOBS,
            value(json!({ "job_id": "a\u{1b}[2J", "event_type": "queued" })),
            Dead(1),
        ),
        ("event_type unknown", JOBS, value(json!({ "job_id": "a", "event_type": "exploded" })), Dead(1)),
        ("event_type an object", JOBS, value(json!({ "job_id": "a", "event_type": {} })), Dead(1)),
        (
            "timestamp nonsense",
            JOBS,
            value(json!({ "job_id": "a", "event_type": "queued", "timestamp": "soon" })),
            Dead(1),
        ),
        (
            "timestamp before 1970",
            JOBS,
            value(json!({ "job_id": "a", "event_type": "queued", "timestamp": -1 })),
            Dead(1),
        ),
        (
            "timestamp after 9999",
            JOBS,
            value(json!({ "job_id": "a", "event_type": "queued", "timestamp": 1e18 })),
            Dead(1),
        ),
        (
            "node_id too long",
            JOBS,
            value(json!({ "job_id": "a", "event_type": "queued", "node_id": long })),
            Dead(1),
        ),
        ("larger than pubsub allows", JOBS, wide.into_bytes(), Nothing),
        // Late, repeated and impossible events.
        (
            "a late start",
            JOBS,
            value(json!({ "job_id": "done", "event_type": "running", "timestamp": 1 })),
            Nothing,
        ),
        ("a late queueing", JOBS, value(json!({ "job_id": "done", "event_type": "queued" })), Nothing),
        ("a second end", JOBS, value(json!({ "job_id": "done", "event_type": "completed" })), Nothing),
        ("another end", JOBS, value(json!({ "job_id": "done", "event_type": "failed" })), Nothing),
        ("an end taken back", JOBS, value(json!({ "job_id": "done", "event_type": "cancelled" })), Nothing),
        ("back into the queue", JOBS, value(json!({ "job_id": "busy", "event_type": "queued" })), Nothing),
        (
            "an older running",
            JOBS,
            value(json!({ "job_id": "busy", "event_type": "running", "timestamp": 2 })),
            Nothing,
        ),
        // Results.
        ("a result without job", RESULTS, value(json!({ "result_cid": "bafy" })), Dead(1)),
        ("a result without cid", RESULTS, value(json!({ "job_id": "done" })), Dead(1)),
        (
            "a result with an empty cid",
            RESULTS,
            value(json!({ "job_id": "done", "result_cid": "" })),
            Dead(1),
        ),
        (
            "the same result again",
            RESULTS,
            value(json!({ "job_id": "done", "result_cid": "bafyresult" })),
            Nothing,
        ),
        (
            "a result that was ready before the one that is known",
            RESULTS,
            value(json!({ "job_id": "done", "result_cid": "bafyearlier", "timestamp": 1 })),
            Nothing,
        ),
        ("a result that is no JSON", RESULTS, text("bafyresult"), Dead(1)),
        // Heartbeats: the registry and the watchdog both hear them.
        ("a heartbeat without node", BEATS, value(json!({ "status": "online" })), Dead(2)),
        ("a heartbeat of an empty node", BEATS, value(json!({ "node_id": "" })), Dead(2)),
        ("a heartbeat of a long node", BEATS, value(json!({ "node_id": long })), Dead(2)),
        ("a heartbeat of a node with a newline", BEATS, value(json!({ "node_id": "a\nb" })), Dead(2)),
        ("a heartbeat that is no object", BEATS, text("\"n1\""), Dead(2)),
        ("a heartbeat nested too deep", BEATS, deep.into_bytes(), Dead(2)),
        (
            "a heartbeat with resources that are none",
            BEATS,
            value(json!({ "node_id": "n9", "resources": 7 })),
            Partly("n9"),
        ),
        (
            "a heartbeat with models that are none",
            BEATS,
            value(json!({ "node_id": "n8", "cached_models": "all" })),
            Partly("n8"),
        ),
        // Verdicts: the registry and the tracker both hear them. A stranger's is not believed.
        ("a verdict that is no JSON", VERDICTS, text("n1 is dead"), Dead(2)),
        ("a verdict without node", VERDICTS, value(json!({ "status": "dead" })), Dead(2)),
        ("a verdict without status", VERDICTS, value(json!({ "node_id": "n1" })), Dead(2)),
        (
            "a stranger's verdict",
            VERDICTS,
            value(json!({ "node_id": "n1", "status": "dead", "observer": "x" })),
            Nothing,
        ),
        (
            "a verdict on an unknown node",
            VERDICTS,
            value(json!({ "node_id": "nobody", "status": "dead" })),
            Nothing,
        ),
    ]
}

async fn fleet() -> TestHost {
    let host = Setup::bundled().start().await;
    host.from_peer(BEATS, json!({ "node_id": "n1", "status": "online" }).to_string()).await;
    for event in [
        json!({ "job_id": "done", "event_type": "running", "node_id": "n1" }),
        json!({ "job_id": "done", "event_type": "completed" }),
        json!({ "job_id": "busy", "event_type": "running", "data": { "node_id": "n1" } }),
    ] {
        host.from_peer(JOBS, event.to_string()).await;
    }
    host.from_peer(RESULTS, json!({ "job_id": "done", "result_cid": "bafyresult" }).to_string()).await;
    eventually("the fleet is set up", async || {
        let done = host.query("job-tracker", "get", json!({ "job_id": "done" })).await;
        done.is_ok_and(|job| job["result_cid"] == "bafyresult" && job["status"] == "completed")
    })
    .await;
    eventually("the node is known", async || {
        host.query("node-registry", "get", json!({ "node_id": "n1" })).await.is_ok()
    })
    .await;
    host
}

/// What an operator sees of jobs and nodes.
async fn visible(host: &TestHost) -> (Value, Value) {
    let jobs = host.query("job-tracker", "list", json!({})).await.unwrap();
    let nodes = host.query("node-registry", "list", json!({})).await.unwrap();
    (jobs, nodes)
}

/// Waits until everything that was sent is in the log and handled.
async fn handled(host: &TestHost, topic: &str) {
    let heard = |host: &TestHost| {
        let counters = &host.host.exchange.received;
        let load =
            |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
        load(&counters.received) + load(&counters.oversized)
    };
    let before = heard(host);
    // A message behind it on the same topic: when that one is handled, so is the one before.
    let marker = json!({ "job_id": "marker", "event_type": "queued", "timestamp": 1, "node_id": "marker",
        "result_cid": "marker", "status": "marker" });
    host.from_peer(topic, marker.to_string()).await;
    eventually("the marker is heard", async || heard(host) > before).await;
    host.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_bad_message_meets_its_fate() {
    assert!(kinds().len() >= 40, "{} kinds", kinds().len());
    let host = fleet().await;
    for topic in [JOBS, RESULTS, BEATS, VERDICTS] {
        handled(&host, topic).await;
    }
    for (what, topic, data, fate) in kinds() {
        let (letters, before) = (host.dead_letters().len(), visible(&host).await);
        host.from_peer(topic, data).await;
        handled(&host, topic).await;
        let set_aside = host.dead_letters().len() - letters;
        match fate {
            Dead(count) => assert_eq!(set_aside, count, "{what}: {:?}", host.dead_letters().last()),
            Nothing | Partly(_) => assert_eq!(set_aside, 0, "{what}: {:?}", host.dead_letters().last()),
        }
        if let Partly(id) = fate {
            let node = host.query("node-registry", "get", json!({ "node_id": id })).await.unwrap();
            assert_eq!(node["ignored"].as_array().map(Vec::len), Some(1), "{what}: {node}");
            host.command("node-registry", "remove", json!({ "node_id": id })).await.unwrap();
        }
        let after = visible(&host).await;
        assert_eq!(without_times(&after), without_times(&before), "{what} changed something");
    }
    // And the line goes on.
    host.from_peer(JOBS, json!({ "job_id": "last", "event_type": "queued" }).to_string()).await;
    eventually("the next job is known", async || {
        host.query("job-tracker", "get", json!({ "job_id": "last" })).await.is_ok()
    })
    .await;
    for (name, plugin) in host.host.plugins.all() {
        assert_eq!(plugin.handle.status().instances, 1, "{name} never trapped");
    }
}

/// The marker is a node that is heard again and again.
fn without_times((jobs, nodes): &(Value, Value)) -> (Value, Vec<(Value, Value)>) {
    let nodes = nodes.as_array().unwrap().iter();
    (jobs.clone(), nodes.map(|node| (node["node_id"].clone(), node["status"].clone())).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_twice_from_the_network_is_handled_once() {
    use dim_ipfs::Incoming;
    // The bus gives each message a number of its own, so repetition is tried where it is judged.
    let host = Setup::probe().start().await;
    let topic = "probe.in".parse().unwrap();
    host.listening(&topic).await;
    let add = dim_tests::script(json!([{ "do": "add", "key": "heard" }])).to_string();
    let peer = dim_ipfs::embedded::new_peer();
    let bus = host.host.exchange.bus.as_ref().unwrap();
    let message = Incoming { data: add.into(), from: peer, sequence: vec![7; 8].into() };
    for _ in 0..3 {
        bus.deliver(&topic, message.clone()).await;
    }
    eventually("the repetitions are counted", async || {
        host.host.exchange.received.repeated.load(std::sync::atomic::Ordering::Relaxed) == 2
    })
    .await;
    eventually("it is handled once", async || host.state_of("probe", "heard").await == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_from_one_topic_does_not_hold_up_commands() {
    let host = Setup::bundled().start().await;
    let answered = AtomicBool::new(false);
    let beats = async {
        // Goes on for as long as the commands take.
        for number in (0..).take_while(|number| *number < 20_000 || !answered.load(Ordering::Relaxed)) {
            let beat = json!({ "node_id": format!("n{}", number % 100), "status": "online" });
            host.from_peer(BEATS, beat.to_string()).await;
        }
    };
    let commands = async {
        for number in 0..50 {
            let update = json!({ "job_id": format!("j{number}"), "event_type": "queued" });
            host.command("job-tracker", "update", update).await.unwrap();
        }
        answered.store(true, Ordering::Relaxed);
    };
    tokio::join!(beats, commands);
    host.settled().await;
    let nodes = host.query("node-registry", "list", json!({})).await.unwrap();
    assert_eq!(nodes.as_array().unwrap().len(), 100);
}

/// What a key of the host points to.
async fn published(host: &TestHost, key: &str) -> Value {
    let name = host.host.storage.keys.name(&key.parse().unwrap()).unwrap();
    let document = host.host.fetch(&format!("/ipns/{name}").parse().unwrap()).await;
    document.map_or(Value::Null, |document| serde_json::from_slice(&document).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_records_crowd_nobody_out_of_the_documents_and_there_are_only_so_many() {
    let host = Setup::bundled().start().await;
    let large = "x".repeat(58 << 10);
    let flood = async |numbers: std::ops::Range<u32>| {
        for number in numbers {
            let job = json!({ "job_id": format!("a{number}"), "event_type": "running", "data": large });
            host.from_peer(JOBS, job.to_string()).await;
            let node = json!({ "node_id": format!("a{number}"), "cached_models": [large] });
            host.from_peer(BEATS, node.to_string()).await;
        }
    };
    // More than the documents have room for.
    flood(0..400).await;
    host.from_peer(JOBS, json!({ "job_id": "honest", "event_type": "running" }).to_string()).await;
    host.from_peer(BEATS, json!({ "node_id": "honest" }).to_string()).await;
    let shows_the_job = async || {
        let jobs = published(&host, "dim-state-key-jobs").await;
        jobs["active_jobs"]["honest"].is_object() && jobs["left_out"].as_u64() > Some(100)
    };
    eventually("the jobs are published, the honest one among them", shows_the_job).await;
    let shows_the_node = async || {
        let nodes = published(&host, "dim-state-key").await;
        let mut all = nodes["nodes"].as_array().into_iter().flatten();
        all.any(|node| node["node_id"] == "honest") && nodes["left_out"].as_u64() > Some(100)
    };
    eventually("the nodes are published, the honest one among them", shows_the_node).await;
    // More than they are built of.
    flood(400..700).await;
    let next = std::cell::Cell::new(700);
    let refused = async || {
        next.set(next.get() + 1);
        flood(next.get()..next.get() + 1).await;
        let letters = host.dead_letters();
        ["of active jobs: new ones are refused", "of nodes: new ones are refused"]
            .iter()
            .all(|why| letters.iter().any(|letter| letter.contains(why)))
    };
    eventually("new ones are refused", refused).await;
    // Those that are known go on.
    let done = json!({ "job_id": "honest", "event_type": "completed" });
    host.from_peer(JOBS, done.to_string()).await;
    let is_done = async || {
        let jobs = published(&host, "dim-state-key-jobs").await;
        jobs["finished_jobs"]["honest"].is_object()
    };
    eventually("the honest job is done", is_done).await;
    for (name, plugin) in host.host.plugins.all() {
        assert_eq!(plugin.handle.status().instances, 1, "{name} never trapped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_comes_before_its_job_does_not_hide_it() {
    let host = Setup::bundled().start().await;
    let ready = json!({ "job_id": "early", "result_cid": "bafkqaaa", "timestamp": 1_700_000_100 });
    host.from_peer("dim.results.ready", ready.to_string()).await;
    let running = json!({
        "job_id": "early", "event_type": "running", "timestamp": 1_700_000_000, "data": { "node_id": "n1" },
    });
    host.from_peer(JOBS, running.to_string()).await;
    eventually("the job has both", async || {
        let job = host.query("job-tracker", "get", json!({ "job_id": "early" })).await.unwrap_or_default();
        job["node_id"] == "n1" && job["result_cid"] == "bafkqaaa"
    })
    .await;
}
