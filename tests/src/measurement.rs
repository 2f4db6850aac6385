//! The parts that benchmarks share.

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// Returns the arguments of a benchmark, without the one that cargo adds.
pub fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|arg| arg != "--bench").collect()
}

/// Returns a runtime with two threads, so that figures of machines with more cores compare.
pub fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Returns the value below or at which a share of sorted times is (nearest rank); zero if there are none.
pub fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or_default()
}
