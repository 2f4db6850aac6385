//! Owns the estimate of the space that compacting the database's file would free, and the time at which the
//! host may restart to do so.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Shortest and longest pause between two compactions. Each pause is twice as long as the one before, up to the
/// longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));

/// The estimate. It survives restarts of the host in the same process.
#[derive(Debug, Default)]
pub struct ReclaimableSpace(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    measured: Option<Measured>,
    /// A compaction is requested before the next start of the host.
    asked: bool,
    /// The time of the last compaction, and the pause after it.
    packed: Option<(Instant, Duration)>,
}

/// A measurement of the file.
#[derive(Clone, Copy, Debug)]
struct Measured {
    in_use: u64,
    held: u64,
}

impl ReclaimableSpace {
    /// Estimates the unused bytes in a file of `file` bytes while the store contains `held` bytes. Pages are
    /// not completely filled: before the first measurement, they are assumed to take half as much again.
    pub fn estimate(&self, file: u64, held: u64) -> u64 {
        let in_use = match self.lock().measured {
            Some(then) => then.in_use.saturating_add(held).saturating_sub(then.held),
            None => held.saturating_add(held / 2),
        };
        file.saturating_sub(in_use)
    }

    /// Whether the file was measured.
    pub fn is_measured(&self) -> bool {
        self.lock().measured.is_some()
    }

    /// Records that `in_use` bytes of the file are in use while the store contains `held` bytes.
    pub fn measured(&self, in_use: u64, held: u64) {
        self.lock().measured = Some(Measured { in_use, held });
    }

    /// Requests a compaction before the next start of the host, unless the pause after the last one is not
    /// over. Returns whether it is requested.
    pub fn ask(&self) -> bool {
        let mut known = self.lock();
        known.asked = known.packed.is_none_or(|(at, pause)| at.elapsed() >= pause);
        known.asked
    }

    /// Whether a compaction is requested. The request ends with this call, which starts the next pause.
    pub fn take_asked(&self) -> bool {
        let mut known = self.lock();
        if known.asked {
            let pause = known.packed.map_or(PAUSE.0, |(_, pause)| (pause * 2).min(PAUSE.1));
            known.packed = Some((Instant::now(), pause));
            known.measured = None;
        }
        std::mem::take(&mut known.asked)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().expect("no one panics while holding what is known")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_after_it_was_measured_is_slack() {
        let reclaimable = ReclaimableSpace::default();
        assert_eq!(reclaimable.estimate(200, 100), 50);
        reclaimable.measured(190, 100);
        assert_eq!((reclaimable.estimate(200, 100), reclaimable.estimate(200, 60)), (10, 50));
        assert_eq!(reclaimable.estimate(200, 130), 0);
    }

    #[test]
    fn the_store_is_not_packed_again_and_again() {
        let reclaimable = ReclaimableSpace::default();
        assert!(!reclaimable.take_asked(), "nobody asked");
        assert!(reclaimable.ask() && reclaimable.take_asked() && !reclaimable.take_asked());
        assert!(!reclaimable.ask() && !reclaimable.take_asked(), "it was packed just now");
    }
}
