//! What a start with many new plugins costs: how many cores compile, and how soon one works that is ready.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_server::config::Config;
use dim_server::host::{Host, Options};
use tempfile::TempDir;

use super::{milliseconds, stamper};

/// Starts a host with `count` plugins that were never compiled and one that was, and starts it again.
pub async fn many(count: usize) {
    let dir = TempDir::new().expect("a directory");
    let mut yaml = format!("limits: {{ plugins: {} }}\nplugins:\n", count + 1);
    for name in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
        writeln!(yaml, "  {name}: {{ disabled: true }}").expect("a string grows");
    }
    let state = TempDir::new().expect("a directory");
    for number in 0..=count {
        let file = dir.path().join(format!("{number}.wasm"));
        std::fs::write(&file, stamper(&format!("0.{number}.1"), false)).expect("a file");
        let (file, grants) =
            (file.display(), "{ subscribe: [numbers], publish: [stamps], write: [], read: [] }");
        writeln!(yaml, "  s{number:03}: {{ file: {file}, grants: {grants} }}").expect("a string grows");
        if number == 0 {
            // It is the last by name, and the only one that the first host has.
            yaml = yaml.replace("s000", "zz-ready");
            let host = Host::start(options(&yaml, &state)).await.expect("the host starts");
            host.shutdown().await;
        }
    }
    println!(
        "\n| a start with {count} plugins | one that was compiled before works | all work | cores busy |\n|---|---|---|---|"
    );
    for what in ["never compiled", "compiled before"] {
        let (begun, before) = (Instant::now(), cpu());
        let host = Host::begin(options(&yaml, &state)).await.expect("the host starts");
        let loading = tokio::spawn({
            let host: Arc<Host> = host.clone();
            async move { host.load().await }
        });
        host.loaded("zz-ready").await;
        let ready = host.plugins.get("zz-ready").expect("it is loaded");
        ready.handle.query("number".to_owned(), "last".to_owned()).await.expect("it answers");
        let first = begun.elapsed();
        loading.await.expect("loading does not panic").expect("they are loaded");
        let all = begun.elapsed();
        assert_eq!((host.plugins.all().len(), host.not_loaded().len()), (count + 1, 0));
        let busy = (cpu() - before).as_secs_f64() / all.as_secs_f64();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        println!("| {what} | {} | {} | {busy:.2} of {cores} |", milliseconds(first), milliseconds(all));
        host.shutdown().await;
    }
}

fn options(yaml: &str, state: &TempDir) -> Options {
    Options::new(Config::parse(yaml).expect("the config is right"), state.path())
}

/// The CPU time of this process: `utime` and `stime` of proc(5), in hundredths of a second.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("proc(5)");
    let after_name = stat.rsplit_once(')').expect("the program's name").1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks: u64 = fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().expect("ticks")).sum();
    Duration::from_millis(ticks * 10)
}
