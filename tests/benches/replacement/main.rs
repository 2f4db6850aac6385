//! What replacing a plugin costs while it works: 1,000 replacements in a row under a steady load of events,
//! commands and timers, beside the same load without any; what a migration and a takeback take, and a start
//! with 200 new plugins. Every entry must be handled once and in order, and the publishes must be those of
//! the recorded log without replacements. `cargo bench -p dim-tests --bench replacement`; `-- quick` for fifty replacements.

mod many;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_model::entry::{Event, Kind, Offset, Origin};
use dim_model::ident::{PluginName, Topic};
use dim_server::config::Config;
use dim_server::host::{Host, Options};
use dim_server::replay::Replay;
use dim_store::change::{Change, Pause};
use dim_tests::alone::{Rows, proposal, rows, rows_of};
use dim_tests::component::with_manifest;
use dim_tests::measurement::{percentile, runtime};
use tempfile::TempDir;

/// Events a second.
const RATE: u64 = 21_000;

/// Commands a second.
const COMMANDS: u64 = 100;

/// Keys of the state that is migrated.
const MIGRATED: u64 = 50_000;

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    let replacements = if quick { 50 } else { 1_000 };
    runtime().block_on(async {
        let without = under_load(0, Duration::from_secs(if quick { 5 } else { 15 })).await;
        let with = under_load(replacements, Duration::ZERO).await;
        println!("| under load | without replacements | with {replacements} |\n|---|---|---|");
        println!("| events a second | {:.0} | {:.0} |", without.rate, with.rate);
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let row = [&without, &with].map(|run| milliseconds(percentile(&run.commands, share)));
            println!("| command {name} | {} | {} |", row[0], row[1]);
        }
        println!("\n| a pause, of {} | p50 | p99 | longest |\n|---|---|---|---|", with.pauses.len());
        let parts: [(&str, PartOf); 4] = [
            ("from the old code's last call to the end of the new code's `start`", |pause| pause.total),
            ("of it, ending the old instance", |pause| pause.drop),
            ("making the new one", |pause| pause.instantiate),
            ("the new code's `start`", |pause| pause.start),
        ];
        for (name, part) in parts {
            let mut values: Vec<_> = with.pauses.iter().map(part).map(Duration::from_nanos).collect();
            values.sort();
            let cells = [0.5, 0.99, 1.0].map(|share| milliseconds(percentile(&values, share)));
            println!("| {name} | {} | {} | {} |", cells[0], cells[1], cells[2]);
        }
        println!(
            "\nA replacement, from the file to the answer: p50 {}.\n",
            milliseconds(percentile(&with.whole, 0.5))
        );
        migration().await;
        takeback(if quick { 20_000 } else { 200_000 }).await;
        many::many(if quick { 20 } else { 200 }).await;
    });
}

/// A part of a pause, in nanoseconds.
type PartOf = fn(&Pause) -> u64;

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn config() -> Config {
    let off = ["job-tracker", "node-registry", "heartbeat-watchdog"]
        .map(|name| format!("  {name}: {{ disabled: true }}\n"))
        .concat();
    let file = dim_tests::STAMPER;
    Config::parse(&format!(
        "store: {{ log: {{ max_bytes: 8589934592 }} }}\nplugins:\n{off}  stamper:\n    file: {file}\n    grants: {{ subscribe: [numbers], publish: [stamps], write: [], read: [] }}\n    limits: {{ publishes-per-second: 1000000 }}\n"
    ))
    .expect("the config is right")
}

/// The stamper as another version.
fn stamper(version: &str, migrates: bool) -> Vec<u8> {
    let manifest = include_str!("../../guests/examples/stamper.toml").replace("0.1.0", version);
    let manifest = if migrates {
        manifest
            .replace("state-version = 1", "state-version = 2")
            .replace("default = false", "default = true")
    } else {
        manifest
    };
    with_manifest(&std::fs::read(dim_tests::STAMPER).expect("the guest is built"), &manifest)
}

async fn start(dir: &TempDir) -> Arc<Host> {
    dim_tests::warm(dir.path());
    Host::start(Options::new(config(), dir.path())).await.expect("the host starts")
}

async fn replace(host: &Host, component: Vec<u8>) -> Change {
    host.replace(proposal("stamper", component)).await.expect("it is replaced")
}

fn name() -> PluginName {
    "stamper".parse().expect("a name")
}

/// What a run under load has shown.
struct Run {
    rate: f64,
    commands: Vec<Duration>,
    pauses: Vec<Pause>,
    whole: Vec<Duration>,
}

/// Feeds numbered messages at a steady rate until told to stop; returns how many.
fn feed(host: &Arc<Host>, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (log, stop) = (host.storage.log.clone(), stop.clone());
    let topic: Topic = "numbers".parse().expect("a topic");
    let peer = dim_ipfs::embedded::new_peer();
    std::thread::spawn(move || {
        let (begun, mut sent) = (Instant::now(), 0_u64);
        while !stop.load(Ordering::Relaxed) {
            let due = (begun.elapsed().as_secs_f64() * RATE as f64) as u64;
            while sent < due {
                sent += 1;
                let mut data = sent.to_be_bytes().to_vec();
                data.resize(200, b'.');
                let (topic, data) = (topic.clone(), Bytes::from(data));
                log.append(Kind::Event(Event::Message { topic, data, origin: Origin::Peer(peer.clone()) }));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        sent
    })
}

async fn order(host: &Arc<Host>, stop: &Arc<AtomicBool>, sent: &AtomicU64) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut interval = tokio::time::interval(Duration::from_millis(1_000 / COMMANDS));
    while !stop.load(Ordering::Relaxed) {
        interval.tick().await;
        let begun = Instant::now();
        let plugin = host.plugins.get("stamper").expect("it is loaded");
        plugin.handle.command("bump".to_owned(), "null".to_owned()).await.expect("it is answered");
        took.push(begun.elapsed());
        sent.fetch_add(1, Ordering::Relaxed);
    }
    took.sort();
    took
}

async fn number(host: &Host, key: &str) -> u64 {
    let plugin = host.plugins.get("stamper").expect("it is loaded");
    let answer = plugin.handle.query("number".to_owned(), key.to_owned()).await.expect("it is answered");
    answer.parse().expect("a number")
}

async fn settled(host: &Host) {
    let head = host.storage.log.head().0;
    let plugin = host.plugins.get("stamper").expect("it is loaded");
    while plugin.handle.status().cursor < head {
        plugin.handle.wake();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for _ in 0..2 {
        host.storage.commit.write(|_| Ok(())).await.expect("the host commits");
    }
}

async fn under_load(replacements: usize, at_least: Duration) -> Run {
    let dir = TempDir::new().expect("a directory");
    let host = start(&dir).await;
    let versions = [stamper("1.0.0", false), stamper("2.0.0", false)];
    // Compiled before, as any component is that is installed a second time.
    for version in &versions {
        replace(&host, version.clone()).await;
    }
    let (stop, ordered) = (Arc::new(AtomicBool::new(false)), AtomicU64::new(0));
    let begun = Instant::now();
    let feeding = feed(&host, &stop);
    let replacing = async {
        let (mut pauses, mut whole) = (Vec::new(), Vec::new());
        for count in 0..replacements {
            let begun = Instant::now();
            let change = replace(&host, versions[count % 2].clone()).await;
            pauses.push(change.pause.expect("it took over"));
            whole.push(begun.elapsed());
        }
        tokio::time::sleep(at_least).await;
        stop.store(true, Ordering::Relaxed);
        whole.sort();
        (pauses, whole)
    };
    let ((pauses, whole), commands) = tokio::join!(replacing, order(&host, &stop, &ordered));
    let sent = feeding.join().expect("feeding does not panic");
    let rate = sent as f64 / begun.elapsed().as_secs_f64();
    settled(&host).await;
    assert_eq!(number(&host, "last").await, sent, "every message was handled");
    assert_eq!(number(&host, "wrong").await, 0, "once, and in order");
    assert_eq!(
        number(&host, "bumped").await,
        ordered.load(Ordering::Relaxed),
        "every order was carried out once"
    );
    let fired = number(&host, "fired").await;
    assert!(fired > 0, "timers fired");
    host.shutdown().await;
    drop(host);
    same_as_without(&dir, (sent, fired), replacements);
    Run { rate, commands, pauses, whole }
}

/// The publishes, the state and the timers are those of the recorded log without replacements.
fn same_as_without(dir: &TempDir, (sent, fired): (u64, u64), replacements: usize) {
    let replay = Replay::open(&config(), dir.path()).expect("the log can be opened again");
    let done = replay.run().expect("the log can be handled again");
    drop(replay);
    let (_, alone) = done.into_iter().find(|(plugin, _)| *plugin == name()).expect("the stamper");
    let store = dim_store::Store::open(dir.path()).expect("the store can be opened");
    let (mut from, mut published, mut entries) = (Offset(0), Vec::new(), 0_u64);
    loop {
        let read = store.read_log(from, 100_000).expect("the log can be read");
        let Some(last) = read.last() else { break };
        from = Offset(last.offset.0 + 1);
        entries += read.len() as u64;
        published.extend(read.into_iter().filter_map(|entry| match entry.kind {
            Kind::Event(Event::Message { data, origin: Origin::Plugin(_), .. }) => Some(data),
            _ => None,
        }));
    }
    assert!(
        published.iter().eq(alone.requested.publishes.iter().map(|publish| &publish.data)),
        "the publishes are the same, in the same order"
    );
    let is_stamp = |key: &[u8]| key[size_of::<u32>()..].starts_with(b"stamp/");
    let (stamps, left): (Rows, Rows) = rows(&store).into_iter().partition(|(key, _)| is_stamp(key));
    let mut again = rows_of(alone);
    again.retain(|(key, _)| !is_stamp(key));
    assert!(left == again, "but for the stamps, state and timers are the same");
    let by: BTreeSet<_> = stamps.iter().map(|(_, version)| String::from_utf8_lossy(version)).collect();
    println!(
        "{replacements} replacements: {sent} messages and {fired} timers that fired, {} publishes, {entries} entries: publishes, state and timers as without replacements; the last thousand stamped by {}\n",
        published.len(),
        by.into_iter().collect::<Vec<_>>().join(" and ")
    );
}

async fn migration() {
    let dir = TempDir::new().expect("a directory");
    let host = start(&dir).await;
    let plugin = host.plugins.get("stamper").expect("it is loaded");
    plugin.handle.command("fill".to_owned(), MIGRATED.to_string()).await.expect("it is filled");
    let begun = Instant::now();
    let change = replace(&host, stamper("3.0.0", true)).await;
    let pause = change.pause.expect("it took over");
    println!(
        "A migration that moves {MIGRATED} keys: a pause of {}, of which `start` {}; from the file to the answer, compiling and a rehearsal included, {}.",
        milliseconds(Duration::from_nanos(pause.total)),
        milliseconds(Duration::from_nanos(pause.start)),
        milliseconds(begun.elapsed()),
    );
    let begun = Instant::now();
    host.roll_back(&name(), None, "the benchmark").await.expect("it is rolled back");
    println!("Rolling it back: {}.", milliseconds(begun.elapsed()));
    host.shutdown().await;
}

/// How long it takes until the old code has handled what came since.
async fn takeback(entries: u64) {
    let dir = TempDir::new().expect("a directory");
    let host = start(&dir).await;
    replace(&host, stamper("1.0.0", false)).await;
    let topic: Topic = "numbers".parse().expect("a topic");
    let peer = dim_ipfs::embedded::new_peer();
    let log = host.storage.log.clone();
    let feeding = tokio::task::spawn_blocking(move || {
        for number in 1..=entries {
            let mut data = number.to_be_bytes().to_vec();
            data.resize(200, b'.');
            let (topic, data) = (topic.clone(), Bytes::from(data));
            log.append(Kind::Event(Event::Message { topic, data, origin: Origin::Peer(peer.clone()) }));
        }
    });
    feeding.await.expect("feeding does not panic");
    settled(&host).await;
    let begun = Instant::now();
    host.roll_back(&name(), None, "the benchmark").await.expect("it is rolled back");
    let undone = begun.elapsed();
    settled(&host).await;
    let all = begun.elapsed();
    assert_eq!(number(&host, "last").await, entries);
    println!(
        "A takeback over {entries} entries: {} until the old code goes on, {} until it has handled them again, {:.0} a second.",
        milliseconds(undone),
        milliseconds(all),
        entries as f64 / all.as_secs_f64(),
    );
    host.shutdown().await;
}
