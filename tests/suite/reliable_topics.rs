//! Reliable topics between hosts: each event of each host once and in its order, over lost messages and restarts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_client::{Address, Client};
use dim_model::entry::{Event, Kind, MemberEvent, Origin};
use dim_model::ident::Topic;
use dim_store::effect::Publish;
use dim_tests::{
    Fault, FaultProxy, Kubo, Program, Setup, TestHost, directly, eventually_within, script, tier,
};
use serde_json::json;

/// Maximum time until everything has arrived.
pub const ARRIVAL: Duration = Duration::from_secs(60);

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A config with a reliable topic.
pub const RELIABLE: &str = "topics: { probe.*: { delivery: reliable } }\n";

fn topic() -> Topic {
    "probe.in".parse().unwrap()
}

/// A host whose probe listens to a reliable topic.
pub fn setup(api: &str) -> Setup {
    let grants = json!({ "config": { "topics": ["probe.in"] } });
    Setup::default().and_probe("probe", grants).yaml(RELIABLE).on_kubo(api)
}

/// The events of members in the log of a host, in order.
pub fn received(host: &TestHost) -> Vec<(MemberEvent, Bytes)> {
    let entries = host.entries();
    let event = |kind: &Kind| match kind {
        Kind::Event(Event::Message { data, origin: Origin::Member(event), .. }) => {
            Some((event.clone(), data.clone()))
        }
        _ => None,
    };
    entries.iter().filter_map(|entry| event(&entry.kind)).collect()
}

pub async fn publish(host: &TestHost, data: &str) {
    let publish = Publish { topic: topic(), data: Bytes::copy_from_slice(data.as_bytes()) };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
}

/// Publishes numbers.
async fn publish_numbers(host: &TestHost, numbers: std::ops::Range<usize>) {
    for number in numbers {
        publish(host, &number.to_string()).await;
    }
}

/// Waits until a host has received `count` events, and checks that they are the numbers from 0 on, and that each
/// incarnation has its sequences from 0 on.
async fn has_numbers(host: &TestHost, count: usize) {
    eventually_within(ARRIVAL, "all events have arrived", async || received(host).len() >= count).await;
    let received = received(host);
    let numbers: Vec<usize> =
        received.iter().map(|(_, data)| std::str::from_utf8(data).unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (0..count).collect::<Vec<_>>());
    let mut next: BTreeMap<[u8; 16], u64> = BTreeMap::new();
    for (event, _) in &received {
        let next = next.entry(event.incarnation).or_default();
        assert_eq!(event.sequence, *next);
        *next += 1;
    }
}

/// Waits until two hosts know that they hear each other.
async fn are_connected(hosts: [&TestHost; 2]) {
    for host in hosts {
        let pubsub = &host.host.exchange.links.backend.pubsub;
        let channel = host.host.exchange.links.reliable.channels().of(&topic());
        eventually_within(ARRIVAL, "the daemon has a peer on the topic", async || {
            pubsub.peers(&channel).await.is_ok_and(|peers| !peers.is_empty())
        })
        .await;
    }
}

/// Two connected daemons, and a host on each: a writer and a reader.
async fn connected_pair() -> Option<((Kubo, Kubo), [TestHost; 2])> {
    let (near, far) = Kubo::start_pair()?;
    let hosts = [setup(near.api()).start().await, setup(far.api()).start().await];
    are_connected([&hosts[0], &hosts[1]]).await;
    Some(((near, far), hosts))
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_and_in_order_over_restarts_of_both_hosts() {
    let Some(((near, far), [writer, reader])) = connected_pair().await else { return };
    publish_numbers(&writer, 0..300).await;
    has_numbers(&reader, 300).await;
    assert_eq!(received(&writer), [], "its own events do not come back");
    let reader_dir = reader.stop().await;
    // What is published while the reader is away is not lost.
    publish_numbers(&writer, 300..400).await;
    let writer = setup(near.api()).start_in(writer.stop().await).await;
    let reader = setup(far.api()).start_in(reader_dir).await;
    are_connected([&writer, &reader]).await;
    publish_numbers(&writer, 400..500).await;
    has_numbers(&reader, 500).await;
    are_all_known(&writer, &reader).await;
    let incarnations: Vec<_> = received(&reader).into_iter().map(|(event, _)| event.incarnation).collect();
    assert_ne!(incarnations[0], incarnations[499], "each start is an incarnation");
    writer.stop().await;
    reader.stop().await;
}

/// Checks what both hosts show of the two incarnations of the writer, each from its side.
async fn are_all_known(writer: &TestHost, reader: &TestHost) {
    let logs = async |host: &TestHost| host.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    // The driver learns a moment after the commit what is durable.
    eventually_within(ARRIVAL, "the reader shows that it has received all", async || {
        logs(reader).await.iter().map(|log| log.received).sum::<u64>() == 500
    })
    .await;
    let at_reader = logs(reader).await;
    assert_eq!(at_reader.len(), 2, "{at_reader:?}");
    assert!(at_reader.iter().all(|log| !log.is_own && log.end == log.received && log.counters.gaps == 0));
    // The writer learns from a head of the reader how far it is. Heads are plain messages and can be lost; the third one
    // comes a minute later.
    eventually_within(ARRIVAL * 2, "the writer knows that everything was received", async || {
        let logs = logs(writer).await;
        let own = logs.iter().find(|log| log.is_own).expect("its own log");
        own.readers.iter().any(|reader| reader.received == own.end && reader.from == 0)
    })
    .await;
}

/// Copies a state directory.
pub fn copy_of(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("cp").arg("-a").arg(dir.join(".")).arg(copy.path()).status();
    assert!(status.unwrap().success());
    copy
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_copied_is_noticed_by_every_host() {
    let Some(((near, _far), [writer, reader])) = connected_pair().await else { return };
    publish_numbers(&writer, 0..1).await;
    has_numbers(&reader, 1).await;
    let dir = writer.stop().await;
    let copy = copy_of(dir.path());
    let alarms = |host: &TestHost| {
        dim_store::topic_rows::alarms(&host.host.storage.store.snapshot().unwrap()).unwrap()
    };
    let writer = setup(near.api()).start_in(dir).await;
    publish_numbers(&writer, 1..2).await;
    has_numbers(&reader, 2).await;
    assert_eq!(alarms(&reader), [], "a restart is no copy");
    writer.stop().await;
    let copied = setup(near.api()).start_in(copy).await;
    publish_numbers(&copied, 2..3).await;
    // Its events are delivered, and both hosts say that something is wrong.
    has_numbers(&reader, 3).await;
    for host in [&reader, &copied] {
        eventually_within(ARRIVAL, "the copy is noticed", async || !alarms(host).is_empty()).await;
        let named: Vec<_> = alarms(host).into_iter().map(|alarm| alarm.writer.name()).collect();
        let keys = &copied.host.storage.keys;
        assert_eq!(named[0], keys.name(&"dim-writer".parse().unwrap()).unwrap());
    }
    copied.stop().await;
    reader.stop().await;
}

/// Publishes numbered events with a prefix through the API of a host.
async fn publish_marked(host: &Path, prefix: &str, numbers: std::ops::Range<usize>) {
    let client = Client::new(Address::in_state_dir(host)).unwrap();
    for number in numbers {
        client.pubsub().publish("probe.in", format!("{prefix} {number}")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_runs_beside_the_original_is_in_the_status_of_every_host_and_nothing_is_merged() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| [&near, &far].into_iter().for_each(|daemon| connect(daemon, &third)));
    let configs = tempfile::tempdir().unwrap();
    let config = |name: &str| configs.path().join(name);
    let [original_dir, witness_dir] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let original = probing_program(original_dir.path(), &config("original"), &near);
    let witness = probing_program(witness_dir.path(), &config("witness"), &third);
    publish_marked(original_dir.path(), "before", 0..20).await;
    let is_known = || {
        let writers = witness.json(&["topic", "writers", "probe.in"]);
        writers.as_array().is_some_and(|logs| logs.iter().any(|log| log["received"] == 20))
    };
    eventually_within(ARRIVAL, "the first events have arrived", async || is_known()).await;
    let writer = original.json(&["topic", "writers", "probe.in"])[0]["writer"].clone();
    original.kill();
    let copy_dir = copy_of(original_dir.path());
    let original = probing_program(original_dir.path(), &config("original"), &near);
    let copy = probing_program(copy_dir.path(), &config("copy"), &far);
    tokio::join!(
        publish_marked(original_dir.path(), "original", 0..50),
        publish_marked(copy_dir.path(), "copy", 0..50),
    );
    for (who, host) in [("the original", &original), ("the copy", &copy), ("the witness", &witness)] {
        let alarm = format!("alarms about the writer {} of reliable topics", writer.as_str().unwrap());
        let is_alarmed = || String::from_utf8_lossy(&host.dim(&["status"]).stdout).contains(&alarm);
        eventually_within(ARRIVAL * 2, who, async || is_alarmed()).await;
        let alarms = |of: &str| host.json(&["topic", "alarms", of]).as_array().unwrap().clone();
        let is_about_it = |alarm: &serde_json::Value| {
            (&alarm["topic"], &alarm["writer"]) == (&json!("probe.in"), &writer)
                && alarm["is_own"] == json!(who != "the witness")
        };
        assert!(!alarms("probe.in").is_empty() && alarms("probe.in").iter().all(is_about_it), "{who}");
        assert!(alarms("probe.out").is_empty(), "{who}");
        let is_acknowledged = |alarm: &serde_json::Value| alarm["is_acknowledged"] == true;
        assert!(!alarms("probe.in").iter().any(is_acknowledged), "{who}");
        host.dim(&["status", "--acknowledge"]);
        assert!(alarms("probe.in").iter().any(is_acknowledged), "{who}");
    }
    // Both are heard, each in its order.
    let has_all = || {
        let logs = witness.json(&["topic", "writers", "probe.in"]);
        let received = logs.as_array().into_iter().flatten().filter_map(|log| log["received"].as_u64());
        received.sum::<u64>() == 120
    };
    eventually_within(ARRIVAL, "all events have arrived", async || has_all()).await;
    [original, copy, witness].into_iter().for_each(Program::kill);
    let witness = setup(third.api()).start_in(witness_dir).await;
    let texts: Vec<String> =
        received(&witness).into_iter().map(|(_, data)| String::from_utf8(data.to_vec()).unwrap()).collect();
    for (prefix, count) in [("before ", 20), ("original ", 50), ("copy ", 50)] {
        let numbers: Vec<usize> =
            texts.iter().filter_map(|text| text.strip_prefix(prefix)?.parse().ok()).collect();
        assert_eq!(numbers, (0..count).collect::<Vec<_>>(), "{prefix}");
    }
    assert_eq!(texts.len(), 120);
    witness.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_restored_from_a_backup_is_noticed_by_every_host_and_its_new_events_are_delivered() {
    let Some(((near, far), [writer, reader])) = connected_pair().await else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| [&near, &far].into_iter().for_each(|daemon| connect(daemon, &third)));
    let witness = setup(third.api()).start().await;
    publish_numbers(&writer, 0..10).await;
    for host in [&reader, &witness] {
        has_numbers(host, 10).await;
    }
    let passphrase = dim_server::backup::Passphrase::new("long enough".to_owned()).unwrap();
    let (mut backup, storage) = (Vec::new(), &writer.host.storage);
    dim_server::backup::write(&storage.store, &storage.keys, passphrase.clone(), &mut backup).unwrap();
    // The others receive what the backup does not have.
    publish_numbers(&writer, 10..20).await;
    for host in [&reader, &witness] {
        has_numbers(host, 20).await;
    }
    writer.stop().await;
    let place = tempfile::tempdir().unwrap();
    dim_server::backup::restore(backup.as_slice(), passphrase, place.path()).unwrap();
    let restored = setup(near.api()).start_in(place).await;
    publish_numbers(&restored, 20..25).await;
    for host in [&reader, &witness] {
        has_numbers(host, 25).await;
    }
    let alarms = |host: &TestHost| {
        dim_store::topic_rows::alarms(&host.host.storage.store.snapshot().unwrap()).unwrap()
    };
    for host in [&reader, &witness, &restored] {
        eventually_within(ARRIVAL * 2, "the restored host is noticed", async || !alarms(host).is_empty())
            .await;
        assert!(alarms(host).iter().all(|alarm| !alarm.is_acknowledged), "`dim status` shows them");
    }
    for host in [restored, reader, witness] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_joins_late_reads_all_that_is_kept_also_after_garbage_collection() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let writer = setup(near.api()).start().await;
    // Each is a bundle of its own, so that the index has many. Messages and heads list the last eight.
    for number in 0..300 {
        publish(&writer, &number.to_string()).await;
        eventually_within(ARRIVAL, "it is in a bundle", async || own_end(&writer).await == number + 1).await;
    }
    // The blocks of bundles are pinned through the index.
    eventually_within(ARRIVAL, "the index is pinned", async || pinned_bundles(&near) >= 300).await;
    near.ipfs(&["repo", "gc", "--quiet"]);
    assert!(pinned_bundles(&near) >= 300);
    let late = "topics: { probe.*: { delivery: reliable, from: earliest } }\n";
    let grants = json!({ "config": { "topics": ["probe.in"] } });
    let reader = Setup::default().and_probe("probe", grants).yaml(late).on_kubo(far.api()).start().await;
    has_numbers(&reader, 300).await;
    let logs = reader.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    assert_eq!(logs[0].counters.gaps, 0);
    writer.stop().await;
    reader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_subscribes_late_begins_where_it_says_and_then_follows_the_others() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let writer = setup(near.api()).start().await;
    let plugin = |topics: &[&str]| json!({ "config": { "topics": topics } });
    let reading = || {
        let setup =
            Setup::default().and_probe("probe", plugin(&[])).and_probe("early", plugin(&["probe.in"]));
        setup.yaml(RELIABLE).on_kubo(far.api())
    };
    let reader = reading().start().await;
    are_connected([&writer, &reader]).await;
    let notes = async |numbers: std::ops::Range<usize>| {
        for number in numbers {
            let note = script(json!([{ "do": "note", "key": "heard", "what": number }]));
            publish(&writer, &note.to_string()).await;
        }
    };
    let has = async |host: &TestHost, plugin: &str, count: usize| {
        let what = format!("{plugin} has {count} events");
        eventually_within(ARRIVAL, &what, async || {
            host.state_of(plugin, "heard").await.as_array().is_some_and(|heard| heard.len() >= count)
        })
        .await;
        let heard = host.state_of(plugin, "heard").await;
        assert_eq!(heard, json!((0..count).collect::<Vec<_>>()), "{plugin}");
    };
    notes(0..100).await;
    has(&reader, "early", 100).await;
    assert_eq!(reader.state_of("probe", "heard").await, json!(null));
    // It gets what the others have had, while more comes.
    reader.run(json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }])).await;
    notes(100..200).await;
    has(&reader, "probe", 200).await;
    has(&reader, "early", 200).await;
    // It goes on after a restart.
    let reader = reading().start_in(reader.stop().await).await;
    notes(200..220).await;
    has(&reader, "probe", 220).await;
    has(&reader, "early", 220).await;
    assert!(reader.dead_letters().is_empty());
    // The log says who has caught up.
    let entries = reader.entries();
    let kinds = entries.iter().map(|entry| &entry.kind);
    let ends: Vec<_> = kinds.filter(|kind| matches!(kind, Kind::CaughtUp { .. })).collect();
    assert!(matches!(ends[..], [Kind::CaughtUp { plugin, .. }] if plugin.as_str() == "probe"), "{ends:?}");
    assert_eq!(dim_store::catch_ups::all(&reader.host.storage.store.snapshot().unwrap()).unwrap(), []);
    writer.stop().await;
    reader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_subscribes_late_receives_the_earlier_messages_of_its_own_host_first() {
    let plugin = |topics: &[&str]| json!({ "config": { "topics": topics } });
    let setup = || {
        let setup =
            Setup::default().and_probe("probe", plugin(&[])).and_probe("early", plugin(&["probe.in"]));
        setup.yaml(RELIABLE)
    };
    let host = setup().start().await;
    let note = |number: usize| script(json!([{ "do": "note", "key": "heard", "what": number }])).to_string();
    let notes = async |host: &TestHost, numbers: std::ops::Range<usize>| {
        for number in numbers {
            publish(host, &note(number)).await;
        }
    };
    let has = async |host: &TestHost, plugin: &str, count: usize| {
        eventually_within(ARRIVAL, "all were handled", async || {
            host.state_of(plugin, "heard").await.as_array().is_some_and(|heard| heard.len() >= count)
        })
        .await;
        let heard = host.state_of(plugin, "heard").await;
        assert_eq!(heard, json!((0..count).collect::<Vec<_>>()), "{plugin}");
    };
    notes(&host, 0..2_000).await;
    // Its own messages are not for it, those of another plugin are.
    let publish_by = async |host: &TestHost, plugin: &str, number: usize| {
        let publish = json!([{ "do": "publish", "topic": "probe.in", "data": note(number) }]);
        host.command(plugin, "run", script(publish)).await.unwrap();
    };
    publish_by(&host, "probe", 9_999).await;
    publish_by(&host, "early", 2_000).await;
    let subscribe = json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }]);
    tokio::join!(notes(&host, 2_001..2_500), host.run(subscribe));
    has(&host, "probe", 2_500).await;
    // It has caught up: what comes now comes at once, also after a restart.
    let is_over = |host: &TestHost| {
        dim_store::catch_ups::all(&host.host.storage.store.snapshot().unwrap()).unwrap().is_empty()
    };
    eventually_within(ARRIVAL, "it has caught up", async || is_over(&host)).await;
    let host = setup().start_in(host.stop().await).await;
    notes(&host, 2_500..2_510).await;
    has(&host, "probe", 2_510).await;
    assert!(host.dead_letters().is_empty());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catch_up_ends_if_its_topic_becomes_plain() {
    let plugin = json!({ "config": { "topics": [] } });
    let plain = || Setup::default().and_probe("probe", plugin.clone());
    let host = plain().yaml(RELIABLE).start().await;
    let note = |number: usize| script(json!([{ "do": "note", "key": "heard", "what": number }])).to_string();
    publish(&host, &note(0)).await;
    // A paused plugin does not catch up.
    let late = "probe".parse().unwrap();
    host.run(json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }])).await;
    host.host.pause(&late, true, "the test").await.unwrap();
    publish(&host, &note(1)).await;
    let state = host.stop().await;
    let host = plain().start_in(state).await;
    host.host.pause(&late, false, "the test").await.unwrap();
    publish(&host, &note(2)).await;
    eventually_within(ARRIVAL, "it has all messages of its host", async || {
        host.state_of("probe", "heard").await.as_array().is_some_and(|heard| heard.len() == 3)
    })
    .await;
    assert_eq!(host.state_of("probe", "heard").await, json!([0, 1, 2]));
    assert_eq!(dim_store::catch_ups::all(&host.host.storage.store.snapshot().unwrap()).unwrap(), []);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catch_up_waits_for_its_plugin_so_that_a_short_queue_loses_nothing() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let writer = setup(near.api()).start().await;
    let plugin = |topics: &[&str]| json!({ "config": { "topics": topics } });
    let limits = "limits: { queue-bytes: 400000 }\nstore: { log: { max_bytes: 20000 } }\n";
    let reading = || {
        let setup =
            Setup::default().and_probe("probe", plugin(&[])).and_probe("early", plugin(&["probe.in"]));
        setup.yaml(&format!("{RELIABLE}{limits}")).on_kubo(far.api())
    };
    let reader = reading().start().await;
    are_connected([&writer, &reader]).await;
    let padding = "x".repeat(10_000);
    let publish_notes = async |host: &TestHost, numbers: std::ops::Range<usize>| {
        for number in numbers {
            let note = json!([{ "do": "note", "key": "heard", "what": number, "padding": padding }]);
            publish(host, &script(note).to_string()).await;
        }
    };
    publish_notes(&writer, 0..300).await;
    eventually_within(ARRIVAL, "the other plugin has all", async || {
        reader.state_of("early", "heard").await.as_array().is_some_and(|heard| heard.len() == 300)
    })
    .await;
    reader.run(json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }])).await;
    let late = "probe".parse().unwrap();
    reader.host.pause(&late, true, "the test").await.unwrap();
    // The retention looks at the log every second. A host that runs has the end of the log in memory, too.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let reader = reading().start_in(reader.stop().await).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let reader = reading().start_in(reader.stop().await).await;
    reader.host.pause(&late, false, "the test").await.unwrap();
    eventually_within(ARRIVAL, "it has all", async || {
        reader.state_of("probe", "heard").await.as_array().is_some_and(|heard| heard.len() == 300)
    })
    .await;
    let heard = reader.state_of("probe", "heard").await;
    assert_eq!(heard, json!((0..300).collect::<Vec<_>>()), "in order, and each once");
    // If the log was trimmed before, it no longer contains what its host may have published.
    let gaps = reader.state_of("probe", "gaps").await;
    let is_of_own_host = |gaps: &[serde_json::Value]| gaps.len() == 1 && gaps[0]["missing"].is_null();
    assert!(gaps.is_null() || gaps.as_array().is_some_and(|gaps| is_of_own_host(gaps)), "{gaps}");
    writer.stop().await;
    reader.stop().await;
}

/// The plain messages in the log of a host, in order.
fn plain_messages(host: &TestHost) -> Vec<String> {
    let entries = host.entries();
    let message = |kind: &Kind| match kind {
        Kind::Event(Event::Message { data, origin: Origin::Peer(_), .. }) => {
            Some(String::from_utf8_lossy(data).into_owned())
        }
        _ => None,
    };
    entries.iter().filter_map(|entry| message(&entry.kind)).collect()
}

/// Checks that plain messages, of which a daemon may lose some, are among the expected ones, and that none came twice.
fn are_of(mut messages: Vec<String>, expected: &[String]) {
    messages.sort();
    assert!(messages.windows(2).all(|pair| pair[0] != pair[1]), "{messages:?}");
    assert!(messages.iter().all(|message| expected.contains(message)), "{messages:?}");
}

/// The bundled plugins of two hosts on topics of one kind: the reader has no watchdog and trusts that of the other host.
/// `program` publishes what nodes and jobs say.
async fn bundled_plugins_agree(delivery: &str, near: &Kubo, far: &Kubo, program: Option<&Kubo>) {
    let topics = format!("topics: {{ dim.*: {{ delivery: {delivery} }} }}\n");
    let with = |plugins: serde_json::Value| Setup::bundled().yaml(&format!("{topics}plugins: {plugins}\n"));
    let quick = json!({ "suspect_after_ms": 1_000, "dead_after_ms": 3_000, "mass_silence_min": 3 });
    let quick = json!({ "heartbeat-watchdog": { "config": quick } });
    let judge = with(quick).on_kubo(near.api()).start().await;
    let observer = judge.host.storage.keys.name(&"dim-writer".parse().unwrap()).unwrap();
    let trusts = json!({ "config": { "trusted_observers": [observer] } });
    let watchdog = json!({ "disabled": true });
    let plugins = json!({ "node-registry": trusts, "job-tracker": trusts, "heartbeat-watchdog": watchdog });
    let reader = with(plugins).on_kubo(far.api()).start().await;
    let program = program.map(directly);
    let say = async |topic: &str, event: serde_json::Value| {
        let (topic, data): (Topic, Bytes) = (topic.parse().unwrap(), event.to_string().into());
        match &program {
            Some(program) => program.pubsub.publish(&topic, data).await.unwrap(),
            None => {
                let at = judge.host.storage.log.now();
                judge.host.storage.commit.publish(Publish { topic, data }, at).await.unwrap();
            }
        }
    };
    let heartbeat = || say("dim.nodes.heartbeat", json!({ "node_id": "n1", "status": "online" }));
    let job = |event: &str| {
        let event = json!({ "job_id": "j1", "event_type": event, "data": { "node_id": "n1" } });
        say("dim.jobs.updates", event)
    };
    let shown = async |host: &TestHost| {
        let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await.unwrap_or_default();
        let job = host.query("job-tracker", "get", json!({ "job_id": "j1" })).await.unwrap_or_default();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        (text(&node["status"]), text(&job["status"]), job["node_dead"].is_object())
    };
    let expected = |node: &str, job: &str, is_dead: bool| (node.to_owned(), job.to_owned(), is_dead);
    let hosts = [&judge, &reader];
    // A plain message may be lost, so the program repeats it.
    eventually_within(ARRIVAL, "both hosts know the node and the job", async || {
        heartbeat().await;
        job("running").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let shown = [shown(hosts[0]).await, shown(hosts[1]).await];
        shown.iter().all(|it| *it == expected("online", "running", false))
    })
    .await;
    eventually_within(ARRIVAL, "both hosts know the verdict", async || {
        let shown = [shown(hosts[0]).await, shown(hosts[1]).await];
        shown.iter().all(|it| *it == expected("dead", "running", true))
    })
    .await;
    eventually_within(ARRIVAL, "both hosts know the return and the result", async || {
        heartbeat().await;
        job("completed").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let shown = [shown(hosts[0]).await, shown(hosts[1]).await];
        shown.iter().all(|it| *it == expected("online", "completed", false))
    })
    .await;
    for host in hosts {
        assert_eq!(host.dead_letters(), [""; 0]);
    }
    judge.stop().await;
    reader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bundled_plugins_of_two_hosts_agree_on_topics_of_either_kind() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| [&near, &far].into_iter().for_each(|daemon| connect(daemon, &third)));
    bundled_plugins_agree("reliable", &near, &far, None).await;
    bundled_plugins_agree("both", &near, &far, None).await;
    bundled_plugins_agree("both", &near, &far, Some(&third)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_and_plain_programs_share_a_topic_and_receive_each_event_once() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let both = |api: &str| {
        let grants = json!({ "config": { "topics": ["probe.in"] } });
        let setup = Setup::default().and_probe("probe", grants);
        setup.yaml("topics: { probe.*: { delivery: both } }\n").on_kubo(api)
    };
    let hosts = [both(near.api()).start().await, both(far.api()).start().await];
    // It is to the others what any program is, and uses the daemon of a host.
    let grants = json!({ "config": { "topics": ["probe.in"] } });
    let program = Setup::default().and_probe("probe", grants).on_kubo(far.api()).start().await;
    are_connected([&hosts[0], &hosts[1]]).await;
    for host in [&hosts[0], &hosts[1], &program] {
        let pubsub = &host.host.exchange.links.backend.pubsub;
        eventually_within(ARRIVAL, "the plain topic has a peer", async || {
            pubsub.peers(&topic()).await.is_ok_and(|peers| !peers.is_empty())
        })
        .await;
    }
    // A host recognises the copies of another once it has a head and a bundle of it. Until then an event may come twice.
    const WARM_UP: &str = "warm-up";
    let warm_up = async || {
        for (host, name) in [(&hosts[0], "near"), (&hosts[1], "far")] {
            publish(host, &format!("{WARM_UP} {name}")).await;
        }
    };
    warm_up().await;
    let mut published = Instant::now();
    for host in &hosts {
        eventually_within(ARRIVAL, "the daemon of the other host is known", async || {
            // A bundle whose message is lost is fetched, and a fetch does not show whose daemon sent it.
            if published.elapsed() > Duration::from_secs(3) {
                warm_up().await;
                published = Instant::now();
            }
            host.host.exchange.links.reliable.copies().confirmed() == 1
        })
        .await;
    }
    let is_measured = |text: &String| !text.starts_with(WARM_UP);
    let plain = |host: &TestHost| plain_messages(host).into_iter().filter(is_measured).collect::<Vec<_>>();
    let texts = |name: &str| (0..20).map(|number| format!("{name} {number}")).collect::<Vec<_>>();
    for number in 0..20 {
        for (host, name) in [(&hosts[0], "near"), (&hosts[1], "far"), (&program, "program")] {
            publish(host, &format!("{name} {number}")).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let from_members = |host: &TestHost| -> Vec<String> {
        let texts = received(host).into_iter().map(|(_, data)| String::from_utf8_lossy(&data).into_owned());
        texts.filter(is_measured).collect()
    };
    for host in &hosts {
        eventually_within(ARRIVAL, "the events of the other host", async || from_members(host).len() >= 20)
            .await;
        eventually_within(ARRIVAL, "the messages", async || plain(host).len() >= 15).await;
    }
    eventually_within(ARRIVAL, "the program has most", async || plain(&program).len() >= 30).await;
    // What was held is decided by now.
    tokio::time::sleep(dim_network::reliable_topics::HOLD + Duration::from_secs(1)).await;
    for (host, other) in [(&hosts[0], "far"), (&hosts[1], "near")] {
        assert_eq!(from_members(host), texts(other));
        are_of(plain(host), &texts("program"));
    }
    are_of(plain(&program), &[texts("near"), texts("far")].concat());
    for host in hosts.into_iter().chain([program]) {
        host.stop().await;
    }
}

/// The sequence after the last event of a host.
async fn own_end(host: &TestHost) -> u64 {
    let logs = host.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    logs.iter().find(|log| log.is_own).map_or(0, |log| log.end)
}

/// The root of the index of the own log of a host that its daemon has pinned.
fn own_index(host: &TestHost) -> Option<dim_topics::identity::Digest> {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    dim_store::topic_rows::TopicState::read(&snapshot).unwrap().pins.get(&topic()).copied()
}

/// The number of blocks below the index that a daemon has pinned.
fn pinned_bundles(kubo: &Kubo) -> usize {
    let pins = kubo.ipfs(&["pin", "ls", "--type=recursive", "--quiet"]);
    let is_index = |pin: &&str| {
        pin.starts_with("bafyrei")
            && kubo.try_ipfs(&["--timeout=5s", "dag", "get", pin]).is_ok_and(|it| it.contains("level"))
    };
    // Another index may have replaced it meanwhile.
    let blocks = |root: &str| kubo.try_ipfs(&["--timeout=5s", "refs", "--recursive", "--unique", root]);
    pins.lines().find(is_index).and_then(|root| blocks(root).ok()).map_or(0, |blocks| blocks.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_keeps_the_events_of_a_writer_whose_daemon_is_gone() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let writer = setup(near.api()).start().await;
    let grants = || json!({ "config": { "topics": ["probe.in"] } });
    let mirroring = || {
        let yaml = "topics: { probe.*: { delivery: reliable, mirror: true } }\n";
        Setup::default().and_probe("probe", grants()).yaml(yaml).on_kubo(far.api())
    };
    // It learns of the first events from a head only.
    publish_numbers(&writer, 0..100).await;
    let mirror = mirroring().start().await;
    are_connected([&writer, &mirror]).await;
    publish_numbers(&writer, 100..200).await;
    let logs = async |host: &TestHost| host.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    let stored = |host: &TestHost| {
        dim_store::mirrors::all(&host.host.storage.store.snapshot().unwrap()).unwrap().pop()
    };
    eventually_within(ARRIVAL, "the log is mirrored", async || {
        logs(&mirror).await.iter().any(|log| log.is_mirrored) && pinned_bundles(&far) > 0
    })
    .await;
    // A head that was sent before the index had all bundles is followed by one that has them.
    eventually_within(ARRIVAL, "the newest root is pinned", async || {
        let Some(kept) = stored(&mirror) else { return false };
        let head = dim_topics::head::Head::open(&kept.head, "dim").unwrap();
        let log = head.topics.iter().find(|log| log.topic == topic()).expect("the head states the log");
        let written = {
            let snapshot = writer.host.storage.store.snapshot().unwrap();
            dim_store::topic_rows::places(&snapshot, &topic()).unwrap().len()
        };
        log.next == 200 && Some(kept.root) == own_index(&writer) && pinned_bundles(&far) == written
    })
    .await;
    let root = stored(&mirror).unwrap().root;
    writer.stop().await;
    drop(near);
    let mirror = mirroring().start_in(mirror.stop().await).await;
    far.ipfs(&["repo", "gc"]);
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    third.ipfs(&["swarm", "connect", far.ipfs(&["id", "-f", "<addrs>"]).lines().next().unwrap()]);
    let late = "topics: { probe.*: { delivery: reliable, from: earliest } }\n";
    let late = Setup::default().and_probe("probe", grants()).yaml(late).on_kubo(third.api()).start().await;
    has_numbers(&late, 200).await;
    assert_eq!(stored(&mirror).map(|kept| kept.root), Some(root));
    late.stop().await;
    // A host that is no mirror any more removes the pin.
    let ended = setup(far.api()).start_in(mirror.stop().await).await;
    eventually_within(ARRIVAL, "nothing is mirrored", async || stored(&ended).is_none()).await;
    assert_eq!(pinned_bundles(&far), 0);
    ended.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_stay_connected_to_those_of_members_that_were_heard_through_others() {
    let Some((near, hub)) = Kubo::start_pair() else { return };
    let mut third = tokio::task::block_in_place(Kubo::start).unwrap();
    third.ipfs(&["swarm", "connect", hub.ipfs(&["id", "-f", "<addrs>"]).lines().next().unwrap()]);
    let peer = near.ipfs(&["id", "-f", "<id>"]);
    let sees = |list: &[&str]| third.try_ipfs(list).is_ok_and(|peers| peers.contains(&peer));
    let hosts =
        [setup(near.api()).start().await, setup(hub.api()).start().await, setup(third.api()).start().await];
    are_connected([&hosts[1], &hosts[2]]).await;
    are_connected([&hosts[0], &hosts[1]]).await;
    publish_numbers(&hosts[0], 0..20).await;
    has_numbers(&hosts[2], 20).await;
    eventually_within(ARRIVAL, "the daemon keeps connected", async || sees(&["swarm", "peering", "ls"]))
        .await;
    eventually_within(ARRIVAL, "the daemons are connected", async || sees(&["swarm", "peers"])).await;
    // The daemon forgets it in a restart; its host says it again.
    third.kill();
    third.restart();
    let sees = |list: &[&str]| third.try_ipfs(list).is_ok_and(|peers| peers.contains(&peer));
    eventually_within(ARRIVAL, "they are connected again", async || {
        sees(&["swarm", "peers"]) && sees(&["swarm", "peering", "ls"])
    })
    .await;
    for host in hosts {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_messages_are_fetched() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let target: SocketAddr = far.url().trim_start_matches("http://").parse().unwrap();
    let proxy = FaultProxy::start(target, tier::seed("the proxy")).await;
    let (writer, reader) = (setup(near.api()).start().await, setup(&proxy.api()).start().await);
    are_connected([&writer, &reader]).await;
    proxy.set(Fault::Losing);
    for number in 0..200 {
        publish(&writer, &number.to_string()).await;
        // Each event is a message of its own.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    has_numbers(&reader, 200).await;
    writer.stop().await;
    reader.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_fits_into_no_message_is_fetched() {
    let Some((_daemons, [writer, reader])) = connected_pair().await else { return };
    // Bytes that cannot be compressed.
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(59 << 10)
    .collect();
    let publish = Publish { topic: topic(), data: noise.clone().into() };
    writer.host.storage.commit.publish(publish, writer.host.storage.log.now()).await.unwrap();
    eventually_within(ARRIVAL, "it has arrived", async || received(&reader).len() == 1).await;
    assert_eq!(received(&reader)[0].1, noise);
    writer.stop().await;
    reader.stop().await;
}

/// Publishes numbered events until the host is gone, and counts those that it acknowledged.
async fn publish_until_it_is_gone(state: &Path, round: usize, acknowledged: &AtomicUsize) {
    let client = Client::new(Address::in_state_dir(state)).unwrap();
    loop {
        let number = acknowledged.load(Ordering::SeqCst);
        if client.pubsub().publish("probe.in", format!("{round} {number}")).await.is_err() {
            return;
        }
        acknowledged.store(number + 1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_were_acknowledged_survive_a_kill_of_their_host() {
    let Some((near, far)) = Kubo::start_pair() else { return };
    let reader = setup(far.api()).start().await;
    let dir = tempfile::tempdir().unwrap();
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).unwrap();
    std::fs::write(&config, RELIABLE).unwrap();
    let rounds = tier::repeats(4, 200);
    let mut acknowledged = Vec::new();
    for round in 0..rounds {
        let args = ["--kubo", near.api(), "--config", config.to_str().unwrap()];
        let writer = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
        let count = Arc::new(AtomicUsize::new(0));
        let load = tokio::spawn({
            let (state, count) = (state.clone(), count.clone());
            async move { publish_until_it_is_gone(&state, round, &count).await }
        });
        eventually_within(ARRIVAL, "there is load", async || count.load(Ordering::SeqCst) > 0).await;
        tokio::time::sleep(Duration::from_millis(200 + 137 * (round as u64 % 5))).await;
        writer.kill();
        load.await.unwrap();
        acknowledged.push(count.load(Ordering::SeqCst));
    }
    // The last start publishes what was durable and not sent.
    let args = ["--kubo", near.api(), "--config", config.to_str().unwrap()];
    let writer = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let of_round = |round: usize| {
        let prefix = format!("{round} ");
        let data = received(&reader).into_iter().map(|(_, data)| String::from_utf8(data.to_vec()).unwrap());
        let numbers =
            data.filter_map(|text| text.strip_prefix(&prefix).map(|it| it.parse::<usize>().unwrap()));
        numbers.collect::<Vec<_>>()
    };
    for (round, count) in acknowledged.iter().enumerate() {
        let all = async || of_round(round).len() >= *count;
        eventually_within(ARRIVAL, "the acknowledged events have arrived", all).await;
        let numbers = of_round(round);
        // The event that was under way when the host was killed may be durable.
        assert!(numbers.len() <= count + 1, "{} of {count}", numbers.len());
        let is_in_order = numbers.iter().copied().eq(0..numbers.len());
        assert!(is_in_order, "round {round}, {count} acknowledged: {:?}", received(&reader));
    }
    println!("{} events, {} acknowledged", received(&reader).len(), acknowledged.iter().sum::<usize>());
    writer.kill();
    reader.stop().await;
}

/// Connects two daemons, as soon as they can be connected.
fn connect(one: &Kubo, other: &Kubo) {
    let deadline = std::time::Instant::now() + ARRIVAL;
    let dial = || -> Result<String, String> {
        let addresses = other.try_ipfs(&["id", "-f", "<addrs>"])?;
        one.try_ipfs(&["swarm", "connect", addresses.lines().next().ok_or("no address")?])
    };
    while let Err(error) = dial() {
        assert!(std::time::Instant::now() < deadline, "the daemons do not connect: {error}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A host with the probe as a process of its own.
fn probing_program(state: &Path, config: &Path, kubo: &Kubo) -> Program {
    let setup = serde_json::to_vec(&setup(kubo.api()).config()).unwrap();
    std::fs::write(config, setup).unwrap();
    let args = ["--kubo", kubo.api(), "--config", config.to_str().unwrap()];
    tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), state, &args))
}

/// Prints what a host has received, for a test that fails.
async fn tell_state(who: &str, host: &TestHost, acknowledged: usize) {
    let events = received(host).len();
    println!("{who}: {events} events, {acknowledged} acknowledged");
    let logs = host.host.exchange.links.reliable.writers(&topic()).await.unwrap();
    for log in logs.iter().filter(|log| log.received < log.end || log.counters.gaps > 0) {
        println!("{log:?}");
    }
}

/// What is killed in a round.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Writer,
    Reader,
    DaemonOfTheWriter,
    DaemonOfTheReader,
    RepositoryOfTheWriter,
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_agree_over_kills_of_hosts_and_daemons_collections_and_a_lost_repository() {
    let Some((mut near, mut far)) = Kubo::start_pair() else { return };
    let third = tokio::task::block_in_place(Kubo::start).unwrap();
    tokio::task::block_in_place(|| [&near, &far].into_iter().for_each(|daemon| connect(daemon, &third)));
    let (configs, dirs) = (tempfile::tempdir().unwrap(), [(); 2].map(|()| tempfile::tempdir().unwrap()));
    let config = |name: &str| configs.path().join(name);
    let mut writer = probing_program(dirs[0].path(), &config("writer"), &near);
    let mut reader = probing_program(dirs[1].path(), &config("reader"), &far);
    let witness = setup(third.api()).start().await;
    let mut acknowledged = Vec::new();
    let victims = [
        Victim::Writer,
        Victim::DaemonOfTheReader,
        Victim::Reader,
        Victim::DaemonOfTheWriter,
        Victim::RepositoryOfTheWriter,
    ];
    for (round, victim) in victims.into_iter().cycle().take(tier::repeats(5, 200)).enumerate() {
        let count = Arc::new(AtomicUsize::new(0));
        let load = tokio::spawn({
            let (state, count) = (dirs[0].path().to_owned(), count.clone());
            async move { publish_until_it_is_gone(&state, round, &count).await }
        });
        eventually_within(ARRIVAL, "there is load", async || count.load(Ordering::SeqCst) > 0).await;
        tokio::time::sleep(Duration::from_millis(200 + 137 * (round as u64 % 5))).await;
        match victim {
            Victim::Writer => {
                writer.kill();
                writer = probing_program(dirs[0].path(), &config("writer"), &near);
            }
            Victim::Reader => {
                reader.kill();
                reader = probing_program(dirs[1].path(), &config("reader"), &far);
            }
            Victim::DaemonOfTheWriter | Victim::RepositoryOfTheWriter => {
                tokio::task::block_in_place(|| {
                    if matches!(victim, Victim::DaemonOfTheWriter) {
                        near.kill();
                        near.restart();
                    } else {
                        near.replace_by_an_empty_one();
                    }
                    [&far, &third].into_iter().for_each(|daemon| connect(&near, daemon));
                });
            }
            Victim::DaemonOfTheReader => tokio::task::block_in_place(|| {
                far.kill();
                far.restart();
                [&near, &third].into_iter().for_each(|daemon| connect(&far, daemon));
            }),
        }
        // A collection waits for an import, so the load would grow with the log.
        load.abort();
        let _ = load.await;
        acknowledged.push(count.load(Ordering::SeqCst));
        tokio::task::block_in_place(|| [&near, &far, &third].map(|daemon| daemon.ipfs(&["repo", "gc"])));
    }
    // What a host has received is read from its store.
    let by_round = |host: &TestHost| {
        let mut rounds = vec![Vec::new(); acknowledged.len()];
        for (_, data) in received(host) {
            let (round, number) = std::str::from_utf8(&data).unwrap().split_once(' ').unwrap();
            rounds[round.parse::<usize>().unwrap()].push(number.parse::<usize>().unwrap());
        }
        rounds
    };
    let has_all =
        |host: &TestHost| by_round(host).iter().zip(&acknowledged).all(|(of, count)| of.len() >= *count);
    eventually_within(ARRIVAL * 3, "the witness has all events", async || has_all(&witness)).await;
    tell_state("the witness", &witness, acknowledged.iter().sum()).await;
    reader.kill();
    let [_writers_dir, readers_dir] = dirs;
    let reader = setup(far.api()).start_in(readers_dir).await;
    // The longer it was away, the more it fetches.
    let mut progress = (0, Instant::now());
    while !has_all(&reader) {
        let count = received(&reader).len();
        if count > progress.0 {
            progress = (count, Instant::now());
        } else if progress.1.elapsed() > ARRIVAL {
            tell_state("the reader", &reader, acknowledged.iter().sum()).await;
            panic!("the reader has received nothing for {ARRIVAL:?}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tell_state("the reader", &reader, acknowledged.iter().sum()).await;
    for host in [&witness, &reader] {
        for (round, (numbers, count)) in by_round(host).into_iter().zip(&acknowledged).enumerate() {
            // The event that was under way at the end of the round may be durable.
            assert!(numbers.len() <= count + 1, "round {round}: {} of {count}", numbers.len());
            assert!(numbers.iter().copied().eq(0..numbers.len()), "round {round}: {numbers:?}");
        }
        let logs = host.host.exchange.links.reliable.writers(&topic()).await.unwrap();
        assert_eq!(logs.iter().map(|log| log.counters.gaps).max(), Some(0), "{logs:?}");
    }
    println!("{} events, {} acknowledged", received(&witness).len(), acknowledged.iter().sum::<usize>());
    writer.kill();
    witness.stop().await;
    reader.stop().await;
}
