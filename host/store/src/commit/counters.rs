//! Owns the counters of the writer.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// The counters of the writer.
#[derive(Debug)]
pub struct Counters {
    /// Transactions.
    pub commits: AtomicU64,
    /// Total time from the beginning of each transaction to the end of its sync, in nanoseconds.
    pub nanoseconds: AtomicU64,
    /// Entries that plugins have handled and that are durable.
    pub handled: AtomicU64,
    /// The duration of each sync, in seconds.
    pub syncs: Histogram,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            commits: AtomicU64::default(),
            nanoseconds: AtomicU64::default(),
            handled: AtomicU64::default(),
            // From 0.1 ms to 3.3 s.
            syncs: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
        }
    }
}
