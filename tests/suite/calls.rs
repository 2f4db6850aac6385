//! Each import function: what it answers, what it refuses, and its limits.

use std::collections::BTreeSet;

use dim_store::WORLDS;
use dim_tests::{Setup, TestHost, eventually, script};
use serde_json::{Value, json};

async fn run_one(host: &TestHost, step: Value) -> Value {
    host.run(json!([step])).await.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_read_back_deleted_and_scanned_in_order() {
    let host = Setup::probe().start().await;
    let answers = host
        .run(json!([
            { "do": "get", "key": "a" },
            { "do": "set", "key": "p/2", "value": "two" },
            { "do": "set", "key": "p/1", "value": "one" },
            { "do": "set", "key": "q/1", "value": "other" },
            { "do": "get", "key": "p/1" },
        ]))
        .await;
    assert_eq!(answers[0], json!({ "ok": null }));
    assert_eq!(answers[4], json!({ "ok": "one" }));
    // Now from the store, with fresh writes and deletions on top.
    let answers = host
        .run(json!([
            { "do": "set", "key": "p/15", "value": "between" },
            { "do": "delete", "key": "p/2" },
            { "do": "scan", "prefix": "p/", "limit": 10 },
            { "do": "scan", "prefix": "p/", "after": "p/1", "limit": 1 },
            { "do": "scan", "prefix": "", "limit": 2 },
            { "do": "scan", "prefix": "p/", "after": "p/15", "limit": 10 },
        ]))
        .await;
    assert_eq!(answers[2], json!({ "ok": ["p/1", "p/15"] }));
    assert_eq!(answers[3], json!({ "ok": ["p/15"] }));
    assert_eq!(answers[4], json!({ "ok": ["p/1", "p/15"] }));
    assert_eq!(answers[5], json!({ "ok": [] }));
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_state_hold_at_the_limit_and_one_past_it() {
    let setup = Setup::default()
        .and_probe("probe", json!({ "limits": { "value-bytes": 100, "state-bytes": 400, "effects": 6 } }));
    let host = setup.start().await;
    for (len, expected) in [(512, json!({ "ok": null })), (513, json!({ "error": "Error::KeyLength(512)" }))]
    {
        let answer = run_one(&host, json!({ "do": "get", "key_len": len })).await;
        assert_eq!(answer, expected, "a key of {len} bytes");
    }
    assert_eq!(
        run_one(&host, json!({ "do": "get", "key": "" })).await,
        json!({ "error": "Error::KeyLength(512)" })
    );
    for (repeat, expected) in
        [(100, json!({ "ok": null })), (101, json!({ "error": "Error::ValueTooLarge(100)" }))]
    {
        let answer = run_one(&host, json!({ "do": "set", "key": "a", "value": "x", "repeat": repeat })).await;
        assert_eq!(answer, expected, "a value of {repeat} bytes");
    }
    // 101 bytes are taken; three more of 100 would be 404, with 99 at the end they are 400.
    let full = host
        .run(json!([
            { "do": "set", "key": "b", "value": "x", "repeat": 99 },
            { "do": "set", "key": "c", "value": "x", "repeat": 99 },
            { "do": "set", "key": "d", "value": "x", "repeat": 98 },
            { "do": "set", "key": "d", "value": "x", "repeat": 99 },
        ]))
        .await;
    assert_eq!(full[2], json!({ "ok": null }));
    assert_eq!(full[3], json!({ "error": "Error::QuotaExceeded(400)" }));
    let set = |n: u64| json!({ "do": "set", "key": "a", "value": n.to_string() });
    let many = host.run((0..7).map(set).collect()).await;
    assert_eq!(many[5], json!({ "ok": null }));
    assert_eq!(many[6], json!({ "error": "Error::LimitExceeded(\"effects\")" }));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_effects_follows_and_log_lines_are_limited() {
    let limits = json!({ "limits": { "effect-bytes": 1_000, "follows": 1, "log-lines": 3 } });
    let host = Setup::default().and_probe("probe", limits).start().await;
    let set = |repeat: u64| json!({ "do": "set", "key": "a", "value": "x", "repeat": repeat });
    assert_eq!(run_one(&host, set(999)).await, json!({ "ok": null }), "a key of one byte and 999 more");
    let past = json!({ "error": "Error::LimitExceeded(\"effect-bytes\")" });
    assert_eq!(run_one(&host, set(1_000)).await, past);
    let follow = |name: &str| json!({ "do": "follow", "name": name });
    let follows = host.run(json!([follow("probe-key"), follow("probe-key"), follow("probe-other")])).await;
    let one_past = json!({ "error": "Error::LimitExceeded(\"follows\")" });
    assert_eq!(follows, [json!({ "ok": null }), json!({ "ok": null }), one_past]);
    for (times, told) in [(3, 3), (4, 4)] {
        let mut rejected = script(json!([{ "do": "log", "line": "x", "times": times }]));
        rejected["then"] = json!("reject");
        host.from_peer("probe.in", rejected.to_string()).await;
        let letters = || {
            dim_store::dead_letters::list(&host.host.storage.store, &Default::default(), None, 10).unwrap()
        };
        dim_tests::eventually("it is set aside", async || letters().len() == times - 2).await;
        let (_, letter) = letters().pop().unwrap();
        assert_eq!(letter.log.len(), told);
        let last = if times == 3 { "x" } else { "(1 more lines were dropped)" };
        assert_eq!(letter.log.last().unwrap(), last);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn timers_fire_once_at_their_time_and_can_be_cleared() {
    let host = Setup::probe().start().await;
    let answers = host
        .run(json!([
            { "do": "timer", "key": "soon", "in": 50_000_000 },
            { "do": "timer", "key": "never", "in": 100_000_000 },
            { "do": "clear", "key": "never" },
            { "do": "timer-at", "key": "never" },
            { "do": "timer", "key": "past", "at": 1 },
        ]))
        .await;
    assert_eq!(answers[3], json!({ "ok": null }));
    dim_tests::eventually("both timers fire", async || {
        host.state_of("probe", "fired").await.as_array().is_some_and(|fired| fired.len() == 2)
    })
    .await;
    let fired = host.state_of("probe", "fired").await;
    assert_eq!(fired[0]["key"], "past");
    assert_eq!(fired[1]["key"], "soon");
    assert!(fired[1]["now"].as_u64() >= fired[1]["due"].as_u64());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_timers_is_limited() {
    let setup = Setup::default().and_probe("probe", json!({ "limits": { "timers": 3 } }));
    let host = setup.start().await;
    assert_eq!(run_one(&host, json!({ "do": "timers", "count": 3 })).await, json!({ "ok": null }));
    assert_eq!(
        run_one(&host, json!({ "do": "timers", "count": 4 })).await,
        json!({ "error": "Error::TooMany(3)" })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_granted_is_refused_before_anything_is_touched() {
    let host = Setup::default().and_probe("probe", json!({ "grants": {} })).start().await;
    let answers = host
        .run(json!([
            { "do": "publish", "topic": "probe.out", "data": "x" },
            { "do": "subscribe", "topic": "probe.in" },
            { "do": "update-state", "key": "probe-key", "data": "x" },
            { "do": "publish-name", "key": "probe-key", "path": "/ipfs/bafkqaaa" },
            { "do": "key-id", "key": "probe-key" },
            { "do": "resolve", "name": "probe-key" },
            { "do": "get-state", "name": "probe-key" },
            { "do": "follow", "name": "k51qzi5uqu5dlkw8pxuw9qmqayfdeh4kfebhmreauqdc6a7c3y7d5i9fi8mk9w" },
            { "do": "peers", "topic": "probe.in" },
            { "do": "heard", "topic": "probe.in" },
            { "do": "topics" },
        ]))
        .await;
    for answer in &answers[..10] {
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.starts_with("Error::NotGranted"), "{answers:?}");
    }
    assert_eq!(answers[10], json!([]));
    assert!(host.host.storage.keys.all().is_empty(), "no key was made");
    assert!(
        host.host.exchange.links.interest.names().is_empty()
            && host.host.exchange.links.interest.topics().is_empty()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_topics_keys_and_paths_are_told_apart() {
    let host = Setup::probe().start().await;
    let answers = host
        .run(json!([
            { "do": "publish", "topic": "", "data": "x" },
            { "do": "publish", "topic": "probe.\n", "data": "x" },
            { "do": "update-state", "key": "../etc", "data": "x" },
            { "do": "publish-name", "key": "probe-key", "path": "/etc/passwd" },
            { "do": "resolve", "name": "/ipns/x" },
            { "do": "update-state", "key": "probe-key", "data": "x", "lifetime": 1 },
        ]))
        .await;
    for answer in answers {
        let error = answer["error"].as_str().unwrap_or_default().to_owned();
        assert!(error.starts_with("Error::InvalidArgument"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_documents_have_a_largest_size() {
    let limits = json!({ "limits": { "document-bytes": 16 << 20, "effect-bytes": 24 << 20 } });
    let host = Setup::default().and_probe("probe", limits).start().await;
    let limit = 60 << 10;
    let message =
        |repeat: u64| json!({ "do": "publish", "topic": "probe.out", "data": "x", "repeat": repeat });
    assert_eq!(run_one(&host, message(limit)).await, json!({ "ok": null }));
    assert_eq!(
        run_one(&host, message(limit + 1)).await,
        json!({ "error": format!("Error::TooLarge({limit})") })
    );
    let limit = 16 << 20;
    let document =
        |repeat: u64| json!({ "do": "update-state", "key": "probe-key", "data": "x", "repeat": repeat });
    assert_eq!(run_one(&host, document(limit)).await, json!({ "ok": null }));
    assert_eq!(
        run_one(&host, document(limit + 1)).await,
        json!({ "error": format!("Error::TooLarge({limit})") })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_has_no_effects() {
    let host = Setup::probe().start().await;
    let steps = json!([
        { "do": "set", "key": "a", "value": "x" },
        { "do": "delete", "key": "a" },
        { "do": "timer", "key": "t", "in": 1 },
        { "do": "clear", "key": "t" },
        { "do": "publish", "topic": "probe.out", "data": "x" },
        { "do": "subscribe", "topic": "probe.more" },
        { "do": "unsubscribe", "topic": "probe.in" },
        { "do": "update-state", "key": "probe-key", "data": "x" },
        { "do": "follow", "name": "probe-key" },
    ]);
    host.settled().await;
    let answers = host.query("probe", "run", script(steps)).await.unwrap();
    for answer in answers.as_array().unwrap() {
        assert_eq!(answer["error"], "Error::ReadOnly", "{answers}");
    }
    let read = host.query("probe", "run", script(json!([{ "do": "get", "key": "a" }]))).await.unwrap();
    assert_eq!(read, json!([{ "ok": null }]));
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_begin_with_the_commit_and_end_with_it() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "subscribe", "topic": "probe.later" }])).await;
    host.settled().await;
    let add = script(json!([{ "do": "add", "key": "heard" }])).to_string();
    host.from_peer("probe.later", add.clone()).await;
    host.settled().await;
    assert_eq!(run_one(&host, json!({ "do": "topics" })).await, json!(["probe.in", "probe.later"]));
    dim_tests::eventually("the message is counted", async || host.state_of("probe", "heard").await == 1)
        .await;
    host.run(json!([{ "do": "unsubscribe", "topic": "probe.later" }])).await;
    host.settled().await;
    assert_eq!(run_one(&host, json!({ "do": "topics" })).await, json!(["probe.in"]));
    assert!(!host.host.exchange.links.interest.topics().iter().any(|topic| topic.as_str() == "probe.later"));
}

#[tokio::test(flavor = "multi_thread")]
async fn own_names_are_known_at_once_and_read_back() {
    let host = Setup::probe().start().await;
    let answers = host
        .run(json!([
            { "do": "resolve", "name": "probe-key" },
            { "do": "update-state", "key": "probe-key", "data": "first" },
            { "do": "get-state", "name": "probe-key" },
            { "do": "key-id", "key": "probe-key" },
        ]))
        .await;
    assert_eq!(answers[0], json!({ "error": "Error::NotYetKnown" }));
    assert_eq!(answers[2], json!({ "ok": "first" }));
    let name = answers[3]["ok"].as_str().unwrap().to_owned();
    assert!(name.starts_with("k51"), "{name}");
    let answers = host
        .run(json!([
            { "do": "resolve", "name": "probe-key" },
            { "do": "resolve", "name": name },
            { "do": "update-state", "key": "probe-key", "data": "second" },
            { "do": "update-state", "key": "probe-key", "data": "third" },
        ]))
        .await;
    assert_eq!(answers[0]["ok"]["sequence"], 1);
    assert_eq!(answers[0], answers[1]);
    let after = run_one(&host, json!({ "do": "resolve", "name": "probe-key" })).await;
    // Two updates in one entry are one new value: the newest.
    assert_eq!(after["ok"]["sequence"], 2);
    assert_eq!(
        run_one(&host, json!({ "do": "get-state", "name": "probe-key" })).await,
        json!({ "ok": "third" })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_name_of_this_host_tells_of_its_changes() {
    let reader = json!({ "config": { "on_start": "[{\"do\":\"follow\",\"name\":\"probe-key\"}]" } });
    let host = Setup::probe().and_probe("reader", reader).start().await;
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": "news" }])).await;
    dim_tests::eventually("the reader hears of it", async || {
        host.state_of("reader", "changed").await.as_array().is_some_and(|changes| !changes.is_empty())
    })
    .await;
    let read = script(json!([{ "do": "get-state", "name": "probe-key" }]));
    assert_eq!(host.query("reader", "run", read).await.unwrap(), json!([{ "ok": "news" }]));
}

#[tokio::test(flavor = "multi_thread")]
async fn wasi_shows_the_time_of_the_entry_and_nothing_of_the_machine() {
    let host = Setup::probe().start().await;
    let answers = host
        .run(json!([
            { "do": "now" },
            { "do": "monotonic" },
            { "do": "now" },
            { "do": "hash" },
            { "do": "env" },
            { "do": "file" },
            { "do": "connect" },
        ]))
        .await;
    assert_eq!(answers[0], answers[2], "the clock stands still");
    assert_eq!(answers[1], 0, "the monotonic clock stands still");
    assert_eq!(answers[4], 0, "no environment and no arguments");
    assert!(answers[5]["error"].is_string(), "no file system: {}", answers[5]);
    assert!(answers[6]["error"].is_string(), "no network: {}", answers[6]);
    // The seed of hash maps survives the instance and the host.
    host.command("probe", "run", script(json!([{ "do": "trap" }]))).await.unwrap_err();
    assert_eq!(run_one(&host, json!({ "do": "hash" })).await, answers[3]);
    let again = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(run_one(&again, json!({ "do": "hash" })).await, answers[3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_counted_and_not_the_calls_about_them() {
    let setup = Setup::default().and_probe("probe", json!({ "limits": { "topics": 3 } }));
    let host = setup.start().await;
    let subscribe = |topic: &str| json!({ "do": "subscribe", "topic": topic });
    let again = vec![subscribe("probe.one"); 70];
    let head = host.host.storage.log.head().0;
    assert!(host.run(json!(again)).await.iter().all(|answer| *answer == json!({ "ok": null })));
    host.settled().await;
    let subscriptions = host.host.storage.store.read_log(dim_model::entry::Offset(head), 1000).unwrap();
    let asked =
        |entry: &&dim_model::entry::Entry| matches!(entry.kind, dim_model::entry::Kind::Subscription { .. });
    assert_eq!(subscriptions.iter().filter(asked).count(), 1, "what changes nothing is no entry");
    let pair = [subscribe("probe.two"), json!({ "do": "unsubscribe", "topic": "probe.two" })];
    let pairs: Vec<Value> = pair.iter().cycle().take(80).cloned().collect();
    assert!(host.run(json!(pairs)).await.iter().all(|answer| *answer == json!({ "ok": null })));
    // `probe.in` is in the manifest, `probe.one` was asked for.
    let answers = host.run(json!([subscribe("probe.three"), subscribe("probe.four")])).await;
    assert_eq!(answers[0], json!({ "ok": null }));
    assert_eq!(answers[1], json!({ "error": "Error::LimitExceeded(\"topics\")" }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_behind_a_path_that_the_name_had_already_is_stored_and_a_longer_lifetime_counts() {
    let host = Setup::probe().start().await;
    let path = dim_model::ident::ContentPath::of(&dim_ipfs::unixfs::file_cid(b"news")).to_string();
    let minute = 60_000_000_000_u64;
    let by_path = json!({ "do": "publish-name", "key": "probe-key", "path": path, "lifetime": minute });
    assert_eq!(run_one(&host, by_path).await, json!({ "ok": null }));
    let key = "probe-key".parse().unwrap();
    let known =
        || dim_store::names::known(&host.host.storage.store.snapshot().unwrap(), &key).unwrap().unwrap();
    let lifetime = || known().published.map(|accepted| accepted.lifetime);
    dim_tests::eventually("the path is published", async || lifetime() == Some(minute)).await;
    let read = json!({ "do": "get-state", "name": "probe-key" });
    assert!(run_one(&host, read.clone()).await["error"].is_string(), "no one holds it");
    run_one(&host, json!({ "do": "update-state", "key": "probe-key", "data": "news" })).await;
    assert_eq!(run_one(&host, read).await, json!({ "ok": "news" }));
    dim_tests::eventually("a record of a day is signed", async || lifetime() == Some(1440 * minute)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_name_of_a_key_survives_a_restart() {
    let host = Setup::probe().start().await;
    for key in ["x.adopted", "adopted", "half"] {
        host.host.storage.keys.get_or_create(&key.parse().unwrap()).unwrap();
    }
    let name = host.host.storage.keys.name(&"x.adopted".parse().unwrap());
    let host = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(host.host.storage.keys.name(&"x.adopted".parse().unwrap()), name);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_toggled_in_one_entry_is_nothing() {
    let host = Setup::probe().start().await;
    let toggle = |times: usize| {
        let there = json!({ "do": "subscribe", "topic": "probe.toggled" });
        let back = json!({ "do": "unsubscribe", "topic": "probe.toggled" });
        json!(std::iter::repeat_n([there, back], times).flatten().collect::<Vec<_>>())
    };
    host.settled().await;
    let before = host.host.storage.log.head().0;
    let mut steps = toggle(5_000).as_array().unwrap().clone();
    // What is left of it is what stands at the end, whatever else was toggled around it.
    steps.insert(1, json!({ "do": "subscribe", "topic": "probe.kept" }));
    host.run(json!(steps)).await;
    host.settled().await;
    let added = host.host.storage.log.head().0 - before;
    assert!(added < 10, "{added} entries for one change");
    let count = json!([{ "do": "add", "key": "heard" }]);
    host.from_peer("probe.kept", script(count.clone()).to_string()).await;
    eventually("the topic is heard", async || host.state_of("probe", "heard").await == 1).await;
    // An odd number of changes is one.
    let mut steps = toggle(3).as_array().unwrap().clone();
    steps.push(json!({ "do": "subscribe", "topic": "probe.toggled" }));
    steps.push(json!({ "do": "unsubscribe", "topic": "probe.kept" }));
    host.run(json!(steps)).await;
    host.from_peer("probe.toggled", script(count.clone()).to_string()).await;
    eventually("the other topic is heard", async || host.state_of("probe", "heard").await == 2).await;
    host.run(count).await;
    assert_eq!(host.state_of("probe", "heard").await, 3, "the one that it left is not heard");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_subscriptions_are_limited_by_the_rate_of_publishes() {
    let setup = json!({ "limits": { "publishes-per-second": 1 } });
    let host = Setup::default().and_probe("probe", setup).start().await;
    let subscribe = |number: usize| json!({ "do": "subscribe", "topic": format!("probe.{number}") });
    let answers = host.run(json!((0..11).map(subscribe).collect::<Vec<_>>())).await;
    let refused = json!({ "error": "Error::LimitExceeded(\"publishes-per-second\")" });
    assert_eq!((&answers[9], &answers[10]), (&json!({ "ok": null }), &refused));
}

/// The world of the one plugin of a host, as it is stored.
fn stored_world(host: &TestHost) -> Value {
    let contexts = host.host.storage.store.snapshot().unwrap().table(WORLDS).unwrap();
    let (_, context) = redb::ReadableTable::first(&contexts).unwrap().unwrap();
    serde_json::from_slice(context.value()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_to_ever_new_topics_leave_nothing_behind() {
    let setup = Setup::probe();
    let host = setup.start().await;
    let change = |what: &str, topic: String| json!([{ "do": what, "topic": topic }]);
    for number in 0..20 {
        host.run(change("subscribe", format!("probe.{number}"))).await;
        host.run(change("unsubscribe", format!("probe.{number}"))).await;
    }
    host.run(change("unsubscribe", "probe.in".to_owned())).await;
    let is_small = |host: &TestHost| {
        let context = stored_world(host);
        context["once"] == json!(["probe.in"]) && context["asked"] == json!({})
    };
    eventually("the topic of the manifest is left", async || is_small(&host)).await;
    // As a host has left it that did not forget.
    let mut context = stored_world(&host);
    let once = (0..2_000).map(|number| json!(format!("probe.{number}"))).chain([json!("probe.in")]);
    context["once"] = once.collect();
    let write = move |write: &redb::WriteTransaction| {
        let mut contexts = write.open_table(WORLDS)?;
        let (plugin, _) =
            contexts.pop_first()?.map(|(plugin, context)| (plugin.value(), context.value().len())).unwrap();
        contexts.insert(plugin, context.to_string().as_bytes())?;
        Ok(())
    };
    host.host.storage.commit.write(write).await.unwrap();
    assert!(!is_small(&host));
    let host = setup.start_in(host.stop().await).await;
    eventually("the topic of the manifest is left again", async || is_small(&host)).await;
    assert!(host.host.exchange.links.interest.topics().is_empty(), "what was ended does not begin again");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_subscriptions_that_are_not_in_the_log_are_limited() {
    let host = Setup::probe().start().await;
    host.plugin("probe").handle.pause(true);
    eventually("it is paused", async || host.plugin("probe").handle.status().state == "paused").await;
    // All of these come before what they ask for.
    for number in 0..300 {
        let topic = format!("probe.{number}");
        for step in ["subscribe", "unsubscribe"] {
            host.from_peer("probe.in", script(json!([{ "do": step, "topic": topic }])).to_string()).await;
        }
    }
    let received = || host.host.exchange.received.received.load(std::sync::atomic::Ordering::Relaxed);
    eventually("all are in the log", async || received() == 600).await;
    let head = host.host.storage.log.head();
    host.plugin("probe").handle.pause(false);
    // To end what has not begun is nothing: one change of each topic beyond is refused.
    let met = || host.plugin("probe").handle.status().met.get("topics").copied().unwrap_or_default();
    eventually("the last one is refused", async || met() == 300 - 256).await;
    let count = || {
        let entries = host.host.storage.store.read_log(head, 1_000).unwrap().into_iter();
        let topics: BTreeSet<_> = entries
            .filter_map(|entry| match entry.kind {
                dim_model::entry::Kind::Subscription { topic, .. } => Some(topic),
                _ => None,
            })
            .collect();
        topics.len()
    };
    eventually("what was asked for is in the log", async || count() == 256).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_before_the_start_has_no_effects() {
    let early = tempfile::NamedTempFile::new().unwrap();
    let probe = std::fs::read(dim_tests::PROBE).unwrap();
    std::fs::write(early.path(), dim_tests::component::with_early_effects(&probe)).unwrap();
    let host = Setup::default().and_probe("probe", json!({ "file": early.path() })).start().await;
    let reason = || host.plugin("probe").handle.status().reason;
    eventually("it has failed to start", async || reason().is_some()).await;
    assert!(reason().unwrap().contains("unreachable"), "{:?}", reason());
    // Whatever it had left for the commit is in the store by then.
    host.host.storage.commit.write(|_| Ok(())).await.unwrap();
    let snapshot = host.host.storage.store.snapshot().unwrap();
    let state = snapshot.table(dim_store::STATE).unwrap();
    let rows = redb::ReadableTable::iter(&state).unwrap();
    let written = rows.filter(|row| row.as_ref().is_ok_and(|(_, value)| value.value() == b"too early"));
    assert_eq!(written.count(), 0, "what it wrote is not there");
}
