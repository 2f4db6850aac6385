//! How fast recorded events are handled again and compared: 100,000 of them, beside reading the file alone and beside one
//! version alone; a difference in one of them that must be found; and a week of heartbeats in a scenario.
//! `cargo bench -p dim-tests --bench compare`; `-- quick` for a tenth.

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use dim_model::time::Timestamp;
use dim_scenarios::{Events, Given, Identity, Plugin, Runs, Scenario, TestBench, compare, try_on};
use dim_tests::component::with_manifest;
use serde_json::{Value, json};
use tempfile::TempDir;

const PEER: &str = "peer 12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF";

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    let count = if quick { 10_000 } else { 100_000 };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bench = TestBench::new().expect("a bench");
    println!(
        "| {count} records | reading alone | one version | two compared | they differ in |\n|---|---|---|---|---|"
    );
    let heartbeats = recorded(&dir, "heartbeats", count, |number| {
        message("dim.nodes.heartbeat", &json!({
            "node_id": format!("n{}", number % 1_000), "status": "online", "timestamp": 1_767_225_600 + number / 100,
            "resources": { "cpu_available": 3.5, "memory_available": number % 64, "gpu_available": 1 },
            "cached_models": ["llama-3-8b", "phi-3-mini", "mistral-7b"],
        }).to_string())
    });
    let registry = bench.bundled("node-registry").expect("it comes with the host");
    row(&bench, "heartbeats, node-registry", (&registry, &registry), &heartbeats, count, 0);
    let jobs = recorded(&dir, "jobs", count, |number| {
        let status = ["created", "running", "progress", "completed"][(number / 1_000 % 4) as usize];
        let id = format!("j{}-{}", number % 1_000, number / 4_000);
        message(
            "dim.jobs.updates",
            &json!({ "job_id": id, "event_type": status, "node_id": "n1" }).to_string(),
        )
    });
    let tracker = bench.bundled("job-tracker").expect("it comes with the host");
    row(&bench, "job events, job-tracker", (&tracker, &tracker), &jobs, count, 0);
    let numbers = recorded(&dir, "numbers", count, |number| message("forgetful.in", &number.to_string()));
    let (old, new) = (counter(&bench, "0.1.0", None), counter(&bench, "0.2.0", Some(count / 2 + 17)));
    row(&bench, "numbers, with one mistake planted", (&old, &new), &numbers, count, 1);
    week(&bench);
}

fn row(
    bench: &TestBench,
    what: &str,
    (old, new): (&Plugin, &Plugin),
    file: &Path,
    count: u64,
    differing: u64,
) {
    let open = || Events::open(file);
    let begun = Instant::now();
    assert_eq!(open().expect("events").map(Result::unwrap).count() as u64, count);
    let reading = begun.elapsed().as_secs_f64();
    let events = open().expect("events");
    let host = Identity::recorded(&events.header).expect("a header");
    let given = Given { time: events.begin(), host, ..Given::default() };
    let alone = Runs { crash: false, replace: false, record: false };
    let (_, once) = in_thread(|| try_on(bench, old, &given, open, &alone));
    let begun = Instant::now();
    let (_, twice) = in_thread(|| try_on(bench, old, &given, open, &alone));
    let one = begun.elapsed().as_secs_f64();
    assert_eq!(once.effects, twice.effects, "two runs of one version are the same");
    let compared = in_thread(|| compare(bench, (old, new), (&given, &given), events, None, |_| {}));
    assert_eq!(compared.differing, differing, "{:?}", compared.first);
    let rate = |seconds: f64| format!("{:.0} a second", count as f64 / seconds);
    println!(
        "| {what} | {} | {} | {} | {} |",
        rate(reading),
        rate(one),
        rate(compared.seconds),
        compared.differing
    );
}

fn in_thread<R: Send, E: std::fmt::Debug + Send>(does: impl FnOnce() -> Result<R, E> + Send) -> R {
    std::thread::scope(|scope| scope.spawn(does).join().expect("it does not panic")).expect("it goes well")
}

/// A week of heartbeats, as the guide has it.
fn week(bench: &TestBench) {
    let watchdog = bench.bundled("heartbeat-watchdog").expect("it comes with the host");
    let text = "steps:\n- repeat: 20160\n  every: 30s\n  steps:\n  - message: dim.nodes.heartbeat\n    data: { node_id: n1 }\n";
    let scenario = Scenario::parse("week", text).expect("a scenario");
    let alone = Runs { crash: false, replace: false, record: false };
    println!("\n| a week of heartbeats, every 30 s | entries | seconds |\n|---|---|---|");
    for (name, runs) in
        [("as it is written", alone), ("and with crashes, and with replacements", Runs::default())]
    {
        let report = scenario.run(bench, &watchdog, &runs).expect("it runs");
        assert!(report.is_well(), "{report}");
        println!("| {name} | {} | {:.2} |", report.entries, report.took.as_secs_f64());
    }
}

/// The forgetful plugin, which remembers; as another version it takes one number for another.
fn counter(bench: &TestBench, version: &str, slips_at: Option<u64>) -> Plugin {
    let slips = slips_at.map_or(String::new(), |at| format!("default = {at}\n"));
    let manifest = include_str!("../../guests/examples/forgetful.toml");
    let manifest = manifest.replace("0.1.0", version).replace("default = \"memory\"", "default = \"state\"");
    let component = std::fs::read(dim_tests::FORGETFUL).expect("it is built");
    bench.plugin(&with_manifest(&component, &format!("{manifest}{slips}"))).expect("a plugin")
}

fn message(topic: &str, text: &str) -> Value {
    json!({ "message": { "topic": topic, "from": PEER, "text": text } })
}

/// A file with so many records, a hundred each second.
fn recorded(dir: &TempDir, name: &str, count: u64, what: impl Fn(u64) -> Value) -> PathBuf {
    let file = dir.path().join(name);
    let mut out = BufWriter::new(std::fs::File::create(&file).expect("a file"));
    let time = |number: u64| Timestamp(1_767_225_600_000_000_000 + number * 10_000_000);
    let header = json!({
        "dim_events": 1, "host": PEER.trim_start_matches("peer "), "random": "5a".repeat(32), "keys": {},
        "plugins": {}, "until": time(count),
    });
    writeln!(out, "{header}").expect("it can be written");
    for number in 0..count {
        let mut record = what(number);
        record["offset"] = number.into();
        record["time"] = json!(time(number));
        writeln!(out, "{record}").expect("it can be written");
    }
    out.flush().expect("it can be written");
    file
}
