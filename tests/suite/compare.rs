//! Recorded events: they leave a host, a plugin is tried on them, and two versions of one are compared over them.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use dim_model::entry::export::{Header, Record};
use dim_model::time::Timestamp;
use dim_scenarios::{
    Comparison, Events, Given, Identity, Plugin, Runs, Scenario, TestBench, compare, try_on,
};
use dim_store::effect::NameValue;
use dim_tests::{Program, component, tier};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// A file with events: one each second, as `what` says.
pub fn recorded(dir: &TempDir, count: u64, what: impl Fn(u64) -> Value) -> PathBuf {
    let file = dir.path().join("events.ndjson");
    let mut out = std::io::BufWriter::new(std::fs::File::create(&file).unwrap());
    let time = |number: u64| Timestamp(1_767_225_600_000_000_000 + number * 1_000_000_000);
    let header = json!({
        "dim_events": 1, "host": "12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF",
        "random": "5a".repeat(32), "keys": {}, "plugins": {}, "until": time(count),
    });
    writeln!(out, "{header}").unwrap();
    for number in 0..count {
        let mut record = what(number);
        record["offset"] = number.into();
        record["time"] = json!(time(number));
        writeln!(out, "{record}").unwrap();
    }
    out.flush().unwrap();
    file
}

fn message(topic: &str, text: &str) -> Value {
    let from = "peer 12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF";
    json!({ "message": { "topic": topic, "from": from, "text": text } })
}

fn given(file: &Path) -> Given {
    let events = Events::open(file).unwrap();
    Given { time: events.begin(), host: Identity::recorded(&events.header).unwrap(), ..Given::default() }
}

fn compared(
    bench: &TestBench,
    old: &Plugin,
    new: &Plugin,
    file: &Path,
    since: Option<Timestamp>,
) -> Comparison {
    let given = given(file);
    compare(bench, (old, new), (&given, &given), Events::open(file).unwrap(), since, |_| {}).unwrap()
}

/// The forgetful plugin, which remembers; as another version it takes one number for another.
fn counter(bench: &TestBench, version: &str, slips_at: Option<u64>) -> Plugin {
    let manifest = include_str!("../guests/examples/forgetful.toml");
    let slips = slips_at.map_or(String::new(), |at| format!("default = {at}\n"));
    let manifest = manifest.replace("0.1.0", version).replace("default = \"memory\"", "default = \"state\"");
    let manifest = format!("{manifest}{slips}");
    let component = std::fs::read(dim_tests::FORGETFUL).unwrap();
    bench.plugin(&component::with_manifest(&component, &manifest)).unwrap()
}

fn numbers(dir: &TempDir, count: u64) -> PathBuf {
    recorded(dir, count, |number| message("forgetful.in", &number.to_string()))
}

#[test]
fn a_difference_in_one_event_of_many_is_found_and_none_between_equal_versions() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBench::new().unwrap();
    let many = tier::repeats(10_000, 100_000) as u64;
    let file = numbers(&dir, many);
    let old = counter(&bench, "0.1.0", None);
    let equal = compared(&bench, &old, &old, &file, None);
    assert!(equal.is_same(), "{equal:?}");
    assert_eq!((equal.records, equal.old.calls), (many, many));
    assert_eq!(equal.old.effects, equal.new.effects);
    let planted = compared(&bench, &old, &counter(&bench, "0.2.0", Some(7_717)), &file, None);
    assert_eq!(planted.differing, 1, "{:?}", planted.first);
    let [found] = planted.first.as_slice() else { panic!("{:?}", planted.first) };
    assert_eq!(found.offset, Some(7_717));
    assert_eq!(found.differences[0].place, "state.last/00000000000000000717");
    assert_eq!(planted.old.effects, equal.old.effects, "two runs are the same to the byte");
    assert_ne!(planted.old.effects, planted.new.effects);
    assert_eq!(planted.state.different, 0, "it was written over");
    let file = numbers(&dir, 2_000);
    let late = compared(&bench, &old, &counter(&bench, "0.3.0", Some(1_999)), &file, None);
    assert_eq!((late.differing, late.state.different), (1, 1));
    assert_eq!(late.state.keys, ["last/00000000000000000999"]);
}

#[test]
fn versions_are_compared_from_a_state_that_the_old_one_has_made() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBench::new().unwrap();
    let file = numbers(&dir, 5_000);
    let (old, new) = (counter(&bench, "0.1.0", None), counter(&bench, "0.2.0", Some(100)));
    let begin = Events::open(&file).unwrap().begin();
    let since = begin.after(std::time::Duration::from_secs(4_000));
    let compared = compared(&bench, &old, &new, &file, Some(since));
    assert_eq!((compared.before, compared.records), (4_000, 1_000));
    assert!(compared.is_same(), "the number that is taken for another came before: {compared:?}");
    assert_eq!((compared.old.calls, compared.new.version.as_str()), (1_000, "0.2.0"));
}

#[test]
fn a_plugin_is_tried_on_recorded_events_with_crashes_and_replacements() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBench::new().unwrap();
    // More than 1,000 events are interrupted at a sample of the places.
    let many = tier::repeats(1_100, 3_000) as u64;
    let file = numbers(&dir, many);
    let open = || Events::open(&file);
    let runs = Runs::default();
    let remembers = counter(&bench, "0.1.0", None);
    let (report, did) = try_on(&bench, &remembers, &given(&file), open, &runs).unwrap();
    assert!(report.is_well(), "{report}");
    assert_eq!((report.crashes, did.calls, did.state_writes), (Some(250), many, 2 * many));
    // Of this much is let go on the way: of the entries, of the documents of their time, of the publishes.
    let file = recorded(&dir, many, |number| {
        let node =
            json!({ "node_id": format!("n{}", number % 50), "status": "online", "text": "x".repeat(1_000) });
        message("dim.nodes.heartbeat", &node.to_string())
    });
    let registry = bench.bundled("node-registry").unwrap();
    let (report, did) = try_on(&bench, &registry, &given(&file), || Events::open(&file), &runs).unwrap();
    assert!(report.is_well(), "{report}");
    assert!(did.calls > many && did.names > 50, "{did:?}");
}

/// What waits for the commit is limited in a host, whose commit is another thread; a trial has but one.
#[test]
fn messages_as_large_as_may_be_are_handled_however_many() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBench::new().unwrap();
    let large = "x".repeat(1 << 20);
    // More than may wait for the commit, many times over in the exhaustive tier.
    let count = tier::repeats(40, 150) as u64;
    let file = recorded(&dir, count, |_| message("forgetful.in", &large));
    let plugin = counter(&bench, "0.1.0", None);
    let runs = Runs::default();
    let (report, did) = try_on(&bench, &plugin, &given(&file), || Events::open(&file), &runs).unwrap();
    assert!(report.is_well(), "{report}");
    assert_eq!(did.dead, count);
    let compared = compared(&bench, &plugin, &plugin, &file, None);
    assert!(compared.is_same() && compared.records == count);
}

/// A document that was replaced may still be read by its path, as on a host that keeps it.
#[test]
fn a_plugin_reads_what_it_wrote_over_whenever_it_is_committed() {
    let bench = TestBench::new().unwrap();
    let probe = bench.plugin(&std::fs::read(dim_tests::PROBE).unwrap()).unwrap();
    let first = NameValue::document("first".into()).path();
    let command = |steps: Value| json!({ "command": "run", "body": dim_tests::script(steps) });
    let update = |data: &str| json!([{ "do": "update-state", "key": "probe-key", "data": data }]);
    let idle = json!([{ "do": "get", "key": "none", "pad": "x".repeat(300_000) }]);
    let reads = json!([
        { "do": "publish-name", "key": "second", "path": first },
        { "do": "get-state", "name": "second" },
    ]);
    let mut read = command(reads);
    read["expect"] = json!({ "reply": [{ "ok": null }, { "ok": "first" }] });
    let mut steps = vec![command(update("first")), command(update("next"))];
    steps.extend((0..4).map(|_| json!({ "message": "probe.in", "data": dim_tests::script(idle.clone()) })));
    steps.push(read);
    let given = json!({ "config": { "keys": ["probe-key", "second"] } });
    let text = json!({ "given": given, "steps": steps }).to_string();
    let report = Scenario::parse("it", &text).unwrap().run(&bench, &probe, &Runs::default()).unwrap();
    assert!(report.is_well(), "{report}");
}

#[test]
fn what_is_no_export_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = numbers(&dir, 3);
    let text = std::fs::read_to_string(&file).unwrap();
    let wrong = |text: String| {
        std::fs::write(&file, text).unwrap();
        let outcome = Events::open(&file).and_then(|events| events.collect::<Result<Vec<Record>, _>>());
        let error = outcome.unwrap_err();
        format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default())
    };
    assert!(wrong(String::new()).contains("has no first line"));
    assert!(wrong("{}\n".to_owned()).contains("line 1"));
    assert!(wrong(text.replace("\"dim_events\":1", "\"dim_events\":2")).contains("form 2"));
    assert!(wrong(text.replace("5a5a", "zz")).contains("64 hex digits"));
    let cut = wrong(text[..text.len() - 30].to_owned());
    assert!(cut.contains("line 4"), "{cut}");
    let sort = wrong(text.replace("message", "massage"));
    assert!(sort.contains("line 2") && sort.contains("unknown field `massage`"), "{sort}");
    let again = wrong(text.replace("\"offset\":1", "\"offset\":0"));
    assert!(again.contains("line 3") && again.contains("offsets of records rise"), "{again}");
    let no_bytes = wrong(text.replace("\"text\":\"1\"", "\"base64\":\"?\""));
    assert!(no_bytes.contains("line 3: base64"), "{no_bytes}");
    assert!(Header::read("{").is_err());
}

#[test]
fn what_a_host_has_heard_is_exported_and_handled_again_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let host = Program::start(Path::new(PROGRAM), &dir.path().join("state"), &["--embedded"]);
    for number in 0..20 {
        let beat = json!({ "node_id": format!("n{}", number % 3), "text": "ünïcode" }).to_string();
        assert!(host.dim(&["topic", "pub", "dim.nodes.heartbeat", &beat]).status.success());
    }
    host.json(&["job", "update", "j1", "running", "--data", r#"{"node_id":"n1"}"#]);
    assert!(host.dim(&["topic", "pub", "dim.jobs.updates", "nonsense"]).status.success());
    dim_tests::soon(|| host.json(&["dead", "ls"]).as_array().unwrap().len() == 1);
    let file = dir.path().join("events.ndjson");
    let path = file.to_str().unwrap();
    let told = host.json(&["events", "export", "-o", path]);
    assert_eq!(told["bytes"], std::fs::metadata(&file).unwrap().len());
    let there = host.dim(&["events", "export", "-o", path]);
    assert!(String::from_utf8_lossy(&there.stderr).contains("--force replaces it"));
    let of_jobs = dir.path().join("jobs.ndjson");
    host.json(&["events", "export", "-o", of_jobs.to_str().unwrap(), "--plugin", "job-tracker"]);
    let records: Vec<Record> = Events::open(&of_jobs).unwrap().map(Result::unwrap).collect();
    let texts: Vec<String> = records.iter().map(|record| json!(record.what).to_string()).collect();
    assert!(
        texts.iter().any(|text| text.contains("nonsense"))
            && texts.iter().any(|text| text.contains("\"command\""))
    );
    assert!(!texts.iter().any(|text| text.contains("ünïcode")), "that is not for it");
    let none = host.dim(&["events", "export", "-o", "-", "--since", "2100-01-01T00:00:00Z"]);
    assert_eq!(String::from_utf8(none.stdout).unwrap().lines().count(), 1, "only what is told of the host");
    assert_eq!(host.dim(&["events", "export", "-o", "-", "--plugin", "nobody"]).status.code(), Some(3));
    // Handled again, it ends in the state that the host has.
    let bench = TestBench::new().unwrap();
    let tracker = bench.bundled("job-tracker").unwrap();
    let given = Given { config: config_of(&file, "job-tracker"), ..given(&file) };
    let (report, did) = try_on(&bench, &tracker, &given, || Events::open(&file), &Runs::default()).unwrap();
    assert!(report.is_well(), "{report}");
    assert_eq!((did.dead, did.publishes), (1, 1));
}

fn config_of(file: &Path, plugin: &str) -> serde_json::Map<String, Value> {
    let header = Events::open(file).unwrap().header;
    header.plugins[plugin].as_object().unwrap().clone()
}

/// A script that notes a number.
fn note(number: u64) -> Value {
    dim_tests::script(json!([{ "do": "note", "key": "heard", "what": number }]))
}

#[test]
fn a_scenario_plays_members_their_gaps_and_a_plugin_that_joins_late() {
    let bench = TestBench::new().unwrap();
    let probe = bench.plugin(&std::fs::read(dim_tests::PROBE).unwrap()).unwrap();
    let message =
        |from: &str, number: u64| json!({ "message": "probe.in", "from": from, "data": note(number) });
    let run = |steps: Value| json!({ "command": "run", "body": dim_tests::script(steps) });
    let steps = json!([
        message("member a", 0),
        { "missing": "probe.in", "from": "member a", "count": 2 },
        message("member a", 3),
        { "wait": "1h" },
        message("member b", 4),
        // It gets what the members have kept, and the gap.
        run(json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }])),
        message("member a", 5),
        run(json!([{ "do": "unsubscribe", "topic": "probe.in" }])),
        message("member b", 6),
        run(json!([{ "do": "subscribe", "topic": "probe.in" }])),
        message("member b", 7),
        run(json!([{ "do": "unsubscribe", "topic": "probe.in" }])),
        // Half an hour before, two events of one member were published.
        run(json!([{ "do": "subscribe", "topic": "probe.in", "from": 1_767_225_600_000_000_000_u64 + 1 }])),
        message("member a", 8),
    ]);
    let heard = [0, 3, 4, 5, 7, 4, 5, 6, 7, 8];
    let include = json!({
        "state": {
            "heard": heard,
            "gaps": [{ "topic": "probe.in", "missing": { "first": 1, "next": 3, "incarnation": "<any>" } }],
        },
        "hears": ["probe.in"],
    });
    let given = json!({ "config": { "topics": ["probe.*"] } });
    let text = json!({ "given": given, "steps": steps, "include": include }).to_string();
    let report = Scenario::parse("it", &text).unwrap().run(&bench, &probe, &Runs::default()).unwrap();
    assert!(report.is_well() && report.crashes > Some(5), "{report}");
    for (step, why) in [
        (json!({ "missing": "probe.in", "from": "alice" }), "`missing` needs `from: member NAME`"),
        (json!({ "wait": "1s", "count": 2 }), "\"count\" does not belong to this step"),
    ] {
        let text = json!({ "steps": [step] }).to_string();
        let error = Scenario::parse("it", &text).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

/// The events of a member as a host exports them, for a plugin that had caught up before, and for one that catches up.
#[test]
fn recorded_events_of_members_come_to_a_plugin_as_they_came_on_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBench::new().unwrap();
    let probe = bench.plugin(&std::fs::read(dim_tests::PROBE).unwrap()).unwrap();
    let writer = "k51qzi5uqu5dlmit2tuwdvnx4sbnyqgmvbxftl0eo3f33wwtb9gr7yozae9kpw";
    let member = |sequence: u64| {
        let from = format!("member {writer} {} {sequence} 2026-01-01T00:00:00Z", "07".repeat(16));
        json!({ "topic": "probe.in", "from": from, "text": note(sequence).to_string() })
    };
    let subscribe =
        dim_tests::script(json!([{ "do": "subscribe", "topic": "probe.in", "from": "earliest" }]));
    let subscribe =
        json!({ "command": { "plugin": "probe", "method": "run", "body": subscribe.to_string() } });
    let who = json!({ "plugin": "probe", "subscription": 1 });
    let of = |mut event: Value| {
        event["earlier_for"] = who.clone();
        json!({ "message": event })
    };
    let live = |sequence| json!({ "message": member(sequence) });
    let state = |kind: &str| json!({ kind: { "plugin": "probe", "subscription": 1, "topic": "probe.in" } });
    let catching_up = [
        subscribe.clone(),
        state("catching_up"),
        live(2),
        of(member(0)),
        of(member(1)),
        of(member(2)),
        state("caught_up"),
        live(3),
    ];
    let at_once = [subscribe, live(0), live(1), live(2), live(3)];
    for records in [&catching_up[..], &at_once[..]] {
        let file = recorded(&dir, records.len() as u64, |number| records[number as usize].clone());
        let config = json!({ "topics": ["probe.*"] }).as_object().unwrap().clone();
        let given = Given { config, ..given(&file) };
        let runs = Runs::default();
        let (report, did) = try_on(&bench, &probe, &given, || Events::open(&file), &runs).unwrap();
        assert!(report.is_well(), "{report}");
        // The command and four events.
        assert_eq!((did.calls, did.dead), (5, 0), "{did:?}");
    }
}
