//! Reliable topics between two hosts on two Kubo daemons: `cargo bench -p dim-tests --bench topics -- WHAT`. Everything
//! runs on this machine: both hosts, both daemons, the load and the checks.
//!
//! - `rate [SECONDS] [EVENTS]`: so many events a second for a time, without and with losses, beside what a daemon alone
//!   does with the same messages.
//! - `latency [EVENTS]`: one event at a time: from the publish to its commit at the other host, and how soon a lost
//!   message is repaired.
//! - `repair [LOSSES] [EVENTS]`: how soon lost messages are repaired while so many events a second go on.
//! - `encryption [SECONDS] [EVENTS] [ROUNDS]`: the same load on a plain and on an encrypted reliable topic, in turn.
//! - `late [EVENTS]`: a host that joins when so many events were published.
//! - `writers [COUNT] [SECONDS]`: so many writers with an event every 5 s each, and the CPU time of a host that reads them.

mod checker;
mod encryption;
mod late;
mod latency;
mod pair;
mod rate;
mod repair;
mod writers;

use dim_tests::measurement;

fn main() {
    let args = measurement::arguments();
    let number =
        |index: usize, default: u64| args.get(index).map_or(default, |text| text.parse().expect("a number"));
    measurement::runtime().block_on(async {
        match args.first().map(String::as_str) {
            Some("rate") => rate::run(number(1, 60), number(2, 50_000)).await,
            Some("latency") => latency::run(number(1, 300)).await,
            Some("repair") => repair::run(number(1, 100), number(2, 20_000)).await,
            Some("encryption") => {
                encryption::run(number(1, 10), number(2, 200_000), number(3, 3)).await;
            }
            Some("late") => late::run(number(1, 1_000_000)).await,
            Some("writers") => writers::run(number(1, 500) as usize, number(2, 60)).await,
            _ => println!(
                "say what: rate [SECONDS] [EVENTS], latency [EVENTS], repair [LOSSES] [EVENTS], encryption [SECONDS] [EVENTS] [ROUNDS], late [EVENTS] or writers [COUNT] [SECONDS]"
            ),
        }
    });
}
