//! Each trouble that a daemon can be in: what commands take, and what becomes of the fleet.

use std::time::Duration;

use dim_tests::endurance::{Endurance, HealthFinding, TROUBLES, endure, p99};
use rand::Rng as _;

pub fn run(seconds: u64, only: Option<&str>) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    println!(
        "| {seconds} s of | commands | p99 before | p99 meanwhile | failed | lost | accused | most waiting | drained after | death found after |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for trouble in TROUBLES {
        let trouble = match trouble {
            // As often as a minute has room for.
            HealthFinding::Restarts(_) => HealthFinding::Restarts(Duration::from_secs(seconds / 4)),
            other => other,
        };
        if only.is_some_and(|only| !format!("{trouble:?}").to_lowercase().contains(only)) {
            continue;
        }
        let what = Endurance {
            trouble,
            length: Duration::from_secs(seconds),
            dead_after: Duration::from_secs(10),
            pace: Duration::from_millis(20),
            seed: rand::rng().next_u64(),
        };
        let endured = runtime.block_on(endure(what)).expect("a Kubo");
        let accused = endured.accused.values().filter(|said| said.iter().any(|word| word == "dead")).count();
        let suspected = endured.accused.values().filter(|said| !said.is_empty()).count();
        println!(
            "| {trouble:?} | {} | {:.2?} | {:.2?} | {} | {} | {accused} ({suspected} suspected) | {} | {:.1?} | {:.1?} |",
            endured.before.len() + endured.during.len(),
            p99(&endured.before),
            p99(&endured.during),
            endured.failed,
            endured.lost.len(),
            endured.most_waiting,
            endured.drained_after,
            endured.found_after,
        );
    }
}
