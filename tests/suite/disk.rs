//! Disks that fill up, and what the host holds on them: the intake stops, questions are answered, and
//! everything goes on by itself.

use std::time::Duration;

use dim_model::entry::{Event, Kind};
use dim_store::batch::ReplyError;
use dim_tests::{HOSTILE, Kubo, Setup, SmallDisk, SupervisedHost, TestHost, downtime, eventually, script};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Keeps 8 MiB of the disk free.
const KEEPING_8_MIB: &str = "store:\n  min_free_bytes: 8388608\n";

fn is_short(host: &TestHost) -> bool {
    host.host.storage.disk.shortage().is_some()
}

/// The gaps of a topic that the log tells of.
fn gaps(host: &TestHost, topic: &str) -> usize {
    let entries = host.host.storage.store.read_log(dim_model::entry::Offset(0), usize::MAX).unwrap();
    let gap = |kind: &Kind| matches!(kind, Kind::Event(Event::Gap { topic: of, .. }) if of.as_str() == topic);
    entries.iter().filter(|entry| gap(&entry.kind)).count()
}

fn count() -> Value {
    script(json!([{ "do": "add", "key": "heard" }]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_the_intake_records_a_gap_and_answers_questions() {
    let disk = SmallDisk::new(64 * MIB);
    let host = Setup::probe().yaml(KEEPING_8_MIB).on_disk(disk.clone()).start().await;
    host.from_peer("probe.in", count().to_string()).await;
    eventually("it is heard", async || host.state_of("probe", "heard").await == 1).await;

    let topic = "probe.in".parse().unwrap();
    eventually("listening is proven", async || {
        host.host.exchange.links.listening_records.all()[&topic].proven_until.is_some()
    })
    .await;
    disk.fill_up_to(7 * MIB);
    eventually("the intake has stopped", async || is_short(&host)).await;
    let refused = host.command("probe", "run", script(json!([]))).await;
    let Err(ReplyError::IntakeStopped(why)) = refused else { panic!("{refused:?}") };
    assert!(why.to_string().contains("8388608 must stay free"), "{why}");
    assert_eq!(host.state_of("probe", "heard").await, 1, "questions are answered");
    eventually("the stream is closed", async || {
        host.host.exchange.links.listening_records.all()[&topic].connected_since.is_none()
    })
    .await;

    disk.clear();
    eventually("the intake goes on", async || !is_short(&host)).await;
    host.from_peer("probe.in", count().to_string()).await;
    eventually("the next one is heard", async || host.state_of("probe", "heard").await == 2).await;
    eventually("the time between is a gap", async || gaps(&host, "probe.in") == 1).await;
    host.run(json!([])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_leaves_while_the_disk_is_full_is_not_kept_for_ever() {
    let Some((near, mut far)) = Kubo::start_pair() else { return };
    let disk = SmallDisk::new(64 * MIB);
    let host = Setup::probe().yaml(KEEPING_8_MIB).on_disk(disk.clone()).on_kubo(near.api()).start().await;
    let elsewhere = Setup::probe().on_kubo(far.api()).start().await;
    let peers = async || {
        let answers =
            host.query("probe", "run", script(json!([{ "do": "peers", "topic": "probe.in" }]))).await;
        answers.unwrap()[0]["ok"].as_array().unwrap().len()
    };
    eventually("the plugin sees the other one", async || peers().await == 1).await;
    disk.fill_up_to(7 * MIB);
    eventually("the intake has stopped", async || is_short(&host)).await;
    far.kill();
    let topic = "probe.in".parse().unwrap();
    let known = async || host.host.exchange.links.backend.pubsub.peers(&topic).await.unwrap().len();
    eventually("the daemon sees it leave", async || known().await == 0).await;
    // Two looks of the host.
    downtime(Duration::from_secs(5)).await;
    disk.clear();
    eventually("the plugin sees it leave", async || peers().await == 0).await;
    drop(elsewhere);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_all_but_full_lets_plugins_stand_still_and_questions_pass() {
    let disk = SmallDisk::new(64 * MIB);
    let host = Setup::probe().yaml(KEEPING_8_MIB).on_disk(disk.clone()).start().await;
    host.run(json!([{ "do": "timer", "key": "t", "in": 3_000_000_000_u64 }])).await;
    disk.fill_up_to(MIB);
    eventually("all stands still", async || host.host.storage.disk.is_at_standstill()).await;
    // Beyond the time of the timer, which the plugin would handle.
    downtime(Duration::from_secs(4)).await;
    let before = host.host.storage.log.head();
    assert_eq!(host.state_of("probe", "fired").await, Value::Null);
    downtime(Duration::from_secs(1)).await;
    assert_eq!(host.host.storage.log.head(), before, "nothing is written");
    disk.clear();
    eventually("the timer fires late", async || host.state_of("probe", "fired").await != Value::Null).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_in_a_moment_loses_nothing_that_was_acknowledged() {
    let disk = SmallDisk::new(64 * MIB);
    // So little that it is not noticed before it happens.
    let setup = Setup::probe().yaml("store:\n  min_free_bytes: 65536\n").on_disk(disk.clone());
    let host = SupervisedHost::start(&setup).await;
    let large = "x".repeat(500_000);
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        disk.fill_up_to(2 * MIB);
        let mut failed = 0;
        for number in 0..40 {
            let steps = json!([
                { "do": "set", "key": format!("large/{round}/{number}"), "value": large },
                { "do": "add", "key": format!("{round}/{number}") },
            ]);
            match host.try_run("probe", steps).await {
                Some(_) => acknowledged.push(format!("{round}/{number}")),
                None => failed += 1,
            }
        }
        assert!(failed > 0, "a full disk acknowledges nothing");
        // Full as it is.
        eventually("questions are answered", async || {
            host.try_query("probe", "run", script(json!([{ "do": "get", "key": "0/0" }]))).await.is_some()
        })
        .await;
        disk.clear();
        host.works("probe").await;
        for number in 0..40 {
            let gone = json!([{ "do": "delete", "key": format!("large/{round}/{number}") }]);
            host.try_run("probe", gone).await.unwrap();
        }
    }
    assert!(!acknowledged.is_empty());
    for key in acknowledged {
        let read = host.try_run("probe", json!([{ "do": "get", "key": key }])).await.unwrap();
        assert_eq!(read, [json!({ "ok": "1" })], "{key} is there, once");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_for_looking_back_goes_before_the_intake_stops() {
    let setup = Setup::probe().yaml("store:\n  max_bytes: 8388608\n");
    let host = setup.start().await;
    let message = "y".repeat(50_000);
    for _ in 0..600 {
        // 30 MB in all; nobody needs them once they are handled.
        eventually("there is room", async || {
            host.command("probe", "run", script(json!([{ "do": "echo", "value": message }]))).await.is_ok()
        })
        .await;
    }
    eventually("the log is trimmed", async || {
        let usage = dim_store::Usage::of(&host.host.storage.store.snapshot().unwrap()).unwrap();
        usage.total() < 8 * MIB
    })
    .await;
    assert!(host.host.storage.store.log_start().unwrap() > Some(dim_model::entry::Offset(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_would_fill_the_disk_is_trimmed_and_the_intake_goes_on() {
    let disk = SmallDisk::new(96 * MIB);
    let keeping = "store:\n  min_free_bytes: 25165824\n";
    let host = SupervisedHost::start(&Setup::probe().yaml(keeping).on_disk(disk)).await;
    for number in 0..250 {
        // 100 MB in all, of which the last 1.2 are needed.
        let steps = json!([{ "do": "set", "key": format!("k{}", number % 3), "value": "w".repeat(400_000) }]);
        eventually("there is room", async || host.try_run("probe", steps.clone()).await.is_some()).await;
    }
    host.works("probe").await;
    let held = host.host().unwrap().storage.store.read_log(dim_model::entry::Offset(0), usize::MAX).unwrap();
    let first = held.first().map_or(0, |entry| entry.offset.0);
    // At most 75 MB fit beside what must stay free; how much more is removed depends on when the host looks.
    assert!(first > 60, "what filled the log is gone from it: the first entry that is held is {first}");
    host.stop().await;
}

/// A host whose file is much larger than what it holds, and what it has taken of the disk.
async fn with_a_large_file(disk: &SmallDisk) -> (SupervisedHost, u64) {
    let host = SupervisedHost::start(&Setup::probe().on_disk(disk.clone()).yaml(KEEPING_8_MIB)).await;
    let keys = (0..60).map(|number| format!("k{number}"));
    for key in keys.clone() {
        let set = json!([{ "do": "set", "key": key, "value": "v".repeat(500_000) }]);
        host.try_run("probe", set).await.unwrap();
    }
    for key in keys {
        host.try_run("probe", json!([{ "do": "delete", "key": key }])).await.unwrap();
    }
    host.try_run("probe", json!([{ "do": "set", "key": "kept", "value": "it" }])).await.unwrap();
    (host, disk.taken())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_free_in_the_file_is_room_too() {
    let disk = SmallDisk::new(160 * MIB);
    let (host, before) = with_a_large_file(&disk).await;
    let started = host.host().unwrap().life.started;
    disk.fill_up_to(4 * MIB);
    eventually("the intake has stopped", async || host.host().unwrap().storage.disk.shortage().is_some())
        .await;
    host.works("probe").await;
    for number in 0..10 {
        let steps = json!([{ "do": "set", "key": format!("more/{number}"), "value": "w".repeat(500_000) }]);
        eventually("there is room", async || host.try_run("probe", steps.clone()).await.is_some()).await;
    }
    assert!(disk.taken() < before + 2 * MIB, "{} after {before} bytes are taken", disk.taken());
    assert_eq!(host.host().unwrap().life.started, started, "nothing is started again for it");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_larger_than_what_it_holds_is_packed_where_the_disk_is_all_but_full() {
    let disk = SmallDisk::new(160 * MIB);
    let (host, before) = with_a_large_file(&disk).await;
    disk.fill_up_to(MIB);
    eventually("all stands still", async || host.host().unwrap().storage.disk.is_at_standstill()).await;
    host.works("probe").await;
    assert!(disk.taken() < before / 4 * 3, "{} of {before} bytes are taken", disk.taken());
    let kept = host.try_run("probe", json!([{ "do": "get", "key": "kept" }])).await.unwrap();
    assert_eq!(kept, [json!({ "ok": "it" })]);
    // It was packed just now, and is not again, whatever the disk says.
    let started = host.host().unwrap().life.started;
    disk.fill_up_to(MIB);
    downtime(Duration::from_secs(8)).await;
    assert_eq!(host.host().unwrap().life.started, started, "it is not started again and again");
    disk.clear();
    host.works("probe").await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_holds_what_is_needed_stops_the_intake_and_says_what_fills_it() {
    let host = Setup::probe().yaml("store:\n  max_bytes: 1048576\n").start().await;
    for number in 0..3 {
        let set = json!({ "do": "set", "key": format!("k{number}"), "value": "z".repeat(400_000) });
        // The third one fills it up; it is taken in whole.
        host.run(json!([set])).await;
    }
    eventually("the intake has stopped", async || is_short(&host)).await;
    // The log is trimmed, and that does not help.
    let why = || host.host.storage.disk.shortage().unwrap().reason;
    eventually("the state is what fills it", async || why().contains("them state")).await;
    assert!(why().contains("of 1048576 bytes"), "{}", why());
    assert!(why().contains("is that of the plugin probe"), "{}", why());
    assert!(matches!(
        host.command("probe", "run", script(json!([]))).await,
        Err(ReplyError::IntakeStopped(_))
    ));
    assert!(host.state_of("probe", "k0").await.is_string());
}

/// The config of a plugin that gives its name changed documents of 3 MiB without end, and may give it so many bytes a
/// second.
fn documents_without_end(bytes_per_second: u64) -> Value {
    json!({
        "file": HOSTILE,
        "config": {
            "attack": "publish-changed-documents", "again": true, "topics": ["hostile.in"], "keys": ["hostile-key"],
        },
        "grants": {
            "publish": ["hostile.out"], "subscribe": ["hostile.*"], "write": ["hostile-key"],
        },
        "limits": { "document-bytes-per-second": bytes_per_second },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_publishes_documents_without_end_stops_nobody() {
    let setup = Setup::probe().yaml("store:\n  max_bytes: 536870912\n");
    let host = setup.and_probe("flood", documents_without_end(8 << 20)).start().await;
    let met = || host.plugin("flood").handle.status().met.contains_key("document-bytes-per-second");
    eventually("it is stopped by its limit", async || met()).await;
    for number in 0..100 {
        let answers = host.run(json!([{ "do": "set", "key": "k", "value": number.to_string() }])).await;
        assert_eq!(answers, [json!({ "ok": null })]);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(!is_short(&host));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_fills_the_store_can_be_removed_and_the_intake_goes_on() {
    let setup = Setup::probe().yaml("store:\n  max_bytes: 134217728\n");
    let host = SupervisedHost::start(&setup.and_probe("flood", documents_without_end(1 << 30))).await;
    eventually("the intake has stopped", async || {
        host.host().is_some_and(|host| host.storage.disk.shortage().is_some())
    })
    .await;
    let flood = "flood".parse().unwrap();
    eventually("it is removed", async || {
        let Some(host) = host.host() else { return false };
        host.remove(&flood, true, "the test").await.is_ok()
    })
    .await;
    host.works("probe").await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_kept_up_to_their_quota() {
    let host = Setup::probe().yaml("store:\n  dead_letters:\n    max_count: 5\n").start().await;
    for number in 0..12 {
        let reject = format!("number {number}");
        host.from_peer("probe.in", reject).await;
    }
    let dropped = || dim_store::dead_letters::dropped(&host.host.storage.store).unwrap();
    eventually("the oldest have gone", async || dropped() == 7).await;
    let letters =
        dim_store::dead_letters::list(&host.host.storage.store, &Default::default(), None, 100).unwrap();
    assert_eq!(letters.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [8, 9, 10, 11, 12]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_accuses_nobody_and_who_died_meanwhile_is_found() {
    let disk = SmallDisk::new(128 * MIB);
    let watchdog =
        "plugins:\n  heartbeat-watchdog:\n    config: { suspect_after_ms: 1000, dead_after_ms: 2000 }\n";
    let yaml = format!("{KEEPING_8_MIB}{watchdog}");
    let host = Setup::bundled().yaml(&yaml).on_disk(disk.clone()).start().await;
    let (topic, peer) = ("dim.nodes.heartbeat".parse().unwrap(), dim_ipfs::embedded::new_peer());
    // Whether the host listens or not.
    let beat = async |nodes: &[&str]| {
        for node in nodes {
            let heartbeat = json!({ "node_id": node, "status": "online" }).to_string();
            host.host.exchange.bus.as_ref().unwrap().publish_as(&peer, &topic, heartbeat.into()).await;
        }
    };
    let standing = async |word: &str| {
        let nodes = host.query("heartbeat-watchdog", "list", json!({ "standing": word })).await.unwrap();
        nodes.as_array().unwrap().iter().map(|node| node["node_id"].clone()).collect::<Vec<_>>()
    };
    let living = ["n1", "n2", "n3"];
    host.listening(&topic).await;
    eventually("all are heard", async || {
        beat(&living).await;
        beat(&["doomed"]).await;
        standing("alive").await.len() == 4
    })
    .await;
    disk.fill_up_to(4 * MIB);
    eventually("the intake has stopped", async || is_short(&host)).await;
    let full = tokio::time::Instant::now();
    eventually("it is full for longer than it takes to be called dead", async || {
        beat(&living).await;
        full.elapsed() > Duration::from_secs(5)
    })
    .await;
    disk.clear();
    eventually("the intake goes on", async || !is_short(&host)).await;
    eventually("who died meanwhile is found", async || {
        beat(&living).await;
        let dead = standing("dead").await;
        assert!(dead.iter().all(|node| node == "doomed"), "{dead:?}");
        dead.len() == 1
    })
    .await;
}
