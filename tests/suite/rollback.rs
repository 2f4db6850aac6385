//! New code is watched, and taken back when it fails: what was before goes on as if the new code had never
//! come.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dim_model::entry::{Kind, Offset};
use dim_server::host::Grant;
use dim_store::change::{Change, State};
use dim_store::change_history;
use dim_tests::alone::{is_as_if_alone, proposal, replace, rows};
use dim_tests::component::{probe, probe_that, probe_with};
use dim_tests::{Kubo, SetClock, Setup, SupervisedHost, TestHost, Witness, downtime, eventually, script};
use serde_json::{Value, json};

/// A host whose probations do not end by themselves.
fn setup() -> Setup {
    Setup::probe().yaml("replacement:\n  probation: { seconds: 600, max_seconds: 600 }\n")
}

/// A host whose probations end after a few events.
fn quick(events: u64) -> Setup {
    let yaml = format!("replacement:\n  probation: {{ seconds: 0, events: {events}, max_seconds: 1 }}\n");
    Setup::probe().yaml(&yaml)
}

fn version(host: &TestHost) -> String {
    host.plugin("probe").version().version
}

/// What has become of the newest change.
fn last(host: &TestHost) -> Change {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    change_history::of(&snapshot, &"probe".parse().unwrap(), 1).unwrap().remove(0)
}

async fn reaches(host: &TestHost, state: State) -> Change {
    eventually(&format!("the change is {state:?}"), async || last(host).state == state).await;
    last(host)
}

fn count(number: u64) -> String {
    let steps = json!([
        { "do": "add", "key": "count" },
        { "do": "set", "key": format!("k{}", number % 7), "value": number.to_string() },
        { "do": "timer", "key": format!("t{}", number % 3), "in": 1_000_000_u64 },
        { "do": "publish", "topic": "probe.out", "data": number.to_string() },
        { "do": "update-state", "key": "probe-key", "data": number.to_string() },
    ]);
    script(steps).to_string()
}

/// Replaces the probe by code that fails, under messages, commands and timers; the end must be that of a run
/// of the same log in which the code never came.
async fn fails_as_if_it_never_came(bad: Vec<u8>, why: &str) {
    let setup = setup();
    let host = setup.start().await;
    let orders = async {
        for number in 0..150 {
            // All are answered, and by the old code in the end.
            let steps =
                json!([{ "do": "add", "key": "orders" }, { "do": "note", "key": "seen", "what": number }]);
            host.run(steps).await;
        }
    };
    let messages = async {
        for number in 0..300 {
            host.from_peer("probe.in", count(number)).await;
            if number == 100 {
                replace(&host, bad.clone()).await.unwrap();
            }
        }
    };
    tokio::join!(orders, messages);
    let received = &host.host.exchange.received.received;
    let all = async || received.load(std::sync::atomic::Ordering::Relaxed) == 300;
    eventually("all messages are in the log", all).await;
    let change = reaches(&host, State::TakenBack).await;
    let reason = change.reason.unwrap();
    assert!(reason.contains(why), "{reason}");
    eventually("the old code runs", async || version(&host) == "0.1.0").await;
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 300);
    assert_eq!(host.state_of("probe", "orders").await, 150);
    assert_eq!(host.dead_letters(), [""; 0]);
    is_as_if_alone(host, &setup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_traps_on_its_third_event_is_taken_back() {
    fails_as_if_it_never_came(probe_that("1.0.0", 3, &json!({ "do": "trap" })), "told to trap").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_loops_is_taken_back() {
    fails_as_if_it_never_came(probe_that("1.0.0", 3, &json!({ "do": "loop" })), "CPU time").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_eats_memory_is_taken_back() {
    let greedy = probe_that("1.0.0", 3, &json!({ "do": "grow", "mib": 100_000 }));
    fails_as_if_it_never_came(greedy, "limit on memory").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_rejects_everything_is_taken_back() {
    let rejects = probe_that("1.0.0", 0, &json!({ "do": "reject" }));
    fails_as_if_it_never_came(rejects, "it rejected ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_failed_code_did_is_undone_and_only_what_it_sent_stays_sent() {
    let host = setup().start().await;
    let name = host.run(json!([{ "do": "key-id", "key": "probe-key" }])).await[0]["ok"].clone();
    host.run(json!([
        { "do": "set", "key": "kept", "value": "old" },
        { "do": "set", "key": "gone", "value": "old" },
        { "do": "timer", "key": "later", "in": 600_000_000_000_u64 },
        { "do": "timer", "key": "never", "in": 600_000_000_000_u64 },
        { "do": "subscribe", "topic": "probe.more" },
        { "do": "follow", "name": "probe-other" },
        { "do": "update-state", "key": "probe-key", "data": "old" },
    ]))
    .await;
    host.from_peer("probe.in", json!({ "then": "retry", "after": 600_000_000_000_u64 }).to_string()).await;
    host.settled().await;
    replace(&host, probe("2.0.0", &json!([{ "do": "set", "key": "started" }]))).await.unwrap();
    host.run(json!([
        { "do": "set", "key": "kept", "value": "new" },
        { "do": "delete", "key": "gone" },
        { "do": "set", "key": "made", "value": "new" },
        { "do": "clear", "key": "never" },
        { "do": "timer", "key": "later", "in": 1_u64 },
        { "do": "timer", "key": "other", "in": 600_000_000_000_u64 },
        { "do": "unsubscribe", "topic": "probe.more" },
        { "do": "subscribe", "topic": "probe.less" },
        { "do": "unfollow", "name": "probe-other" },
        { "do": "update-state", "key": "probe-key", "data": "new" },
        { "do": "update-state", "key": "probe-other", "data": "new" },
    ]))
    .await;
    host.from_peer("probe.in", json!({ "then": "reject" }).to_string()).await;
    host.from_peer("probe.in", json!({ "then": "retry", "after": 600_000_000_000_u64 }).to_string()).await;
    eventually("an event is set aside", async || !host.dead_letters().is_empty()).await;
    let document = async || {
        let steps = script(json!([{ "do": "get-state", "name": name }]));
        host.query("probe", "run", steps).await.unwrap()[0]["ok"].clone()
    };
    assert_eq!(document().await, "new");
    let before = host.host.storage.log.head();
    host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    let change = last(&host);
    assert_eq!(
        (change.state, change.reason.as_deref()),
        (State::RolledBack, Some("rolled back by the test"))
    );
    assert_eq!(version(&host), "0.1.0");
    // The order is handled again, by the old code: what it says is done anew.
    host.settled().await;
    assert_eq!(host.state_of("probe", "started").await, Value::Null);
    assert_eq!(host.state_of("probe", "kept").await, "new");
    assert_eq!(document().await, "new");
    // One letter, set aside again; and one retry, beside the one from before the replacement.
    assert_eq!(host.dead_letters(), ["told to reject"]);
    let log = host.host.storage.store.read_log(Offset(0), usize::MAX).unwrap();
    let code = |entry: &dim_model::entry::Entry| matches!(entry.kind, Kind::Code { voids: Some(_), .. });
    assert!(log.iter().any(|entry| code(entry) && entry.offset >= before));
    let waiting = host.host.storage.store.snapshot().unwrap().table(dim_store::RETRIES).unwrap();
    assert_eq!(redb::ReadableTableMetadata::len(&waiting).unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_code_did_is_undone_where_the_old_code_does_not_do_it_again() {
    let host = setup().start().await;
    host.run(json!([
        { "do": "set", "key": "kept", "value": "old" },
        { "do": "set", "key": "gone", "value": "old" },
        { "do": "timer", "key": "later", "at": 5_000_000_000_000_000_000_u64 },
        { "do": "subscribe", "topic": "probe.more" },
        { "do": "update-state", "key": "probe-key", "data": "old" },
    ]))
    .await;
    host.settled().await;
    let (state, usage) = (
        rows(&host.host.storage.store),
        dim_store::Usage::of(&host.host.storage.store.snapshot().unwrap()).unwrap(),
    );
    let steps = json!([
        { "do": "set", "key": "kept", "value": "new" },
        { "do": "delete", "key": "gone" },
        { "do": "set", "key": "made", "value": "new" },
        { "do": "timer", "key": "later", "at": 6_000_000_000_000_000_000_u64 },
        { "do": "timer", "key": "made", "at": 6_000_000_000_000_000_000_u64 },
        { "do": "unsubscribe", "topic": "probe.more" },
        { "do": "subscribe", "topic": "probe.less" },
        { "do": "follow", "name": "probe-other" },
        { "do": "update-state", "key": "probe-key", "data": "new" },
    ]);
    replace(&host, probe("2.0.0", &steps)).await.unwrap();
    let heard = host.plugin("probe").handle.status();
    assert_eq!(heard.timers, 2);
    let accepted = async |data: &'static str| {
        let path = dim_store::effect::NameValue::document(data.into()).path();
        eventually("the document is published", async || {
            let snapshot = host.host.storage.store.snapshot().unwrap();
            let known = dim_store::names::known(&snapshot, &"probe-key".parse().unwrap()).unwrap().unwrap();
            known.published.is_some_and(|accepted| accepted.path == path)
        })
        .await;
    };
    accepted("new").await;
    // The publisher rests then.
    downtime(Duration::from_millis(500)).await;
    // It is heard while the new code, which does not want it, is on probation.
    host.from_peer("probe.more", script(json!([{ "do": "add", "key": "heard" }])).to_string()).await;
    host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    eventually("the old code handles what came meanwhile", async || {
        host.state_of("probe", "heard").await == 1
    })
    .await;
    host.run(json!([{ "do": "delete", "key": "heard" }])).await;
    host.settled().await;
    assert_eq!(rows(&host.host.storage.store), state);
    let topics = host.query("probe", "run", script(json!([{ "do": "topics" }]))).await.unwrap();
    assert_eq!(topics[0], json!(["probe.in", "probe.more"]));
    assert!(!host.host.exchange.links.interest.topics().contains(&"probe.less".parse().unwrap()));
    let after = dim_store::Usage::of(&host.host.storage.store.snapshot().unwrap()).unwrap();
    assert_eq!((after.state, after.undo), (usage.state, 0));
    let known =
        dim_store::names::known(&host.host.storage.store.snapshot().unwrap(), &"probe-key".parse().unwrap());
    let path = known.unwrap().unwrap().path;
    let old = dim_store::effect::NameValue::document("old".into());
    assert_eq!(path, old.path());
    accepted("old").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_that_proves_itself_is_confirmed_and_can_be_rolled_back_still() {
    let host = quick(10).start().await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    for number in 0..10 {
        host.from_peer("probe.in", count(number)).await;
    }
    reaches(&host, State::Confirmed).await;
    // It failed too late for its probation: a dead letter, as of any code.
    host.from_peer("probe.in", script(json!([{ "do": "trap" }])).to_string()).await;
    eventually("an event is set aside", async || !host.dead_letters().is_empty()).await;
    assert_eq!(version(&host), "1.0.0");
    replace(&host, probe("2.0.0", &json!([]))).await.unwrap();
    for number in 10..20 {
        host.from_peer("probe.in", count(number)).await;
    }
    reaches(&host, State::Confirmed).await;
    let name = "probe".parse().unwrap();
    let why = host.host.roll_back(&name, Some("0.0.1"), "the test").await.unwrap_err().to_string();
    assert!(why.contains("a rollback is possible to 1.0.0, 0.1.0"), "{why}");
    let back = host.host.roll_back(&name, Some("0.1.0"), "the test").await.unwrap();
    assert_eq!((back.before.version.as_str(), back.after.version.as_str()), ("2.0.0", "0.1.0"));
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 20);
    let why = host.host.roll_back(&name, None, "the test").await.unwrap_err().to_string();
    assert_eq!(why, "no earlier version of probe is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn code_to_which_nothing_happens_is_confirmed_unproven() {
    let host = quick(10).start().await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    reaches(&host, State::ConfirmedUnproven).await;
    assert_eq!(version(&host), "1.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn during_a_probation_the_way_back_leads_to_what_was_confirmed_last() {
    let host = setup().start().await;
    host.run(json!([{ "do": "set", "key": "by", "value": "0" }])).await;
    replace(&host, probe("1.0.0", &json!([{ "do": "set", "key": "by", "value": "1" }]))).await.unwrap();
    let steps = json!([{ "do": "set", "key": "by", "value": "2" }]);
    replace(&host, probe_that("2.0.0", 2, &json!({ "do": "trap" }))).await.unwrap();
    host.run(steps.clone()).await;
    // It is answered by the code that goes on.
    host.run(steps).await;
    assert_eq!(version(&host), "0.1.0");
    reaches(&host, State::TakenBack).await;
    let snapshot = host.host.storage.store.snapshot().unwrap();
    let changes = change_history::of(&snapshot, &"probe".parse().unwrap(), 10).unwrap();
    let states: Vec<_> = changes.iter().map(|change| change.state).collect();
    assert_eq!(states, [State::TakenBack, State::Replaced]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probation_goes_on_after_a_restart_and_so_does_the_way_back() {
    let setup = setup();
    let host = setup.start().await;
    host.run(json!([{ "do": "set", "key": "kept", "value": "old" }])).await;
    replace(&host, probe("1.0.0", &json!([{ "do": "set", "key": "kept", "value": "new" }]))).await.unwrap();
    host.run(json!([{ "do": "add", "key": "count" }])).await;
    let dir = host.stop().await;
    let host = setup.start_in(dir).await;
    assert_eq!(version(&host), "1.0.0");
    assert_eq!(host.state_of("probe", "kept").await, "new");
    let trapped = host.command("probe", "run", script(json!([{ "do": "trap" }]))).await;
    assert!(trapped.unwrap_err().to_string().contains("told to trap"));
    let change = reaches(&host, State::TakenBack).await;
    assert!(change.replayed.unwrap() >= 2, "{change:?}");
    assert_eq!(version(&host), "0.1.0");
    assert_eq!(host.state_of("probe", "kept").await, "old");
    assert_eq!(host.state_of("probe", "count").await, 1);
    let dir = host.stop().await;
    // And what goes on stays.
    let host = setup.start_in(dir).await;
    assert_eq!((version(&host).as_str(), host.state_of("probe", "count").await), ("0.1.0", json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_hears_of_each_change_on_a_topic() {
    let host = setup().and_probe("watcher", json!({})).start().await;
    let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut log = host.host.storage.log.follow(None);
    let noted = heard.clone();
    let listening = tokio::spawn(async move {
        loop {
            for entry in log.read().await.unwrap().entries {
                if let Kind::Event(dim_model::entry::Event::Message { topic, data, .. }) = &entry.kind
                    && topic.as_str() == dim_store::change::TOPIC
                {
                    let change: Value = serde_json::from_slice(data).unwrap();
                    noted.lock().unwrap().push(change["state"].as_str().unwrap().to_owned());
                }
            }
        }
    });
    replace(&host, probe_that("1.0.0", 1, &json!({ "do": "trap" }))).await.unwrap();
    replace(&host, b"nonsense".to_vec()).await.unwrap_err();
    host.run(json!([])).await;
    reaches(&host, State::Refused).await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while heard.lock().unwrap().len() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    listening.abort();
    assert_eq!(*heard.lock().unwrap(), ["on-probation", "refused", "taken-back"]);
}

/// The ways back that are kept of the probe.
fn ways_back(host: &TestHost) -> usize {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    let (id, _) = dim_store::plugin_registry::known(&snapshot, &"probe".parse().unwrap()).unwrap().unwrap();
    dim_store::checkpoint::checkpoints(&snapshot, id).unwrap().len()
}

fn undo_bytes(host: &TestHost) -> u64 {
    dim_store::Usage::of(&host.host.storage.store.snapshot().unwrap()).unwrap().undo
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_is_given_up_after_its_time() {
    let yaml = "replacement:\n  probation: { seconds: 0, events: 1, max_seconds: 1 }\n  undo_hours: 0\n";
    let host = Setup::probe().yaml(yaml).start().await;
    host.run(json!([{ "do": "set", "key": "kept", "value": "old" }, { "do": "update-state", "key": "probe-key", "data": "old" }])).await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    host.run(json!([{ "do": "set", "key": "kept", "value": "new" }, { "do": "update-state", "key": "probe-key", "data": "new" }])).await;
    reaches(&host, State::Confirmed).await;
    eventually("it is given up", async || ways_back(&host) == 0).await;
    assert_eq!(undo_bytes(&host), 0);
    let why = host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap_err();
    assert_eq!(why.to_string(), "no earlier version of probe is kept");
    assert_eq!(host.state_of("probe", "kept").await, "new");
}

/// A write of 200 kB, over what was there.
fn write(fill: &str) -> Value {
    let set = |number| json!({ "do": "set", "key": format!("k{number}"), "value": fill, "repeat": 1000 });
    (0..200).map(set).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_to_which_too_much_has_changed_is_given_up_once_the_code_is_confirmed() {
    let yaml = "replacement:\n  probation: { seconds: 3, events: 1, max_seconds: 3 }\n  undo_bytes: 100000\n";
    let host = Setup::probe().yaml(yaml).start().await;
    host.run(write("a")).await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    host.run(write("b")).await;
    // Two looks.
    downtime(Duration::from_millis(2_100)).await;
    assert_eq!(ways_back(&host), 1, "not while it is on probation");
    assert!(undo_bytes(&host) > 100_000);
    reaches(&host, State::Confirmed).await;
    eventually("it is given up", async || (ways_back(&host), undo_bytes(&host)) == (0, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_is_given_up_where_there_is_no_room_and_ends_the_probation() {
    let yaml =
        "store: { max_bytes: 440000 }\nreplacement:\n  probation: { seconds: 600, max_seconds: 600 }\n";
    let host = Setup::probe().yaml(yaml).start().await;
    host.run(write("a")).await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    assert_eq!(ways_back(&host), 1);
    let _ = host.command("probe", "run", script(write("b"))).await;
    let change = reaches(&host, State::ConfirmedUnproven).await;
    let reason = change.reason.unwrap();
    assert!(reason.contains("no room"), "{reason}");
    eventually("it is given up", async || (ways_back(&host), undo_bytes(&host)) == (0, 0)).await;
    // What fails now is a failure like any other; what is installed next can be taken back.
    eventually("there is room again", async || host.host.storage.disk.check().is_ok()).await;
    assert!(host.command("probe", "run", script(json!([{ "do": "trap" }]))).await.is_err());
    assert_eq!(version(&host), "1.0.0");
    replace(&host, probe_that("2.0.0", 1, &json!({ "do": "trap" }))).await.unwrap();
    host.run(json!([])).await;
    assert_eq!(version(&host), "1.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_versions_that_come_in_quick_succession_the_last_one_runs() {
    let host = setup().start().await;
    let (one, two) = (probe("1.0.0", &json!([])), probe("2.0.0", &json!([])));
    replace(&host, one.clone()).await.unwrap();
    for _ in 0..10 {
        // Both are under way at once; the second one runs already when it comes.
        let (first, second) = tokio::join!(replace(&host, two.clone()), async {
            tokio::task::yield_now().await;
            replace(&host, one.clone()).await
        });
        first.unwrap();
        second.unwrap();
        assert_eq!(version(&host), "1.0.0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_plugin_is_on_probation_no_more_and_keeps_no_log() {
    let host = setup().start().await;
    let name: dim_model::ident::PluginName = "probe".parse().unwrap();
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    host.run(json!([{ "do": "add", "key": "count" }])).await;
    host.host.remove(&name, false, "the test").await.unwrap();
    let snapshot = host.host.storage.store.snapshot().unwrap();
    assert!(dim_store::checkpoint::on_probation(&snapshot).unwrap().is_empty());
    // It comes again, with its state, and what fails then is taken back.
    let component = probe("1.0.0", &json!([]));
    host.host.install(proposal("probe", component), Grant::AsBefore).await.unwrap();
    host.from_peer("probe.in", script(json!([{ "do": "add", "key": "count" }])).to_string()).await;
    eventually("it hears again", async || host.state_of("probe", "count").await == 2).await;
    replace(&host, probe_that("2.0.0", 1, &json!({ "do": "trap" }))).await.unwrap();
    host.run(json!([])).await;
    assert_eq!((version(&host).as_str(), host.state_of("probe", "count").await), ("1.0.0", json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_kept_for_code_on_probation_and_a_way_back_ends_with_the_log() {
    let yaml = "store: { log: { max_bytes: 20000 } }\nreplacement:\n  probation: { seconds: 0, events: 400, max_seconds: 600 }\n";
    let host = Setup::probe().yaml(yaml).start().await;
    host.from_peer("probe.in", count(0)).await;
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    let first = host.host.storage.log.head();
    for number in 0..300 {
        host.from_peer("probe.in", count(number)).await;
    }
    host.settled().await;
    // Two rounds of trimming.
    downtime(Duration::from_secs(3)).await;
    assert!(
        host.host.storage.store.log_start().unwrap().unwrap() <= first,
        "what may be handled again is there"
    );
    for number in 0..150 {
        host.from_peer("probe.in", count(number)).await;
    }
    reaches(&host, State::Confirmed).await;
    eventually("the log is trimmed", async || host.host.storage.store.log_start().unwrap().unwrap() > first)
        .await;
    eventually("and the way back ends", async || ways_back(&host) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_of_the_old_code_alone_end_with_the_probation_and_come_back_with_it() {
    let host = quick(3).start().await;
    let topics =
        || host.host.exchange.links.interest.topics().iter().map(ToString::to_string).collect::<Vec<_>>();
    let proven = async || {
        let listening_records = host.host.exchange.links.listening_records.all();
        listening_records.values().any(|hearing| hearing.proven_until.is_some())
    };
    eventually("listening is proven", proven).await;
    host.from_peer("probe.in", count(0)).await;
    host.settled().await;
    // What both want is left as it is: the plugin has ended one of them itself.
    let both =
        probe_with("1.0.0", &[("default = [\"probe.in\"]", "default = [\"probe.in\", \"probe.both\"]")]);
    replace(&host, both).await.unwrap();
    host.run(json!([{ "do": "unsubscribe", "topic": "probe.both" }, { "do": "add", "key": "count" }])).await;
    host.run(json!([])).await;
    host.run(json!([])).await;
    reaches(&host, State::Confirmed).await;
    let moved =
        probe_with("2.0.0", &[("default = [\"probe.in\"]", "default = [\"probe.both\", \"probe.else\"]")]);
    replace(&host, moved).await.unwrap();
    // The code before it may have to handle what comes now.
    host.from_peer("probe.in", count(1)).await;
    host.settled().await;
    assert_eq!(topics(), ["probe.else", "probe.in"]);
    assert_eq!(host.state_of("probe", "count").await, 2, "the new code does not hear it");
    for _ in 0..3 {
        host.run(json!([])).await;
    }
    reaches(&host, State::Confirmed).await;
    eventually("the topic of the old code is let go", async || topics() == ["probe.else"]).await;
    host.listening(&"probe.else".parse().unwrap()).await;
    // An operator goes back all the same: what was not heard meanwhile is a gap.
    host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 3, "what came on probation is handled");
    eventually("it is heard again", async || topics() == ["probe.in"]).await;
    let gap = async || host.state_of("probe", "gaps").await[0]["topic"] == "probe.in";
    eventually("the gap is told", gap).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_on_probation_that_cannot_be_loaded_after_a_restart_is_taken_back() {
    let setup = setup();
    let host = setup.start().await;
    host.from_peer("probe.in", count(0)).await;
    let new = probe("2.0.0", &json!([{ "do": "set", "key": "started" }]));
    let digest = dim_model::ident::Digest::of(&new).to_string();
    replace(&host, new).await.unwrap();
    host.from_peer("probe.in", count(1)).await;
    eventually("both are counted", async || host.state_of("probe", "count").await == 2).await;
    let dir = host.stop().await;
    std::fs::write(dir.path().join("components").join(&digest).with_extension("wasm"), b"damaged").unwrap();
    let host = setup.start_in(dir).await;
    let change = reaches(&host, State::TakenBack).await;
    let reason = change.reason.unwrap();
    assert!(reason.contains("cannot read the component"), "{reason}");
    eventually("the old code runs", async || version(&host) == "0.1.0").await;
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 2);
    assert_eq!(host.state_of("probe", "started").await, Value::Null);
    assert_eq!(host.host.not_loaded(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_code_could_not_send_while_the_daemon_was_away_is_never_sent() {
    let Some(kubo) = Kubo::start() else { return };
    let host = setup().on_kubo(kubo.api()).start().await;
    host.listening(&"probe.in".parse().unwrap()).await;
    let witness = Witness::of(&kubo, "probe.out").await;
    let seen = || {
        let seen = witness.seen();
        seen.iter().map(|data| String::from_utf8_lossy(data).into_owned()).collect::<BTreeSet<_>>()
    };
    let tell = |what: &str| {
        json!([
            { "do": "publish", "topic": "probe.out", "data": what },
            { "do": "update-state", "key": "probe-key", "data": what },
        ])
    };
    let published = async || {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        let known = dim_store::names::known(&snapshot, &"probe-key".parse().unwrap()).unwrap()?;
        Some(known.published?.path)
    };
    let path = |data: &'static str| Some(dim_store::effect::NameValue::document(data.into()).path());
    host.run(tell("old")).await;
    eventually("it is sent and published", async || {
        seen().contains("old") && published().await == path("old")
    })
    .await;
    kubo.freeze();
    // This one is on its way when the daemon freezes: it may arrive.
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "stuck" }])).await;
    downtime(Duration::from_millis(500)).await;
    replace(&host, probe("2.0.0", &tell("new"))).await.unwrap();
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "order" }])).await;
    host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    assert_eq!(version(&host), "0.1.0", "the daemon is not needed for it");
    host.settled().await;
    kubo.thaw();
    let all = ["old", "order", "stuck"].map(str::to_owned).into();
    eventually("what the old code said is sent", async || seen().is_superset(&all)).await;
    host.run(json!([{ "do": "publish", "topic": "probe.out", "data": "last" }])).await;
    eventually("what comes after it is sent", async || seen().contains("last")).await;
    assert!(!seen().contains("new"), "{:?}", seen());
    eventually("the old document is published", async || published().await == path("old")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn time_in_which_a_plugin_is_paused_or_the_host_is_down_is_no_probation() {
    let setup = Setup::probe().yaml("replacement:\n  probation: { time: 0s, max_time: 10m }\n");
    let clock = SetClock::default();
    let setup = setup.by_clock(clock.clone());
    let twenty_minutes = || clock.pass(Duration::from_secs(1_200));
    let host = setup.start().await;
    let name = "probe".parse().unwrap();
    replace(&host, probe_that("2.0.0", 100, &json!({ "do": "trap" }))).await.unwrap();
    host.host.pause(&name, true, "the test").await.unwrap();
    twenty_minutes();
    let dir = host.stop().await;
    twenty_minutes();
    let host = setup.start_in(dir).await;
    twenty_minutes();
    for number in 0..200 {
        host.from_peer("probe.in", count(number)).await;
    }
    host.host.pause(&name, false, "the test").await.unwrap();
    let change_of = |state| {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        change_history::of(&snapshot, &name, 10).unwrap().into_iter().any(|change| change.state == state)
    };
    eventually("it is taken back", async || change_of(State::TakenBack)).await;
    eventually("the old code runs", async || version(&host) == "0.1.0").await;
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_installed_anew_and_rolled_back_is_on_record_as_that() {
    let host = quick(1).start().await;
    let name: dim_model::ident::PluginName = "probe".parse().unwrap();
    replace(&host, probe("1.0.0", &json!([]))).await.unwrap();
    host.run(json!([])).await;
    reaches(&host, State::Confirmed).await;
    host.host.remove(&name, false, "the test").await.unwrap();
    let third = proposal("probe", probe("3.0.0", &json!([])));
    host.host.install(third, Grant::AsBefore).await.unwrap();
    host.host.roll_back(&name, None, "the test").await.unwrap();
    assert_eq!(version(&host), "0.1.0");
    let change = last(&host);
    let versions = [change.before, change.after].map(|version| version.unwrap().version);
    assert_eq!((change.state, versions), (State::RolledBack, ["0.1.0".to_owned(), "3.0.0".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_takeback_is_shown_until_there_is_a_newer_change() {
    let host = SupervisedHost::start(&quick(2)).await;
    let (url, client) = (host.serve().await, dim_tests::with_token());
    let get = async |path: &str| {
        let answer =
            client.get(format!("{url}{path}")).header("accept", "application/json").send().await.unwrap();
        answer.json::<serde_json::Value>().await.unwrap()
    };
    let taken_back = async || {
        let plugins = get("/v1/plugins").await;
        let probe = plugins.as_array().unwrap().iter().find(|plugin| plugin["name"] == "probe").unwrap();
        probe["taken_back"]["after"]["version"].clone()
    };
    let well = json!({ "healthy": true, "troubles": [] });
    host.works("probe").await;
    eventually("all is well", async || get("/healthz").await == well).await;
    let replace = async |component: Vec<u8>| host.host().unwrap().replace(proposal("probe", component)).await;
    replace(probe_that("2.0.0", 1, &json!({ "do": "trap" }))).await.unwrap();
    let _ = host.try_run("probe", json!([])).await;
    eventually("it is taken back", async || taken_back().await == "2.0.0").await;
    let health = get("/healthz").await;
    let trouble = &health["troubles"][0];
    assert_eq!((&trouble["code"], &trouble["severity"]), (&json!("plugin-taken-back"), &json!("warning")));
    assert_eq!((&trouble["subject"], &health["healthy"]), (&json!("probe"), &json!(true)));
    let message = trouble["message"].as_str().unwrap();
    assert!(
        message.starts_with("version 2.0.0 of plugin probe was rolled back, and 0.1.0 runs again: "),
        "{message}"
    );
    let acknowledged = client.post(format!("{url}/v1/status/acknowledge")).send().await.unwrap();
    assert!(acknowledged.status().is_success());
    assert_eq!(get("/healthz").await, well, "the operator has seen it");
    assert_eq!(taken_back().await, "2.0.0");
    replace(probe("3.0.0", &json!([]))).await.unwrap();
    eventually("there is a newer change", async || taken_back().await.is_null()).await;
    eventually("all is well again", async || get("/healthz").await == well).await;
    host.stop().await;
}
