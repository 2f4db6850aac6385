//! Two hosts on two daemons: the fleet that the project is for.

use std::time::Duration;

use dim_ipfs::embedded::new_peer;
use dim_model::entry::{Entry, Event, Kind, Offset, Origin};
use dim_server::replay::Replay;
use dim_store::plugin_registry;
use dim_store::{CURSORS, Store, names};
use dim_tests::{Kubo, Setup, TestHost, downtime, eventually};
use serde_json::json;

async fn two_hosts() -> Option<((Kubo, TestHost), (Kubo, TestHost))> {
    let (one, other) = Kubo::start_pair()?;
    let first = Setup::bundled().on_kubo(one.api()).start().await;
    let second = Setup::bundled().on_kubo(other.api()).start().await;
    for (host, topic) in [(&first, "dim.jobs.updates"), (&second, "dim.jobs.updates")] {
        let topic = topic.parse().unwrap();
        host.listening(&topic).await;
        // The mesh needs a second or two after both have subscribed.
        eventually("the daemons know each other on the topic", async || {
            host.host.exchange.links.backend.pubsub.peers(&topic).await.is_ok_and(|peers| !peers.is_empty())
        })
        .await;
    }
    Some(((one, first), (other, second)))
}

/// Publishes as curl does.
async fn publish_by_http(kubo: &Kubo, topic: &str, data: &str) {
    let arg = multibase::encode(multibase::Base::Base64Url, topic);
    let url = format!("{}/api/v0/pubsub/pub?arg={arg}", kubo.url());
    let output = std::process::Command::new("curl")
        .args([
            "--silent",
            "--fail",
            "--request",
            "POST",
            "--form",
            &format!("file={data};filename=data"),
            &url,
        ])
        .output();
    let sent = output.is_ok_and(|output| output.status.success());
    assert!(sent, "curl publishes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_event_from_one_daemon_is_known_on_both_hosts_and_readable_anywhere() {
    let Some(((one, first), (other, second))) = two_hosts().await else { return };
    let event = json!({ "job_id": "j1", "event_type": "running", "timestamp": 1_700_000_000, "data": { "node_id": "n1" } });
    publish_by_http(&one, "dim.jobs.updates", &event.to_string()).await;
    for host in [&first, &second] {
        eventually("the job is known", async || {
            host.query("job-tracker", "get", json!({ "job_id": "j1" }))
                .await
                .is_ok_and(|job| job["status"] == "running")
        })
        .await;
    }
    // The state of the first host, read on the second daemon with its own tools.
    let name = first.host.storage.keys.name(&"dim-state-key-jobs".parse().unwrap()).unwrap();
    eventually("the state resolves on the other node", async || {
        other.try_ipfs(&["name", "resolve", "--nocache", name.as_str()]).is_ok()
    })
    .await;
    eventually("the state reads on the other node", async || {
        let read = other.try_ipfs(&["cat", &format!("/ipns/{name}")]).unwrap_or_default();
        serde_json::from_str::<serde_json::Value>(&read)
            .is_ok_and(|state| state["active_jobs"]["j1"]["node_id"] == "n1")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_another_host_is_read_and_merged() {
    let Some((one, other)) = Kubo::start_pair() else { return };
    let first = Setup::bundled().on_kubo(one.api()).start().await;
    let name = first.host.storage.keys.name(&"dim-state-key".parse().unwrap()).unwrap();
    let yaml = format!("ipfs:\n  registry_ipns: /ipns/{name}\n  follow_every: 1\n");
    let second = Setup::bundled().yaml(&yaml).on_kubo(other.api()).start().await;
    first.listening(&"dim.nodes.heartbeat".parse().unwrap()).await;
    // Known to the first registry alone.
    let nodes = json!([{ "node_id": "far", "status": "online", "last_seen": "2026-01-01T00:00:00Z" }]);
    first.command("node-registry", "put", nodes).await.unwrap();
    eventually("the second host has merged it", async || {
        second.query("node-registry", "get", json!({ "node_id": "far" })).await.is_ok()
    })
    .await;
    let node = second.query("node-registry", "get", json!({ "node_id": "far" })).await.unwrap();
    assert_eq!(node["source"], name.as_str());
    // Merged nodes are not published again: not with a node that is heard afterwards, either.
    let near = json!([{ "node_id": "near", "status": "online" }]);
    second.command("node-registry", "put", near).await.unwrap();
    let key = "dim-state-key".parse().unwrap();
    let published = || names::known(&second.host.storage.store.snapshot().unwrap(), &key).unwrap();
    // A daemon that is asked for a name before its first record looks for a minute.
    eventually("the registry is published", async || published().is_some_and(|name| name.is_published()))
        .await;
    let name = second.host.storage.keys.name(&key).unwrap();
    let document = || {
        // A daemon's own cache stays stale after a publish.
        let path = other.ipfs(&["name", "resolve", "--nocache", &format!("/ipns/{name}")]);
        other.ipfs(&["cat", path.trim()])
    };
    eventually("the new node is readable", async || document().contains("near")).await;
    assert!(!document().contains("far"), "{}", document());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_missed_messages_know_the_same_jobs_once_they_follow_each_other() {
    let Some((one, other)) = Kubo::start_pair() else { return };
    // Before anything is published each has heard what the other has not, as after an outage: they listen on topics of
    // their own.
    let setup = |kubo: &Kubo, topic: &str, follows: Option<&str>| {
        let follows = follows.map_or_else(String::new, |name| format!("  jobs_ipns: [/ipns/{name}]\n"));
        let yaml = format!("ipfs:\n  follow_every: 1\n{follows}  pubsub:\n    job_updates: {topic}\n");
        Setup::bundled().yaml(&yaml).on_kubo(kubo.api())
    };
    let key = "dim-state-key-jobs".parse().unwrap();
    let first = setup(&one, "one", None).start().await;
    let name = first.host.storage.keys.name(&key).unwrap().to_string();
    let second = setup(&other, "other", Some(&name)).start().await;
    let name = second.host.storage.keys.name(&key).unwrap().to_string();
    let first = setup(&one, "one", Some(&name)).start_in(first.stop().await).await;
    let update = async |host: &TestHost, job: &str, event: &str| {
        let body = json!({ "job_id": job, "event_type": event });
        host.command("job-tracker", "update", body).await.unwrap();
    };
    for (job, event) in [("a", "running"), ("a", "completed"), ("b", "running"), ("shared", "queued")] {
        update(&first, job, event).await;
    }
    for (job, event) in [("c", "running"), ("shared", "running")] {
        update(&second, job, event).await;
    }
    let known = async |host: &TestHost| {
        let jobs = host.query("job-tracker", "list", json!({})).await.unwrap();
        let known =
            jobs.as_array().unwrap().iter().map(|job| {
                format!("{} {}", job["job_id"].as_str().unwrap(), job["status"].as_str().unwrap())
            });
        known.collect::<Vec<_>>()
    };
    let all = ["a completed", "b running", "c running", "shared running"];
    for host in [&first, &second] {
        eventually("both know all", async || known(host).await == all).await;
    }
    // Removed on one, it goes from the other, too.
    first.command("job-tracker", "remove", json!({ "job_id": "c" })).await.unwrap();
    eventually("it is removed there", async || {
        known(&second).await == ["a completed", "b running", "shared running"]
    })
    .await;
    assert_eq!(known(&first).await, known(&second).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_of_more_jobs_than_one_entry_looks_at_is_merged_to_its_end() {
    // What another plugin publishes stands for the document of another host.
    let yaml = "plugins:\n  job-tracker:\n    config: { jobs_ipns: [probe-key] }\n";
    let host = Setup::bundled().yaml(yaml).and_probe("probe", json!({})).start().await;
    let (now, count) = ("2026-01-01T00:00:00Z", 12_000);
    let jobs = |status: &str| -> serde_json::Value {
        let row = |number| {
            let id = format!("j{number}");
            (id.clone(), json!({ "job_id": id, "status": status, "updated_at": now }))
        };
        serde_json::Value::Object((0..count).map(row).collect())
    };
    let publish = async |document: serde_json::Value| {
        let step = json!({ "do": "update-state", "key": "probe-key", "data": document.to_string() });
        assert_eq!(host.run(json!([step])).await, [json!({ "ok": null })]);
    };
    let report = async || host.query("job-tracker", "merged", json!({})).await.unwrap()[0].clone();
    publish(json!({ "active_jobs": jobs("queued"), "\\ud800": {}, "left_out": "x", "updated_at": "9999-01-01T00:00:00Z" }))
        .await;
    // Another one comes meanwhile.
    publish(json!({ "active_jobs": jobs("running"), "updated_at": now })).await;
    let is_merged = async || {
        let report = report().await;
        report["taken"].as_u64() >= Some(count) && report["under_way"].is_null()
    };
    eventually("all are merged", is_merged).await;
    eventually("the newest document is", async || {
        let last = host.query("job-tracker", "get", json!({ "job_id": "j9999" })).await;
        last.is_ok_and(|job| job["status"] == "running")
    })
    .await;
    assert_eq!(host.dead_letters(), Vec::<String>::new());
    // A document that cannot be read is told, and the next one mends it.
    publish(json!([1])).await;
    eventually("it is told", async || report().await["error"].is_string()).await;
    publish(json!({ "active_jobs": {} })).await;
    eventually("it is mended", async || report().await["error"].is_null()).await;
}

fn quick() -> Setup {
    dead_after(3_000)
}

fn dead_after(ms: u64) -> Setup {
    let config = json!({ "suspect_after_ms": ms / 2, "dead_after_ms": ms });
    Setup::bundled().yaml(&format!("plugins:\n  heartbeat-watchdog:\n    config: {config}\n"))
}

/// What the watchdog has said of a node, by the log.
fn verdicts(host: &TestHost, node: &str) -> Vec<String> {
    let entries = host.entries();
    let said = entries.iter().filter_map(|entry| match &entry.kind {
        Kind::Event(Event::Message { data, origin: Origin::Plugin(_), .. }) => {
            let verdict: serde_json::Value = serde_json::from_slice(data).unwrap();
            (verdict["node_id"] == node).then(|| verdict["status"].as_str().unwrap().to_owned())
        }
        _ => None,
    });
    said.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_suspected_declared_dead_and_recovers_and_its_job_is_marked() {
    let host = quick().start().await;
    let beat = |id: &str| json!({ "node_id": id, "status": "online" }).to_string();
    let job = json!({ "job_id": "j1", "event_type": "running", "data": { "node_id": "n1" } });
    host.from_peer("dim.nodes.heartbeat", beat("n1")).await;
    host.from_peer("dim.jobs.updates", job.to_string()).await;
    // Others go on, so that the silence is the node's and not the host's.
    let others = async || {
        for id in ["n2", "n3"] {
            host.from_peer("dim.nodes.heartbeat", beat(id)).await;
        }
    };
    let node = async || {
        let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await;
        node.map_or(json!(null), |node| node["status"].clone())
    };
    let job = async || host.query("job-tracker", "get", json!({ "job_id": "j1" })).await.unwrap_or_default();
    eventually("it is dead", async || {
        others().await;
        node().await == "dead"
    })
    .await;
    assert_eq!(verdicts(&host, "n1"), ["suspect", "dead"]);
    eventually("its job is marked", async || job().await["node_dead"]["observer"] == host.host.id.as_str())
        .await;
    host.from_peer("dim.nodes.heartbeat", beat("n1")).await;
    eventually("it is back", async || node().await == "online").await;
    eventually("the mark is gone", async || job().await["node_dead"].is_null()).await;
    let standing = host.query("heartbeat-watchdog", "list", json!({})).await.unwrap();
    assert!(standing.as_array().unwrap().iter().all(|node| node["standing"] == "alive"), "{standing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_down_accuses_nobody_and_finds_who_really_died() {
    let setup = dead_after(6_000);
    let host = setup.start().await;
    let beat = |id: &str| json!({ "node_id": id, "status": "online" }).to_string();
    for id in ["alive", "gone"] {
        host.from_peer("dim.nodes.heartbeat", beat(id)).await;
    }
    host.settled().await;
    let dir = host.stop().await;
    // Longer than it takes to be declared dead.
    downtime(Duration::from_secs(8)).await;
    let host = setup.start_in(dir).await;
    host.from_peer("dim.nodes.heartbeat", beat("alive")).await;
    host.settled().await;
    let dead =
        async || host.query("heartbeat-watchdog", "list", json!({ "standing": "dead" })).await.unwrap();
    assert_eq!(dead().await, json!([]), "nobody is accused for the time without the host");
    eventually("the one that is really gone is found", async || {
        host.from_peer("dim.nodes.heartbeat", beat("alive")).await;
        dead().await[0]["node_id"] == "gone"
    })
    .await;
    assert_eq!(dead().await.as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_fall_silent_together_the_host_suspects_itself_first() {
    let host = quick().start().await;
    for id in ["n1", "n2", "n3", "n4"] {
        let beat = json!({ "node_id": id, "status": "online" }).to_string();
        host.from_peer("dim.nodes.heartbeat", beat).await;
    }
    let standing = async |wanted: &str| {
        let nodes = host.query("heartbeat-watchdog", "list", json!({ "standing": wanted })).await.unwrap();
        nodes.as_array().unwrap().len()
    };
    let begun = std::time::Instant::now();
    eventually("all are suspect", async || standing("suspect").await == 4).await;
    eventually("all are dead in the end", async || standing("dead").await == 4).await;
    assert!(
        begun.elapsed() > Duration::from_millis(5_500),
        "not before twice the time: {:?}",
        begun.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_runs_without_the_tracker_whose_document_it_follows() {
    let host = Setup::bundled().yaml("plugins:\n  job-tracker: { disabled: true }\n").start().await;
    host.from_peer("dim.nodes.heartbeat", json!({ "node_id": "n1" }).to_string()).await;
    eventually("the node is known", async || {
        host.query("node-registry", "get", json!({ "node_id": "n1" })).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_jobs_than_one_answer_may_hold_come_in_pages() {
    const JOBS: usize = 1_200;
    let host = Setup::bundled().start().await;
    for number in 0..JOBS {
        // Active and finished ones in turn.
        let status = ["running", "completed"][number % 2];
        let event = json!({ "job_id": format!("j{number:05}"), "event_type": status });
        host.from_peer("dim.jobs.updates", event.to_string()).await;
    }
    let after = |page: &serde_json::Value| page.as_array().unwrap().last().map(|job| job["job_id"].clone());
    eventually("all are known", async || {
        host.query("job-tracker", "get", json!({ "job_id": format!("j{:05}", JOBS - 1) })).await.is_ok()
    })
    .await;
    let (mut pages, mut ids) = (Vec::new(), Vec::new());
    let mut last = None;
    loop {
        let page = host.query("job-tracker", "list", json!({ "after": last })).await.unwrap();
        last = after(&page);
        if last.is_none() {
            break;
        }
        pages.push(page.as_array().unwrap().len());
        ids.extend(page.as_array().unwrap().iter().map(|job| job["job_id"].as_str().unwrap().to_owned()));
    }
    assert_eq!(pages, [1_000, 200]);
    let expected: Vec<String> = (0..JOBS).map(|number| format!("j{number:05}")).collect();
    assert_eq!(ids, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_told_to_merge_itself_does_not() {
    let host = Setup::bundled().yaml("ipfs:\n  registry_ipns: dim-state-key\n").start().await;
    host.from_peer("dim.nodes.heartbeat", json!({ "node_id": "n1" }).to_string()).await;
    let key = "dim-state-key".parse().unwrap();
    let known = || names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap();
    eventually("it is published", async || known().is_some_and(|name| name.is_published())).await;
    host.settled().await;
    let settled = known().unwrap().sequence;
    // Several times as long as a document takes.
    downtime(Duration::from_secs(2)).await;
    assert_eq!(known().unwrap().sequence, settled, "nothing new is published");
    let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await.unwrap();
    assert!(node["source"].is_null(), "{node}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watchdog_of_another_host_is_believed_where_the_operator_says_so() {
    let (trusted, stranger) = (new_peer(), new_peer());
    let believing = json!({ "config": { "trusted_observers": [trusted] } });
    let plugins = json!({ "plugins": { "node-registry": believing, "job-tracker": believing } });
    // JSON is YAML.
    let host = Setup::bundled().yaml(&plugins.to_string()).start().await;
    host.from_peer("dim.nodes.heartbeat", json!({ "node_id": "n1" }).to_string()).await;
    let job = json!({ "job_id": "j1", "event_type": "running", "data": { "node_id": "n1" } });
    host.from_peer("dim.jobs.updates", job.to_string()).await;
    let topic = "dim.nodes.status".parse().unwrap();
    host.listening(&topic).await;
    let bus = host.host.exchange.bus.as_ref().unwrap();
    let now = dim_model::time::Timestamp::wall();
    let verdict = |status: &str, at: dim_model::time::Timestamp| {
        let verdict = json!({ "node_id": "n1", "status": status, "observer": "other", "timestamp": at });
        bytes::Bytes::from(verdict.to_string())
    };
    let later = now.after(Duration::from_secs(10));
    let latest = now.after(Duration::from_secs(20));
    let marked = async || {
        host.settled().await;
        let job = host.query("job-tracker", "get", json!({ "job_id": "j1" })).await.unwrap_or_default();
        let node = host.query("node-registry", "get", json!({ "node_id": "n1" })).await.unwrap_or_default();
        (job["node_dead"].is_object(), node["status"] == "dead")
    };
    eventually("the job and the node are known", async || {
        host.query("job-tracker", "get", json!({ "job_id": "j1" })).await.is_ok()
            && host.query("node-registry", "get", json!({ "node_id": "n1" })).await.is_ok()
    })
    .await;
    bus.publish_as(&stranger, &topic, verdict("dead", later)).await;
    assert_eq!(marked().await, (false, false), "a stranger's is not");
    bus.publish_as(&trusted, &topic, verdict("dead", later)).await;
    eventually("it is believed", async || marked().await == (true, true)).await;
    bus.publish_as(&trusted, &topic, verdict("recovered", latest)).await;
    eventually("the mark is gone", async || !marked().await.0).await;
    bus.publish_as(&trusted, &topic, verdict("dead", later)).await;
    bus.publish_as(&trusted, &topic, verdict("recovered", latest)).await;
    assert!(!marked().await.0, "an earlier verdict that comes later says nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_finished_jobs_than_one_entry_may_remove_are_pruned_in_slices() {
    const JOBS: u64 = 120_000;
    const KEEP: usize = 100;
    let yaml = format!("plugins:\n  job-tracker:\n    config:\n      keep_finished: {KEEP}\n");
    let setup = Setup::bundled().yaml(&yaml);
    let dir = setup.start().await.stop().await;
    // A log of a minute and a half, written at once.
    let store = Store::open(dir.path()).unwrap();
    let (first, begun) = store.log_end().unwrap();
    let later = |index: u64| {
        let pause = if index < JOBS { Duration::ZERO } else { Duration::from_secs(90) };
        begun.after(pause + Duration::from_micros(index))
    };
    let entries: Vec<Entry> = (0..JOBS + 50)
        .map(|index| {
            let event = json!({ "job_id": format!("j{index}"), "event_type": "completed" });
            let message = Event::Message {
                topic: "dim.jobs.updates".parse().unwrap(),
                data: event.to_string().into(),
                origin: Origin::Host,
            };
            Entry { offset: Offset(first.0 + index), time: later(index), kind: Kind::Event(message) }
        })
        .collect();
    let write = store.begin().unwrap();
    dim_store::event_log_rows::append(&write, entries.iter()).unwrap();
    let (id, _) =
        plugin_registry::known(&store.snapshot().unwrap(), &"job-tracker".parse().unwrap()).unwrap().unwrap();
    write.open_table(CURSORS).unwrap().insert(id.0, (first.0 + JOBS + 50, 0)).unwrap();
    write.commit().unwrap();
    drop(store);

    let done = Replay::open(&setup.config(), dir.path()).unwrap().run().unwrap();
    let (_, batch) = done.iter().find(|(name, _)| name.as_str() == "job-tracker").unwrap();
    assert!(batch.requested.dead.is_empty(), "{:?}", batch.requested.dead);
    let finished =
        batch.requested.state.iter().filter(|(key, value)| key.starts_with(b"finished/") && value.is_some());
    let left = finished.count();
    assert!((KEEP..KEEP + 50).contains(&left), "{left} are left");
}
