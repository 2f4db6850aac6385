//! The protocol of reliable topics in a simulated network, in virtual time.
//!
//! Each seed makes a fleet, a load and a set of troubles: lost, repeated, late and reordered messages, partitions,
//! crashes, restored backups, copies that run twice, changes of the roster, lost blockstores, retention, slow readers and clock jumps. After
//! the troubles the fleet gets time to recover, and a checker compares what each reader made durable with what each
//! writer published. `DIM_SIMULATION_SEED=N` runs one seed; `DIM_SIMULATION_FROM=N` continues a long run at seed N.

mod admin;
mod checker;
mod fleet;
mod node;
mod troubles;

use std::sync::atomic::{AtomicU64, Ordering};

use fleet::Fleet;
use troubles::Troubles;

/// The number of seeds: 100,000 in the exhaustive tier.
fn seeds() -> u64 {
    let is_exhaustive = std::env::var("DIM_TEST_TIER").is_ok_and(|tier| tier == "exhaustive");
    if is_exhaustive { 100_000 } else { 2_000 }
}

/// Runs the seeds from 0 to `count` on all cores. `troubles` makes the troubles of a seed.
fn run_all(count: u64, troubles: fn(u64) -> Troubles) {
    if let Ok(seed) = std::env::var("DIM_SIMULATION_SEED") {
        run(seed.parse().expect("a number"), troubles);
        return;
    }
    let from = std::env::var("DIM_SIMULATION_FROM").map_or(0, |seed| seed.parse().expect("a number"));
    let next = AtomicU64::new(from);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= count {
                    return;
                }
                run(seed, troubles);
            }
        };
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            if let Err(panic) = worker.join() {
                next.store(count, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
    });
}

fn run(seed: u64, troubles: fn(u64) -> Troubles) {
    let outcome = std::panic::catch_unwind(|| Fleet::new(seed, troubles(seed)).run());
    if let Err(panic) = outcome {
        let troubles = troubles(seed);
        eprintln!("DIM_SIMULATION_SEED={seed} fails, with {troubles:#?}");
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_event_is_delivered_once_and_in_order_under_any_trouble() {
    run_all(seeds(), Troubles::any);
}

#[test]
fn copied_and_restored_writers_are_noticed_by_every_member() {
    run_all(seeds() / 10, Troubles::copies);
}

#[test]
fn seeds_beyond_the_usual_ones_that_once_failed_pass() {
    for seed in [2_651, 7_009, 13_553, 13_593, 15_833, 17_738] {
        run(seed, Troubles::any);
    }
    for seed in [683, 1_088, 2_316, 2_776] {
        run(seed, Troubles::copies);
    }
    run(1_613, Troubles::slow_receivers);
    for seed in [44_090, 98_028] {
        run(seed, Troubles::memberships);
    }
}

#[test]
fn members_that_start_again_and_again_agree() {
    run_all(seeds() / 50, Troubles::many_starts);
}

#[test]
fn receivers_that_let_their_catch_ups_wait_miss_nothing() {
    run_all(seeds() / 20, Troubles::slow_receivers);
}

#[test]
fn members_come_and_go_and_nobody_else_reads_or_is_locked_out() {
    run_all(seeds(), Troubles::memberships);
}

#[test]
fn fifty_members_agree() {
    run_all(seeds() / 200, Troubles::many_members);
}
