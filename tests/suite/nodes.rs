//! Nodes: who is alive, what one bad record costs, and what an operator sees and removes.

use std::path::Path;

use dim_tests::{Program, Setup, SupervisedHost, TestHost, eventually, soon, with_token};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");
const BEATS: &str = "dim.nodes.heartbeat";

/// A watchdog that calls a node dead after a second of listening.
const QUICK: &str = "plugins:
  heartbeat-watchdog:
    config: { suspect_after_ms: 500, dead_after_ms: 1000 }
";

async fn beat(host: &TestHost, heartbeat: Value) {
    host.from_peer(BEATS, heartbeat.to_string()).await;
}

async fn node(host: &TestHost, id: &str) -> Value {
    host.query("node-registry", "get", json!({ "node_id": id })).await.unwrap_or_default()
}

/// How the watchdog lists a node.
async fn standing(host: &TestHost, id: &str) -> Value {
    let nodes = host.query("heartbeat-watchdog", "list", json!({})).await.unwrap();
    let found = nodes.as_array().unwrap().iter().find(|node| node["node_id"] == id);
    found.map(|node| node["standing"].clone()).unwrap_or_default()
}

fn yesterday() -> jiff::Timestamp {
    jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_sends_heartbeats_is_never_dead_whatever_its_clock_says() {
    let host = Setup::bundled().yaml(QUICK).start().await;
    beat(&host, json!({ "node_id": "n1", "timestamp": jiff::Timestamp::now(), "status": "busy" })).await;
    host.command("job-tracker", "update", json!({ "job_id": "j", "event_type": "running", "node_id": "n1" }))
        .await
        .unwrap();
    let job = async || host.query("job-tracker", "get", json!({ "job_id": "j" })).await.unwrap();
    eventually("all three say that it is dead", async || {
        standing(&host, "n1").await == "dead"
            && node(&host, "n1").await["status"] == "dead"
            && job().await["node_dead"].is_object()
    })
    .await;
    let figures = json!({ "memory_available": 31.25 });
    let begun = tokio::time::Instant::now();
    eventually("all three say that it is alive, for longer than it takes to be dead", async || {
        beat(&host, json!({ "node_id": "n1", "timestamp": yesterday(), "resources": figures })).await;
        host.settled().await;
        let known = node(&host, "n1").await;
        assert_eq!(known["status"], "online");
        assert_eq!(known["resources"].to_string(), figures.to_string());
        assert_eq!(standing(&host, "n1").await, "alive");
        begun.elapsed().as_secs() >= 2 && job().await["node_dead"].is_null()
    })
    .await;
    assert_eq!(host.dead_letters(), [] as [String; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_whose_clock_is_ahead_keeps_no_node_dead() {
    let friend = dim_ipfs::embedded::new_peer();
    let trusts = json!({ "config": { "trusted_observers": [friend.to_string()] } });
    let quick = json!({ "config": { "suspect_after_ms": 500, "dead_after_ms": 1000 } });
    let plugins = json!({ "node-registry": trusts, "job-tracker": trusts, "heartbeat-watchdog": quick });
    let host = Setup::bundled().yaml(&format!("plugins: {plugins}\n")).start().await;
    beat(&host, json!({ "node_id": "n1" })).await;
    let running = json!({ "job_id": "j", "event_type": "running", "node_id": "n1" });
    host.command("job-tracker", "update", running).await.unwrap();
    let job = async || host.query("job-tracker", "get", json!({ "job_id": "j" })).await.unwrap();
    let says = async |status: &str| {
        let said = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(240);
        let seen = said - jiff::SignedDuration::from_secs(2);
        let verdict = json!({ "node_id": "n1", "status": status, "observer": "friend", "timestamp": said, "last_seen": seen });
        let topic = "dim.nodes.status".parse().unwrap();
        host.host
            .exchange
            .bus
            .as_ref()
            .unwrap()
            .publish_as(&friend, &topic, verdict.to_string().into())
            .await;
    };
    eventually("it is dead", async || {
        standing(&host, "n1").await == "dead" && job().await["node_dead"].is_object()
    })
    .await;
    // What this host's own watchdog says is not for another one to change.
    for word in ["dead", "recovered"] {
        says(word).await;
    }
    host.settled().await;
    assert_eq!(
        (&node(&host, "n1").await["status"], job().await["node_dead"].is_object()),
        (&json!("dead"), true)
    );
    says("dead").await;
    beat(&host, json!({ "node_id": "n1" })).await;
    eventually("all three say that it is alive", async || {
        beat(&host, json!({ "node_id": "n1" })).await;
        standing(&host, "n1").await == "alive"
            && node(&host, "n1").await["status"] == "online"
            && job().await["node_dead"].is_null()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_in_milliseconds_is_a_heartbeat_and_says_so() {
    let host = Setup::bundled().start().await;
    let millis = jiff::Timestamp::now().as_millisecond();
    for (id, timestamp) in
        [("ms", json!(millis)), ("us", json!(millis * 1_000)), ("ns", json!(millis * 1_000_000))]
    {
        beat(&host, json!({ "node_id": id, "timestamp": timestamp, "cached_models": ["m"], "status": 7 }))
            .await;
    }
    host.settled().await;
    for (id, unit) in [("ms", "milliseconds?"), ("us", "microseconds?"), ("ns", "nanoseconds?")] {
        let known = node(&host, id).await;
        assert_eq!((&known["cached_models"], &known["status"]), (&json!(["m"]), &json!("online")), "{known}");
        assert!(known["ignored"][0].as_str().unwrap().contains(unit), "{known}");
        assert_eq!(standing(&host, id).await, "alive");
    }
    assert_eq!(host.dead_letters(), [] as [String; 0]);
    // What has no such member is refused, and the reason says why.
    let event = json!({ "job_id": "j", "event_type": "running", "timestamp": millis });
    host.from_peer("dim.jobs.updates", event.to_string()).await;
    eventually("it is set aside", async || host.dead_letters().len() == 1).await;
    assert!(host.dead_letters()[0].contains("milliseconds?"), "{:?}", host.dead_letters());
}

/// A heartbeat whose figure lies so deep that no reader takes it.
fn deep(id: &str) -> String {
    let deep = format!("{}1{}", "[".repeat(125), "]".repeat(125));
    format!("{{\"node_id\":{id:?},\"resources\":{{\"memory_available\":{deep}}}}}")
}

#[test]
fn one_heartbeat_breaks_nobodys_list_and_a_node_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(Path::new(PROGRAM), dir.path(), &["--embedded"]);
    let publish = |message: &str| assert!(host.dim(&["topic", "pub", BEATS, message]).status.success());
    publish("{\"node_id\":\"fine\"}");
    publish(&deep("deep"));
    let known = || host.dim(&["node", "ls"]);
    soon(|| String::from_utf8_lossy(&known().stdout).contains("deep"));
    let listed = known();
    let (rows, notes) = (String::from_utf8_lossy(&listed.stdout), String::from_utf8_lossy(&listed.stderr));
    assert!(listed.status.success() && rows.contains("fine"), "{rows}");
    assert!(notes.contains("deep: ignored in its last heartbeat: resources: "), "{notes}");
    let nodes = host.json(&["node", "ls"]);
    assert_eq!(nodes.as_array().unwrap().len(), 2);
    let removed = host.json(&["node", "rm", "deep"]);
    assert_eq!(removed["node_id"], "deep");
    for gone in ["deep", "nobody"] {
        let again = host.dim(&["node", "rm", gone]);
        assert_eq!(again.status.code(), Some(3), "{again:?}");
    }
    let watched = host.json(&["plugin", "query", "heartbeat-watchdog", "list"]);
    assert_eq!(watched.as_array().unwrap().len(), 1, "{watched}");
    assert_eq!(host.json(&["node", "ls"]).as_array().unwrap().len(), 1);
    // It comes back with its next heartbeat.
    publish("{\"node_id\":\"deep\"}");
    soon(|| host.dim(&["node", "get", "deep"]).status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_of_a_node_are_passed_on_to_the_letter_in_the_answer_and_in_the_document() {
    let host = SupervisedHost::start(&Setup::bundled()).await;
    let (url, client) = (host.serve().await, with_token());
    let figures = "{\"cpu_available\":9007199254740991.0,\"memory_available\":31.245270191439438,\"gpu_available\":123456789012345678901234567890}";
    let heartbeat = format!("{{\"node_id\":\"n1\",\"resources\":{figures}}}");
    let topic = format!("{url}/v1/topics/{BEATS}/messages");
    assert!(client.post(topic).body(heartbeat).send().await.unwrap().status().is_success());
    let text =
        async |path: &str| client.get(format!("{url}{path}")).send().await.unwrap().text().await.unwrap();
    for path in ["/v1/nodes/n1", "/v1/nodes", "/v1/names/dim-state-key/state"] {
        eventually(path, async || text(path).await.contains(figures)).await;
    }
    host.stop().await;
}

#[test]
fn a_bad_row_of_a_merged_registry_costs_itself_and_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (state, config, file) =
        (dir.path().join("state"), dir.path().join("config.yaml"), dir.path().join("other"));
    std::fs::create_dir(&state).unwrap();
    std::fs::write(&config, "plugins: { node-registry: { config: { registry_ipns: other } } }\n").unwrap();
    let deep = deep("n4");
    let rows = format!(
        r#"{{"nodes":[{{"node_id":"n1","cached_models":null,"resources":null}},{{"node_id":"n2","status":"busy"}},
        {{"node_id":3}},{{"node_id":""}},{{"node_id":"n2"}},{deep}],"active_jobs":{{}}}}"#
    );
    std::fs::write(&file, rows).unwrap();
    let args = ["--config", config.to_str().unwrap(), "--embedded"];
    let host = Program::start(Path::new(PROGRAM), &state, &args);
    let updated = host.dim(&["ipns", "update-state", "other", file.to_str().unwrap()]);
    assert!(updated.status.success(), "{updated:?}");
    soon(|| host.json(&["node", "ls"]).as_array().unwrap().len() == 3);
    let listed = host.dim(&["node", "ls"]);
    let notes = String::from_utf8_lossy(&listed.stderr);
    assert!(notes.contains("3 rows set aside, 1 incomplete: row 2: "), "{notes}");
    assert!(host.log().contains("rows of a merged registry cannot be read"), "{}", host.log());
    // A document that is none changes nothing, and is told until there is a better one.
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, "garbage{").unwrap();
    assert!(host.dim(&["ipns", "update-state", "other", file.to_str().unwrap()]).status.success());
    let told = || String::from_utf8_lossy(&host.dim(&["node", "ls"]).stderr).into_owned();
    soon(|| told().contains("the last document cannot be merged: it is not a registry"));
    assert_eq!(host.json(&["node", "ls"]).as_array().unwrap().len(), 3);
    let status = String::from_utf8(host.dim(&["status"]).stdout).unwrap();
    assert!(status.contains("cannot be merged, and its nodes are shown as they were"), "{status}");
    std::fs::write(&file, good).unwrap();
    assert!(host.dim(&["ipns", "update-state", "other", file.to_str().unwrap()]).status.success());
    soon(|| !told().contains("cannot be merged"));
    let there = host.dim(&["node", "rm", "n1"]);
    let why = String::from_utf8_lossy(&there.stderr);
    assert!(why.contains("remove it on the host that publishes it") && !there.status.success(), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_sender_does_not_push_out_the_dead_letters_of_others() {
    use dim_ipfs::embedded::new_peer;
    let host = Setup::probe().yaml("store:\n  dead_letters:\n    max_count: 20\n").start().await;
    let (honest, flooding) = (new_peer(), new_peer());
    let topic = "probe.in".parse().unwrap();
    host.listening(&topic).await;
    let says = async |peer: &dim_model::ident::PeerName, text: String| {
        host.host.exchange.bus.as_ref().unwrap().publish_as(peer, &topic, text.into()).await;
    };
    says(&honest, "what is looked for".to_owned()).await;
    let store = &host.host.storage.store;
    eventually("it is set aside", async || dim_store::dead_letters::count(store).unwrap() == 1).await;
    // As in a store of the code before, which kept no index of senders.
    let write = store.begin().unwrap();
    write.open_table(dim_store::DEAD_OF).unwrap().retain(|_, _| false).unwrap();
    write.open_table(dim_store::DEAD_SHARES).unwrap().retain(|_, _| false).unwrap();
    write.commit().unwrap();
    for number in 0..100 {
        says(&flooding, format!("flood {number}")).await;
    }
    says(&honest, "another".to_owned()).await;
    eventually("those that are too many are dropped and counted", async || {
        dim_store::dead_letters::dropped(store).unwrap() == 82
    })
    .await;
    let letters = dim_store::dead_letters::list(store, &Default::default(), None, 100).unwrap();
    let of_honest: Vec<u64> = letters
        .iter()
        .filter(|(_, letter)| letter.event.describe().1["origin"] == format!("peer {honest}"))
        .map(|(id, _)| *id)
        .collect();
    assert_eq!((letters.len(), of_honest), (20, vec![1, 102]));
    // Letters that are gone are gone from the shares, too: the sender has room again.
    for (id, _) in &letters {
        dim_server::dead_letters::drop_letter(&host.host.storage.commit, *id).await.unwrap();
    }
    for number in 0..20 {
        says(&flooding, format!("again {number}")).await;
    }
    eventually("they are there", async || dim_store::dead_letters::count(store).unwrap() == 20).await;
    assert_eq!(dim_store::dead_letters::dropped(store).unwrap(), 82);
}
