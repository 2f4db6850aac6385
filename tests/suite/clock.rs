//! Clocks that jump, machines that sleep, hosts that stand still: nobody is accused for it, nothing
//! waits for ever, and who really died is found.

use std::path::Path;
use std::time::Duration;

use dim_tests::{Kubo, Program, SetClock, Setup, TestHost, directly, downtime, eventually};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

const HOUR: i64 = 3_600;

/// A watchdog that calls a node dead after two seconds of listening.
const QUICK: &str = "plugins:
  heartbeat-watchdog:
    config: { suspect_after_ms: 1000, dead_after_ms: 2000 }
";

const LIVING: [&str; 4] = ["n1", "n2", "n3", "n4"];

async fn beat(host: &TestHost, nodes: &[&str]) {
    for node in nodes {
        let heartbeat = json!({ "node_id": node, "status": "online" });
        host.from_peer("dim.nodes.heartbeat", heartbeat.to_string()).await;
    }
}

async fn standing(host: &TestHost, standing: &str) -> Vec<Value> {
    let nodes = host.query("heartbeat-watchdog", "list", json!({ "standing": standing })).await.unwrap();
    nodes.as_array().unwrap().iter().map(|node| node["node_id"].clone()).collect()
}

/// All nodes are heard, the clock is set, and they go on; then one dies.
async fn a_clock_set_by(seconds: i64) {
    let clock = SetClock::default();
    let host = Setup::bundled().yaml(QUICK).by_clock(clock.clone()).start().await;
    let begun = tokio::time::Instant::now();
    eventually("all are heard for a while", async || {
        beat(&host, &LIVING).await;
        begun.elapsed() > Duration::from_secs(3)
    })
    .await;
    let before = host.host.storage.log.now();
    clock.set_by(seconds);
    let set = tokio::time::Instant::now();
    // Longer than it takes to be called dead.
    eventually("all go on", async || {
        beat(&host, &LIVING).await;
        set.elapsed() > Duration::from_secs(5)
    })
    .await;
    host.settled().await;
    assert!(host.host.storage.log.now() > before, "the log's time goes on");
    for word in ["suspect", "dead"] {
        assert_eq!(standing(&host, word).await, [] as [Value; 0], "nobody is {word} for a clock");
    }
    eventually("who really dies is found", async || {
        beat(&host, &LIVING[1..]).await;
        standing(&host, "dead").await == [json!("n1")]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_back_by_an_hour_accuses_nobody_and_blocks_no_timer() {
    a_clock_set_by(-HOUR).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_ahead_by_a_day_accuses_nobody() {
    a_clock_set_by(24 * HOUR).await;
}

/// What a suspended machine sees: the time of day has gone on, its own has not.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_suspended_for_two_minutes_accuses_nobody() {
    a_clock_set_by(120).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_ahead_gives_up_nothing_that_waits_to_be_sent() {
    let Some(mut kubo) = Kubo::start() else { return };
    let clock = SetClock::default();
    let yaml = "outbox:\n  expire_after: 3600\n";
    // A day behind.
    clock.set_by(-24 * HOUR);
    let setup = Setup::probe().yaml(yaml).by_clock(clock.clone()).on_kubo(kubo.api());
    let host = setup.start().await;
    kubo.kill();
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "it waits" }])).await;
    clock.set_by(24 * HOUR);
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "it waits too" }])).await;
    // Over a start as well: the first is a day old by all that this host can know.
    let host = setup.start_in(host.stop().await).await;
    let sent = || host.host.exchange.sent.accepted.load(std::sync::atomic::Ordering::Relaxed);
    kubo.restart();
    eventually("both are sent", async || sent() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_stopped_for_a_while_accuses_nobody() {
    let Some(daemon) = Kubo::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).unwrap();
    std::fs::write(&config, QUICK).unwrap();
    let args = ["--config", config.to_str().unwrap(), "--kubo", daemon.api()];
    let host = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let network = directly(&daemon);
    let topic = "dim.nodes.heartbeat".parse().unwrap();
    let beat = async |nodes: &[&str]| {
        for node in nodes {
            let heartbeat = json!({ "node_id": node, "status": "online" }).to_string();
            // Two who publish at one daemon at once are refused now and then.
            eventually("the daemon takes it", async || {
                network.pubsub.publish(&topic, heartbeat.clone().into()).await.is_ok()
            })
            .await;
        }
    };
    let standing = |word: &str| -> Vec<Value> {
        let asked = json!({ "standing": word }).to_string();
        let nodes = host.json(&["plugin", "query", "heartbeat-watchdog", "list", &asked]);
        nodes.as_array().unwrap().iter().map(|node| node["node_id"].clone()).collect()
    };
    eventually("all are heard", async || {
        beat(&LIVING).await;
        standing("alive").len() == LIVING.len()
    })
    .await;
    host.freeze();
    // What they say meanwhile is lost: a daemon holds no more than a few messages for a subscriber.
    for _ in 0..30 {
        beat(&LIVING).await;
        downtime(Duration::from_millis(200)).await;
    }
    host.thaw();
    let thawed = tokio::time::Instant::now();
    eventually("all go on, and nobody is accused", async || {
        beat(&LIVING).await;
        assert_eq!(standing("dead"), [] as [Value; 0]);
        thawed.elapsed() > Duration::from_secs(4)
    })
    .await;
    eventually("who really dies is found", async || {
        beat(&LIVING[1..]).await;
        standing("dead") == [json!("n1")]
    })
    .await;
}
