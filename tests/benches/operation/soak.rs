//! A large fleet over a long time, with troubles at random: what the host takes must stay flat.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use dim_client::{Address, Client, JobUpdate};
use dim_ipfs::Backend;
use dim_tests::{Fault, FaultProxy, Kubo, Program, directly};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

const NODES: usize = 2_000;

/// How often each node is heard.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(60);

pub fn run(minutes: u64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(soak(Duration::from_secs(minutes * 60)));
}

async fn soak(length: Duration) {
    let seed = rand::rng().next_u64();
    println!("seed {seed}; {NODES} nodes, a heartbeat every {HEARTBEAT:?} each");
    let (near, far) = Kubo::start_pair().expect("a Kubo");
    let target: SocketAddr = near.url().trim_start_matches("http://").parse().expect("an address");
    let proxy = FaultProxy::start(target, seed).await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = dir.path().join("state");
    std::fs::create_dir(&state).expect("a directory");
    let config = dir.path().join("config.yaml");
    // So small that it is full, and trimmed, before half of the time is over.
    let yaml = json!({ "store": { "log": { "max_bytes": 16 << 20, "max_document_bytes": 16 << 20 } } });
    std::fs::write(&config, yaml.to_string()).expect("a config");
    let api = proxy.api();
    let args = ["--kubo", api.as_str(), "--config", config.to_str().expect("a path")];
    let host = tokio::task::block_in_place(|| Program::start(Path::new(PROGRAM), &state, &args));
    let network = directly(&far);
    let deadline = Instant::now() + length;
    tokio::join!(
        heartbeats(&network, deadline),
        jobs(&host, deadline),
        troubles(&proxy, &near, &far, seed, deadline),
        looks(&host, &near, &state, deadline),
    );
    let asked = host.json(&["plugin", "query", "heartbeat-watchdog", "list", "{\"standing\":\"dead\"}"]);
    println!("called dead although they lived: {}", asked.as_array().expect("a list").len());
    let troubles = host.json(&["status"])["troubles"].clone();
    println!("troubles at the end: {troubles}");
}

async fn heartbeats(network: &Backend, deadline: Instant) {
    let topic = "dim.nodes.heartbeat".parse().expect("a topic");
    let mut tick = tokio::time::interval(HEARTBEAT / NODES as u32);
    for number in (0..NODES).cycle() {
        tick.tick().await;
        if Instant::now() > deadline {
            return;
        }
        let heartbeat = json!({
            "node_id": format!("node-{number:04}"), "status": "online", "timestamp": jiff::Timestamp::now(),
            "resources": { "cpu_available": number % 64, "memory_available": number % 512, "gpu_available": 1 },
            "cached_models": ["llama-3-8b"],
        });
        // The nodes' own daemon is well; one message that it refuses is as one lost on the way.
        let _ = network.pubsub.publish(&topic, heartbeat.to_string().into()).await;
    }
}

async fn jobs(host: &Program, deadline: Instant) {
    let client = Client::new(Address::Unix(host.socket())).expect("a client");
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    for number in 0_u64.. {
        tick.tick().await;
        if Instant::now() > deadline {
            return;
        }
        let job = format!("job-{}", number / 2);
        let word = if number % 2 == 0 { "running" } else { "completed" };
        client.fleet().update_job_status(&job, &JobUpdate::new(word)).await.expect("commands go on");
    }
}

/// A trouble of up to half a minute, and a calm of up to a minute, in turn.
async fn troubles(proxy: &FaultProxy, near: &Kubo, far: &Kubo, seed: u64, deadline: Instant) {
    let mut random = StdRng::seed_from_u64(seed);
    while Instant::now() < deadline {
        tokio::time::sleep(random.random_range(Duration::from_secs(5)..Duration::from_secs(60))).await;
        let faults = [Fault::Stopped, Fault::Frozen, Fault::Refusing, Fault::Cutting, Fault::Slow];
        let length = random.random_range(Duration::from_secs(2)..Duration::from_secs(30));
        match faults.get(random.random_range(0..=faults.len())) {
            Some(fault) => {
                proxy.set(*fault);
                tokio::time::sleep(length).await;
                proxy.set(Fault::None);
            }
            None => {
                tokio::task::block_in_place(|| near.cut_off());
                tokio::time::sleep(length).await;
                tokio::task::block_in_place(|| near.reconnect(far));
            }
        }
    }
    proxy.set(Fault::None);
}

async fn looks(host: &Program, near: &Kubo, state: &Path, deadline: Instant) {
    println!(
        "| minute | resident MiB | threads | files | store MiB | held MiB | pins | waiting | nodes heard | gaps |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let begun = Instant::now();
    while Instant::now() < deadline {
        tokio::time::sleep(LOOK.min(deadline.saturating_duration_since(Instant::now()))).await;
        tokio::task::block_in_place(|| look(host, near, state, begun.elapsed()));
    }
}

fn look(host: &Program, near: &Kubo, state: &Path, at: Duration) {
    let status = host.json(&["status"]);
    let held: u64 =
        status["disk"]["held_bytes"].as_object().expect("parts").values().filter_map(Value::as_u64).sum();
    let pins = near.ipfs(&["pin", "ls", "--type=recursive", "--quiet"]).lines().count();
    let process = host.pid();
    let status_of = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a process");
    let number = |name: &str| {
        let line = status_of.lines().find(|line| line.starts_with(name)).expect("a line");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number")
    };
    let files = std::fs::read_dir(format!("/proc/{process}/fd")).expect("a process").count();
    let store = std::fs::metadata(state.join("dim.redb")).expect("a file").len();
    let nodes = host.json(&["plugin", "query", "heartbeat-watchdog", "list", "{\"standing\":\"alive\"}"]);
    let metrics = host.metrics();
    let gaps =
        metrics.lines().find(|line| line.starts_with("dim_topic_gaps_total{topic=\"dim.nodes.heartbeat\"}"));
    println!(
        "| {} | {} | {} | {files} | {} | {} | {pins} | {} | {} | {} |",
        at.as_secs() / 60,
        number("VmRSS:") >> 10,
        number("Threads:"),
        store >> 20,
        held >> 20,
        status["outbox"]["waiting"],
        nodes.as_array().expect("a list").len(),
        gaps.and_then(|line| line.rsplit(' ').next()).unwrap_or("0"),
    );
}
