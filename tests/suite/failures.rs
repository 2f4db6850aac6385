//! What a plugin that fails does to itself, and does not do to others.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dim_store::batch::ReplyError;
use dim_tests::{Setup, SupervisedHost, eventually, script, with_token};
use serde_json::{Value, json};

fn message(steps: Value, then: &str) -> String {
    json!({ "script": steps, "then": then }).to_string()
}

fn add(key: &str) -> Value {
    json!({ "do": "add", "key": key })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_event_leaves_no_trace_and_becomes_a_dead_letter() {
    let host = Setup::probe().start().await;
    let effects = json!([
        add("count"),
        { "do": "timer", "key": "t", "in": 1 },
        { "do": "publish", "topic": "probe.in", "data": "x" },
        { "do": "update-state", "key": "probe-key", "data": "x" },
        { "do": "subscribe", "topic": "probe.more" },
        { "do": "follow", "name": "probe-other" },
        { "do": "log", "line": "about to be rejected" },
    ]);
    host.from_peer("probe.in", message(json!([add("count")]), "ok")).await;
    host.from_peer("probe.in", message(effects, "reject")).await;
    host.from_peer("probe.in", message(json!([add("count")]), "ok")).await;
    eventually("the events around it are handled", async || host.state_of("probe", "count").await == 2).await;
    host.settled().await;
    assert_eq!(host.dead_letters(), ["told to reject"]);
    assert_eq!(host.state_of("probe", "fired").await, Value::Null);
    assert_eq!(published(&host), 0, "nothing was published");
    assert!(dim_store::names::all(&host.host.storage.store.snapshot().unwrap()).unwrap().is_empty());
    assert!(host.host.exchange.links.interest.names().is_empty());
    assert_eq!(host.host.exchange.links.interest.topics().len(), 1);
    let letters =
        dim_store::dead_letters::list(&host.host.storage.store, &Default::default(), None, 10).unwrap();
    assert_eq!(letters[0].1.log, ["about to be rejected"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_dead_letters_has_the_beginning_of_a_long_log_and_one_letter_all_of_it() {
    let host = SupervisedHost::start(&Setup::probe()).await;
    let (http, url) = (with_token(), host.serve().await);
    let get = async |path: &str| -> String {
        let answer = http.get(format!("{url}/v1/dead-letters{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.text().await.unwrap()
    };
    let count = async || serde_json::from_str::<Vec<Value>>(&get("").await).unwrap().len();
    for (lines, long) in [(1, "short".to_owned()), (100, "L".repeat(4_000)), (100, "L".repeat(4_000))] {
        let log = message(json!([{ "do": "log", "line": long, "times": lines }]), "reject");
        let url = format!("{url}/v1/topics/probe.in/messages");
        assert_eq!(http.post(url).body(log).send().await.unwrap().status(), 202);
    }
    eventually("they are set aside", async || count().await == 3).await;
    let page = get("").await;
    assert!(page.len() < 20_000, "{}", page.len());
    let page: Vec<Value> = serde_json::from_str(&page).unwrap();
    assert_eq!((&page[0]["log"], &page[0]["log_lines"]), (&json!(["short"]), &Value::Null));
    assert_eq!((&page[2]["log"], &page[2]["log_lines"]), (&json!(["L".repeat(1_000)]), &json!(100)));
    let last: Value = serde_json::from_str(&get(&format!("/{}", page[2]["id"])).await).unwrap();
    assert_eq!(last["log"], json!(vec!["L".repeat(4_000); 100]));
    assert_eq!(last["log_lines"], Value::Null);
    let next: Vec<Value> = serde_json::from_str(&get("?limit=1&after=1").await).unwrap();
    assert_eq!(next.len(), 1);
    host.stop().await;
}

/// How many messages of plugins are in the log.
fn published(host: &dim_tests::TestHost) -> usize {
    use dim_model::entry::{Event, Kind, Origin};
    let entries = host.entries();
    let of_plugin =
        |kind: &Kind| matches!(kind, Kind::Event(Event::Message { origin: Origin::Plugin(_), .. }));
    entries.iter().filter(|entry| of_plugin(&entry.kind)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_event_comes_again_a_bounded_number_of_times() {
    let setup = Setup::default().and_probe("probe", json!({ "limits": { "retries": 2 } }));
    let host = setup.start().await;
    host.from_peer("probe.in", message(json!([add("count")]), "retry")).await;
    eventually("it is given up", async || host.dead_letters().len() == 1).await;
    assert_eq!(host.dead_letters(), ["still not handled after 3 tries"]);
    assert_eq!(host.state_of("probe", "count").await, Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trap_is_tried_once_more_then_set_aside_and_the_line_goes_on() {
    let host = Setup::probe().start().await;
    host.from_peer("probe.in", message(json!([add("count"), { "do": "trap" }]), "ok")).await;
    host.from_peer("probe.in", message(json!([add("count")]), "ok")).await;
    eventually("the next event is handled", async || host.state_of("probe", "count").await == 1).await;
    host.settled().await;
    let reasons = host.dead_letters();
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].contains("told to trap"), "the panic's message is told: {reasons:?}");
    let status = host.plugin("probe").handle.status();
    assert_eq!((status.failures, status.instances), (2, 3), "tried twice, each time on a fresh instance");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_command_says_why_and_leaves_no_trace() {
    let host = Setup::probe().start().await;
    let refused = host.command("probe", "refuse", script(json!([add("count")]))).await;
    assert_eq!(refused, Err(ReplyError::Conflict("told to refuse".into())));
    let trapped = host.command("probe", "run", script(json!([add("count"), { "do": "trap" }]))).await;
    assert!(matches!(&trapped, Err(ReplyError::Failed(why)) if why.contains("told to trap")), "{trapped:?}");
    let unknown = host.command("probe", "nothing", json!({})).await;
    assert_eq!(unknown, Err(ReplyError::UnknownMethod("nothing".into())));
    let invalid = host.command("probe", "run", json!([1])).await;
    assert!(invalid.is_ok(), "{invalid:?}");
    assert_eq!(host.state_of("probe", "count").await, Value::Null);
    assert!(host.dead_letters().is_empty(), "a command has a reply instead");
}

#[tokio::test(flavor = "multi_thread")]
async fn looping_sleeping_greedy_and_exiting_plugins_are_stopped_with_a_reason() {
    // On a busy machine, the steps after the first take some of the CPU time, too.
    let limits = json!({ "limits": { "call-cpu-ms": 500, "memory": 32 << 20 } });
    let host = Setup::default().and_probe("probe", limits).start().await;
    for (step, reason) in [
        (json!({ "do": "loop" }), "500ms of CPU time"),
        (json!({ "do": "sleep", "ms": 60_000 }), "cannot wait"),
        (json!({ "do": "grow", "mib": 64 }), "limit on memory"),
        (json!({ "do": "recurse", "depth": 100_000_000_u64 }), "stack"),
        (json!({ "do": "exit" }), "exit"),
    ] {
        let begun = std::time::Instant::now();
        let reply = host.command("probe", "run", script(json!([add("count"), step.clone()]))).await;
        let Err(ReplyError::Failed(why)) = &reply else { panic!("{step}: {reply:?}") };
        assert!(why.contains(reason), "{step}: {why}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{step} took {:?}", begun.elapsed());
    }
    assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": 1 })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fits_into_the_memory_is_allowed() {
    let limits = json!({ "limits": { "memory": 32 << 20 } });
    let host = Setup::default().and_probe("probe", limits).start().await;
    assert_eq!(host.run(json!([{ "do": "grow", "mib": 16 }])).await, [json!(16)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_whose_memory_is_too_large_to_begin_with_does_not_start() {
    let host = Setup::probe().and_probe("fat", json!({ "limits": { "memory": 1 << 16 } })).start().await;
    let fat = host.plugin("fat");
    eventually("it says why", async || fat.handle.status().reason.is_some()).await;
    assert!(fat.handle.status().reason.unwrap().contains("limit on memory"));
    assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": 1 })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_plugins_delay_no_other() {
    let limits = json!({ "limits": { "call-cpu-ms": 200 } });
    let host = Setup::probe().and_probe("bad", limits).start().await;
    let bad = message(json!([{ "do": "loop" }]), "ok");
    // Two seconds of looping, for one of them only.
    let looping = host.plugin("bad").handle.clone();
    let orders: Vec<_> = (0..10)
        .map(|_| {
            let (looping, bad) = (looping.clone(), bad.clone());
            tokio::spawn(async move { looping.command("run".into(), bad).await })
        })
        .collect();
    for count in 1..=100 {
        assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": count })]);
    }
    let stopped = orders.iter().filter(|order| order.is_finished()).count();
    assert!(stopped < 10, "the honest one was done first");
    for order in orders {
        let stopped = order.await.unwrap();
        assert!(matches!(stopped, Err(ReplyError::Failed(_))), "{stopped:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_does_not_start_says_why_and_stops_no_other() {
    let fails = json!({ "config": { "on_start": "[{\"do\":\"add\",\"key\":\"count\"},{\"do\":\"fail\"}]" } });
    let host = Setup::probe().and_probe("broken", fails).start().await;
    assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": 1 })]);
    let reply = host.query("broken", "calls", json!({})).await;
    assert!(matches!(&reply, Err(ReplyError::Unavailable(_))), "{reply:?}");
    let broken = host.plugin("broken");
    eventually("its status says why", async || {
        broken.handle.status().reason.as_deref() == Some("told to fail")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_plugin_is_refused_with_a_reason() {
    let host = Setup::probe().and_probe("nonsense", json!({ "file": file!() })).start().await;
    assert_eq!(host.host.not_loaded().len(), 1);
    assert_eq!(host.host.not_loaded()[0].name.as_str(), "nonsense");
    assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": 1 })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_told_by_its_name() {
    let host = Setup::probe().start().await;
    for number in 0..50 {
        host.run(json!([{ "do": "set", "key": format!("{number}"), "value": "x", "repeat": 1_000 }])).await;
    }
    let dir = host.stop().await;
    let file = dim_store::Store::file(dir.path());
    let whole = std::fs::read(&file).unwrap();
    let mut garbled = whole.clone();
    let middle = garbled.len() / 8;
    garbled[middle..].iter_mut().enumerate().for_each(|(index, byte)| *byte ^= (index % 251) as u8);
    for bytes in [b"no database".to_vec(), whole[..whole.len() / 2].to_vec(), garbled] {
        std::fs::write(&file, bytes).unwrap();
        let options = dim_server::host::Options::new(Setup::probe().config(), dir.path());
        let error = dim_server::host::Host::start(options).await.expect_err("it is damaged").to_string();
        assert!(error.contains("dim.redb") && error.contains("backup"), "{error}");
    }
    std::fs::write(&file, whole).unwrap();
    let host = Setup::probe().start_in(dir).await;
    assert_eq!(host.state_of("probe", "49").await, "x".repeat(1_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_gone_is_told_until_it_is_back() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "update-state", "key": "probe-key", "data": "x" }])).await;
    let published = || {
        let known = dim_store::names::all(&host.host.storage.store.snapshot().unwrap()).unwrap();
        known.iter().all(|(_, name)| name.is_published())
    };
    eventually("it is published", async || published()).await;
    assert!(host.host.lost().is_empty());
    let dir = host.stop().await;
    std::fs::rename(dir.path().join("keys"), dir.path().join("elsewhere")).unwrap();
    let host = Setup::probe().start_in(dir).await;
    assert!(host.host.lost().iter().any(|lost| lost.contains("probe-key")), "{:?}", host.host.lost());
    let dir = host.stop().await;
    std::fs::remove_dir_all(dir.path().join("keys")).unwrap();
    std::fs::rename(dir.path().join("elsewhere"), dir.path().join("keys")).unwrap();
    assert!(Setup::probe().start_in(dir).await.host.lost().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_is_too_large_is_a_trouble_until_one_is_taken() {
    let limits = json!({ "limits": { "document-bytes": 1_000 } });
    let host = Setup::default().and_probe("probe", limits).start().await;
    let probe = host.plugin("probe").handle.clone();
    let update =
        |repeat: u64| json!({ "do": "update-state", "key": "probe-key", "data": "x", "repeat": repeat });
    for (repeat, troubles) in [(1_000, 0), (1_001, 1), (1_000, 0)] {
        host.run(json!([update(repeat)])).await;
        eventually("it is told", async || probe.status().too_large.len() == troubles).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_compiled_form_is_compiled_again() {
    let host = Setup::probe().start().await;
    host.run(json!([add("count")])).await;
    let dir = host.stop().await;
    let compiled = std::fs::read_dir(dir.path().join("compiled")).unwrap().map(|file| file.unwrap().path());
    for file in compiled.filter(|file| file.extension().is_some_and(|kind| kind == "cwasm")) {
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 64].fill(0xCC);
        std::fs::write(&file, bytes).unwrap();
    }
    let host = Setup::probe().start_in(dir).await;
    assert_eq!(host.run(json!([add("count")])).await, [json!({ "ok": 2 })]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_can_be_replayed_and_dropped() {
    let host = Setup::probe().start().await;
    host.from_peer("probe.in", "no script").await;
    host.from_peer("probe.in", message(json!([]), "reject")).await;
    eventually("both are set aside", async || host.dead_letters().len() == 2).await;
    let letters =
        dim_store::dead_letters::list(&host.host.storage.store, &Default::default(), None, 10).unwrap();
    let (store, commit) = (&host.host.storage.store, &host.host.storage.commit);
    assert!(dim_server::dead_letters::replay(commit, letters[0].0).await.unwrap());
    eventually("it is set aside again", async || host.dead_letters().len() == 2).await;
    let again = dim_store::dead_letters::list(store, &Default::default(), None, 10).unwrap();
    assert!(again.iter().all(|(id, _)| *id != letters[0].0), "it has a new number");
    assert!(dim_server::dead_letters::drop_letter(commit, letters[1].0).await.unwrap());
    assert!(!dim_server::dead_letters::drop_letter(commit, letters[1].0).await.unwrap());
    assert_eq!(host.dead_letters().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_in_python_loads_and_answers() {
    let dir = tempfile::tempdir().unwrap();
    let Some(file) = dim_tests::python::component(dir.path()) else { return };
    // With the limits that every plugin has.
    let section = json!({ "file": file, "limits": { "memory": 256 << 20 } });
    let host = Setup::default().and_probe("in-python", section).start().await;
    let count = async || host.query("in-python", "count", json!({ "topic": "probe.in" })).await;
    eventually("it has started", async || count().await.is_ok()).await;
    for _ in 0..3 {
        host.from_peer("probe.in", "hello").await;
    }
    eventually("it has counted", async || count().await.is_ok_and(|answer| answer["count"] == 3)).await;
    assert_eq!(count().await.unwrap(), json!({ "greeting": "hello from Python", "count": 3 }));
    assert!(host.dead_letters().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timer_that_sets_itself_to_the_past_for_ever_hangs_nobody() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "timer", "key": "again", "at": 0 }])).await;
    eventually("it has fired often", async || {
        host.state_of("probe", "fired").await.as_array().is_some_and(|fired| fired.len() > 20)
    })
    .await;
    // Commands and queries get their turn, and the host can be stopped.
    assert_eq!(
        host.run(json!([{ "do": "clear", "key": "again" }, add("count")])).await[1],
        json!({ "ok": 1 })
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn timers_that_fall_due_together_hold_up_neither_queries_nor_the_end() {
    let host = Setup::default().and_probe("probe", json!({ "limits": { "call-cpu-ms": 100 } })).start().await;
    // Each is stopped twice: forty seconds in all.
    let spin = |number: u64| json!({ "do": "timer", "key": format!("spin{number}"), "at": 1 });
    host.run((0..200).map(spin).collect()).await;
    eventually("the first are set aside", async || !host.dead_letters().is_empty()).await;
    host.query("probe", "calls", json!({})).await.unwrap();
    let begun = std::time::Instant::now();
    let dir = host.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    // Those that fired are done, and the others are still to come.
    let store = dim_store::Store::open(dir.path()).unwrap();
    let snapshot = store.snapshot().unwrap();
    let left = redb::ReadableTableMetadata::len(&snapshot.table(dim_store::TIMERS).unwrap()).unwrap();
    let done = dim_store::dead_letters::count(&store).unwrap();
    assert_eq!(left + done, 200);
    assert!(left > 0, "it was stopped in the middle");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handled_before_a_plugin_cannot_start_again_is_committed() {
    let poisoned = json!({ "config": { "on_start": "[{\"do\":\"fail-if\",\"key\":\"poison\"}]" } });
    let host = Setup::default().and_probe("probe", poisoned).start().await;
    let (set, trap) = (json!({ "do": "set", "key": "poison", "value": "1" }), json!({ "do": "trap" }));
    let set = host.command("probe", "run", script(json!([set])));
    let trap = host.command("probe", "run", script(json!([trap])));
    let (set, trap) = tokio::join!(set, trap);
    assert_eq!(set, Ok(json!([{ "ok": null }])), "its reply does not wait for a start");
    assert!(matches!(trap, Err(ReplyError::Failed(_) | ReplyError::Unavailable(_))), "{trap:?}");
    let probe = &host.plugin("probe").handle;
    eventually("it cannot start", async || probe.status().reason.is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_plugins_queue_does_not_hide_anothers_publishes() {
    let host = Setup::probe().and_probe("other", json!({})).start().await;
    let publish = |n: u64| json!({ "do": "publish", "topic": "probe.out", "data": n.to_string() });
    host.run((0..5_000).map(publish).collect()).await;
    host.command("other", "run", script(json!([publish(0)]))).await.unwrap();
    let waiting = |plugin: &str| {
        host.host.exchange.links.backlog.length(Some(&plugin.parse().unwrap())).load(Ordering::Relaxed)
    };
    let left = std::cell::Cell::new(0);
    eventually("the other's is sent", async || {
        left.set(waiting("probe"));
        waiting("other") == 0
    })
    .await;
    assert!(left.get() > 0, "in its turn, not after all of the first one's");
    eventually("all are sent", async || dim_store::outbox::waiting(&host.host.storage.store).unwrap().0 == 0)
        .await;
    assert_eq!(host.host.exchange.sent.accepted.load(Ordering::Relaxed), 5_001);
}
