//! Each limit, at the limit and one past it; and the table of the documentation, which names them all.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use dim_server::host::Grant;
use dim_store::batch::ReplyError;
use dim_store::plugin_limits::{LIMITS, LimitPolicy};
use dim_tests::alone::proposal;
use dim_tests::component::{probe, probe_with, with_core_instances, with_manifest};
use dim_tests::{Program, Setup, TestHost, eventually, script};
use serde_json::{Value, json};

use crate::documentation::{quoted, rows};

async fn limited(limits: Value) -> TestHost {
    Setup::default().and_probe("probe", json!({ "limits": limits })).start().await
}

async fn run_one(host: &TestHost, step: Value) -> Value {
    host.run(json!([step])).await.remove(0)
}

/// Why the probe traps at a step.
async fn trap(host: &TestHost, step: Value) -> String {
    match host.command("probe", "run", script(json!([step]))).await {
        Err(ReplyError::Failed(why)) => why,
        other => panic!("it does not trap: {other:?}"),
    }
}

fn publish(bytes: usize) -> Value {
    json!({ "do": "publish", "topic": "probe.out", "data": "x", "repeat": bytes })
}

fn ok() -> Value {
    json!({ "ok": null })
}

fn exceeded(limit: &str) -> Value {
    json!({ "error": format!("Error::LimitExceeded({limit:?})") })
}

/// How often the probe has met a limit, as the operator sees it.
async fn met(host: &TestHost, limit: &str, times: u64) {
    let met = || host.plugin("probe").handle.status().met.get(limit).copied().unwrap_or_default();
    eventually(&format!("{limit} was met {times} times"), async || met() == times).await;
}

/// A component that takes seconds to compile, and means nothing.
fn laborious() -> Vec<u8> {
    let sum = "(local.set 0 (i64.add (i64.mul (local.get 0) (i64.const 3)) (i64.rotl (local.get 0) (local.get 0))))";
    let function = format!("(func (param i64) (result i64) {} (local.get 0))", sum.repeat(2_000));
    let text = format!("(component (core module {}))", function.repeat(400));
    with_manifest(
        &wat::parse_str(text).unwrap(),
        "name = \"laborious\"\nversion = \"1.0.0\"\nstate-version = 1\n",
    )
}

#[test]
fn compiling_is_limited_in_cpu_time_and_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("laborious.wasm");
    std::fs::write(&file, laborious()).unwrap();
    let (program, file) = (Path::new(env!("CARGO_BIN_EXE_dim-under-test")), file.to_str().unwrap());
    let why = |limits: Value| {
        let state = tempfile::tempdir_in(dir.path()).unwrap();
        let config = state.path().join("config.yaml");
        // Only what is installed is compiled.
        let disabled = json!({ "disabled": true });
        let plugins = json!({
            "job-tracker": disabled, "node-registry": disabled, "heartbeat-watchdog": disabled,
        });
        std::fs::write(&config, json!({ "limits": limits, "plugins": plugins }).to_string()).unwrap();
        let host = Program::start(program, state.path(), &["--config", config.to_str().unwrap()]);
        let refused = host.dim(&["plugin", "install", file, "--grant"]);
        assert_eq!(refused.status.code(), Some(5));
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(host.dim(&["status"]).status.success(), "the host is not hurt");
        why
    };
    let time = why(json!({ "compile-seconds": 1 }));
    assert!(time.contains("more than 1 s of CPU time (limits.compile-time)"), "{time}");
    let memory = why(json!({ "compile-memory": 64 << 20 }));
    assert!(memory.contains("bytes of memory (limits.compile-memory)"), "{memory}");
    // Within them it compiles, and is refused for what it is.
    let fits = why(json!({}));
    assert!(fits.contains("does not fit the world"), "{fits}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_host_functions_are_limited() {
    let host = limited(json!({ "host-calls": 10 })).await;
    assert_eq!(run_one(&host, json!({ "do": "read", "times": 10 })).await, 10);
    let why = trap(&host, json!({ "do": "read", "times": 11 })).await;
    assert!(why.contains("more than 10 calls of host functions"), "{why}");
    assert_eq!(run_one(&host, json!({ "do": "read", "times": 10 })).await, 10, "each call begins anew");
    met(&host, "host-calls", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_over_the_border_is_judged_before_it_is_copied() {
    let host = limited(json!({ "border-bytes": 10_000, "message-bytes": 1_000 })).await;
    let too_large = json!({ "error": "Error::TooLarge(1000)" });
    let fits = 10_000 - "probe.out".len();
    assert_eq!(run_one(&host, publish(fits)).await, too_large, "copied, and too large for a message");
    let why = trap(&host, publish(fits + 1)).await;
    assert!(why.contains("more than 10000 bytes went over the plugin's border"), "{why}");
    met(&host, "border-bytes", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_limited() {
    let host = limited(json!({ "message-bytes": 100 })).await;
    assert_eq!(run_one(&host, publish(100)).await, ok());
    assert_eq!(run_one(&host, publish(101)).await, json!({ "error": "Error::TooLarge(100)" }));
    met(&host, "message-bytes", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_of_an_entry_are_limited_by_number_and_bytes() {
    let host = limited(json!({ "publishes": 3, "publish-bytes": 100 })).await;
    let answers = host.run(json!([publish(1), publish(1), publish(1), publish(1)])).await;
    assert_eq!(answers, [ok(), ok(), ok(), exceeded("publishes")]);
    let answers = host.run(json!([publish(60), publish(41), publish(40), publish(1)])).await;
    let past = exceeded("publish-bytes");
    assert_eq!(answers, [ok(), past.clone(), ok(), past]);
    met(&host, "publishes", 1).await;
    met(&host, "publish-bytes", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_a_second_are_limited_by_number_and_bytes() {
    let host = limited(json!({ "publishes-per-second": 1 })).await;
    let answers = host.run((0..11).map(|_| publish(1)).collect()).await;
    assert_eq!(answers[9], ok(), "ten at once are a burst");
    assert_eq!(answers[10], exceeded("publishes-per-second"));
    eventually("a second later there is room for one", async || run_one(&host, publish(1)).await == ok())
        .await;
    let host = limited(json!({ "publish-bytes-per-second": 10 })).await;
    let answers = host.run(json!([publish(60), publish(41), publish(40)])).await;
    assert_eq!(answers, [ok(), exceeded("publish-bytes-per-second"), ok()]);
    met(&host, "publish-bytes-per-second", 1).await;
}

#[test]
fn a_component_of_components_that_multiply_is_refused_before_it_is_compiled() {
    let manifest = "name = \"bomb\"\nversion = \"1.0.0\"\nstate-version = 1\n";
    let judged = |text: &str| dim_runtime::inspect(&with_manifest(&wat::parse_str(text).unwrap(), manifest));
    let twice = "(core module $m) (core instance (instantiate $m)) (core instance (instantiate $m))";
    judged(&format!("(component (component $c {twice}) (instance (instantiate $c)))")).unwrap();
    let nested = |most: usize, instance: &str| {
        let mut text = format!("(component $c0 {twice})");
        for depth in 1..=12 {
            let instances = instance.replace('N', &(depth - 1).to_string()).repeat(most);
            text = format!("(component $c{depth} {text} {instances})");
        }
        judged(&text).map_err(|error| error.to_string())
    };
    let direct = "(instance (instantiate $cN))";
    assert!(nested(1, direct).is_ok());
    let aliased = "(component (alias outer 1 $cN (component $d)) (instance (instantiate $d)) (instance (instantiate $d)))";
    for why in [nested(30, direct).unwrap_err(), nested(60, direct).unwrap_err()] {
        assert!(why.contains("1000 are the limit"), "{why}");
    }
    assert!(nested(1, aliased).is_ok(), "a component that nobody instantiates makes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_a_second_are_limited_by_bytes() {
    let host = limited(json!({ "document-bytes-per-second": 10 })).await;
    let document =
        |bytes: usize| json!({ "do": "update-state", "key": "probe-key", "data": "x".repeat(bytes) });
    let limit = "document-bytes-per-second";
    assert_eq!(
        host.run(json!([document(60), document(41), document(40)])).await,
        [ok(), exceeded(limit), ok()]
    );
    met(&host, limit, 1).await;
    eventually("a second later there is room for ten", async || run_one(&host, document(10)).await == ok())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_for_which_the_rate_leaves_no_room_is_published_later() {
    let limits = json!({ "document-bytes-per-second": 60 });
    let config = json!({ "publish_every_ms": 1 });
    let setup = Setup::bundled()
        .yaml(&format!("plugins:\n  node-registry: {}\n", json!({ "config": config, "limits": limits })));
    let host = setup.start().await;
    let registered = |node: &str| json!({ "node_id": node, "status": "online" }).to_string();
    let met = || host.plugin("node-registry").handle.status().met.contains_key("document-bytes-per-second");
    eventually("the limit is met", async || {
        host.from_peer("dim.nodes.heartbeat", registered("n1")).await;
        met()
    })
    .await;
    host.from_peer("dim.nodes.heartbeat", registered("the-last")).await;
    let key = "dim-state-key".parse().unwrap();
    eventually("the document shows all", async || {
        let snapshot = host.host.storage.store.snapshot().unwrap();
        let known = dim_store::names::known(&snapshot, &key).unwrap();
        let document = known.and_then(|known| dim_store::documents::get(&snapshot, &known.path).unwrap());
        document.is_some_and(|document| String::from_utf8_lossy(&document).contains("the-last"))
    })
    .await;
    assert_eq!(host.dead_letters(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_handled_again_after_a_rollback_has_the_rate_of_its_time() {
    let host = limited(json!({ "publishes-per-second": 1 })).await;
    dim_tests::alone::replace(&host, probe("2.0.0", &json!([]))).await.unwrap();
    // All that a burst allows.
    let publishing = script(vec![publish(1); 10].into());
    host.from_peer("probe.in", publishing.to_string()).await;
    let published = || host.plugin("probe").handle.status().effects.publishes;
    eventually("it has published", async || published() == 10).await;
    host.host.roll_back(&"probe".parse().unwrap(), None, "the test").await.unwrap();
    eventually("it has published again", async || published() == 20).await;
    assert!(host.plugin("probe").handle.status().met.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_publishes_are_limited() {
    // Nothing is sent as long as there is no daemon.
    let setup = Setup::default().and_probe("probe", json!({ "limits": { "outbox": 3 } }));
    let host = setup.on_kubo("/ip4/127.0.0.1/tcp/9").start().await;
    let answers = host.run(json!([publish(1), publish(1), publish(1), publish(1)])).await;
    assert_eq!(answers, [ok(), ok(), ok(), exceeded("outbox")]);
    assert_eq!(run_one(&host, publish(1)).await, exceeded("outbox"), "they wait still");
    met(&host, "outbox", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_a_second_are_limited_and_dead_letters_have_them() {
    let host = limited(json!({ "log-lines-per-second": 1 })).await;
    let mut lines = host.host.lines().follow(None);
    let mut logs = script(json!([{ "do": "log", "line": "x", "times": 12 }]));
    logs["then"] = json!("reject");
    host.from_peer("probe.in", logs.to_string()).await;
    met(&host, "log-lines-per-second", 2).await;
    eventually("it is set aside", async || host.dead_letters().len() == 1).await;
    let told = lines.read().await.items.iter().filter(|(_, line)| line.text == "x").count();
    assert_eq!(told, 10, "ten at once are a burst");
    let letters =
        dim_store::dead_letters::list(&host.host.storage.store, &Default::default(), None, 1).unwrap();
    assert_eq!(letters[0].1.log.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_limited_for_all_memories_together() {
    let host = limited(json!({ "memory": 32 << 20 })).await;
    assert_eq!(run_one(&host, json!({ "do": "grow", "mib": 16 })).await, 16);
    let why = trap(&host, json!({ "do": "grow", "mib": 32 })).await;
    assert!(why.contains("the limit on memory, 33554432 bytes, was met"), "{why}");
    met(&host, "memory", 1).await;
    assert!(host.plugin("probe").handle.status().memory < 32 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_time_is_limited_for_calls_questions_and_starts() {
    let host = limited(json!({ "call-cpu-ms": 200 })).await;
    assert_eq!(run_one(&host, json!({ "do": "burn", "steps": 1_000 })).await, Value::Null);
    let why = trap(&host, json!({ "do": "loop" })).await;
    assert!(why.contains("more than 200ms of CPU time"), "{why}");
    let asked = host.query("probe", "run", script(json!([{ "do": "loop" }]))).await;
    assert!(matches!(&asked, Err(ReplyError::Failed(why)) if why.contains("CPU time")), "{asked:?}");
    met(&host, "call-cpu-ms", 2).await;
    let start = json!({
        "limits": { "start-cpu-ms": 100 }, "config": { "on_start": "[{\"do\":\"loop\"}]" },
    });
    let host = Setup::default().and_probe("probe", start).start().await;
    met(&host, "start-cpu-ms", 1).await;
    let reason = host.plugin("probe").handle.status().reason.unwrap_or_default();
    assert!(reason.contains("more than 100ms of CPU time"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_ask_without_end_leave_half_of_the_time_to_orders() {
    let host = limited(json!({})).await;
    let asked = Cell::new(0);
    // Long enough for the other callers to ask again meanwhile.
    let ask = async || {
        loop {
            let burn = script(json!([{ "do": "burn", "steps": 3_000_000 }]));
            host.query("probe", "run", burn).await.unwrap();
            asked.set(asked.get() + 1);
        }
    };
    let order = async {
        for number in 1..=20 {
            assert_eq!(run_one(&host, json!({ "do": "add", "key": "n" })).await, json!({ "ok": number }));
        }
    };
    tokio::select! {
        () = ask() => {}
        () = ask() => {}
        () = ask() => {}
        done = tokio::time::timeout(Duration::from_secs(60), order) => done.expect("orders are carried out"),
    }
    assert!(asked.get() > 3, "questions are answered, too: {}", asked.get());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_is_counted_and_told() {
    let host = Setup::default().and_probe("probe", json!({ "grants": {} })).start().await;
    run_one(&host, json!({ "do": "publish", "topic": "fleet.orders", "data": "x" })).await;
    met(&host, "grants", 1).await;
    assert_eq!(host.plugin("probe").handle.status().last_denied.as_deref(), Some("fleet.orders"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_plugins_and_the_size_of_a_component_are_limited() {
    let component = probe("2.0.0", &json!([]));
    let policy = format!("limits: {{ plugins: 2, component-bytes: {} }}\n", component.len());
    let host = Setup::probe().yaml(&policy).start().await;
    let install = async |name: &str, component: Vec<u8>| {
        host.host.install(proposal(name, component), Grant::AllThatIsAsked).await
    };
    let own_key = |name: &str| probe_with("2.0.0", &[("probe-key", name)]);
    let larger = own_key("a-key-with-a-longer-name");
    assert!(larger.len() > component.len());
    let why = install("second", larger).await.unwrap_err().to_string();
    assert!(why.contains("limits.component-bytes"), "{why}");
    install("second", own_key("key")).await.unwrap();
    let why = install("third", own_key("k3")).await.unwrap_err().to_string();
    assert!(why.contains("the host has 2 plugins already"), "{why}");
    host.host.remove(&"second".parse().unwrap(), false, "the test").await.unwrap();
    install("third", own_key("k3")).await.unwrap();
}

/// A component of so many core instances, memories of a page and tables, with the probe's manifest.
fn crowd(instances: usize, memories: usize) -> Vec<u8> {
    let memory =
        "(core module $m (memory 1))".to_owned() + &"(core instance (instantiate $m))".repeat(memories);
    let empty =
        "(core module $e)".to_owned() + &"(core instance (instantiate $e))".repeat(instances - memories);
    let component = wat::parse_str(format!("(component {memory}{empty})")).unwrap();
    with_manifest(&component, include_str!("../guests/examples/probe.toml"))
}

#[tokio::test(flavor = "multi_thread")]
async fn core_instances_and_memories_of_a_component_are_limited() {
    let host = Setup::default().start().await;
    let why = async |component: Vec<u8>| {
        host.host.install(proposal("crowd", component), Grant::AllThatIsAsked).await.unwrap_err().to_string()
    };
    // What is within the limits lacks what a plugin exports.
    for (component, expected) in [
        (crowd(100, 4), "does not fit the world"),
        (crowd(101, 4), "101 core module instances"),
        (crowd(100, 5), "5 Wasm linear memories"),
    ] {
        let why = why(component).await;
        assert!(why.contains(expected), "{expected}: {why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_for_which_there_is_no_instance_left_waits_for_one_and_is_not_quarantined() {
    // 4,000 core instances are there, for all of them.
    let host = Setup::default().yaml("limits: { plugins: 60, default: { restarts: 1 } }\n").start().await;
    let crowded = with_core_instances(&probe_with("2.0.0", &[("[\"probe-key\"]", "[]")]), 90);
    let name = |number: usize| format!("crowd-{number}");
    let install = async |number: usize| {
        host.host.install(proposal(&name(number), crowded.clone()), Grant::AllThatIsAsked).await
    };
    let mut there = 0;
    let why = loop {
        match install(there).await {
            Ok(_) => there += 1,
            Err(error) => break error.to_string(),
        }
        assert!(there < 50, "there is room without end");
    };
    assert!(why.contains("there is no space for another instance"), "{why}");
    assert!(there > 30, "{there}");
    // One that traps has an instance no more, and another may have taken its place.
    let trap = json!({ "script": [{ "do": "trap" }] }).to_string();
    for number in 0..there {
        let _ = host.plugin(&name(number)).handle.command("run".to_owned(), trap.clone()).await;
    }
    for number in 0..there {
        eventually("each has an instance", async || {
            host.host
                .plugins
                .get(name(number).as_str())
                .is_some_and(|it| it.handle.status().state == "running")
        })
        .await;
    }
    host.host.remove(&name(0).parse().unwrap(), false, "the test").await.unwrap();
    eventually("there is room for another", async || install(there).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_questions_wait_at_a_plugin_and_one_more_is_refused() {
    let host = Setup::probe().start().await;
    // It loops for a second, and answers nobody meanwhile.
    host.from_peer("probe.in", script(json!([{ "do": "loop" }])).to_string()).await;
    dim_tests::downtime(std::time::Duration::from_millis(200)).await;
    let handle = &host.plugin("probe").handle;
    let nothing = script(json!([])).to_string();
    let questions = (0..1_025).map(|_| handle.query("run".to_owned(), nothing.clone()));
    let answers = futures::future::join_all(questions).await;
    let refused: Vec<_> = answers.iter().filter(|answer| answer.is_err()).collect();
    assert_eq!(refused, [&Err(ReplyError::Unavailable("1024 queries are waiting".to_owned()))]);
}

const LIMITS_PAGE: &str = include_str!("../../docs/limits.md");

#[test]
fn the_documentation_names_each_limit_with_its_default_and_its_ceiling() {
    let number = |cell: &str| cell.replace(',', "").parse::<u64>().ok();
    let (of_plugins, of_the_host) = LIMITS_PAGE.split_once("These limits apply to the host").unwrap();
    let documented: BTreeSet<_> = rows(of_plugins)
        .into_iter()
        .filter_map(|cells| {
            let name = quoted(&cells[0]).next()?.to_owned();
            Some((name, number(&cells[1])?, number(&cells[2])?))
        })
        .collect();
    let limits = LIMITS.iter().map(|limit| (limit.name.to_owned(), limit.default, limit.ceiling));
    assert_eq!(documented, limits.collect());
    let documented: Vec<_> = rows(of_the_host)
        .into_iter()
        .filter_map(|cells| Some((quoted(&cells[0]).next()?.to_owned(), number(&cells[1])?)))
        .collect();
    let policy = LimitPolicy::default();
    let defaults = [
        ("plugins", policy.plugins as u64),
        ("component-bytes", policy.component_bytes as u64),
        ("compile-time", policy.compile_time.as_secs()),
        ("compile-memory", policy.compile_memory),
        ("queue-bytes", policy.queue_bytes),
    ];
    assert_eq!(documented, defaults.map(|(name, default)| (name.to_owned(), default)));
}

#[test]
fn each_test_that_the_documentation_names_is_there() {
    let mut sources = String::new();
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/suite")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|kind| kind == "rs") {
            sources += &std::fs::read_to_string(path).unwrap();
        }
    }
    let rows = [LIMITS_PAGE, include_str!("../../docs/security.md")].map(rows).concat();
    assert!(rows.len() > LIMITS.len());
    for cells in rows {
        let tests: Vec<_> = quoted(cells.last().unwrap()).collect();
        assert!(!tests.is_empty(), "{} has a test", cells[0]);
        for test in tests {
            assert!(sources.contains(&format!("fn {test}(")), "{} is tested by {test}", cells[0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_asks_for_too_much_is_refused_at_once_in_a_few_words() {
    let host = Setup::probe().start().await;
    let values = |count: usize| (0..count).map(|it| format!("\"v{it}\"")).collect::<Vec<_>>().join(",");
    let manifest = |topics: usize, defaults: usize| {
        let asked = (0..topics).map(|it| format!("\"{it}.${{config.a}}\"")).collect::<Vec<_>>().join(",");
        format!(
            "name = \"wide\"\nversion = \"1.0.0\"\n[topics]\npublish = [{asked}]\n[config.a]\ntype = \"strings\"\ndefault = [{}]\n",
            values(defaults)
        )
    };
    let begun = std::time::Instant::now();
    let component = with_manifest(&wat::parse_str("(component)").unwrap(), &manifest(600, 600));
    let refused = host.host.install(proposal("wide", component), Grant::AllThatIsAsked).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("more than 1000 topics") && refused.len() < 1_000, "{refused}");
    assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    // As many as there may be are asked for, and the refusal names some of them.
    let manifest = manifest(20, 50);
    assert!(dim_runtime::Manifest::parse(&manifest).unwrap().resolve(&Default::default(), &[]).is_ok());
}

#[test]
fn a_bundled_plugin_is_compiled_only_where_the_form_from_the_build_does_not_fit() {
    let component = dim_bundled::component("job-tracker").unwrap();
    let (_, from_build) = dim_bundled::compiled().find(|(of, _)| *of == component).unwrap();
    let other: &[u8] = zstd::encode_all(b"made by another version".as_slice(), 0).unwrap().leak();
    for (built_in, compiled) in [(from_build, 0), (other, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let cache = dim_runtime::Cache::open(dir.path()).unwrap();
        let engine =
            dim_runtime::Engine::new(cache, dim_runtime::Compiler::Here, dim_runtime::Capacity::Bench)
                .unwrap();
        let digest = dim_model::ident::Digest::of(component);
        // SAFETY: one form is that of the build, and wasmtime refuses the other, which has not its header.
        let engine = unsafe { engine.with_built_in([(digest, built_in)]) };
        assert!(engine.has_compiled(digest));
        engine.prepare(component, dim_runtime::judge(component, []).unwrap()).unwrap();
        let files = std::fs::read_dir(dir.path().join("compiled")).unwrap().map(|file| file.unwrap().path());
        let kept = files.filter(|file| file.extension().is_some_and(|it| it == "cwasm")).count();
        assert_eq!(kept, compiled);
    }
}
