//! The fake host of the SDK answers as the real one does: one script, by the same plugin, natively on the fake and as a
//! component on the real one.

use dim_guest::fake::Host;
use dim_scenarios::{Given, Runs, Scenario, TestBench, Trial};
use serde_json::{Value, json};

#[path = "../guests/examples/probe.rs"]
mod probe;

/// What both are told, one command after the other.
fn script() -> Vec<Value> {
    let steps = [
        json!([{ "do": "set", "key": "a", "value": "1" }, { "do": "set", "key": "b", "value": "2" }, { "do": "get", "key": "a" }]),
        json!([{ "do": "get", "key": "a" }, { "do": "delete", "key": "a" }, { "do": "get", "key": "a" }, { "do": "delete", "key": "a" }]),
        json!([{ "do": "set", "key": "", "value": "1" }, { "do": "get", "key": "" }]),
        json!([{ "do": "add", "key": "count" }, { "do": "add", "key": "count" }]),
        json!([{ "do": "set", "key": "c/1", "value": "1" }, { "do": "set", "key": "c/2", "value": "2" }, { "do": "scan", "prefix": "c/", "limit": 1 }]),
        json!([{ "do": "scan", "prefix": "c/", "after": "c/1", "limit": 9 }, { "do": "scan", "prefix": "none", "limit": 9 }]),
        json!([{ "do": "timer", "key": "t", "in": 5_000_000_000_u64 }, { "do": "clear", "key": "t" }, { "do": "timer-at", "key": "t" }, { "do": "clear", "key": "t" }]),
        json!([{ "do": "timer", "key": "", "in": 1 }]),
        json!([{ "do": "publish", "topic": "probe.out", "data": "hello" }]),
        json!([{ "do": "subscribe", "topic": "probe.more" }, { "do": "unsubscribe", "topic": "probe.more" }]),
        json!([{ "do": "resolve", "name": "probe-key" }, { "do": "get-state", "name": "probe-key" }]),
    ];
    steps.into_iter().map(dim_tests::script).collect()
}

/// What the real host answers: without a network, and the plugin is a component.
fn on_the_real_one() -> Vec<Value> {
    let bench = TestBench::new().unwrap();
    let plugin = bench.plugin(&std::fs::read(dim_tests::PROBE).unwrap()).unwrap();
    std::thread::scope(|scope| {
        let trying = scope.spawn(|| {
            let mut trial = Trial::new(&bench, &plugin, &Given::default()).unwrap();
            trial.start().unwrap();
            let mut answers = Vec::new();
            for script in script() {
                trial.command("run", &script.to_string()).unwrap();
                let reply = trial.happened().last().and_then(|it| it.reply.clone()).unwrap().unwrap();
                answers.push(serde_json::from_str(&reply).unwrap());
            }
            answers
        });
        trying.join().unwrap()
    })
}

fn on_the_fake_one() -> Vec<Value> {
    let host = Host::new();
    // What it is not granted on the real one.
    host.deny("probe.more");
    let mut plugin: probe::Probe = host.start(r#"{"on_start":"[]","on_call":"null"}"#, 1).expect("it starts");
    let answers = script().into_iter().map(|script| {
        let reply = host.command(&mut plugin, "run", &script.to_string()).expect("it does what it is told");
        serde_json::from_str(&reply).unwrap()
    });
    answers.collect()
}

#[test]
fn the_fake_host_answers_as_the_real_one_does() {
    let (real, fake) = (on_the_real_one(), on_the_fake_one());
    for ((asked, real), fake) in script().iter().zip(&real).zip(&fake) {
        assert_eq!(fake, real, "{asked}");
    }
    assert_eq!(real.len(), script().len());
}

/// A scenario is the real host, too: what it shows of a message is what the fake shows.
#[test]
fn an_event_has_the_same_effects_on_both() {
    let bench = TestBench::new().unwrap();
    let plugin = bench.plugin(&std::fs::read(dim_tests::PROBE).unwrap()).unwrap();
    let script = dim_tests::script(
        json!([{ "do": "publish", "topic": "probe.out", "data": "hello" }, { "do": "add", "key": "n" }]),
    );
    let text = format!(
        "steps:\n- message: probe.in\n  data: {script}\n  expect: {{ publishes: [{{ topic: probe.out, data: {{ $text: hello }} }}] }}\n  include: {{ state: {{ n: 1 }} }}\n"
    );
    let report = Scenario::parse("it", &text).unwrap().run(&bench, &plugin, &Runs::default()).unwrap();
    assert!(report.is_well(), "{report}");
    let host = Host::new();
    let mut plugin: probe::Probe = host.start(r#"{"on_start":"[]","on_call":"null"}"#, 1).expect("it starts");
    let message = dim_guest::Message {
        topic: "probe.in".to_owned(),
        data: script.to_string().into_bytes(),
        origin: dim_guest::Origin::Host,
    };
    host.handle(&mut plugin, dim_guest::Event::Message(message)).expect("it is handled");
    let published = host.take_published();
    assert_eq!(
        (published[0].topic.as_str(), published[0].data.as_slice()),
        ("probe.out", b"hello".as_slice())
    );
    assert_eq!(host.state()[b"n".as_slice()], b"1");
}
