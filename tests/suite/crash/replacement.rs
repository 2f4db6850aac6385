//! `kill -9` at each state of a replacement and amid every other change of a plugin, under load.

use std::any::Any;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dim_tests::component::{probe, probe_with};
use dim_tests::{Program, begin_request, tier};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use super::{Acknowledged, PROGRAM, check, check_state, config_file, load};

/// How often the host is killed at each state: two rounds show that what the first has left is whole, too.
fn kills() -> usize {
    tier::repeats(2, 20)
}

const SOON: Duration = Duration::from_millis(3);

/// For how long after it was asked for a change is under way, with the start of the program that asks.
const UNDER_WAY: Duration = Duration::from_millis(120);

/// The states of changes from the time on at which the host has answered.
fn changes(socket: &Path) -> impl Iterator<Item = String> + Send + use<> {
    let stream = begin_request(socket, "GET /v1/changes", 0);
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("the host tells of changes"));
    assert!(lines.by_ref().any(|line| line.is_empty()), "the host answers");
    lines
}

/// Waits until a change comes to a state; the stream is read as it comes, for every moment counts.
fn await_state(mut changes: impl Iterator<Item = String>, state: &str) {
    let wanted = format!("\"state\":\"{state}\",\"by\"");
    assert!(changes.any(|line| line.contains(&wanted)), "a change comes to the state {state}");
}

/// Which version runs, and which one says in the state that it has started last.
fn version_of(host: &Program, plugin: &str) -> (String, String) {
    let shown = host.get(&format!("/v1/plugins/{plugin}")).unwrap();
    let get = json!({ "script": [{ "do": "get", "key": "stamp" }] });
    let answer = host.query(plugin, "run", &get.to_string());
    let stamp = answer[0]["ok"].as_str().unwrap_or("0.1.0").to_owned();
    (shown["version"].as_str().expect("a version").to_owned(), stamp)
}

/// A version that says in its state that it has started.
fn good(version: &str) -> Vec<u8> {
    probe(version, &json!([{ "do": "set", "key": "stamp", "value": version }]))
}

/// The same as another plugin.
fn late(version: &str) -> Vec<u8> {
    let start = json!([{ "do": "set", "key": "stamp", "value": version }]).to_string();
    let start = format!("default = {start:?}");
    probe_with(
        version,
        &[("name = \"probe\"", "name = \"late\""), ("probe-key", "late-key"), ("default = \"[]\"", &start)],
    )
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

/// When a host is killed.
#[derive(Clone, Copy)]
enum When {
    /// Once a change comes to a state, or up to so long after it.
    At(&'static str, Duration),
    /// Up to so long after it was asked for.
    Within(Duration),
}

/// What is done to hosts that are killed.
struct Plan<'a> {
    when: When,
    /// Whether work of code is taken back; what that had published stays published.
    fails: bool,
    /// How many events a probation has.
    events: u64,
    /// What is done before there is load.
    before: &'a dyn Fn(&Program, usize),
    /// Asks for the change; what it returns is held until the host is dead.
    ask: &'a (dyn Fn(&Place, usize) -> Box<dyn Any + Send> + Sync),
    /// Looks whether all is whole after the restart.
    after: &'a dyn Fn(&Program, usize),
}

/// Where a host is, and the component that it is to run.
struct Place {
    state_dir: PathBuf,
    file: PathBuf,
}

/// A command of `dim` that runs.
struct Asking(Child);

impl Drop for Asking {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

impl Place {
    fn dim(&self, args: &[&str]) -> Box<dyn Any + Send> {
        let mut command = Command::new(PROGRAM);
        command.args(args).arg("--state-dir").arg(&self.state_dir).env_remove("DIM_API");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Box::new(Asking(command.spawn().expect("dim can be run")))
    }

    fn install(&self, component: &[u8]) -> Box<dyn Any + Send> {
        std::fs::write(&self.file, component).expect("the component can be written");
        self.dim(&["plugin", "install", self.file.to_str().expect("a path")])
    }

    /// Sends one half of a component.
    fn send_half(&self, component: &[u8]) -> Box<dyn Any + Send> {
        let socket = self.state_dir.join(dim_client::SOCKET);
        let mut stream = begin_request(&socket, "PUT /v1/plugins/probe/component", component.len());
        stream.write_all(&component[..component.len() / 2]).expect("the host reads");
        Box::new(stream)
    }
}

/// Installs a component, and waits until it runs.
fn put(host: &Program, component: &[u8], with: &[&str]) {
    let file = tempfile::NamedTempFile::with_suffix(".wasm").expect("a temporary file");
    std::fs::write(file.path(), component).expect("the component can be written");
    host.json(&[&["plugin", "install", file.path().to_str().expect("a path")], with].concat());
}

fn kill_amid(what: &str, plan: &Plan<'_>) {
    let kills = kills();
    let mut random = StdRng::seed_from_u64(tier::seed(what));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let place = Place { state_dir: dir.path().join("state"), file: dir.path().join("new.wasm") };
    std::fs::create_dir(&place.state_dir).expect("a state directory");
    let config = config_file(dir.path());
    let mut with_rules: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    with_rules["replacement"] =
        json!({ "probation": { "seconds": 0, "events": plan.events, "max_seconds": 60 } });
    for bundled in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
        with_rules["plugins"][bundled] = json!({ "disabled": true });
    }
    std::fs::write(&config, with_rules.to_string()).unwrap();
    let args = ["--config", config.as_str(), "--embedded"];
    let (acknowledged, mut next) = (Acknowledged::default(), 0);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for round in 0..=kills {
        let host = Program::start(Path::new(PROGRAM), &place.state_dir, &args);
        if plan.fails {
            check_state(&host, &acknowledged, round);
        } else {
            check(&host, &acknowledged, round);
        }
        (plan.after)(&host, round);
        if round == kills {
            break;
        }
        (plan.before)(&host, round);
        let (stop, socket) = (AtomicBool::new(false), host.socket());
        let most = match plan.when {
            When::At(_, most) | When::Within(most) => most,
        };
        let later = Duration::from_micros(random.random_range(0..=most.as_micros() as u64));
        let (when, ask, place) = (plan.when, plan.ask, &place);
        std::thread::scope(|scope| {
            let killing = scope.spawn(|| {
                let waiting = match when {
                    When::At(state, _) => {
                        let changes = changes(&socket);
                        Some(scope.spawn(|| await_state(changes, state)))
                    }
                    When::Within(_) => None,
                };
                // There is load before anything happens.
                std::thread::sleep(Duration::from_millis(30));
                let asking = ask(place, round);
                if let Some(waiting) = waiting {
                    waiting.join().expect("the state comes");
                }
                std::thread::sleep(later);
                host.kill();
                drop(asking);
                stop.store(true, Ordering::Relaxed);
            });
            next = runtime.block_on(load(&socket, next, &acknowledged, &stop));
            killing.join().expect("it is killed");
        });
    }
    println!("{kills} kills: {what}, {} acknowledged commands", acknowledged.lock().unwrap().len());
}

fn version(round: usize) -> String {
    format!("1.{round}.0")
}

/// Another one that comes in the same round.
fn second(round: usize) -> String {
    format!("1.{round}.1")
}

/// One version of the probe runs, which came by round `round` if it is not the first, and the state is its.
fn is_whole(host: &Program, round: usize) {
    let (runs, stamp) = version_of(host, "probe");
    assert_eq!(runs, stamp, "round {round}: one version, and whole");
    let came = (0..round).flat_map(|round| [version(round), second(round)]);
    let came = came.chain(["0.1.0".to_owned()]).any(|came| came == runs);
    assert!(came, "round {round}: {runs} never came");
}

/// Kills hosts that replace the probe once the change comes to `state`, a random while later.
fn kill_at(state: &'static str, most_later: Duration) {
    kill_amid(
        state,
        &Plan {
            when: When::At(state, most_later),
            fails: false,
            events: 40,
            before: &|_, _| {},
            ask: &|place, round| place.install(&good(&version(round))),
            after: &is_whole,
        },
    );
}

/// The same where the new code fails.
fn kill_failing_at(state: &'static str, most_later: Duration) {
    kill_amid(
        state,
        &Plan {
            when: When::At(state, most_later),
            fails: true,
            events: 40,
            before: &|_, _| {},
            ask: &|place, round| place.install(&bad(&version(round))),
            after: &|host, round| {
                is_whole(host, round);
                // It may not have failed yet.
                dim_tests::soon(|| {
                    let _ = host.dim(&["plugin", "command", "probe", "run", "{}"]);
                    version_of(host, "probe").0 == "0.1.0"
                });
            },
        },
    );
}

#[test]
fn kills_while_new_code_is_fetched_leave_one_version_whole() {
    kill_amid(
        "fetching",
        &Plan {
            when: When::At("fetching", SOON),
            fails: false,
            events: 40,
            before: &|_, _| {},
            ask: &|place, round| place.send_half(&good(&version(round))),
            after: &|host, round| {
                is_whole(host, round);
                assert_eq!(version_of(host, "probe").0, "0.1.0", "half a component is none");
            },
        },
    );
}

#[test]
fn kills_while_new_code_is_refused_leave_the_old_version_whole() {
    // `start` overwrites the stamp, and traps.
    let unfit = |round| {
        let steps = json!([{ "do": "set", "key": "stamp", "value": "unfit" }, { "do": "trap" }]);
        probe(&version(round), &steps)
    };
    kill_amid(
        "refused",
        &Plan {
            when: When::At("refused", SOON),
            fails: false,
            events: 40,
            before: &|_, _| {},
            ask: &|place, round| place.install(&unfit(round)),
            after: &|host, round| {
                is_whole(host, round);
                assert_eq!(version_of(host, "probe").0, "0.1.0", "what is refused never runs");
            },
        },
    );
}

#[test]
fn kills_while_code_on_probation_is_replaced_leave_one_version_whole() {
    kill_amid(
        "replaced",
        &Plan {
            when: When::At("replaced", SOON),
            fails: false,
            events: 1_000_000,
            before: &|host, round| put(host, &good(&version(round)), &[]),
            ask: &|place, round| place.install(&good(&second(round))),
            after: &is_whole,
        },
    );
}

#[test]
fn kills_while_new_code_is_judged_leave_one_version_whole() {
    kill_at("judging", SOON);
}

#[test]
fn kills_while_new_code_is_compiled_leave_one_version_whole() {
    kill_at("compiling", Duration::from_millis(300));
}

#[test]
fn kills_while_new_code_waits_for_its_turn_leave_one_version_whole() {
    kill_at("waiting", SOON);
}

#[test]
fn kills_while_new_code_is_rehearsed_leave_one_version_whole() {
    kill_at("rehearsing", SOON);
}

#[test]
fn kills_while_new_code_takes_over_leave_one_version_whole() {
    kill_at("taking-over", Duration::from_millis(8));
}

#[test]
fn kills_while_new_code_is_on_probation_leave_one_version_whole() {
    kill_at("on-probation", Duration::from_millis(100));
}

#[test]
fn kills_while_new_code_is_confirmed_leave_one_version_whole() {
    kill_at("confirmed", SOON);
}

#[test]
fn kills_while_new_code_fails_leave_one_version_whole() {
    kill_failing_at("on-probation", Duration::from_millis(40));
}

#[test]
fn kills_while_new_code_is_taken_back_leave_one_version_whole() {
    kill_failing_at("taken-back", SOON);
}

fn kill_rolling_back(what: &str, when: When) {
    kill_amid(
        what,
        &Plan {
            when,
            fails: true,
            events: 40,
            before: &|host, round| put(host, &good(&version(round)), &[]),
            ask: &|place, _| place.dim(&["plugin", "rollback", "probe"]),
            after: &|host, round| is_whole(host, round),
        },
    );
}

#[test]
fn kills_during_a_rollback_leave_one_version_whole() {
    kill_rolling_back("a rollback", When::Within(UNDER_WAY));
}

#[test]
fn kills_after_a_rollback_leave_one_version_whole() {
    kill_rolling_back("rolled-back", When::At("rolled-back", SOON));
}

/// Kills hosts to which a second plugin comes and from which it goes.
fn kill_coming_and_going(what: &str, when: [When; 2]) {
    for (turn, when) in when.into_iter().enumerate() {
        let is_there = |host: &Program| host.get("/v1/plugins/late").is_some();
        let whole = |host: &Program, round| {
            if is_there(host) {
                let (runs, stamp) = version_of(host, "late");
                assert_eq!(runs, stamp, "{what}, round {round}: whole");
            }
        };
        kill_amid(
            what,
            &Plan {
                when,
                fails: false,
                events: 40,
                before: &|host, round| match (turn, is_there(host)) {
                    (0, true) => drop(host.json(&["plugin", "remove", "late"])),
                    (1, false) => put(host, &late(&version(round)), &["--grant"]),
                    _ => {}
                },
                ask: &|place, round| match turn {
                    0 => {
                        std::fs::write(&place.file, late(&version(round))).unwrap();
                        place.dim(&["plugin", "install", place.file.to_str().unwrap(), "--grant"])
                    }
                    _ => place.dim(&["plugin", "remove", "late"]),
                },
                after: &whole,
            },
        );
    }
}

#[test]
fn kills_while_a_plugin_comes_or_goes_leave_it_there_whole_or_not_at_all() {
    kill_coming_and_going(
        "coming and going",
        [When::Within(Duration::from_millis(600)), When::Within(UNDER_WAY)],
    );
}

#[test]
fn kills_once_a_plugin_has_come_or_gone_leave_it_there_whole_or_not_at_all() {
    kill_coming_and_going("come and gone", [When::At("installed", SOON), When::At("removed", SOON)]);
}
