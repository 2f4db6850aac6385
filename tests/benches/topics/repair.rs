//! How soon lost messages are repaired while events go on.

use std::time::{Duration, Instant};

use dim_model::time::Timestamp;
use dim_tests::Fault;
use dim_tests::measurement::percentile;

use crate::checker::Checker;
use crate::pair::Pair;
use crate::rate;

/// The time for which all messages to the reader are lost. At every rate that is measured a bundle is among them.
const LOSS: Duration = Duration::from_millis(40);

/// The pause after a loss. It is longer than a repair takes.
const PAUSE: Duration = Duration::from_secs(1);

/// A span in which messages were lost.
struct Loss {
    begin: Timestamp,
    end: Timestamp,
}

pub async fn run(losses: u64, rate: u64) {
    let pair = Pair::start().await;
    let mut checker = Checker::new(&pair.reader, 0);
    pair.publish(0).await;
    checker.read_to(1).await;
    let seconds = (LOSS + PAUSE).as_secs_f64() * losses as f64;
    let last = 1 + (seconds * rate as f64) as u64;
    let check = tokio::spawn(async move {
        checker.read_to(last).await;
        checker
    });
    let begun = Instant::now();
    let (found, ()) = tokio::join!(lose(&pair, losses), rate::publish(&pair.writer, 1..last, rate));
    let published = (last - 1) as f64 / begun.elapsed().as_secs_f64();
    let checker = check.await.expect("nothing is lost, repeated, or out of order");
    pair.handled(checker.next).await;
    let within = |loss: &Loss| {
        let during = checker.delays.iter().filter(|(at, _)| (loss.begin..loss.end).contains(at));
        during.map(|(_, delay)| *delay).max()
    };
    let mut repairs: Vec<Duration> = found.iter().filter_map(within).collect();
    let mut all: Vec<Duration> = checker.delays.iter().map(|(_, delay)| *delay).collect();
    println!("| {} losses at {published:.0} events a second | p50 | p99 |", repairs.len());
    println!("|---|---|---|");
    for (label, times) in [
        ("from the publish of the most delayed event of a loss until it is in the other log", &mut repairs),
        ("from the publish of any event until it is in the other log", &mut all),
    ] {
        times.sort();
        let [p50, p99] = [0.5, 0.99].map(|share| percentile(times, share).as_secs_f64() * 1e3);
        println!("| {label} | {p50:.0} ms | {p99:.0} ms |");
    }
    println!("{} bundles were repaired.", pair.repaired().await);
    pair.stop().await;
}

/// Loses messages again and again. Returns the spans in which a bundle was lost.
async fn lose(pair: &Pair, count: u64) -> Vec<Loss> {
    let mut losses = Vec::new();
    for _ in 0..count {
        let (repaired, begin) = (pair.repaired().await, pair.writer.host.storage.log.now());
        pair.proxy.set(Fault::LosingAll);
        tokio::time::sleep(LOSS).await;
        pair.proxy.set(Fault::None);
        let end = pair.writer.host.storage.log.now();
        tokio::time::sleep(PAUSE).await;
        if pair.repaired().await > repaired {
            losses.push(Loss { begin, end });
        }
    }
    losses
}
