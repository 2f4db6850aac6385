//! A plugin that runs scripts of host calls. A script arrives in a message, a command, a query or the config. The
//! results are in the reply or in the state.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dim_guest::log::Level;
use dim_guest::pubsub::Beginning;
use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin, ipns, json, log, pubsub, state, timers};
use serde::Deserialize;
use serde_json::{Value, json};

/// The config: the steps that `start` and each call run.
#[derive(Deserialize)]
pub struct Config {
    on_start: String,
    /// A step that each event and command runs, starting with call number `from` of an instance.
    on_call: String,
}

/// The plugin.
pub struct Probe {
    /// The number of calls of this instance. A new instance starts at 0.
    calls: u64,
    on_call: Value,
}

impl Plugin for Probe {
    type Config = Config;

    fn start(config: Config, from_state_version: Option<u32>) -> Result<Self, String> {
        let on_call = serde_json::from_str(&config.on_call).map_err(|error| error.to_string())?;
        let mut probe = Probe { calls: 0, on_call };
        let script: Vec<Value> = serde_json::from_str(&config.on_start).map_err(|error| error.to_string())?;
        for step in &script {
            let poisoned = || state::get(step["key"].as_str().unwrap_or_default().as_bytes());
            if step["do"] == "fail"
                || step["do"] == "fail-if" && poisoned().is_ok_and(|value| value.is_some())
            {
                return Err("told to fail".to_owned());
            }
            if step["do"] == "must" {
                let answer = probe.step(&step["step"]);
                if answer["error"].is_string() {
                    return Err(answer["error"].as_str().unwrap_or_default().to_owned());
                }
                continue;
            }
            if step["do"] == "note-version" {
                let version = json!(from_state_version).to_string();
                state::set(b"version", version.as_bytes()).map_err(|error| format!("{error:?}"))?;
            }
            probe.step(step);
        }
        Ok(probe)
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        if self.called()["do"] == "reject" {
            return Err(Failure::Reject("rejects everything".to_owned()));
        }
        match event {
            Event::Message(message) => {
                let script: Value = serde_json::from_slice(&message.data)
                    .map_err(|error| Failure::Reject(format!("no script: {error}")))?;
                self.run(&script);
                match script["then"].as_str() {
                    Some("reject") => Err(Failure::Reject("told to reject".to_owned())),
                    Some("retry") => Err(Failure::Retry(script["after"].as_u64().unwrap_or(0))),
                    _ => Ok(()),
                }
            }
            Event::Timer(timer) if timer.key.starts_with("spin") => loop {
                std::hint::black_box(());
            },
            Event::Timer(timer) => {
                let now = now();
                if timer.key == "again" {
                    timers::set("again", 0)?;
                }
                note("fired", &json!({ "key": timer.key, "due": timer.due, "now": now }))
            }
            Event::Gap(gap) => {
                let missing = gap.missing.map(|it| {
                    json!({
                        "writer": it.writer, "peer": it.peer, "incarnation": it.incarnation,
                        "first": it.first, "next": it.next,
                    })
                });
                note(
                    "gaps",
                    &json!({ "topic": gap.topic, "since": gap.since, "until": gap.until, "missing": missing }),
                )
            }
            Event::NameChanged(known) => {
                let document = ipns::get_state(&known.name)
                    .map(|document| String::from_utf8_lossy(&document.data).into_owned());
                let document = answer(document);
                note(
                    "changed",
                    &json!({
                        "name": known.name, "path": known.path, "sequence": known.sequence,
                        "document": document,
                    }),
                )
            }
        }
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        self.called();
        let script: Value = json::read(body)?;
        match method {
            "run" => json::write(&self.run(&script)),
            // Later documents contain the imported members.
            "import" => {
                let was = script["document"].clone();
                let merged = json!({ "was": was, "now": "imported" }).to_string();
                ipns::update_state("probe-key", merged.as_bytes(), None)?;
                state::set_json(b"imported", &was)?;
                json::write(&was)
            }
            "refuse" => {
                self.run(&script);
                Err(Refusal::Conflict("told to refuse".to_owned()))
            }
            _ => Err(Refusal::UnknownMethod),
        }
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        match method {
            "run" => {
                let mut probe = Probe { calls: self.calls, on_call: Value::Null };
                json::write(&probe.run(&json::read(body)?))
            }
            "calls" => json::write(&self.calls),
            _ => Err(Refusal::UnknownMethod),
        }
    }
}

/// Appends to a list in the state.
fn note(list: &str, what: &Value) -> Result<(), Failure> {
    let mut noted: Vec<Value> = state::get_json(list.as_bytes())?.unwrap_or_default();
    noted.push(what.clone());
    state::set_json(list.as_bytes(), &noted)?;
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// Returns a result as JSON: `{"ok":…}` or `{"error":…}`.
fn answer<T: serde::Serialize, E: std::fmt::Debug>(result: Result<T, E>) -> Value {
    match result {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": format!("{error:?}") }),
    }
}

impl Probe {
    /// Counts a call and runs the step of `on_call`. Returns the step.
    fn called(&mut self) -> Value {
        self.calls += 1;
        let step = self.on_call.clone();
        if !step["do"].is_string() || step["from"].as_u64().unwrap_or(0) > self.calls {
            return Value::Null;
        }
        self.step(&step);
        step
    }

    fn run(&mut self, script: &Value) -> Value {
        script["script"].as_array().into_iter().flatten().map(|step| self.step(step)).collect()
    }

    fn step(&mut self, step: &Value) -> Value {
        let text = |name: &str| step[name].as_str().unwrap_or_default();
        let bytes = |name: &str| match step["repeat"].as_u64() {
            Some(times) => text(name).repeat(times as usize).into_bytes(),
            None => text(name).as_bytes().to_vec(),
        };
        let number = |name: &str| step[name].as_u64().unwrap_or_default();
        let key = || match step["key_len"].as_u64() {
            Some(len) => "k".repeat(len as usize),
            None => text("key").to_owned(),
        };
        match text("do") {
            "set" => answer(state::set(key().as_bytes(), &bytes("value"))),
            "add" => {
                let sum = state::get_json::<u64>(key().as_bytes()).map(|value| value.unwrap_or(0) + 1);
                answer(sum.and_then(|sum| state::set_json(key().as_bytes(), &sum).map(|()| sum)))
            }
            "note" => {
                let mut noted: Vec<Value> =
                    state::get_json(text("key").as_bytes()).ok().flatten().unwrap_or_default();
                noted.push(step["what"].clone());
                answer(state::set_json(text("key").as_bytes(), &noted))
            }
            "note-name" => {
                let known = ipns::resolve(text("name"))
                    .map(|known| json!([known.path, known.sequence, known.valid_until, known.confirmed_at]));
                answer(note("names", &answer(known)))
            }
            "get" => answer(
                state::get(key().as_bytes())
                    .map(|value| value.map(|value| String::from_utf8_lossy(&value).into_owned())),
            ),
            "read" => json!((0..number("times")).filter(|_| state::get(b"read").is_ok()).count()),
            "delete" => answer(state::delete(key().as_bytes())),
            "scan" => {
                let after = step["after"].as_str().map(str::as_bytes);
                answer(state::scan(text("prefix").as_bytes(), after, number("limit") as u32).map(|page| {
                    page.into_iter()
                        .map(|pair| String::from_utf8_lossy(&pair.key).into_owned())
                        .collect::<Vec<_>>()
                }))
            }
            "timer" => {
                answer(timers::set(&key(), step["at"].as_u64().unwrap_or_else(|| now() + number("in"))))
            }
            "timers" => {
                answer((0..number("count")).try_for_each(|n| timers::set(&format!("t{n}"), u64::MAX)))
            }
            "clear" => answer(timers::clear(&key())),
            "timer-at" => answer(timers::get(&key())),
            "publish" => answer(pubsub::publish(text("topic"), &bytes("data"))),
            "subscribe" => answer(pubsub::subscribe_from(
                text("topic"),
                match (step["from"].as_str(), step["from"].as_u64()) {
                    (Some("earliest"), _) => Beginning::Earliest,
                    (_, Some(time)) => Beginning::Time(time),
                    _ => Beginning::Head,
                },
            )),
            "unsubscribe" => answer(pubsub::unsubscribe(text("topic"))),
            "topics" => json!(pubsub::list_topics()),
            "peers" => answer(pubsub::list_peers(text("topic"))),
            "heard" => answer(pubsub::heard(text("topic"), number("since")).map(
                |heard| json!({ "listened": heard.listened, "confirmed_until": heard.confirmed_until }),
            )),
            "update-state" => {
                answer(ipns::update_state(text("key"), &bytes("data"), step["lifetime"].as_u64()))
            }
            "publish-name" => answer(ipns::publish(text("key"), text("path"), step["lifetime"].as_u64())),
            "key-id" => answer(ipns::key_id(text("key"))),
            "follow" => answer(ipns::follow(text("name"))),
            "unfollow" => answer(ipns::unfollow(text("name"))),
            "resolve" => {
                answer(ipns::resolve(text("name")).map(
                    |known| json!({ "name": known.name, "path": known.path, "sequence": known.sequence }),
                ))
            }
            "get-state" => answer(
                ipns::get_state(text("name"))
                    .map(|document| String::from_utf8_lossy(&document.data).into_owned()),
            ),
            "log" => {
                (0..step["times"].as_u64().unwrap_or(1))
                    .for_each(|_| log::line(Level::Info, text("line"), &[]));
                Value::Null
            }
            "print" => {
                println!("{}", text("line"));
                Value::Null
            }
            "now" => json!(now()),
            "monotonic" => {
                let begun = Instant::now();
                json!((0..1000).map(|_| begun.elapsed().as_nanos() as u64).max())
            }
            // A hash map's seed: the same for all instances of the plugin.
            "hash" => json!(RandomState::new().hash_one("dim")),
            "env" => json!(std::env::vars().count() + std::env::args().count()),
            "file" => answer(std::fs::read("/etc/hostname").map(|bytes| bytes.len())),
            "connect" => answer(std::net::TcpStream::connect("127.0.0.1:1").map(|_| ())),
            "trap" => panic!("told to trap"),
            "exit" => std::process::exit(0),
            "loop" => loop {
                std::hint::black_box(());
            },
            "burn" => {
                let mut done = 0_u64;
                while done < number("steps") {
                    done = std::hint::black_box(done + 1);
                }
                Value::Null
            }
            "sleep" => {
                std::thread::sleep(Duration::from_millis(number("ms")));
                Value::Null
            }
            "grow" => {
                let greedy: Vec<Vec<u8>> = (0..number("mib")).map(|_| vec![1; 1 << 20]).collect();
                json!(greedy.len())
            }
            "recurse" => json!(recurse(number("depth"))),
            other => json!({ "error": format!("unknown step {other:?}") }),
        }
    }
}

fn recurse(depth: u64) -> u64 {
    if depth == 0 { 0 } else { 1 + std::hint::black_box(recurse(std::hint::black_box(depth - 1))) }
}

export_plugin!(Probe, manifest: "probe.toml");
