//! How fast the way of an event is, beside the limits that it cannot pass: the same logic in native
//! code, the same without a sync, a bare fsync. Everything in one run, so that ratios hold on a
//! noisy machine. `cargo bench -p dim-tests`; `-- quick` for a tenth of the events.

mod native;

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_model::entry::{Event, Kind, Origin};
use dim_model::ident::{PeerName, Topic};
use dim_server::config::Config;
use dim_server::host::{Host, Options};
use dim_tests::measurement::{percentile, runtime};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tempfile::TempDir;

const TOPIC: &str = "dim.nodes.heartbeat";

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    let events = if quick { 40_000 } else { 400_000 };
    runtime().block_on(async {
        let warm = TempDir::new().expect("a directory");
        drop(start(&warm, "", "immediate").await);
        println!("| heartbeats a second | 1,000 nodes | 50,000 nodes, random order |");
        println!("|---|---|---|");
        for (label, setup) in [
            ("`node-registry` alone, durable", Setup::Registry("immediate")),
            ("the same without a sync", Setup::Registry("eventual")),
            ("its logic in native code, durable", Setup::Native("immediate")),
            ("its logic in native code, without a sync", Setup::Native("eventual")),
            ("all three plugins, timers and documents, durable", Setup::All),
        ] {
            let mut cells = Vec::new();
            for nodes in [1_000, 50_000] {
                cells.push(throughput(&warm, setup, nodes, events).await);
            }
            println!("| {label} | {} | {} |", cells[0], cells[1]);
        }
        println!();
        latency(&warm, if quick { 200 } else { 2_000 }).await;
        readiness(&warm).await;
        memory(&warm).await;
    });
}

#[derive(Clone, Copy)]
enum Setup {
    Registry(&'static str),
    Native(&'static str),
    All,
}

fn config(bundled: &[&str], more: &str, durability: &str) -> Config {
    let mut yaml = format!("store:\n  durability: {durability}\nplugins:\n");
    for name in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
        yaml.push_str(&format!("  {name}:\n    disabled: {}\n", !bundled.contains(&name)));
    }
    yaml.push_str(more);
    Config::parse(&yaml).expect("the config is right")
}

async fn start(warm: &TempDir, more: &str, durability: &str) -> (TempDir, Arc<Host>) {
    let all = ["job-tracker", "node-registry", "heartbeat-watchdog"];
    start_with(warm, config(&all, more, durability)).await
}

/// Starts a host with the components that were compiled before.
async fn start_with(warm: &TempDir, config: Config) -> (TempDir, Arc<Host>) {
    let dir = TempDir::new().expect("a directory");
    copy(&warm.path().join("compiled"), &dir.path().join("compiled"));
    let host = Host::start(Options::new(config, dir.path())).await.expect("the host starts");
    copy(&dir.path().join("compiled"), &warm.path().join("compiled"));
    (dir, host)
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for file in std::fs::read_dir(from).into_iter().flatten().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
    }
}

/// Heartbeats of about 300 bytes.
fn heartbeats(nodes: usize, events: usize) -> Vec<Kind> {
    let topic: Topic = TOPIC.parse().expect("a topic");
    let peer: PeerName = dim_ipfs::embedded::new_peer();
    let mut random = StdRng::seed_from_u64(7);
    let mut order: Vec<usize> = (0..events).map(|index| index % nodes).collect();
    order.shuffle(&mut random);
    let beat = |node: usize| {
        let free = random.random_range(1..64);
        let data = format!(
            "{{\"node_id\":\"node-{node:06}\",\"timestamp\":\"2026-01-01T00:00:00.000000\",\"status\":\"online\",\
             \"resources\":{{\"cpu_available\":{free},\"memory_available\":{free}.5,\"gpu_available\":1}},\
             \"cached_models\":[\"llama-3-8b-instruct\",\"mistral-7b-instruct-v0.3\",\"qwen2.5-coder-14b\"]}}"
        );
        Kind::Event(Event::Message {
            topic: topic.clone(),
            data: Bytes::from(data),
            origin: Origin::Peer(peer.clone()),
        })
    };
    order.into_iter().map(beat).collect()
}

async fn throughput(warm: &TempDir, setup: Setup, nodes: usize, events: usize) -> String {
    let (bundled, durability): (&[&str], _) = match setup {
        Setup::Registry(durability) => (&["node-registry"], durability),
        Setup::Native(durability) => (&[], durability),
        Setup::All => (&["job-tracker", "node-registry", "heartbeat-watchdog"], "immediate"),
    };
    let beats = heartbeats(nodes, events);
    let (_dir, host) = start_with(warm, config(bundled, "", durability)).await;
    let native = matches!(setup, Setup::Native(_)).then(|| native::Registry::start(&host));
    // Every node is known before the time is taken.
    feed(&host, heartbeats(nodes, nodes)).await;
    settled(&host, native.as_ref()).await;
    let before = Measured::of(&host);
    let begun = Instant::now();
    feed(&host, beats).await;
    settled(&host, native.as_ref()).await;
    let elapsed = begun.elapsed();
    let spent = Measured::of(&host);
    if let Some(native) = native {
        native.stop();
    }
    host.shutdown().await;
    let rate = events as f64 / elapsed.as_secs_f64();
    eprintln!("    {nodes} nodes: {}", spent.since(&before, elapsed, events));
    format!("{:.0}k", rate / 1e3)
}

async fn feed(host: &Arc<Host>, kinds: Vec<Kind>) {
    let log = host.storage.log.clone();
    let feeding = tokio::task::spawn_blocking(move || {
        for kind in kinds {
            log.append(kind);
        }
    });
    feeding.await.expect("feeding does not panic");
}

/// Waits until everything in the log is handled and durable.
async fn settled(host: &Arc<Host>, native: Option<&native::Registry>) {
    let head = host.storage.log.head().0;
    loop {
        for (name, plugin) in host.plugins.all() {
            assert_eq!(plugin.handle.status().reason, None, "{name} does not start");
        }
        let behind = host.plugins.all().values().any(|plugin| plugin.handle.status().cursor < head);
        if !behind && native.is_none_or(|native| native.cursor() >= head) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        host.plugins.all().values().for_each(|plugin| plugin.handle.wake());
    }
    for _ in 0..2 {
        host.storage.commit.write(|_| Ok(())).await.expect("the host commits");
    }
}

/// Where time goes.
struct Measured {
    commits: u64,
    commit_time: Duration,
    plugins: Duration,
}

impl Measured {
    fn of(host: &Host) -> Self {
        let counters = &host.storage.commit.counters;
        let cpu = host.plugins.all().values().map(|plugin| plugin.handle.status().cpu).sum();
        Self {
            commits: counters.commits.load(Ordering::Relaxed),
            commit_time: Duration::from_nanos(counters.nanoseconds.load(Ordering::Relaxed)),
            plugins: Duration::from_nanos(cpu),
        }
    }

    fn since(&self, before: &Self, elapsed: Duration, events: usize) -> String {
        let each = |time: Duration| time.as_secs_f64() * 1e6 / events as f64;
        let commits = self.commits - before.commits;
        format!(
            "{:.1} us an event: plugin threads {:.1} us of CPU, commits {:.1} us ({commits} of {} events)",
            each(elapsed),
            each(self.plugins - before.plugins),
            each(self.commit_time - before.commit_time),
            events as u64 / commits.max(1),
        )
    }
}

/// From a message to its commit at low load, beside a bare fsync.
async fn latency(warm: &TempDir, rounds: usize) {
    let (dir, host) = start_with(warm, config(&["node-registry"], "", "immediate")).await;
    let mut file = std::fs::File::create(dir.path().join("bare")).expect("a file");
    let (mut commits, mut syncs) = (Vec::new(), Vec::new());
    let beats = heartbeats(1_000, rounds);
    feed(&host, heartbeats(1_000, 1_000)).await;
    settled(&host, None).await;
    for beat in beats {
        tokio::time::sleep(Duration::from_micros(500)).await;
        let handled = host.storage.commit.counters.handled.load(Ordering::Acquire);
        let begun = Instant::now();
        host.storage.log.append_now([beat]);
        while host.storage.commit.counters.handled.load(Ordering::Acquire) == handled {
            std::hint::spin_loop();
        }
        commits.push(begun.elapsed());
        let begun = Instant::now();
        file.write_all(&[7; 4096]).and_then(|()| file.sync_data()).expect("a sync");
        syncs.push(begun.elapsed());
    }
    host.shutdown().await;
    println!("| one message at low load | p50 | p99 |");
    println!("|---|---|---|");
    for (label, mut times) in
        [("from the log to its commit", commits), ("a bare write of 4 KiB and fsync", syncs)]
    {
        times.sort();
        let at = |share| percentile(&times, share).as_secs_f64() * 1e3;
        println!("| {label} | {:.2} ms | {:.2} ms |", at(0.5), at(0.99));
    }
    println!();
}

async fn readiness(warm: &TempDir) {
    let mut times = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        let (_dir, host) = start(warm, "", "immediate").await;
        while host.plugins.all().values().any(|plugin| plugin.handle.status().state != "running") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.push(begun.elapsed());
        host.shutdown().await;
    }
    times.sort();
    println!(
        "Time to ready with a warm cache, three plugins: {:.0} ms (median of 5).\n",
        times[2].as_secs_f64() * 1e3
    );
}

async fn memory(warm: &TempDir) {
    let probe = |number: usize| {
        format!(
            "  probe-{number}:\n    file: {:?}\n    grants: {{ subscribe: [probe.in] }}\n",
            dim_tests::PROBE
        )
    };
    let resident = |count: usize| async move {
        let more: String = (0..count).map(probe).collect();
        let (_dir, host) = start_with(warm, config(&[], &more, "immediate")).await;
        while host.plugins.all().values().any(|plugin| plugin.handle.status().state != "running") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux");
        let pages: usize = pages.split(' ').nth(1).expect("a second field").parse().expect("a number");
        host.shutdown().await;
        pages * 4096
    };
    let (one, hundred) = (resident(1).await, resident(101).await);
    let each = (hundred.saturating_sub(one)) as f64 / 100.0 / 1024.0;
    println!("Memory of 100 more plugins: {each:.0} KiB resident each.");
}
