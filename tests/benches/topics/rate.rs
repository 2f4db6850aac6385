//! A steady rate of events, handled by a plugin of the other host, without and with losses, beside a daemon alone.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_tests::measurement::percentile;
use dim_tests::{Fault, Kubo, TestHost, Witness, directly};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};

use crate::checker::Checker;
use crate::pair::{self, Pair, heartbeat};

/// The pause between two groups of publishes.
const TICK: Duration = Duration::from_millis(10);

/// The maximum number of publishes that are not durable yet. At the maximum the load waits.
const OUTSTANDING: usize = 20_000;

/// The time of a measurement of a daemon alone.
const ALONE: Duration = Duration::from_secs(10);

/// The maximum size of a message of reliable topics, about.
const LARGE: usize = 56 << 10;

pub async fn run(seconds: u64, rate: u64) {
    println!(
        "| {seconds} s of {rate} events a second | published/s | handled/s | in the log p50 | p99 | repaired bundles | CPU an event |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (label, fault) in [("nothing is lost", Fault::None), ("one message in ten is lost", Fault::Losing)] {
        let pair = Pair::start().await;
        // The first event connects what is slow at first.
        let mut checker = Checker::new(&pair.reader, 0);
        pair.publish(0).await;
        checker.read_to(1).await;
        pair.proxy.set(fault);
        println!("| {label} | {} |", measure(&pair, checker, seconds, rate).await);
        pair.stop().await;
    }
    println!();
    println!("| a daemon alone, {} s, one message after the other | messages/s | lost |", ALONE.as_secs());
    println!("|---|---|---|");
    let (near, far) = Kubo::start_pair().expect("a Kubo");
    let small = |number| heartbeat(number);
    println!("| an event a message | {} |", alone(&near, &far, "raw.small", small).await);
    let noise = Bytes::from((0..LARGE).map(|_| rand::random()).collect::<Vec<u8>>());
    let large = move |number: u64| [number.to_le_bytes().as_slice(), &noise].concat().into();
    println!("| messages of 56 KiB | {} |", alone(&near, &far, "raw.large", large).await);
}

/// What a steady load showed.
pub struct Measured {
    /// Events that were published in a second.
    pub published: f64,
    /// Events that were handled in a second.
    pub handled: f64,
    /// From the publish until an event is in the log of the reader: the median and the 99th percentile.
    pub delays: [Duration; 2],
    /// The CPU time of both hosts, the load and the checks for an event, in microseconds.
    pub each: f64,
}

/// Publishes at a rate, and waits until everything is handled.
async fn measure(pair: &Pair, checker: Checker, seconds: u64, rate: u64) -> String {
    let Measured { published, handled, delays: [p50, p99], each } = load(pair, checker, seconds, rate).await;
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let (p50, p99) = (milliseconds(p50), milliseconds(p99));
    let repaired = pair.repaired().await;
    format!("{published:.0} | {handled:.0} | {p50:.0} ms | {p99:.0} ms | {repaired} | {each:.1} us")
}

/// Publishes at a rate, and waits until everything is handled.
pub async fn load(pair: &Pair, mut checker: Checker, seconds: u64, rate: u64) -> Measured {
    let (first, count) = (checker.seen, seconds * rate);
    // Both hosts, the load and the checks.
    let process = std::process::id();
    let (cpu, begun) = (cpu_time(process), Instant::now());
    let check = tokio::spawn(async move {
        checker.read_to(first + count).await;
        checker
    });
    publish(&pair.writer, first..first + count, rate).await;
    let published = begun.elapsed();
    let mut checker = check.await.expect("nothing is lost, repeated, or out of order");
    pair.handled(checker.next).await;
    let handled = begun.elapsed();
    let mut delays: Vec<Duration> = checker.delays.drain(..).map(|(_, delay)| delay).collect();
    delays.sort();
    let each = (cpu_time(process) - cpu).as_secs_f64() * 1e6 / count as f64;
    let rate_of = |time: Duration| count as f64 / time.as_secs_f64();
    let delays = [0.5, 0.99].map(|share| percentile(&delays, share));
    Measured { published: rate_of(published), handled: rate_of(handled), delays, each }
}

/// Publishes heartbeats with the given numbers.
pub async fn publish(writer: &TestHost, numbers: Range<u64>, rate: u64) {
    let begun = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    let mut outstanding = FuturesUnordered::new();
    let mut next = numbers.start;
    while next < numbers.end {
        tick.tick().await;
        let due = numbers.start + (begun.elapsed().as_secs_f64() * rate as f64) as u64;
        while next < due.min(numbers.end) && outstanding.len() < OUTSTANDING {
            outstanding.push(pair::publish(writer, next));
            next += 1;
        }
        // Each is polled once at least, in order. Tokio would let only some end at a time.
        while let Some(Some(())) = tokio::task::unconstrained(outstanding.next()).now_or_never() {}
    }
    while outstanding.next().await.is_some() {}
}

/// The CPU time of a process.
pub fn cpu_time(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|text| text.parse::<u64>().expect("a number")).sum();
    // Linux counts in hundredths of a second.
    Duration::from_millis(ticks * 10)
}

/// Publishes messages through one daemon as fast as it takes them, and counts them at another one.
async fn alone(near: &Kubo, far: &Kubo, name: &str, message: impl Fn(u64) -> Bytes) -> String {
    let topic: Topic = name.parse().expect("a topic");
    let (publisher, witness) = (directly(near), Witness::of(far, name).await);
    while publisher.pubsub.peers(&topic).await.expect("a daemon").is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < ALONE {
        publisher.pubsub.publish(&topic, message(count)).await.expect("a daemon");
        count += 1;
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let lost = count.saturating_sub(witness.seen().len() as u64);
    format!("{rate:.0} | {:.2} %", lost as f64 * 100.0 / count as f64)
}
