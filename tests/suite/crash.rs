//! `kill -9` and losses of power at random moments, under load: after each restart every acknowledged
//! command is there once, cursor and state agree, and a daemon accepts each committed publish.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dim_tests::{FailingDisk, Kubo, Program, Setup, SupervisedHost, TearingDisk, Witness, eventually, tier};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

mod replacement;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A config file for a host with two probes: what one publishes the other counts.
fn config_file(dir: &Path) -> String {
    let probe = json!({
        "file": dim_tests::PROBE,
        "grants": { "publish": ["probe.*"], "subscribe": ["probe.*"], "write": ["probe-key"], "read": [], "share": ["probe-key"] },
    });
    let setup = json!({ "plugins": { "probe": probe, "other": probe } });
    let file = dir.join("config.yaml");
    // JSON is YAML.
    std::fs::write(&file, setup.to_string()).expect("the config can be written");
    file.to_string_lossy().into_owned()
}

/// What the commands that were acknowledged have written.
type Acknowledged = Mutex<Vec<u64>>;

/// What the other plugin is told; each is another message, for who looks on.
fn heard(what: &str) -> String {
    json!({ "script": [{ "do": "add", "key": "heard" }], "from": what }).to_string()
}

/// From which commands the daemon has accepted the publish.
fn accepted(witness: &Witness) -> BTreeSet<String> {
    let from = |data: &Bytes| {
        let message: Value = serde_json::from_slice(data).expect("a script");
        message["from"].as_str().expect("a command").to_owned()
    };
    witness.seen().iter().map(from).collect()
}

/// Sends commands, each of which adds its number to a list and one to a count, until told to stop.
async fn load(socket: &Path, first: u64, acknowledged: &Acknowledged, stop: &AtomicBool) -> u64 {
    dim_client::install_tls();
    let http = reqwest::Client::builder().unix_socket(socket).no_proxy().build().expect("a client");
    let mut number = first;
    while !stop.load(Ordering::Relaxed) {
        let script = json!({ "script": [
            { "do": "set", "key": format!("n/{number:08}"), "value": "1" },
            { "do": "add", "key": "count" },
            { "do": "publish", "topic": "probe.in", "data": heard(&format!("n/{number:08}")) },
            { "do": "timer", "key": "t", "in": 1_000_000 },
            { "do": "update-state", "key": "probe-key", "data": format!("{number}") },
        ] });
        let url = "http://dim.localhost/v1/plugins/probe/commands/run";
        let sent = http.post(url).body(script.to_string()).send().await;
        match sent {
            Ok(response) if response.status().is_success() => {
                acknowledged.lock().expect("no panic").push(number);
            }
            _ => return number + 1,
        }
        number += 1;
    }
    number
}

/// The numbers that the state holds, and its count.
fn state_of(host: &Program) -> (Vec<u64>, u64) {
    let mut numbers = Vec::new();
    let mut after = String::new();
    loop {
        let scan = json!({ "script": [{ "do": "scan", "prefix": "n/", "after": after, "limit": 5000 }] });
        let page = host.query("probe", "run", &scan.to_string());
        let keys: Vec<String> = serde_json::from_value(page[0]["ok"].clone()).expect("a page of keys");
        let Some(last) = keys.last() else { break };
        after.clone_from(last);
        numbers.extend(keys.iter().map(|key| key[2..].parse::<u64>().expect("a number")));
    }
    (numbers, number_of(host, "probe", "count"))
}

/// A number in the state of a probe.
fn number_of(host: &Program, plugin: &str, key: &str) -> u64 {
    let get = json!({ "script": [{ "do": "get", "key": key }] });
    let answer = host.query(plugin, "run", &get.to_string());
    answer[0]["ok"].as_str().map_or(0, |text| text.parse().expect("a number"))
}

fn check(host: &Program, acknowledged: &Acknowledged, round: usize) {
    let heard = check_state(host, acknowledged, round);
    assert_eq!(number_of(host, "other", "heard"), heard, "round {round}: a publish was heard twice");
}

/// Checks all but that each publish was heard once; returns how many were committed.
fn check_state(host: &Program, acknowledged: &Acknowledged, round: usize) -> u64 {
    // What is still in the log is handled first.
    let settled =
        |plugins: &Value| plugins.as_array().is_some_and(|all| all.iter().all(|p| p["state"] == "running"));
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !settled(&host.get("/v1/plugins").unwrap()) {
        assert!(std::time::Instant::now() < deadline, "round {round}: the plugins do not run");
        std::thread::sleep(Duration::from_millis(10));
    }
    host.json(&["plugin", "command", "probe", "run", "{}"]);
    let (numbers, count) = state_of(host);
    for number in acknowledged.lock().expect("no panic").iter() {
        assert!(
            numbers.binary_search(number).is_ok(),
            "round {round}: command {number} was acknowledged and is lost"
        );
    }
    assert_eq!(count, numbers.len() as u64, "round {round}: a command was applied in part or twice");
    // Each publish reached the other plugin with the commit that held it: once.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while number_of(host, "other", "heard") < count {
        assert!(std::time::Instant::now() < deadline, "round {round}: a committed publish is lost");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(host.get("/v1/status").unwrap()["dead_letters"], 0, "round {round}");
    count
}

fn kill_in_a_loop(kills: usize, args: &[&str], kubo: Option<&Kubo>) {
    let mut random = StdRng::seed_from_u64(tier::seed("kills"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state_dir = dir.path().join("state");
    std::fs::create_dir(&state_dir).expect("a state directory");
    let config = config_file(dir.path());
    let args = [&["--config", config.as_str()], args].concat();
    let (acknowledged, mut next) = (Acknowledged::default(), 0);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let witness = kubo.map(|kubo| runtime.block_on(Witness::of(kubo, "probe.in")));
    for round in 0..kills {
        let host = Program::start(Path::new(PROGRAM), &state_dir, &args);
        check(&host, &acknowledged, round);
        let stop = AtomicBool::new(false);
        let socket = host.socket();
        next = runtime.block_on(async {
            let working = load(&socket, next, &acknowledged, &stop);
            let pause = Duration::from_micros(random.random_range(1_000..300_000));
            let killing = async {
                tokio::time::sleep(pause).await;
                tokio::task::block_in_place(|| host.kill());
                stop.store(true, Ordering::Relaxed);
            };
            tokio::join!(working, killing).0
        });
    }
    let host = Program::start(Path::new(PROGRAM), &state_dir, &args);
    check(&host, &acknowledged, kills);
    if let Some(witness) = witness {
        let committed: BTreeSet<String> =
            state_of(&host).0.iter().map(|number| format!("n/{number:08}")).collect();
        let all_accepted = async || accepted(&witness).is_superset(&committed);
        runtime.block_on(eventually("the daemon has accepted each committed publish", all_accepted));
    }
    let acknowledged = acknowledged.lock().expect("no panic").len();
    println!("{kills} kills, {acknowledged} acknowledged commands, none lost");
    assert!(acknowledged > kills, "there was load: {acknowledged}");
}

#[test]
fn kills_on_the_embedded_backend_lose_and_double_nothing() {
    kill_in_a_loop(tier::repeats(15, 200), &["--embedded"], None);
}

#[test]
fn kills_on_kubo_lose_and_double_nothing() {
    let Some(kubo) = Kubo::start() else { return };
    kill_in_a_loop(tier::repeats(4, 20), &["--kubo", kubo.api()], Some(&kubo));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_told_to_stop_loses_nothing_either() {
    let host = Setup::probe().start().await;
    for count in 1..=50 {
        assert_eq!(host.run(json!([{ "do": "add", "key": "count" }])).await, [json!({ "ok": count })]);
    }
    let host = Setup::probe().start_in(host.stop().await).await;
    assert_eq!(host.state_of("probe", "count").await, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_error_of_the_disk_the_host_goes_on_by_itself() {
    let disk = FailingDisk::default();
    let host = SupervisedHost::start(&Setup::probe().on_disk(disk.clone())).await;
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let mut failed = 0;
        for number in 0..40 {
            disk.set_broken(number >= 20);
            let key = format!("{round}/{number}");
            match host.try_run("probe", json!([{ "do": "add", "key": key }])).await {
                Some(_) => acknowledged.push(key),
                None => failed += 1,
            }
        }
        assert!(failed > 0, "nothing is acknowledged by a broken disk");
        disk.set_broken(false);
        host.works("probe").await;
    }
    assert!(acknowledged.len() >= 60, "{}", acknowledged.len());
    for key in acknowledged {
        let read = host.try_run("probe", json!([{ "do": "get", "key": key }])).await.unwrap();
        assert_eq!(read, [json!({ "ok": "1" })], "{key} is there, once");
    }
    host.stop().await;
}

/// A command that changes a little of everything.
fn steps_of(key: &str) -> Value {
    json!([
        { "do": "set", "key": key, "value": "1" },
        { "do": "add", "key": "count" },
        { "do": "publish", "topic": "probe.in", "data": heard(key) },
        { "do": "timer", "key": "t", "in": 1_000_000 },
        { "do": "update-state", "key": "probe-key", "data": key },
    ])
}

/// One worker of a load on a host that loses power now and then: what was acknowledged of it.
async fn work(host: &SupervisedHost, worker: usize, stop: &AtomicBool) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for number in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
        let key = format!("n/{worker}/{number:08}");
        match host.try_run("probe", steps_of(&key)).await {
            Some(_) => acknowledged.push(key),
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    acknowledged
}

async fn number_in(host: &SupervisedHost, plugin: &str, key: &str) -> u64 {
    let answers = host.try_run(plugin, json!([{ "do": "get", "key": key }])).await.unwrap();
    answers[0]["ok"].as_str().map_or(0, |text| text.parse().expect("a number"))
}

/// Loses power `times` times under load, at moments that follow from a seed.
async fn lose_power_in_a_loop(disk: TearingDisk, setup: Setup, times: usize, witness: Option<Witness>) {
    let mut random = StdRng::seed_from_u64(tier::seed("losses of power"));
    let host = SupervisedHost::start(&setup.on_disk(disk.clone())).await;
    let stop = AtomicBool::new(false);
    let crashes = async {
        for _ in 0..times {
            host.works("probe").await;
            tokio::time::sleep(Duration::from_micros(random.random_range(0..60_000))).await;
            disk.lose_power(random.next_u64());
        }
        host.works("probe").await;
        stop.store(true, Ordering::Relaxed);
    };
    let workers = futures::future::join_all((0..4).map(|worker| work(&host, worker, &stop)));
    let (acknowledged, ()) = tokio::join!(workers, crashes);
    let acknowledged: Vec<String> = acknowledged.concat();
    println!("{times} losses of power, {} acknowledged commands", acknowledged.len());
    assert!(acknowledged.len() > times, "there was load: {}", acknowledged.len());
    let committed = check_whole(&host, &acknowledged).await;
    if let Some(witness) = witness {
        let all_accepted = async || accepted(&witness).is_superset(&committed);
        eventually("the daemon has accepted each committed publish", all_accepted).await;
    }
    host.stop().await;
}

/// Checks that what was acknowledged is there, and that all that is there was applied once and whole; returns the keys.
async fn check_whole(host: &SupervisedHost, acknowledged: &[String]) -> BTreeSet<String> {
    for keys in acknowledged.chunks(500) {
        let steps: Vec<Value> = keys.iter().map(|key| json!({ "do": "get", "key": key })).collect();
        for (key, read) in keys.iter().zip(host.try_run("probe", json!(steps)).await.unwrap()) {
            assert_eq!(read, json!({ "ok": "1" }), "{key} was acknowledged and is lost");
        }
    }
    // What was applied without an acknowledgement was applied whole, too: state, count and publish.
    let (mut applied, mut committed, mut after) = (0, BTreeSet::new(), String::new());
    loop {
        let scan = json!([{ "do": "scan", "prefix": "n/", "after": after, "limit": 5000 }]);
        let page = host.try_run("probe", scan).await.unwrap();
        let keys: Vec<String> = serde_json::from_value(page[0]["ok"].clone()).unwrap();
        let Some(last) = keys.last() else { break };
        after.clone_from(last);
        applied += keys.len() as u64;
        committed.extend(keys);
    }
    assert_eq!(number_in(host, "probe", "count").await, applied, "a command was applied in part or twice");
    eventually("each publish was heard", async || number_in(host, "other", "heard").await >= applied).await;
    assert_eq!(number_in(host, "other", "heard").await, applied, "a publish was heard twice");
    committed
}

#[tokio::test(flavor = "multi_thread")]
async fn power_that_is_lost_at_any_sync_point_loses_and_doubles_nothing() {
    let seed = tier::seed("what arrives of the last writes");
    for sync in 0_u64.. {
        let disk = TearingDisk::default();
        let setup = Setup::probe().and_probe("other", json!({}));
        let host = SupervisedHost::start(&setup.on_disk(disk.clone())).await;
        host.works("probe").await;
        disk.lose_power_after(sync, seed.wrapping_add(sync));
        let mut acknowledged = Vec::new();
        for number in 0..6 {
            let key = format!("n/{number}");
            if host.try_run("probe", steps_of(&key)).await.is_some() {
                acknowledged.push(key);
            }
        }
        let is_past_the_end = disk.keep_power() == 0;
        host.works("probe").await;
        check_whole(&host, &acknowledged).await;
        host.stop().await;
        if is_past_the_end {
            assert!(sync >= 6, "each command is synced: {sync}");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_of_power_on_kubo_lose_and_double_nothing() {
    let Some(kubo) = Kubo::start() else { return };
    let witness = Witness::of(&kubo, "probe.in").await;
    let setup = Setup::probe().and_probe("other", json!({})).on_kubo(kubo.api());
    lose_power_in_a_loop(TearingDisk::default(), setup, tier::repeats(5, 20), Some(witness)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_of_power_lose_and_double_nothing() {
    let setup = Setup::probe().and_probe("other", json!({}));
    lose_power_in_a_loop(TearingDisk::default(), setup, tier::repeats(40, 200), None).await;
}

/// A large database is committed in another way, so that it opens soon.
#[tokio::test(flavor = "multi_thread")]
async fn losses_of_power_lose_and_double_nothing_in_a_large_database() {
    let setup = Setup::probe().and_probe("other", json!({}));
    lose_power_in_a_loop(TearingDisk::seeming_large(), setup, tier::repeats(10, 50), None).await;
}
