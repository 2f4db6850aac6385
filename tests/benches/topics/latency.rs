//! One event at a time: from the publish until the other host has handled it, and how soon a lost message is repaired.

use std::time::{Duration, Instant};

use dim_tests::Fault;
use dim_tests::measurement::percentile;

use crate::checker::Checker;
use crate::pair::Pair;

/// The pause before a last message. Then no head follows soon that an earlier one has caused.
const QUIET: Duration = Duration::from_secs(6);

/// The pause between events. It is longer than a repair takes.
const PAUSE: Duration = Duration::from_millis(150);

pub async fn run(events: u64) {
    let pair = Pair::start().await;
    let mut checker = Checker::new(&pair.reader, 0);
    let mut number = 0;
    let mut idle = Vec::new();
    for _ in 0..events {
        idle.push(time_of(&pair, &mut checker, &mut number).await);
    }
    let mut repairs = Vec::new();
    for _ in 0..events {
        lose_one(&pair, &mut number).await;
        // The next message shows that one is missing.
        repairs.push(time_of(&pair, &mut checker, &mut number).await);
    }
    let mut last = Vec::new();
    for _ in 0..events / 10 {
        tokio::time::sleep(QUIET).await;
        let begun = Instant::now();
        lose_one(&pair, &mut number).await;
        checker.read_to(number).await;
        pair.handled(checker.next).await;
        last.push(begun.elapsed());
    }
    println!("| one event at a time | p50 | p99 |");
    println!("|---|---|---|");
    for (label, mut times) in [
        ("from the publish until it is handled", idle),
        ("from the message after a lost one until both are handled", repairs),
        ("from the publish of a lost last message until it is handled", last),
    ] {
        times.sort();
        let at = |share| percentile(&times, share).as_secs_f64() * 1e3;
        let [p50, p99] = [0.5, 0.99].map(at);
        println!("| {label} | {p50:.0} ms | {p99:.0} ms |");
    }
    println!("{} bundles were repaired.", pair.repaired().await);
    pair.stop().await;
}

/// Publishes an event that does not arrive as a message.
async fn lose_one(pair: &Pair, number: &mut u64) {
    pair.proxy.set(Fault::LosingAll);
    pair.publish(*number).await;
    *number += 1;
    // It passes the daemons meanwhile.
    tokio::time::sleep(Duration::from_millis(60)).await;
    pair.proxy.set(Fault::None);
}

/// Publishes an event, and returns the time until everything is handled.
pub async fn time_of(pair: &Pair, checker: &mut Checker, number: &mut u64) -> Duration {
    *number += 1;
    let begun = Instant::now();
    pair.publish(*number - 1).await;
    checker.read_to(*number).await;
    pair.handled(checker.next).await;
    let elapsed = begun.elapsed();
    tokio::time::sleep(PAUSE).await;
    elapsed
}
