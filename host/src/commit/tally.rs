//! Owns the counts of the writer.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// Counts of the writer.
#[derive(Debug)]
pub struct Tally {
    /// Transactions.
    pub commits: AtomicU64,
    /// Nanoseconds from the beginning of a transaction to the end of its sync, in all.
    pub nanoseconds: AtomicU64,
    /// Entries that plugins have handled and that are durable.
    pub handled: AtomicU64,
    /// Seconds that each commit with a sync waited for the disk.
    pub syncs: Histogram,
}

impl Default for Tally {
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
