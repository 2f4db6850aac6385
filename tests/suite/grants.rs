//! What the operator grants and denies while a host runs: it counts from the next entry on, goes with the plugin's
//! name, and a component that asks for more waits for it.

use dim_model::ident::PluginName;
use dim_server::host::{Grant, GrantChange, Granted, ReplaceError};
use dim_store::change::State;
use dim_store::change_history;
use dim_tests::alone::{proposal, replace};
use dim_tests::component::{probe, probe_with};
use dim_tests::{Program, Setup, TestHost, eventually, script};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A probe that may hear `probe.in` and nothing else.
fn modest() -> Setup {
    Setup::default().and_probe("probe", json!({ "grants": { "subscribe": ["probe.in"] } }))
}

fn name() -> PluginName {
    "probe".parse().unwrap()
}

async fn grant(host: &TestHost, change: Value) -> Result<Granted, ReplaceError> {
    let change: GrantChange = serde_json::from_value(change).unwrap();
    host.host.grant(&name(), change, "the test").await
}

async fn run_one(host: &TestHost, step: Value) -> Value {
    host.run(json!([step])).await.remove(0)
}

fn ok() -> Value {
    json!({ "ok": null })
}

fn add() -> String {
    script(json!([{ "do": "add", "key": "count" }])).to_string()
}

fn states(host: &TestHost) -> Vec<State> {
    let snapshot = host.host.storage.store.snapshot().unwrap();
    change_history::of(&snapshot, &name(), 100).unwrap().iter().map(|change| change.state).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_granted_and_denied_counts_from_the_next_entry_on_and_over_a_restart() {
    let host = modest().start().await;
    let publish = |topic: &str| json!({ "do": "publish", "topic": topic, "data": "x" });
    let refused = |topic: &str| json!({ "error": format!("Error::NotGranted({topic:?})") });
    assert_eq!(run_one(&host, publish("probe.out")).await, refused("probe.out"));
    let granted = grant(&host, json!({ "allow": { "publish": ["probe.*"] } })).await.unwrap();
    assert_eq!(granted.missing, ["write under the key probe-key"]);
    assert_eq!(run_one(&host, publish("probe.out")).await, ok());
    // What is denied counts more than a prefix that is granted.
    grant(&host, json!({ "deny": { "publish": ["probe.secret"] } })).await.unwrap();
    assert_eq!(run_one(&host, publish("probe.secret")).await, refused("probe.secret"));
    assert_eq!(run_one(&host, publish("probe.out")).await, ok());
    let host = modest().start_in(host.stop().await).await;
    assert_eq!(run_one(&host, publish("probe.secret")).await, refused("probe.secret"));
    assert_eq!(run_one(&host, publish("probe.out")).await, ok());
    grant(&host, json!({ "allow": { "publish": ["probe.secret"] } })).await.unwrap();
    assert_eq!(run_one(&host, publish("probe.secret")).await, ok());
    grant(&host, json!({ "reset": true })).await.unwrap();
    assert_eq!(run_one(&host, publish("probe.out")).await, refused("probe.out"));
    assert_eq!(states(&host), [State::GrantsChanged; 4]);
    // Nothing changes, and nothing is put on record.
    grant(&host, json!({ "reset": true })).await.unwrap();
    assert_eq!(states(&host).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_denied_is_heard_no_more_until_it_is_allowed() {
    let host = modest().start().await;
    host.from_peer("probe.in", add()).await;
    eventually("it hears", async || host.state_of("probe", "count").await == 1).await;
    grant(&host, json!({ "deny": { "subscribe": ["probe.*"] } })).await.unwrap();
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!([])]);
    let subscribe = json!({ "do": "subscribe", "topic": "probe.in" });
    assert_eq!(run_one(&host, subscribe).await, json!({ "error": "Error::NotGranted(\"probe.in\")" }));
    // Whoever publishes on it through this host is in the log, and not heard either.
    let publish = dim_store::effect::Publish { topic: "probe.in".parse().unwrap(), data: add().into() };
    host.host.storage.commit.publish(publish, host.host.storage.log.now()).await.unwrap();
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, 1);
    // To allow a part of what is denied as a whole would change nothing.
    let part = grant(&host, json!({ "allow": { "subscribe": ["probe.in"] } })).await.unwrap_err();
    assert!(part.to_string().contains("a wider permission that includes it is denied"), "{part}");
    grant(&host, json!({ "allow": { "subscribe": ["probe.*"] } })).await.unwrap();
    host.settled().await;
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!(["probe.in"])]);
    host.from_peer("probe.in", add()).await;
    eventually("it hears again", async || host.state_of("probe", "count").await == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_and_a_name_are_granted_and_taken_back_while_the_host_runs() {
    let host = modest().start().await;
    let write = || json!({ "do": "update-state", "key": "probe-key", "data": "x" });
    let follow = || json!({ "do": "follow", "name": "probe-other" });
    let not = |what: &str| json!({ "error": format!("Error::NotGranted({what:?})") });
    assert_eq!(run_one(&host, write()).await, not("probe-key"));
    grant(&host, json!({ "allow": { "write": ["probe-key"], "read": ["probe-other"] } })).await.unwrap();
    assert_eq!(run_one(&host, write()).await, ok());
    assert_eq!(run_one(&host, json!({ "do": "get-state", "name": "probe-key" })).await, json!({ "ok": "x" }));
    assert_eq!(run_one(&host, follow()).await, ok());
    grant(&host, json!({ "deny": { "write": ["probe-key"], "read": ["probe-other"] } })).await.unwrap();
    assert_eq!(run_one(&host, write()).await, not("probe-key"));
    assert_eq!(run_one(&host, follow()).await, not("probe-other"));
    host.settled().await;
    assert!(host.host.exchange.links.interest.names().is_empty(), "it is followed no more");
}

/// Grants all that is asked for, also by what waits.
async fn grant_all(host: &TestHost) -> Result<Granted, ReplaceError> {
    let seen = host.host.grants(&name()).unwrap().pending.expect("something waits").digest;
    grant(host, json!({ "all": true, "pending": seen })).await
}

/// The probe as a version that asks for a topic more.
fn curious() -> Vec<u8> {
    probe_with("2.0.0", &[("[\"probe.in\"]", "[\"probe.in\", \"fleet.secrets\"]")])
}

fn version(host: &TestHost) -> String {
    host.plugin("probe").version().version
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_asks_for_more_waits_until_it_is_granted_while_the_old_code_works_on() {
    let setup = Setup::probe();
    let host = setup.start().await;
    let change = replace(&host, curious()).await.unwrap();
    assert_eq!(change.state, State::Pending);
    assert_eq!(change.missing, ["subscribe to fleet.secrets"]);
    assert!(change.reason.unwrap().contains("dim plugin grants probe allow --all"));
    host.from_peer("probe.in", add()).await;
    eventually("the old code works on", async || host.state_of("probe", "count").await == 1).await;
    assert_eq!(version(&host), "0.1.0");
    let host = setup.start_in(host.stop().await).await;
    let pending = host.host.grants(&name()).unwrap().pending.expect("it waits still");
    assert_eq!((pending.version.as_str(), pending.by.as_str()), ("2.0.0", "the test"));
    // Not by something else.
    grant(&host, json!({ "allow": { "publish": ["elsewhere"] } })).await.unwrap();
    assert_eq!(version(&host), "0.1.0");
    // Nor by consent to what runs.
    grant(&host, json!({ "all": true })).await.unwrap();
    assert_eq!(version(&host), "0.1.0");
    let granted = grant_all(&host).await.unwrap();
    assert_eq!(granted.change.unwrap().state, State::OnProbation);
    assert!(granted.pending.is_none());
    assert_eq!(version(&host), "2.0.0");
    host.from_peer("fleet.secrets", add()).await;
    eventually("it hears what it was granted", async || host.state_of("probe", "count").await == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_that_waits_is_given_up_or_runs_without_what_is_denied() {
    let host = Setup::probe().start().await;
    replace(&host, curious()).await.unwrap();
    grant(&host, json!({ "refuse-pending": true })).await.unwrap();
    assert!(host.host.grants(&name()).unwrap().pending.is_none());
    assert_eq!(version(&host), "0.1.0");
    replace(&host, curious()).await.unwrap();
    let granted = grant(&host, json!({ "deny": { "subscribe": ["fleet.secrets"] } })).await.unwrap();
    assert_eq!(granted.change.unwrap().state, State::OnProbation);
    assert_eq!(version(&host), "2.0.0");
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!(["probe.in"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_and_does_not_start_waits_no_more_and_what_is_denied_is_denied_to_old_code_too() {
    let host = Setup::probe().start().await;
    let broken = probe_with(
        "3.0.0",
        &[
            ("[\"probe.in\"]", "[\"probe.in\", \"fleet.secrets\"]"),
            ("default = \"[]\"", "default = '[{\"do\":\"fail\"}]'"),
        ],
    );
    replace(&host, broken).await.unwrap();
    let why = grant_all(&host).await.unwrap_err().to_string();
    assert!(why.contains("told to fail"), "{why}");
    assert!(host.host.grants(&name()).unwrap().pending.is_none());
    assert_eq!(version(&host), "0.1.0");
    // Denied while other code is on probation.
    replace(&host, probe("4.0.0", &json!([]))).await.unwrap();
    grant(&host, json!({ "deny": { "publish": ["probe.out"] } })).await.unwrap();
    host.host.roll_back(&name(), None, "the test").await.unwrap();
    assert_eq!(version(&host), "0.1.0");
    let publish = json!({ "do": "publish", "topic": "probe.out", "data": "x" });
    assert_eq!(run_one(&host, publish).await, json!({ "error": "Error::NotGranted(\"probe.out\")" }));
}

#[tokio::test(flavor = "multi_thread")]
async fn consent_to_what_is_missing_lifts_no_denial() {
    let host = Setup::probe().start().await;
    grant(&host, json!({ "deny": { "publish": ["probe.out"] } })).await.unwrap();
    let change = replace(&host, curious()).await.unwrap();
    assert_eq!(change.missing, ["subscribe to fleet.secrets"], "what was denied is not asked again");
    grant_all(&host).await.unwrap();
    assert_eq!(version(&host), "2.0.0");
    let publish = json!({ "do": "publish", "topic": "probe.out", "data": "x" });
    assert_eq!(run_one(&host, publish).await, json!({ "error": "Error::NotGranted(\"probe.out\")" }));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_on_probation_is_denied_to_the_code_that_comes_back() {
    let host = Setup::probe().start().await;
    host.run(json!([{ "do": "subscribe", "topic": "probe.more" }])).await;
    replace(&host, probe("2.0.0", &json!([]))).await.unwrap();
    grant(&host, json!({ "deny": { "subscribe": ["probe.more"] } })).await.unwrap();
    // It fails by itself.
    host.from_peer("probe.in", script(json!([{ "do": "trap" }])).to_string()).await;
    eventually("the old code is back", async || version(&host) == "0.1.0").await;
    host.settled().await;
    assert_eq!(host.run(json!([{ "do": "topics" }])).await, [json!(["probe.in"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_plugins_have_one_key_only_if_both_are_granted_to_share_it() {
    let own = |share: Value| json!({ "grants": { "write": ["probe-key"], "share": share } });
    let setup = Setup::default().and_probe("probe", own(json!([]))).and_probe("second", own(json!([])));
    let host = setup.start().await;
    let not_loaded = host.host.not_loaded();
    assert_eq!(not_loaded.len(), 1, "one of them has it: {not_loaded:?}");
    let (owner, other) = if not_loaded[0].name == name() { ("second", "probe") } else { ("probe", "second") };
    assert!(not_loaded[0].reason.contains(&format!("the key probe-key is {owner}'s")), "{not_loaded:?}");
    // Whoever had it first has it after a restart, too.
    let host = setup.start_in(host.stop().await).await;
    assert_eq!(host.host.not_loaded()[0].name.as_str(), other);
    let one_sided = Setup::default()
        .and_probe(owner, own(json!(["probe-key"])))
        .and_probe(other, own(json!([])))
        .start_in(host.stop().await)
        .await;
    assert_eq!(one_sided.host.not_loaded().len(), 1, "both must be granted it");
    let both = own(json!(["probe-key"]));
    let shared = Setup::default().and_probe("probe", both.clone()).and_probe("second", both);
    let host = shared.start_in(one_sided.stop().await).await;
    assert_eq!(host.host.not_loaded(), []);
    assert_eq!(run_one(&host, json!({ "do": "key-id", "key": "probe-key" })).await["error"], Value::Null);
    // Nor does a third come to it while the host runs.
    let third = proposal("third", probe("1.0.0", &json!([])));
    let why = host.host.install(third, Grant::AllThatIsAsked).await.unwrap_err();
    assert!(matches!(why, ReplaceError::KeyTaken { .. }), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_default_of_a_limit_is_granted_up_to_the_ceiling() {
    let policy = "limits: { default: { timers: 3 }, ceiling: { timers: 5 } }\n";
    let host = Setup::probe().yaml(policy).start().await;
    let timers = |count: u64| json!({ "do": "timers", "count": count });
    let too_many = |limit: u64| json!({ "error": format!("Error::TooMany({limit})") });
    assert_eq!(run_one(&host, timers(3)).await, ok());
    assert_eq!(run_one(&host, timers(4)).await, too_many(3));
    let wishing = |version: &str, wish: u64| {
        probe_with(version, &[("[topics]", &format!("[limits]\ntimers = {wish}\n\n[topics]"))])
    };
    let change = replace(&host, wishing("2.0.0", 4)).await.unwrap();
    assert_eq!(change.missing, ["have 4 timers"]);
    grant_all(&host).await.unwrap();
    assert_eq!(version(&host), "2.0.0");
    assert_eq!(run_one(&host, timers(4)).await, ok());
    assert_eq!(run_one(&host, timers(5)).await, too_many(4));
    // More than the ceiling is not to be had, whatever is asked for and granted.
    replace(&host, wishing("3.0.0", 1_000)).await.unwrap();
    let granted = grant(&host, json!({ "allow": { "limits": { "timers": 1_000 } } })).await.unwrap();
    assert_eq!(granted.limits.timers, 5);
    assert_eq!(run_one(&host, timers(5)).await, ok());
    assert_eq!(run_one(&host, timers(6)).await, too_many(5));
    // Taken back, the default counts again; what is set already stays.
    grant(&host, json!({ "deny": { "limits": { "timers": 0 } } })).await.unwrap();
    assert_eq!(run_one(&host, json!({ "do": "timer", "key": "new", "in": 1 })).await, too_many(3));
}

#[test]
fn the_command_line_shows_what_is_asked_and_waits_for_a_grant() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, component: Vec<u8>| {
        let path = dir.path().join(name);
        std::fs::write(&path, component).unwrap();
        path.display().to_string()
    };
    let (first, second) = (file("1.wasm", probe("1.0.0", &json!([]))), file("2.wasm", curious()));
    let more = probe_with("3.0.0", &[("[\"probe.in\"]", "[\"probe.in\", \"fleet.plans\"]")]);
    let third = file("3.wasm", more);
    let program = Program::start(PROGRAM.as_ref(), &dir.path().join("state"), &[]);
    let run = |args: &[&str]| program.dim(args);
    let refused = run(&["plugin", "install", &first]);
    assert_eq!(refused.status.code(), Some(5));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        why.contains("publish on probe.out, subscribe to probe.in, write under the key probe-key"),
        "{why}"
    );
    assert!(run(&["plugin", "install", &first, "--grant"]).status.success());
    let waits = run(&["plugin", "install", &second]);
    assert_eq!(waits.status.code(), Some(6));
    let why = String::from_utf8_lossy(&waits.stderr).into_owned();
    assert!(why.contains("it asks to subscribe to fleet.secrets"), "{why}");
    let listed = program.json(&["plugin", "ls"]);
    let listed = listed.as_array().unwrap().iter().find(|plugin| plugin["name"] == "probe").unwrap().clone();
    assert_eq!((&listed["version"], &listed["pending"]["version"]), (&json!("1.0.0"), &json!("2.0.0")));
    let shown = run(&["plugin", "grants", "probe"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for words in ["may      subscribe  probe.in", "waits    2.0.0", "it asks to subscribe to fleet.secrets"] {
        assert!(shown.contains(words), "{words} in {shown}");
    }
    assert_eq!(run(&["plugin", "grants", "probe", "allow"]).status.code(), Some(2), "what?");
    let unknown = run(&["plugin", "grants", "probe", "allow", "--limit", "timer=1"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there are memory, "), "{unknown:?}");
    assert_eq!(unknown.status.code(), Some(5));
    let nobody = run(&["plugin", "grants", "probe", "allow", "--all"]);
    assert_eq!(nobody.status.code(), Some(2), "nobody is asked");
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("--all --yes"), "{nobody:?}");
    let granted = program.json(&["plugin", "grants", "probe", "allow", "--subscribe", "fleet.secrets"]);
    assert_eq!(granted["change"]["state"], "on-probation");
    let denied = program.json(&["plugin", "grants", "probe", "deny", "--write", "probe-key"]);
    assert_eq!(denied["denied"]["write"], json!(["probe-key"]));
    run(&["plugin", "install", &third]);
    let all = program.json(&["plugin", "grants", "probe", "allow", "--all", "--yes"]);
    assert_eq!((&all["change"]["state"], &all["unanswered"]), (&json!("on-probation"), &json!([])));
    assert_eq!(all["missing"], json!(["write under the key probe-key"]), "it stays denied");
    let reset = program.json(&["plugin", "grants", "probe", "reset"]);
    assert_eq!(reset["granted"]["subscribe"], json!([]), "the config says nothing of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_start_keeps_nobodys_key_and_no_place() {
    let host = Setup::default().yaml("limits: { plugins: 1 }\n").start().await;
    let install = async |name: &str, steps: Value| {
        host.host.install(proposal(name, probe("1.0.0", &steps)), Grant::AllThatIsAsked).await
    };
    let refused = install("broken", json!([{ "do": "fail" }])).await.unwrap_err().to_string();
    assert!(refused.contains("told to fail"), "{refused}");
    install("sound", json!([])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_change_hands_in_one_restart() {
    let own = |key: &str| json!({ "grants": { "write": [key] }, "config": { "keys": [key] } });
    let keys = |one: &str, other: &str| {
        Setup::default().and_probe("probe", own(one)).and_probe("second", own(other))
    };
    let writes = |host: &TestHost, plugin: &str| {
        let reach = host.plugin(plugin).handle.code().reach.clone();
        reach.writes().map(ToString::to_string).collect::<Vec<_>>()
    };
    let host = keys("one", "two").start().await;
    let dir = host.stop().await;
    let host = keys("two", "one").start_in(dir).await;
    assert_eq!(host.host.not_loaded(), [], "they swap");
    assert_eq!(
        (writes(&host, "probe"), writes(&host, "second")),
        (vec!["two".to_owned()], vec!["one".to_owned()])
    );
    // One that was disabled meanwhile has lost what another was granted since.
    let alone =
        Setup::default().and_probe("probe", own("two")).and_probe("second", json!({ "disabled": true }));
    let host = alone.start_in(host.stop().await).await;
    let host = keys("one", "two").start_in(host.stop().await).await;
    assert_eq!(host.host.not_loaded(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn consent_is_to_the_component_that_was_seen() {
    let host = Setup::probe().start().await;
    replace(&host, curious()).await.unwrap();
    let seen = host.host.grants(&name()).unwrap().pending.unwrap().digest;
    let other = probe_with("2.1.0", &[("[\"probe.in\"]", "[\"probe.in\", \"fleet.plans\"]")]);
    replace(&host, other).await.unwrap();
    let moved = grant(&host, json!({ "all": true, "pending": seen })).await.unwrap_err();
    assert!(matches!(moved, ReplaceError::Moved(_)), "{moved}");
    assert_eq!(version(&host), "0.1.0");
    let now = host.host.grants(&name()).unwrap().pending.unwrap();
    assert_eq!(now.version, "2.1.0");
    grant(&host, json!({ "all": true, "pending": now.digest })).await.unwrap();
    assert_eq!(version(&host), "2.1.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_already_waits_no_more() {
    let host = Setup::probe().start().await;
    replace(&host, curious()).await.unwrap();
    // Installed with all that it asks for by somebody else.
    host.host.install(proposal("probe", curious()), Grant::AllThatIsAsked).await.unwrap();
    assert!(host.host.grants(&name()).unwrap().pending.is_none());
    assert_eq!(version(&host), "2.0.0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_denied_on_probation_is_denied_to_the_code_that_comes_back() {
    let wishing = |version: &str| probe_with(version, &[("[topics]", "[limits]\ntimers = 4\n\n[topics]")]);
    let host = Setup::probe().yaml("limits: { default: { timers: 3 } }\n").start().await;
    let all = Grant::AllThatIsAsked;
    host.host.install(proposal("probe", wishing("1.0.0")), all).await.unwrap();
    host.host.install(proposal("probe", wishing("2.0.0")), all).await.unwrap();
    assert_eq!(run_one(&host, json!({ "do": "timers", "count": 4 })).await, ok());
    grant(&host, json!({ "deny": { "limits": { "timers": 0 } } })).await.unwrap();
    host.from_peer("probe.in", script(json!([{ "do": "trap" }])).to_string()).await;
    eventually("the old code is back", async || version(&host) == "0.1.0").await;
    let host_limits = host.plugin("probe").handle.code().limits.timers;
    assert_eq!(host_limits, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_plugins_are_loaded_than_there_may_be_by_now() {
    let three = |most: u64| {
        let probes = Setup::probe().and_probe("second", json!({})).and_probe("third", json!({}));
        probes.yaml(&format!("limits: {{ plugins: {most} }}\n"))
    };
    let host = three(3).start().await;
    assert_eq!(host.host.not_loaded(), []);
    let host = three(2).start_in(host.stop().await).await;
    let refused = host.host.not_loaded();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].reason.contains("the host has 2 plugins already"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_already_is_put_on_record_once() {
    let host = Setup::probe().start().await;
    for _ in 0..2 {
        assert_eq!(replace(&host, curious()).await.unwrap().state, State::Pending);
    }
    assert_eq!(states(&host), [State::Pending]);
}
