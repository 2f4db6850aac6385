//! How soon a host is ready after `kill -9` on a large store, with and without the page cache.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dim_client::{Address, Client};
use dim_tests::Program;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// Keys that one command writes, of a kilobyte each; the command itself is in the log.
const KEYS: u64 = 1_000;

pub fn run(gigabytes: u64) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = dir.path().join("state");
    std::fs::create_dir(&state).expect("a directory");
    let config = dir.path().join("config.yaml");
    let probe = json!({
        "file": dim_tests::PROBE, "grants": {}, "limits": { "state-bytes": 64_u64 << 30, "call-cpu-ms": 10_000 },
    });
    let yaml = json!({ "plugins": { "probe": probe }, "store": { "log": { "max_bytes": 64_u64 << 30 } } });
    std::fs::write(&config, yaml.to_string()).expect("a config");
    let args = ["--embedded", "--config", config.to_str().expect("a path")];
    let start = || Program::start(Path::new(PROGRAM), &state, &args);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (mut host, mut next) = (start(), 0);
    let file = state.join("dim.redb");
    while held(&host) < gigabytes << 30 {
        next = runtime.block_on(fill(&host, next, 50));
    }
    println!("{next} keys; the file has {} MiB", file.metadata().expect("a file").len() >> 20);
    println!("| killed under load | ready after, five times |");
    println!("|---|---|");
    for (words, is_cold) in [("pages in memory", false), ("pages on the disk only", true)] {
        let mut took = Vec::new();
        for _ in 0..5 {
            next = runtime.block_on(async {
                let working = fill(&host, next, 20);
                tokio::time::timeout(Duration::from_millis(200), working).await.unwrap_or(next + KEYS * 20)
            });
            host.kill();
            if is_cold {
                forget(&file);
            }
            let begun = Instant::now();
            host = start();
            took.push(begun.elapsed());
        }
        println!("| {words} | {took:.2?} |");
    }
}

/// What the store holds.
fn held(host: &Program) -> u64 {
    let held = host.json(&["status"])["disk"]["held_bytes"].clone();
    held.as_object().expect("parts").values().filter_map(Value::as_u64).sum()
}

async fn fill(host: &Program, first: u64, commands: u64) -> u64 {
    let client = Client::new(Address::Unix(host.socket())).expect("a client");
    let mut next = first;
    for _ in 0..commands {
        let value = "v".repeat(1_000);
        let sets: Vec<Value> = (next..next + KEYS)
            .map(|number| json!({ "do": "set", "key": format!("{:016x}", number.wrapping_mul(0x9E37_79B9_7F4A_7C15)), "value": value }))
            .collect();
        let path = ["plugins", "probe", "commands", "run"];
        let body = json!({ "script": sets });
        let sent = client.http().send_json::<Value>(reqwest::Method::POST, &path, &[], &body).await;
        sent.expect("the host takes it");
        next += KEYS;
    }
    next
}

/// Lets the system forget the pages of a file.
fn forget(file: &PathBuf) {
    let file = std::fs::File::open(file).expect("a file");
    file.sync_all().expect("a sync");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
}
