//! `kill -9` at each state of a replacement, under load.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dim_tests::Program;
use dim_tests::component::{probe, probe_with};
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use super::{Acknowledged, PROGRAM, check, check_state, config_file, load};

/// How often the host is killed at each state.
const KILLS: usize = 20;

/// Waits until a change comes to a state; the stream is read as it comes, for every moment counts.
fn await_state(socket: &Path, state: &str) {
    let mut stream = UnixStream::connect(socket).expect("the host's socket");
    stream.write_all(b"GET /v1/changes HTTP/1.1\r\nhost: dim\r\n\r\n").expect("the host listens");
    let wanted = format!("\"state\":\"{state}\",\"by\"");
    for line in BufReader::new(stream).lines() {
        if line.expect("the host tells of changes").contains(&wanted) {
            return;
        }
    }
}

/// Which version runs, and which one says in the state that it has started last.
fn version_of(host: &Program) -> (String, String) {
    let shown = host.json(&["plugin", "inspect", "probe"]);
    let get = json!({ "script": [{ "do": "get", "key": "stamp" }] });
    let answer = host.json(&["plugin", "query", "probe", "run", &get.to_string()]);
    let stamp = answer[0]["ok"].as_str().unwrap_or("0.1.0").to_owned();
    (shown["version"].as_str().expect("a version").to_owned(), stamp)
}

/// A version that says in its state that it has started.
fn good(version: &str) -> Vec<u8> {
    probe(version, &json!([{ "do": "set", "key": "stamp", "value": version }]))
}

/// One that traps soon after.
fn bad(version: &str) -> Vec<u8> {
    let start = json!([{ "do": "set", "key": "stamp", "value": version }]).to_string();
    let call = json!({ "do": "trap", "from": 5 }).to_string();
    let (start, call) = (format!("default = {start:?}"), format!("default = {call:?}"));
    probe_with(
        version,
        &[
            ("default = \"[]\"\n\n[config.on_call]", &format!("{start}\n\n[config.on_call]")),
            ("default = \"null\"", &call),
        ],
    )
}

/// Kills hosts that replace the probe by `component` once the change comes to `state`, a random while later.
fn kill_at(state: &str, component: impl Fn(usize) -> Vec<u8>, fails: bool, most_later: Duration) {
    let seed = rand::rng().next_u64();
    println!("{state}: seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (state_dir, file) = (dir.path().join("state"), dir.path().join("new.wasm"));
    std::fs::create_dir(&state_dir).expect("a state directory");
    let config = config_file(dir.path());
    let mut with_rules: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    with_rules["replacement"] = json!({ "probation": { "seconds": 0, "events": 40, "max_seconds": 60 } });
    with_rules["plugins"]["job-tracker"] = json!({ "disabled": true });
    with_rules["plugins"]["node-registry"] = json!({ "disabled": true });
    with_rules["plugins"]["heartbeat-watchdog"] = json!({ "disabled": true });
    std::fs::write(&config, with_rules.to_string()).unwrap();
    let args = ["--config", config.as_str(), "--embedded"];
    let (acknowledged, mut next) = (Acknowledged::default(), 0);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut versions = vec!["0.1.0".to_owned()];
    for round in 0..=KILLS {
        let host = Program::start(Path::new(PROGRAM), &state_dir, &args);
        if fails {
            // What code had published that is taken back stays published.
            check_state(&host, &acknowledged, round);
        } else {
            check(&host, &acknowledged, round);
        }
        let (version, stamp) = version_of(&host);
        assert_eq!(version, stamp, "{state}, round {round}: one version, and whole");
        assert!(versions.contains(&version), "{state}, round {round}: {version} never came");
        if fails && round > 0 {
            // It may not have failed yet.
            dim_tests::soon(|| {
                let _ = host.dim(&["plugin", "command", "probe", "run", "{}"]);
                version_of(&host).0 == "0.1.0"
            });
        }
        if round == KILLS {
            break;
        }
        let component = component(round);
        versions.push(format!("1.{round}.0"));
        std::fs::write(&file, component).unwrap();
        let (stop, socket) = (AtomicBool::new(false), host.socket());
        let later = Duration::from_micros(random.random_range(0..=most_later.as_micros() as u64));
        let path = file.to_str().unwrap();
        let mut install = std::process::Command::new(PROGRAM);
        install.args(["plugin", "install", path, "--state-dir"]).arg(&state_dir);
        install.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        next = runtime.block_on(async {
            let working = load(&socket, next, &acknowledged, &stop);
            let killing = async {
                let (socket, wanted) = (socket.clone(), state.to_owned());
                let killed = tokio::task::spawn_blocking(move || {
                    let waiting = std::thread::spawn(move || await_state(&socket, &wanted));
                    // It listens before anything happens.
                    std::thread::sleep(Duration::from_millis(30));
                    let mut installing = install.spawn().expect("dim can be run");
                    waiting.join().expect("the state comes");
                    std::thread::sleep(later);
                    host.kill();
                    let _ = installing.wait();
                });
                killed.await.expect("it is killed");
                stop.store(true, Ordering::Relaxed);
            };
            tokio::join!(working, killing).0
        });
    }
    println!("{KILLS} kills at {state}, {} acknowledged commands", acknowledged.lock().unwrap().len());
}

const SOON: Duration = Duration::from_millis(3);

fn version(round: usize) -> String {
    format!("1.{round}.0")
}

#[test]
fn kills_while_new_code_is_judged_leave_one_version_whole() {
    kill_at("judging", |round| good(&version(round)), false, SOON);
}

#[test]
fn kills_while_new_code_is_compiled_leave_one_version_whole() {
    kill_at("compiling", |round| good(&version(round)), false, Duration::from_millis(300));
}

#[test]
fn kills_while_new_code_waits_for_its_turn_leave_one_version_whole() {
    kill_at("waiting", |round| good(&version(round)), false, SOON);
}

#[test]
fn kills_while_new_code_is_rehearsed_leave_one_version_whole() {
    kill_at("rehearsing", |round| good(&version(round)), false, SOON);
}

#[test]
fn kills_while_new_code_takes_over_leave_one_version_whole() {
    kill_at("taking-over", |round| good(&version(round)), false, Duration::from_millis(8));
}

#[test]
fn kills_while_new_code_is_on_probation_leave_one_version_whole() {
    kill_at("on-probation", |round| good(&version(round)), false, Duration::from_millis(100));
}

#[test]
fn kills_while_new_code_is_confirmed_leave_one_version_whole() {
    kill_at("confirmed", |round| good(&version(round)), false, SOON);
}

#[test]
fn kills_while_new_code_fails_leave_one_version_whole() {
    kill_at("on-probation", |round| bad(&version(round)), true, Duration::from_millis(40));
}

#[test]
fn kills_while_new_code_is_taken_back_leave_one_version_whole() {
    kill_at("taken-back", |round| bad(&version(round)), true, SOON);
}
