//! What encryption costs: the same load on a reliable topic, and on an encrypted one of a fleet with a roster, in turn.

use std::time::Duration;

use dim_tests::measurement::percentile;

use crate::checker::Checker;
use crate::latency::time_of;
use crate::pair::Pair;
use crate::rate::{Measured, load};

/// The number of events that are published one at a time.
const SINGLE: usize = 100;

pub async fn run(seconds: u64, rate: u64, rounds: u64) {
    println!("| topic | handled/s | CPU an event | one event at a time p50 | p99 |");
    println!("|---|---|---|---|---|");
    let (mut plain, mut encrypted) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for is_encrypted in [false, true] {
            let pair = if is_encrypted { Pair::start_encrypted().await } else { Pair::start().await };
            let mut checker = Checker::new(&pair.reader, 0);
            // The first event connects what is slow at first, and waits for the key.
            pair.publish(0).await;
            checker.read_to(1).await;
            let (mut number, mut times) = (1, Vec::new());
            for _ in 0..SINGLE {
                times.push(time_of(&pair, &mut checker, &mut number).await);
            }
            times.sort();
            let [p50, p99] = [0.5, 0.99].map(|share| percentile(&times, share));
            let Measured { handled, each, .. } = load(&pair, checker, seconds, rate).await;
            let label = if is_encrypted { "encrypted" } else { "reliable" };
            let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
            let (p50, p99) = (milliseconds(p50), milliseconds(p99));
            println!("| {label} | {handled:.0} | {each:.1} us | {p50:.1} ms | {p99:.1} ms |");
            if is_encrypted { &mut encrypted } else { &mut plain }.push((handled, p50));
            pair.stop().await;
        }
    }
    let median = |of: &[(f64, f64)], value: fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = of.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let ratio = |value: fn(&(f64, f64)) -> f64| median(&encrypted, value) / median(&plain, value);
    let (handled, latency) = (ratio(|it| it.0), ratio(|it| it.1));
    println!(
        "Encrypted by reliable, medians: {handled:.2} of the events a second, {latency:.2} of the latency."
    );
}
