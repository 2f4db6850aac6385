//! What an honest plugin keeps of its speed beside hostile ones: each attack alone and all together, with the honest
//! load fixed at half of what it can do alone. Everything in one run, so that ratios hold on a noisy machine.
//! `cargo bench -p dim-tests --bench fairness`; `-- quick` for a fifth of the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dim_runtime::Handle;
use dim_server::config::Config;
use dim_server::host::{Host, Options};
use serde_json::json;
use tempfile::TempDir;

/// What the attackers do, one plugin for each.
const ATTACKS: [(&str, &str); 5] = [
    ("loop", "one that loops"),
    ("allocate", "one that allocates without end"),
    ("flood-outbox", "one that floods the outbox"),
    ("log-without-end", "one that logs without end"),
    ("fill-state", "one that fills its state"),
];

/// What meets no limit, and may use a core: it is shown, and nothing is promised.
const WITHIN: (&str, &str) = ("work-without-end", "one that works without end, within its limits");

/// Callers of the honest plugin at a time, when it is seen what it can do.
const CALLERS: usize = 64;

/// Into how many slices the time is cut; p50 and p99 are the medians of theirs, and the p99 of all stands beside.
const SLICES: usize = 9;

/// How many times as long as alone the p99 may take, and what part of the load must be kept up: promised, and a
/// failure of the benchmark otherwise.
const LONGEST: f64 = 3.0;
const LEAST: f64 = 0.95;

/// How long the attackers are let loose before it is measured.
const WARM_UP: Duration = Duration::from_secs(3);

fn main() {
    let seconds = if std::env::args().any(|arg| arg == "quick") { 4 } else { 20 };
    let length = Duration::from_secs(seconds);
    dim_tests::measurement::runtime().block_on(async {
        let warm = TempDir::new().expect("a directory");
        let alone = Run::start(&warm, &[]).await;
        let capacity = alone.capacity(length / 2).await;
        let rate = capacity / 2.0;
        println!(
            "alone, with {CALLERS} callers: {capacity:.0} orders a second; half of that is asked for below\n"
        );
        println!("| beside it | orders a second | p50 | p99 | p99 beside that alone | p99 of all | worst |");
        println!("|---|---|---|---|---|---|---|");
        let base = alone.measure(rate, length).await;
        let mut is_fair = base.print("nobody", &base, rate);
        alone.stop().await;
        for (attack, words) in ATTACKS {
            let run = Run::start(&warm, &[attack]).await;
            is_fair &= run.measure(rate, length).await.print(words, &base, rate);
            run.stop().await;
        }
        let (attack, words) = WITHIN;
        let within = Run::start(&warm, &[attack]).await;
        within.measure(rate, length).await.print(words, &base, rate);
        within.stop().await;
        let all = ATTACKS.map(|(attack, _)| attack);
        let run = Run::start(&warm, &all).await;
        is_fair &= run.measure(rate, length).await.print("all five", &base, rate);
        println!();
        for (name, plugin) in run.host.plugins.all() {
            let status = plugin.handle.status();
            println!("{name}: {} handled, {} failed, met {:?}", status.handled, status.failures, status.met);
        }
        run.stop().await;
        assert!(is_fair, "more than {LONGEST} times as long as alone, or less than {LEAST} of the load");
    });
}

/// A host with an honest plugin and attackers.
struct Run {
    host: Arc<Host>,
    honest: Handle,
    _dir: TempDir,
}

impl Run {
    async fn start(warm: &TempDir, attacks: &[&str]) -> Self {
        let honest = json!({ "file": dim_tests::PROBE, "config": { "topics": [] } });
        let mut plugins = serde_json::Map::from_iter([("honest".to_owned(), honest)]);
        for name in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
            plugins.insert(name.to_owned(), json!({ "disabled": true }));
        }
        for attack in attacks {
            let grants = json!({ "publish": ["hostile.out"] });
            let section = json!({ "file": dim_tests::HOSTILE, "grants": grants, "config": { "attack": attack, "again": true } });
            plugins.insert((*attack).to_owned(), section);
        }
        let config = Config::parse(&json!({ "plugins": plugins }).to_string()).expect("a config");
        let dir = TempDir::new().expect("a directory");
        dim_tests::warm(dir.path());
        copy(warm.path(), &dir.path().join("compiled"));
        let host = Host::start(Options::new(config, dir.path())).await.expect("the host starts");
        copy(&dir.path().join("compiled"), warm.path());
        let honest = host.plugins.get("honest").expect("it is loaded").handle.clone();
        if !attacks.is_empty() {
            tokio::time::sleep(WARM_UP).await;
        }
        Self { host, honest, _dir: dir }
    }

    /// Orders a second with as many callers as are of use.
    async fn capacity(&self, length: Duration) -> f64 {
        let (begun, done) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let callers = (0..CALLERS).map(|_| {
            let (honest, done) = (self.honest.clone(), done.clone());
            tokio::spawn(async move {
                while begun.elapsed() < length {
                    order(&honest).await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        futures::future::join_all(callers.collect::<Vec<_>>()).await;
        done.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64()
    }

    /// Gives `rate` orders a second, however long each takes. It counts from when an order was due.
    async fn measure(&self, rate: f64, length: Duration) -> Figures {
        let (begun, pause) = (Instant::now(), Duration::from_secs_f64(1.0 / rate));
        let mut given = Vec::new();
        for number in 0.. {
            let due = begun + pause * number;
            if due.duration_since(begun) > length {
                break;
            }
            tokio::time::sleep_until(due.into()).await;
            let honest = self.honest.clone();
            given.push(tokio::spawn(async move {
                order(&honest).await;
                due.elapsed()
            }));
        }
        let mut took = Vec::new();
        for order in given {
            took.push(order.await.expect("an order is carried out"));
        }
        let kept_up = took.len() as f64 / begun.elapsed().as_secs_f64();
        // Of slices, so that one hiccup of the disk does not count for all of it.
        let mut slices: Vec<Vec<Duration>> =
            took.chunks(took.len().div_ceil(SLICES)).map(<[Duration]>::to_vec).collect();
        slices.iter_mut().for_each(|slice| slice.sort_unstable());
        Figures { kept_up, slices }
    }

    async fn stop(self) {
        self.host.shutdown().await;
    }
}

async fn order(honest: &Handle) {
    let add = json!({ "script": [{ "do": "add", "key": "count" }] });
    honest.command("run".to_owned(), add.to_string()).await.expect("the honest plugin answers");
}

/// How a load went.
struct Figures {
    kept_up: f64,
    /// How long the orders took, of each slice of the time in order.
    slices: Vec<Vec<Duration>>,
}

/// What so large a part of them took no longer than; they are in order.
fn at(took: &[Duration], part: f64) -> Duration {
    took[((took.len() - 1) as f64 * part) as usize]
}

impl Figures {
    /// The median of the slices.
    fn at(&self, part: f64) -> Duration {
        let mut of_each: Vec<Duration> = self.slices.iter().map(|slice| at(slice, part)).collect();
        of_each.sort_unstable();
        of_each[of_each.len() / 2]
    }

    fn worst(&self) -> Duration {
        self.slices.iter().filter_map(|slice| slice.last()).max().copied().unwrap_or_default()
    }

    /// The same part of all orders, whatever the disk did.
    fn at_of_all(&self, part: f64) -> Duration {
        let mut all = self.slices.concat();
        all.sort_unstable();
        at(&all, part)
    }

    /// Returns whether it is as promised.
    fn print(&self, beside: &str, base: &Self, rate: f64) -> bool {
        let ms = |duration: Duration| format!("{:.1} ms", duration.as_secs_f64() * 1_000.0);
        let ratio = self.at(0.99).as_secs_f64() / base.at(0.99).as_secs_f64();
        println!(
            "| {beside} | {:.0} | {} | {} | {ratio:.1} | {} | {} |",
            self.kept_up,
            ms(self.at(0.5)),
            ms(self.at(0.99)),
            ms(self.at_of_all(0.99)),
            ms(self.worst())
        );
        ratio <= LONGEST && self.kept_up >= rate * LEAST
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for file in std::fs::read_dir(from).into_iter().flatten().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
    }
}
