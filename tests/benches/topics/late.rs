//! A host that joins late: from its start until it has handled everything that a writer keeps.

use std::time::{Duration, Instant};

use dim_tests::eventually_within;

use crate::checker::Checker;
use crate::pair::{self, Pair};
use crate::rate;

/// The rate at which the events are published before.
const RATE: u64 = 50_000;

/// The time that the writer has for the last events.
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(events: u64) {
    let (near, far) = pair::daemons();
    let writer = pair::writer(&near).await;
    rate::publish(&writer, 0..events, RATE).await;
    eventually_within(PATIENCE, "all events are in bundles", async || {
        let logs = writer.host.exchange.links.reliable.writers(&pair::topic()).await.expect("it runs");
        logs.iter().any(|log| log.is_own && log.end == events)
    })
    .await;
    // The daemon has all blocks, and heads state the index.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let begun = Instant::now();
    let (proxy, reader) = pair::reader(&far).await;
    let started = begun.elapsed();
    let pair = Pair { _daemons: (near, far), proxy, writer, reader };
    let mut checker = Checker::from_the_beginning(&pair.reader);
    checker.read_to(events).await;
    let received = begun.elapsed();
    pair.handled(checker.next).await;
    println!("| a host that joins late, {events} events | seconds |");
    println!("|---|---|");
    for (label, time) in [
        ("it has started", started),
        ("all events are in its log", received),
        ("all are handled", begun.elapsed()),
    ] {
        println!("| {label} | {:.1} |", time.as_secs_f64());
    }
    pair.stop().await;
}
