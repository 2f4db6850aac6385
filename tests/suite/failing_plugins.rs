//! Plugins that keep failing: those that do not start are quarantined, poison events cost others a bounded delay, and
//! what is set aside says where it trapped.

use std::time::Duration;

use dim_model::entry::{Event, Generation, Kind};
use dim_model::ident::PluginName;
use dim_server::host::GrantChange;
use dim_store::batch::ReplyError;
use dim_store::change::{Change, State, TOPIC};
use dim_store::change_history;
use dim_store::dead_letters::{self, Filter};
use dim_store::effect::DeadLetter;
use dim_tests::alone::replace;
use dim_tests::component::probe;
use dim_tests::{Setup, SupervisedHost, TestHost, eventually, script};
use serde_json::{Value, json};

fn add() -> String {
    script(json!([{ "do": "add", "key": "count" }])).to_string()
}

fn poison(step: Value) -> String {
    script(json!([{ "do": "add", "key": "count" }, step])).to_string()
}

/// A probe that starts only if it may publish on `rare`.
fn wanting() -> Setup {
    let on_start = json!([{ "do": "must", "step": { "do": "publish", "topic": "rare", "data": "x" } }]);
    let setup = json!({ "limits": { "restarts": 2 }, "config": { "on_start": on_start.to_string() } });
    Setup::default().and_probe("probe", setup)
}

fn state(host: &TestHost) -> &'static str {
    host.plugin("probe").handle.status().state
}

fn states(host: &TestHost) -> Vec<State> {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    let changes = change_history::of(&snapshot, &"probe".parse().unwrap(), 100).unwrap();
    changes.iter().map(|change| change.state).collect()
}

async fn is_quarantined(host: &TestHost) {
    eventually("it is quarantined", async || state(host) == "quarantined").await;
    eventually("that is on record", async || states(host).first() == Some(&State::Quarantined)).await;
}

/// What was told of the probe on the topic of changes.
fn told(host: &TestHost) -> Vec<State> {
    let entries = host.entries();
    let told = entries.iter().filter_map(|entry| match &entry.kind {
        Kind::Event(Event::Message { topic, data, .. }) if topic.as_str() == TOPIC => {
            Some(serde_json::from_slice::<Change>(data).unwrap().state)
        }
        _ => None,
    });
    told.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_does_not_start_is_quarantined_and_goes_on_where_it_was_once_it_is_resumed() {
    let name: PluginName = "probe".parse().unwrap();
    let host = wanting().start().await;
    for _ in 0..3 {
        host.from_peer("probe.in", add()).await;
    }
    is_quarantined(&host).await;
    assert_eq!(host.plugin("probe").handle.status().instances, 2);
    assert_eq!(told(&host), [State::Quarantined]);
    for refused in
        [host.command("probe", "run", script(json!([]))).await, host.query("probe", "calls", json!({})).await]
    {
        let Err(ReplyError::Unavailable(why)) = refused else { panic!("{refused:?}") };
        assert!(why.contains("NotGranted(\"rare\")"), "{why}");
    }
    // It is not even tried by the next host, and what came waits.
    let host = wanting().start_in(host.stop().await).await;
    host.from_peer("probe.in", add()).await;
    host.host.storage.commit.write(|_| Ok(())).await.unwrap();
    assert_eq!(state(&host), "quarantined");
    assert_eq!(host.plugin("probe").handle.status().instances, 0);
    // Resumed without a change, it fails again.
    host.host.pause(&name, false, "the test").await.unwrap();
    is_quarantined(&host).await;
    let change: GrantChange = serde_json::from_value(json!({ "allow": { "publish": ["rare"] } })).unwrap();
    host.host.grant(&name, change, "the test").await.unwrap();
    assert_eq!(state(&host), "quarantined", "only when it is told to");
    host.host.pause(&name, false, "the test").await.unwrap();
    eventually("nothing was lost", async || {
        state(&host) == "running" && host.state_of("probe", "count").await == 4
    })
    .await;
    let mut changes = states(&host);
    changes.reverse();
    assert_eq!(
        changes,
        [State::Quarantined, State::Resumed, State::Quarantined, State::GrantsChanged, State::Resumed]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_lets_a_quarantined_plugin_go_on_where_it_was() {
    let host = wanting().start().await;
    for _ in 0..3 {
        host.from_peer("probe.in", add()).await;
    }
    is_quarantined(&host).await;
    // The operator's config counts for each version: this one asks for no such start.
    let mended = dim_tests::component::probe_with(
        "2.0.0",
        &[("[config.on_start]\ntype = \"string\"", "[config.on_start]\ntype = \"string\"\noptional = true")],
    );
    let refused = replace(&host, mended).await.unwrap_err().to_string();
    assert!(refused.contains("does not start"), "it is rehearsed: {refused}");
    let free = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(state(&free), "quarantined");
    assert_eq!(replace(&free, probe("3.0.0", &json!([]))).await.unwrap().state, State::OnProbation);
    eventually("nothing was lost", async || free.state_of("probe", "count").await == 3).await;
    let free = Setup::probe().start_in(free.stop().await).await;
    eventually("it runs still", async || state(&free) == "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_for_whose_publishes_there_is_no_room_waits_and_is_not_quarantined() {
    let on_start = json!([{ "do": "must", "step": { "do": "publish", "topic": "probe.out", "data": "x" } }]);
    // Nothing is sent as long as there is no daemon.
    let with = |outbox: u64| {
        let limits = json!({ "restarts": 1, "outbox": outbox });
        let setup = json!({ "limits": limits, "config": { "on_start": on_start.to_string() } });
        Setup::default().and_probe("probe", setup).on_kubo("/ip4/127.0.0.1/tcp/9")
    };
    let host = with(1).start().await;
    eventually("it runs, and its publish waits", async || state(&host) == "running").await;
    host.settled().await;
    let host = with(1).start_in(host.stop().await).await;
    let tried = async || host.plugin("probe").handle.status().instances >= 3;
    eventually("it is started over and over", tried).await;
    assert_eq!(state(&host), "failing");
    assert!(!states(&host).contains(&State::Quarantined));
    let host = with(10).start_in(host.stop().await).await;
    eventually("it runs", async || state(&host) == "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_can_do_without_a_publish_goes_on_and_does_so_when_it_is_handled_again() {
    let publish = json!({ "do": "publish", "topic": "probe.out", "data": "x" });
    let starting = |on_start: Vec<Value>| {
        let section = json!({
            "limits": { "publishes-per-second": 1, "restarts": 1 },
            "config": { "on_start": json!(on_start).to_string() },
        });
        Setup::default().and_probe("probe", section)
    };
    let setup = starting(vec![publish.clone(); 6]);
    let host = setup.start().await;
    // The second try and what comes after have fresh instances, for which four of the burst of ten are left.
    host.from_peer("probe.in", poison(json!({ "do": "trap" }))).await;
    host.from_peer("probe.in", add()).await;
    eventually("it goes on", async || host.state_of("probe", "count").await == 1).await;
    let status = host.plugin("probe").handle.status();
    assert!(status.met.contains_key("publishes-per-second") && status.instances == 3, "{status:?}");
    let published = status.effects.publishes;
    assert!((10..18).contains(&published), "{published}");
    host.settled().await;
    let dir = host.stop().await;
    let replay = dim_server::replay::Replay::open(&setup.config(), dir.path()).unwrap();
    let (_, batch) = replay.run().unwrap().into_iter().find(|(name, _)| name.as_str() == "probe").unwrap();
    assert_eq!(batch.requested.publishes.len() as u64, published, "as it was");

    // Who cannot do without more than there ever is waits in vain, and is not started for ever.
    let mut greedy = vec![publish.clone(); 10];
    greedy.push(json!({ "do": "must", "step": publish }));
    is_quarantined(&starting(greedy).start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_publish_at_a_rate_of_their_own() {
    let on_start = json!([{ "do": "must", "step": { "do": "publish", "topic": "probe.out", "data": "x" } }]);
    let setup = json!({
        "limits": { "publishes-per-second": 1, "restarts": 1 }, "config": { "on_start": on_start.to_string() },
    });
    let host = Setup::default().and_probe("probe", setup).start().await;
    eventually("it runs", async || state(&host) == "running").await;
    // Each trap takes a start, and the rate of the entries is used up.
    for _ in 0..8 {
        host.from_peer("probe.in", poison(json!({ "do": "trap" }))).await;
    }
    eventually("each is set aside", async || host.dead_letters().len() == 8).await;
    assert_ne!(state(&host), "quarantined");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quarantined_plugin_is_paused_and_resumed_like_any_other() {
    let host = wanting().start().await;
    is_quarantined(&host).await;
    let name: PluginName = "probe".parse().unwrap();
    host.host.pause(&name, true, "the test").await.unwrap();
    assert_eq!(states(&host)[0], State::Paused);
    let host = wanting().start_in(host.stop().await).await;
    assert_eq!(state(&host), "quarantined");
    let allow: GrantChange = serde_json::from_value(json!({ "allow": { "publish": ["rare"] } })).unwrap();
    host.host.grant(&name, allow, "the test").await.unwrap();
    // Other code ends the quarantine, and not what the operator has said.
    let starting = json!([{ "do": "must", "step": { "do": "publish", "topic": "rare", "data": "x" } }]);
    host.host.replace(dim_tests::alone::proposal("probe", probe("2.0.0", &starting))).await.unwrap();
    eventually("it is paused", async || state(&host) == "paused").await;
    host.host.pause(&name, false, "the test").await.unwrap();
    eventually("it runs", async || state(&host) == "running").await;
    let host = wanting().start_in(host.stop().await).await;
    eventually("it runs after a restart, too", async || state(&host) == "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everyone_can_see_that_a_plugin_is_quarantined() {
    let host = SupervisedHost::start(&wanting()).await;
    let (url, client) = (host.serve().await, dim_tests::with_token());
    let text =
        async |path: &str| client.get(format!("{url}{path}")).send().await.unwrap().text().await.unwrap();
    eventually("/healthz says so", async || {
        let health = text("/healthz").await;
        health.contains("plugin probe is quarantined since") && health.contains("dim plugin resume probe")
    })
    .await;
    assert!(text("/v1/status").await.contains("plugin probe is quarantined since"));
    let listed: Value = serde_json::from_str(&text("/v1/plugins").await).unwrap();
    let probe = listed.as_array().unwrap().iter().find(|plugin| plugin["name"] == "probe").unwrap();
    assert_eq!(probe["state"], "quarantined");
    assert!(probe["reason"].as_str().unwrap().contains("NotGranted"), "{probe}");
    assert!(text("/metrics").await.contains("dim_plugin_quarantined{plugin=\"probe\"} 1"));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_of_poison_events_brings_a_topic_to_a_stop() {
    let host = Setup::probe().start().await;
    for _ in 0..10 {
        for _ in 0..50 {
            host.from_peer("probe.in", poison(json!({ "do": "trap" }))).await;
        }
        host.from_peer("probe.in", add()).await;
    }
    eventually("all that are sound are handled", async || host.state_of("probe", "count").await == 10).await;
    assert_eq!(state(&host), "running");
    eventually("the others are set aside", async || host.dead_letters().len() == 500).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_loop_cost_the_others_a_bounded_delay() {
    let setup = Setup::default().and_probe("probe", json!({ "limits": { "call-cpu-ms": 50 } }));
    let topics = json!({ "config": { "topics": ["probe.more"] } });
    let host = setup.and_probe("other", topics).start().await;
    for _ in 0..5 {
        host.from_peer("probe.in", poison(json!({ "do": "loop" }))).await;
        host.from_peer("probe.more", add()).await;
    }
    host.from_peer("probe.in", add()).await;
    eventually("another is not held up", async || host.state_of("other", "count").await == 5).await;
    let left = host.plugin("probe").handle.status();
    assert!(left.dead_letters < 5, "it was not over by then: {left:?}");
    eventually("it comes to what is sound", async || host.state_of("probe", "count").await == 1).await;
    let (looping, cpu) = (host.plugin("probe").handle.status(), Duration::from_millis(50));
    assert_eq!(looping.dead_letters, 5);
    assert!(Duration::from_nanos(looping.cpu) < 30 * cpu, "each was tried twice: {looping:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_says_where_the_plugin_trapped() {
    let host = Setup::default().and_probe("probe", json!({ "limits": { "call-cpu-ms": 50 } })).start().await;
    for step in
        [json!({ "do": "trap" }), json!({ "do": "loop" }), json!({ "do": "log", "line": "last words" })]
    {
        let mut sent = script(json!([step]));
        sent["then"] = json!("reject");
        host.from_peer("probe.in", sent.to_string()).await;
    }
    eventually("they are set aside", async || host.dead_letters().len() == 3).await;
    let letters = dead_letters::list(&host.host.storage.store, &Filter::default(), None, 10).unwrap();
    for (_, letter) in &letters[..2] {
        let has = |part: &str| letter.stack.iter().any(|function| function.contains(part));
        assert!(has("Probe::step") || has("Probe>::step") || has("probe::Probe"), "{:?}", letter.stack);
        assert_eq!((letter.attempts, letter.version.as_str()), (2, "0.1.0"));
    }
    assert!(letters[0].1.reason.contains("told to trap"), "{}", letters[0].1.reason);
    assert!(letters[2].1.stack.is_empty(), "it did not trap");
    assert_eq!(letters[2].1.log, ["last words"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_replayed_and_dropped_by_plugin_topic_and_time() {
    let two =
        Setup::probe().and_probe("other", json!({ "config": { "topics": ["probe.in", "probe.more"] } }));
    let host = SupervisedHost::start(&two).await;
    let (url, client) = (host.serve().await, dim_tests::with_token());
    let count = async |query: &str| {
        let letters = client.get(format!("{url}/v1/dead-letters{query}")).send().await.unwrap();
        letters.json::<Value>().await.unwrap().as_array().unwrap().len()
    };
    let reject = json!({ "script": [{ "do": "add", "key": "count" }], "then": "reject" }).to_string();
    let send = async |topic: &str| {
        let sent = client.post(format!("{url}/v1/topics/{topic}/messages")).body(reject.clone()).send();
        assert!(sent.await.unwrap().status().is_success());
    };
    for topic in ["probe.in", "probe.more", "probe.more"] {
        send(topic).await;
    }
    eventually("all are set aside", async || count("").await == 4).await;
    assert_eq!((count("?plugin=probe").await, count("?plugin=other").await), (1, 3));
    assert_eq!(count("?topic=probe.more").await, 2);
    assert_eq!(count("?topic=probe.in&plugin=other").await, 1);
    let later = dim_model::time::Timestamp::wall();
    assert_eq!(count(&format!("?since={later}")).await, 0);
    send("probe.more").await;
    eventually("one more is", async || count(&format!("?since={later}")).await == 1).await;
    // Replayed, they fail again: others are in their place, each once.
    let replayed = client.post(format!("{url}/v1/dead-letters/replay?plugin=other&topic=probe.more"));
    let replayed: Value = replayed.send().await.unwrap().json().await.unwrap();
    assert_eq!(replayed["count"], 3);
    eventually("they are set aside again", async || {
        count("?topic=probe.more").await == 3 && count("?after=5").await == 3
    })
    .await;
    let dropped = client.delete(format!("{url}/v1/dead-letters?topic=probe.in")).send().await.unwrap();
    assert_eq!(dropped.json::<Value>().await.unwrap()["count"], 2);
    assert_eq!((count("").await, count("?topic=probe.in").await), (3, 0));
    let dropped = client.delete(format!("{url}/v1/dead-letters")).send().await.unwrap();
    assert_eq!(dropped.json::<Value>().await.unwrap()["count"], 3);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_kept_for_a_time_and_those_that_go_are_counted() {
    let kept = "store: { dead_letters: { max_age_hours: 0 } }\n";
    let host = Setup::probe().yaml(kept).start().await;
    host.from_peer("probe.in", json!({ "script": [], "then": "reject" }).to_string()).await;
    let dropped = || dead_letters::dropped(&host.host.storage.store).unwrap();
    eventually("it goes, and that is counted", async || dropped() == 1 && host.dead_letters().is_empty())
        .await;
    // One that is younger stays.
    let store = &host.host.storage.store;
    let kept = dead_letters::Quota { max_age: Duration::from_secs(3_600), ..dead_letters::Quota::default() };
    let now = dim_model::time::Timestamp::wall();
    let letter = |minutes: u64| DeadLetter {
        plugin: "probe".parse().unwrap(),
        version: "1".to_owned(),
        by: Generation(1),
        offset: 0,
        time: now.0 - minutes * 60_000_000_000,
        attempts: 1,
        reason: "why".to_owned(),
        stack: Vec::new(),
        log: Vec::new(),
        event: Event::Timer { key: "t".to_owned(), due: now },
    };
    let write = store.begin().unwrap();
    dead_letters::put(&write, &[letter(61), letter(59), letter(0)], &kept, now).unwrap();
    write.commit().unwrap();
    let left = dead_letters::list(store, &Filter::default(), None, 10).unwrap();
    let left: Vec<u64> = left.iter().map(|(_, letter)| (now.0 - letter.time) / 60_000_000_000).collect();
    assert_eq!((left.len(), dropped()), (2, 2), "{left:?}");
    assert!(left.contains(&59) && left.contains(&0), "{left:?}");
}
