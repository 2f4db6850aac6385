//! The promises of the design that are no one interface's alone.

use dim_tests::{Setup, eventually, script};
use serde_json::{Value, json};

fn add(key: &str) -> String {
    script(json!([{ "do": "add", "key": key }])).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plugin_publishes_reaches_the_others_once_and_not_itself() {
    let host = Setup::probe().and_probe("other", json!({})).start().await;
    let published = json!({ "do": "publish", "topic": "probe.in", "data": add("heard") });
    host.run(json!([published, published, published])).await;
    eventually("the other hears all three", async || host.state_of("other", "heard").await == 3).await;
    eventually("the echoes come back", async || {
        host.host.exchange.received.echoes.load(std::sync::atomic::Ordering::Relaxed) == 3
    })
    .await;
    host.settled().await;
    assert_eq!(host.state_of("other", "heard").await, 3, "echoes are dropped");
    assert_eq!(host.state_of("probe", "heard").await, Value::Null, "a plugin does not hear itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_on_the_bus_is_never_swallowed() {
    let host = Setup::probe().start().await;
    let published = json!({ "do": "publish", "topic": "probe.in", "data": add("heard") });
    host.run(json!([published])).await;
    eventually("the echo is dropped", async || {
        host.host.exchange.received.echoes.load(std::sync::atomic::Ordering::Relaxed) == 1
    })
    .await;
    // The same bytes with the same sender: another program on the host's own daemon.
    let daemon = host.host.exchange.links.backend.swarm.identity().await.unwrap();
    let (bus, topic) = (host.host.exchange.bus.as_ref().unwrap(), "probe.in".parse().unwrap());
    bus.publish_as(&daemon, &topic, add("heard").into()).await;
    eventually("it is heard", async || host.state_of("probe", "heard").await == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_share_the_one_subscription_of_a_topic() {
    let host = Setup::probe().and_probe("other", json!({})).start().await;
    host.from_peer("probe.in", add("heard")).await;
    for plugin in ["probe", "other"] {
        eventually("it is heard", async || host.state_of(plugin, "heard").await == 1).await;
    }
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let received = &host.host.exchange.received;
    assert_eq!((load(&received.received), load(&received.repeated)), (1, 0), "it came through one stream");
}

#[tokio::test(flavor = "multi_thread")]
async fn order_holds_within_a_topic() {
    let host = Setup::probe().start().await;
    for number in 0..500 {
        let note = script(json!([{ "do": "note", "key": "order", "what": number }]));
        host.from_peer("probe.in", note.to_string()).await;
    }
    eventually("all are handled", async || {
        host.state_of("probe", "order").await.as_array().is_some_and(|order| order.len() == 500)
    })
    .await;
    let expected: Vec<i32> = (0..500).collect();
    assert_eq!(host.state_of("probe", "order").await, json!(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timer_waits_for_the_messages_that_came_before_it() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "timer", "key": "t", "in": 30_000_000 }])).await;
    // A busy plugin falls behind; its queue holds messages from before the timer.
    let slow =
        script(json!([{ "do": "grow", "mib": 30 }, { "do": "note", "key": "fired", "what": "message" }]));
    for _ in 0..20 {
        host.from_peer("probe.in", slow.to_string()).await;
    }
    eventually("all is handled", async || {
        host.state_of("probe", "fired").await.as_array().is_some_and(|fired| fired.len() == 21)
    })
    .await;
    let fired = host.state_of("probe", "fired").await;
    let place = fired.as_array().unwrap().iter().position(|what| what["key"] == "t").unwrap();
    let due = fired[place]["due"].as_u64().unwrap();
    let times: Vec<u64> = message_times(&host);
    let before = times.iter().filter(|time| **time < due).count();
    assert_eq!(place, before, "after every older message and before the first later one");
}

fn message_times(host: &dim_tests::TestHost) -> Vec<u64> {
    let mut entries = std::collections::VecDeque::new();
    host.host.storage.log.read(dim_model::entry::Offset(0), usize::MAX, &mut entries).unwrap();
    let is_message = |kind: &dim_model::entry::Kind| {
        matches!(kind, dim_model::entry::Kind::Event(dim_model::entry::Event::Message { .. }))
    };
    entries.iter().filter(|entry| is_message(&entry.kind)).map(|entry| entry.time.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn state_timers_and_subscriptions_survive_a_restart() {
    let host = Setup::probe().start().await;
    host.run(json!([
        { "do": "set", "key": "kept", "value": "1" },
        { "do": "timer", "key": "later", "in": 300_000_000 },
        { "do": "subscribe", "topic": "probe.more" },
    ]))
    .await;
    host.settled().await;
    let host = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(host.state_of("probe", "kept").await, 1);
    host.from_peer("probe.more", add("heard")).await;
    eventually("the subscription is there", async || host.state_of("probe", "heard").await == 1).await;
    eventually("the timer fires", async || host.state_of("probe", "fired").await[0]["key"] == "later").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_disk_may_lag_loses_nothing_when_it_is_told_to_stop() {
    let setup = Setup::probe().yaml("store:\n  durability: eventual\n");
    let host = setup.start().await;
    for count in 1..=20 {
        assert_eq!(host.run(json!([{ "do": "add", "key": "count" }])).await, [json!({ "ok": count })]);
    }
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.state_of("probe", "count").await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn time_without_the_host_is_a_gap_and_does_not_count_as_listening() {
    let host = Setup::probe().start().await;
    let begun = host.host.storage.log.now().0;
    let heard = json!([{ "do": "heard", "topic": "probe.in", "since": begun }]);
    eventually("some listening is proven", async || {
        host.run(heard.clone()).await[0]["ok"]["listened"].as_u64() > Some(0)
    })
    .await;
    host.settled().await;
    let dir = host.stop().await;
    dim_tests::downtime(std::time::Duration::from_secs(6)).await;
    let host = Setup::probe().start_in(dir).await;
    eventually("the gap is told", async || host.state_of("probe", "gaps").await.is_array()).await;
    let gaps = host.state_of("probe", "gaps").await;
    let length = gaps[0]["until"].as_u64().unwrap() - gaps[0]["since"].as_u64().unwrap();
    assert!(length > 5_000_000_000, "{gaps}");
    let listened = host.run(heard).await[0]["ok"]["listened"].as_u64().unwrap();
    let elapsed = host.host.storage.log.now().0 - begun;
    assert!(listened + length <= elapsed + 1_000_000, "{listened} of {elapsed} ns, a gap of {length}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_host_on_one_state_directory_is_refused_with_the_holders_pid() {
    let host = Setup::probe().start().await;
    let options = dim_server::host::Options::new(Setup::probe().config(), host.host.storage.store.path());
    let error = dim_server::host::Host::start(options).await.unwrap_err().to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_an_older_start_is_told_to_the_plugin() {
    let noting = json!({ "config": { "on_start": "[{\"do\":\"note-version\"}]" } });
    let setup = Setup::default().and_probe("probe", noting);
    let host = setup.start().await;
    host.settled().await;
    assert_eq!(host.state_of("probe", "version").await, Value::Null);
    let host = setup.start_in(host.stop().await).await;
    host.settled().await;
    eventually("the second start knows the version", async || host.state_of("probe", "version").await == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_granted_any_more_is_taken_back_at_the_next_start() {
    let host = Setup::probe().start().await;
    host.run(
        json!([{ "do": "subscribe", "topic": "probe.more" }, { "do": "follow", "name": "probe-other" }]),
    )
    .await;
    host.settled().await;
    let less = Setup::default().and_probe("probe", json!({ "grants": { "subscribe": ["probe.in"] } }));
    let host = less.start_in(host.stop().await).await;
    host.settled().await;
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!(["probe.in"])]);
    assert!(host.host.exchange.links.interest.names().is_empty());
    assert_eq!(host.host.exchange.links.interest.topics().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_subscribing_and_unsubscribing_holds() {
    let host = Setup::probe().start().await;
    host.run(json!([
        { "do": "unsubscribe", "topic": "probe.in" },
        { "do": "subscribe", "topic": "probe.in" },
        { "do": "subscribe", "topic": "probe.more" },
        { "do": "unsubscribe", "topic": "probe.more" },
    ]))
    .await;
    host.settled().await;
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!(["probe.in"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn following_is_as_durable_as_the_commit_that_asked_for_it() {
    use dim_store::WORLDS;
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "follow", "name": "probe-other" }])).await;
    let contexts = host.host.storage.store.snapshot().unwrap().table(WORLDS).unwrap();
    let context = contexts.get(1).unwrap().expect("it is stored with the reply");
    let context: Value = serde_json::from_slice(context.value()).unwrap();
    assert_eq!(context["follows"].as_object().unwrap().len(), 1, "{context}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_unsubscribed_from_a_topic_of_its_manifest_stays_so() {
    let host = Setup::probe().start().await;
    host.settled().await;
    host.run(json!([{ "do": "unsubscribe", "topic": "probe.in" }])).await;
    host.settled().await;
    let host = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!([])]);
    // Taken and granted again, it is as new.
    let none = Setup::default().and_probe("probe", json!({ "grants": {} }));
    let host = none.start_in(host.stop().await).await;
    host.settled().await;
    let host = Setup::probe().start_in(host.stop().await).await;
    host.settled().await;
    let unchanged = host.run(json!([{ "do": "topics" }])).await;
    assert_eq!(unchanged, [json!([])], "what it gave up itself was not taken from it");
}
