//! An entry's world is fixed: the same log, handled again from the same state, ends in the same
//! state and the same effects, to the byte.

use dim_model::entry::{Entry, Event, Kind, Offset, Origin};
use dim_server::replay::Replay;
use dim_store::batch::Batch;
use dim_tests::{Setup, TestHost, eventually, script};
use redb::{ReadableTable as _, ReadableTableMetadata as _};
use serde_json::{Value, json};

/// Everything that a replay leaves, as bytes.
fn bytes_of(batch: &Batch) -> String {
    format!(
        "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
        batch.requested.state,
        batch.requested.timers,
        batch.requested.publishes,
        batch.requested.names,
        batch.requested.subscriptions,
        batch.requested.follows,
        batch.requested.dead,
        batch.requested.retries
    )
}

/// Handles the log that a host left, with fresh plugins, and returns what each of them did.
fn replayed(setup: &Setup, dir: &std::path::Path) -> Vec<(String, Batch)> {
    let replay = Replay::open(&setup.config(), dir).expect("the log can be opened again");
    let done = replay.run().expect("the log can be handled again");
    done.into_iter().map(|(name, batch)| (name.to_string(), batch)).collect()
}

async fn live(
    setup: &Setup,
    drive: impl AsyncFnOnce(&TestHost),
) -> (tempfile::TempDir, Vec<(Vec<u8>, Vec<u8>)>) {
    let host = setup.start().await;
    drive(&host).await;
    host.settled().await;
    let dir = host.stop().await;
    let state = dump(&dim_store::Store::open(dir.path()).unwrap());
    (dir, state)
}

fn dump(store: &dim_store::Store) -> Vec<(Vec<u8>, Vec<u8>)> {
    let table = store.snapshot().unwrap().table(dim_store::STATE).unwrap();
    table
        .iter()
        .unwrap()
        .map(|row| row.unwrap())
        .map(|(k, v)| (k.value().to_vec(), v.value().to_vec()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_log_is_handled_twice_with_the_same_outcome() {
    // Where these strike depends on the machine: on its speed and on what the backend took by then.
    let limited = json!({ "limits": { "outbox": 4, "call-cpu-ms": 100 } });
    let on_start = "[{\"do\":\"follow\",\"name\":\"probe-key\"}]";
    let follows = json!({ "config": { "on_start": on_start }, "limits": { "call-cpu-ms": 100 } });
    let rated = json!({ "limits": { "publishes-per-second": 3, "call-cpu-ms": 100 } });
    let setup = Setup::bundled().and_probe("probe", limited).and_probe("reader", follows);
    let setup = setup.and_probe("rated", rated);
    let (dir, live_state) = live(&setup, async |host| {
        for number in 0..200 {
            let node = number % 7;
            let beat = json!({ "node_id": format!("n{node}"), "timestamp": 1_700_000_000 + number, "status": "online" });
            host.from_peer("dim.nodes.heartbeat", beat.to_string()).await;
            let status = ["queued", "running", "completed", "nonsense"][number % 4];
            let event = json!({ "job_id": format!("j{}", number / 3), "event_type": status, "data": { "node_id": format!("n{node}") } });
            host.from_peer("dim.jobs.updates", event.to_string()).await;
            host.from_peer("probe.in", script(json!([
                { "do": "note", "key": "times", "what": number },
                { "do": "publish", "topic": "probe.out", "data": format!("{number}") },
                { "do": "timer", "key": format!("t{}", number % 3), "in": 1_000_000 },
            ])).to_string()).await;
            if number % 20 == 0 {
                // What is known of an own name follows from the log too, however the backend is.
                let name = json!([
                    { "do": "note-name", "name": "probe-key" },
                    { "do": "update-state", "key": "probe-key", "data": format!("{number}") },
                    { "do": "note-name", "name": "probe-key" },
                ]);
                host.from_peer("probe.in", script(name).to_string()).await;
            }
            if number % 50 == 0 {
                let burst = vec![json!({ "do": "publish", "topic": "probe.out", "data": "burst" }); 6];
                host.from_peer("probe.in", script(json!(burst)).to_string()).await;
                host.from_peer("probe.in", script(json!([{ "do": "loop" }])).to_string()).await;
                host.from_peer("probe.in", script(json!([{ "do": "add", "key": "x" }, { "do": "trap" }])).to_string()).await;
                let update = json!({ "job_id": format!("c{number}"), "event_type": "running" });
                host.command("job-tracker", "update", update).await.expect("the tracker takes it");
            }
        }
    })
    .await;
    let (once, twice) = (replayed(&setup, dir.path()), replayed(&setup, dir.path()));
    assert_eq!(once.len(), 6);
    for ((name, first), (_, second)) in once.iter().zip(&twice) {
        assert!(!first.requested.state.is_empty(), "{name} did something");
        assert_eq!(bytes_of(first), bytes_of(second), "{name}");
    }
    // What was published when there was room, and nothing else, is published again.
    let store = dim_store::Store::open(dir.path()).unwrap();
    let log = store.read_log(Offset(0), usize::MAX).unwrap();
    drop(store);
    for plugin in ["probe", "rated"] {
        let published: Vec<_> = log.iter().filter_map(|entry| published_by(plugin, entry)).collect();
        let (_, batch) = once.iter().find(|(name, _)| name == plugin).unwrap();
        let again: Vec<_> = batch.requested.publishes.iter().map(|publish| publish.data.clone()).collect();
        assert_eq!(published, again, "{plugin}");
        let struck = |entry: &&Entry| matches!(&entry.kind, Kind::Struck { plugin: whose, .. } if whose.as_str() == plugin);
        assert!(log.iter().filter(struck).count() >= 8, "limits of {plugin} struck");
    }
    // And what the live host committed is what the replay finds.
    assert_state(&once, &live_state);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_stopped_between_two_timers_is_replayed_up_to_there() {
    let setup = Setup::probe();
    let host = setup.start().await;
    // All are due before one entry, and each is a step of its own.
    let timer = |number: u64| json!({ "do": "timer", "key": format!("t{number}"), "at": 1 });
    host.run((0..2_000).map(timer).collect()).await;
    eventually("the first fire", async || host.state_of("probe", "fired").await != Value::Null).await;
    let dir = host.stop().await;
    let store = dim_store::Store::open(dir.path()).unwrap();
    let live_state = dump(&store);
    let left = store.snapshot().unwrap().table(dim_store::TIMERS).unwrap().len().unwrap();
    drop(store);
    assert!((1..2_000).contains(&left), "it was stopped in the middle: {left} timers are left");
    assert_state(&replayed(&setup, dir.path()), &live_state);
}

/// Asserts that replayed plugins leave the state that the live host committed.
fn assert_state(replayed: &[(String, Batch)], live: &[(Vec<u8>, Vec<u8>)]) {
    let mut again: Vec<_> = replayed
        .iter()
        .flat_map(|(_, batch)| {
            let id = batch.id;
            batch.requested.state.iter().filter_map(move |(key, value)| {
                Some((dim_store::StateKey::new(id, key).as_bytes().to_vec(), value.clone()?))
            })
        })
        .collect();
    again.sort();
    let (again, live) = (readable(&again), readable(live));
    for (replayed, live) in again.iter().zip(&live) {
        assert_eq!(replayed, live);
    }
    assert_eq!(again.len(), live.len());
}

fn published_by(plugin: &str, entry: &Entry) -> Option<bytes::Bytes> {
    match &entry.kind {
        Kind::Event(Event::Message { data, origin: Origin::Plugin(name), .. }) if name.as_str() == plugin => {
            Some(data.clone())
        }
        _ => None,
    }
}

fn readable(state: &[(Vec<u8>, Vec<u8>)]) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    state.iter().map(|(key, value)| (text(key), text(value))).collect()
}
