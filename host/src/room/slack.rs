//! Owns what is known of the file beyond what it holds: how much of it would be given back to the disk, and
//! when the host may start again to do so.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Shortest time between two times that the store is packed; each is twice as far from the next, up to the
/// longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));

/// What is known, over the starts of one host after another.
#[derive(Debug, Default)]
pub struct Slack(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    measured: Option<Measured>,
    /// The store is to be packed before the next host runs.
    asked: bool,
    /// When it was packed last, and how long to wait from then on.
    packed: Option<(Instant, Duration)>,
}

/// The file at some time.
#[derive(Clone, Copy, Debug)]
struct Measured {
    in_use: u64,
    held: u64,
}

impl Slack {
    /// About how many bytes of a file of `file` bytes hold nothing, where the store holds `held`. Pages are
    /// not full to the last byte: until it was measured, they take half as much again.
    pub fn estimate(&self, file: u64, held: u64) -> u64 {
        let in_use = match self.lock().measured {
            Some(then) => then.in_use.saturating_add(held).saturating_sub(then.held),
            None => held.saturating_add(held / 2),
        };
        file.saturating_sub(in_use)
    }

    /// Whether it was measured.
    pub fn is_measured(&self) -> bool {
        self.lock().measured.is_some()
    }

    /// Takes in that `in_use` bytes of the file are in use while the store holds `held`.
    pub fn measured(&self, in_use: u64, held: u64) {
        self.lock().measured = Some(Measured { in_use, held });
    }

    /// Asks for the store to be packed before the next host runs, unless that was done not long ago; returns
    /// whether it will be.
    pub fn ask(&self) -> bool {
        let mut known = self.lock();
        known.asked = known.packed.is_none_or(|(at, pause)| at.elapsed() >= pause);
        known.asked
    }

    /// Whether it was asked for; once it is told, it is done.
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
        let slack = Slack::default();
        assert_eq!(slack.estimate(200, 100), 50);
        slack.measured(190, 100);
        assert_eq!((slack.estimate(200, 100), slack.estimate(200, 60)), (10, 50));
        assert_eq!(slack.estimate(200, 130), 0);
    }

    #[test]
    fn the_store_is_not_packed_again_and_again() {
        let slack = Slack::default();
        assert!(!slack.take_asked(), "nobody asked");
        assert!(slack.ask() && slack.take_asked() && !slack.take_asked());
        assert!(!slack.ask() && !slack.take_asked(), "it was packed just now");
    }
}
