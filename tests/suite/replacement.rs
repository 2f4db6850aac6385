//! A plugin's code is replaced while it runs: with everything that it has, and not at all where anything is
//! wrong with the new code.

use std::path::Path;

use dim_store::change::State;
use dim_tests::alone::{is_as_if_alone, replace};
use dim_tests::component::probe;
use dim_tests::{Program, Setup, TestHost, eventually, script, tier};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// The version of the probe that runs.
fn version(host: &TestHost) -> String {
    host.plugin("probe").version().version
}

/// Puts other bytes in the place of a name, wherever it stands.
fn renamed(component: &mut [u8], name: &[u8], other: &[u8]) {
    assert_eq!(name.len(), other.len());
    let mut found = 0;
    for at in 0..component.len() - name.len() {
        if component[at..].starts_with(name) {
            component[at..at + name.len()].copy_from_slice(other);
            found += 1;
        }
    }
    assert!(found > 0, "the component has the name");
}

/// A version that says in its state that it has started, and which state it has found.
fn stamping(version: &str) -> Vec<u8> {
    probe(version, &json!([{ "do": "note-version" }, { "do": "set", "key": "stamp", "value": version }]))
}

fn count() -> String {
    script(json!([{ "do": "add", "key": "count" }])).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_code_takes_over_with_the_state_the_timers_and_the_subscriptions() {
    let host = Setup::probe().start().await;
    host.run(json!([
        { "do": "set", "key": "kept", "value": "it" },
        { "do": "timer", "key": "later", "in": 1_500_000_000_u64 },
        { "do": "subscribe", "topic": "probe.more" },
    ]))
    .await;
    let replaced = replace(&host, stamping("0.2.0")).await.unwrap();
    assert_eq!(replaced.state, State::OnProbation);
    let versions = (replaced.before.unwrap().version, replaced.after.unwrap().version);
    assert_eq!((versions.0.as_str(), versions.1.as_str()), ("0.1.0", "0.2.0"));
    assert_eq!(version(&host), "0.2.0");
    for (key, value) in [("kept", json!("it")), ("stamp", json!("0.2.0")), ("version", json!(1))] {
        assert_eq!(host.state_of("probe", key).await, value, "{key}");
    }
    host.from_peer("probe.more", count()).await;
    eventually("it is heard on both topics", async || host.state_of("probe", "count").await == 1).await;
    eventually("the timer fires", async || host.state_of("probe", "fired").await != Value::Null).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_every_entry_is_handled_once_and_every_command_is_answered() {
    let host = Setup::probe().start().await;
    host.from_peer("probe.in", count()).await;
    let (commands, messages) = (tier::repeats(100, 400) as i64, tier::repeats(500, 2_000) as i64);
    let versions = tier::repeats(8, 20);
    let load = async {
        for _ in 1..messages {
            host.from_peer("probe.in", count()).await;
        }
    };
    let orders = async {
        for number in 0..commands {
            host.run(json!([{ "do": "add", "key": "orders" }, { "do": "set", "key": format!("{number}") }]))
                .await;
        }
    };
    let replacements = async {
        for number in 0..versions {
            replace(&host, stamping(&format!("1.{number}.0"))).await.unwrap();
        }
    };
    tokio::join!(load, orders, replacements);
    host.settled().await;
    assert_eq!(host.state_of("probe", "count").await, messages);
    assert_eq!(host.state_of("probe", "orders").await, commands);
    assert_eq!(host.state_of("probe", "stamp").await, format!("1.{}.0", versions - 1));
    assert_eq!(host.dead_letters(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_new_code_is_told_and_the_old_code_goes_on() {
    let setup = Setup::probe();
    let host = setup.start().await;
    host.from_peer("probe.in", count()).await;
    let whole = stamping("2.0.0");
    let greedy = probe(
        "2.0.0",
        &json!([{ "do": "set", "key": "stamp", "value": "x" }, { "do": "grow", "mib": 100_000 }]),
    );
    let mut wrong = vec![
        (b"no component".to_vec(), "the file is not WebAssembly"),
        (probe("2.0.0", &json!([{ "do": "set", "key": "stamp" }, { "do": "fail" }])), "told to fail"),
        (probe("2.0.0", &json!([{ "do": "set", "key": "stamp" }, { "do": "trap" }])), "told to trap"),
        (probe("2.0.0", &json!([{ "do": "set", "key": "stamp" }, { "do": "loop" }])), "CPU time"),
        (greedy, "limit on memory"),
    ];
    let mut foreign = whole.clone();
    renamed(&mut foreign, b"dim:coordination/timers@0.2.0", b"dim:coordination/timerz@0.2.0");
    let nearest = "imports dim:coordination/timerz@0.2.0, which this host does not offer; the most similar is dim:coordination/timers@0.2.0";
    wrong.push((foreign, nearest));
    let mut newer = whole.clone();
    renamed(&mut newer, b"dim:coordination/state@0.2.0", b"dim:coordination/state@0.7.0");
    wrong.push((newer, "imports dim:coordination/state in version 0.7.0, this host offers 0.2.0 and 0.1.0"));
    let mut random = StdRng::seed_from_u64(tier::seed("components cut off"));
    for _ in 0..tier::repeats(10, 50) {
        wrong.push((whole[..random.random_range(0..whole.len())].to_vec(), ""));
    }
    for (component, why) in wrong {
        let bytes = component.len();
        let error = replace(&host, component).await.expect_err(why).to_string();
        assert!(error.contains(why), "{bytes} bytes: {error}");
    }
    host.from_peer("probe.in", count()).await;
    eventually("the old code goes on", async || host.state_of("probe", "count").await == 2).await;
    assert_eq!((version(&host).as_str(), host.state_of("probe", "stamp").await), ("0.1.0", Value::Null));
    assert_eq!(host.plugin("probe").handle.status().instances, 1, "it was never interrupted");
    is_as_if_alone(host, &setup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_component_changes_nothing_and_of_many_at_once_the_last_one_stays() {
    let host = Setup::probe().start().await;
    let same = std::fs::read(dim_tests::PROBE).unwrap();
    assert_eq!(replace(&host, same).await.unwrap().state, State::Unchanged);
    let versions = (0..10).map(|number| stamping(&format!("3.{number}.0")));
    let outcomes = futures::future::join_all(versions.map(|version| replace(&host, version))).await;
    for (number, outcome) in outcomes.into_iter().enumerate() {
        assert_eq!(outcome.unwrap().after.unwrap().version, format!("3.{number}.0"));
    }
    assert_eq!((version(&host).as_str(), host.state_of("probe", "stamp").await), ("3.9.0", json!("3.9.0")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_installed_runs_after_a_restart_and_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let (state, config) = (dir.path().join("state"), dir.path().join("config.yaml"));
    std::fs::create_dir(&state).unwrap();
    let section = json!({ "file": dim_tests::PROBE, "grants": { "subscribe": ["probe.in"], "publish": ["probe.out"], "write": ["probe-key"] } });
    std::fs::write(&config, json!({ "plugins": { "probe": section } }).to_string()).unwrap();
    let file = dir.path().join("probe-2.wasm");
    std::fs::write(&file, stamping("4.0.0")).unwrap();
    let args = ["--embedded", "--config", config.to_str().unwrap()];
    let start = || tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let host = start();
    let told = host.json(&["plugin", "install", file.to_str().unwrap()]);
    assert_eq!(
        (&told["state"], &told["after"]["version"]),
        (&json!("on-probation"), &json!("4.0.0")),
        "{told}"
    );
    host.kill();
    // The file is not needed any more.
    std::fs::remove_file(&file).unwrap();
    let host = start();
    // It is waited for while it is being loaded.
    host.json(&["plugin", "inspect", "probe"]);
    let listed = host.json(&["plugin", "ls"]);
    let probe = listed.as_array().unwrap().iter().find(|plugin| plugin["name"] == "probe").unwrap().clone();
    assert_eq!(
        (&probe["version"], &probe["source"]),
        (&json!("4.0.0"), &json!(file.to_str().unwrap())),
        "{probe}"
    );
    // And from a backup.
    let backup = dir.path().join("backup");
    let passphrase = ("DIM_PASSPHRASE", "correct horse battery");
    let run = |args: &[&str], state: &Path| {
        let mut command = std::process::Command::new(PROGRAM);
        command.args(args).arg(&backup).arg("--state-dir").arg(state).env(passphrase.0, passphrase.1);
        let output = tokio::task::block_in_place(|| command.output()).unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run(&["backup"], &state);
    let other = dir.path().join("other");
    run(&["restore"], &other);
    let restored = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &other, &args));
    let shown = restored.json(&["plugin", "inspect", "probe"]);
    assert_eq!(shown["version"], "4.0.0", "{shown}");
    let refused = host.dim(&["plugin", "install", config.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not a plugin"), "{refused:?}");
}
