//! Owns what becomes of a plugin that keeps failing: it is started again with growing pauses, and quarantined when it
//! does not start at all; and who traps or meets a limit rests for longer than it has worked in vain.
//!
//! What comes from outside quarantines nobody: whoever may publish on a topic could stop every plugin that hears it.
//! An event that traps costs the others a bounded delay, and the line goes on.

use std::time::{Duration, Instant};

use super::Actor;
use crate::plugin::instance::thread_cpu;
use crate::plugin::roster::Quarantine;
use crate::time::Timestamp;

/// How long a plugin that does not start is left alone, at first and at most.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// After a call that trapped or met a limit a plugin rests for the CPU time that it took, and for twice as long after
/// each further one in a row; so often it doubles at most, to 32 times.
const DOUBLED: u32 = 5;

/// Longest rest after one such call.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// Shortest rest that is worth it.
const WORTH_IT: Duration = Duration::from_millis(10);

/// How a plugin fails at present.
#[derive(Debug, Default)]
pub struct Failing {
    /// It did not start.
    restart: Option<Restart>,
    /// It is stopped until an operator or other code lets it go on.
    quarantined: bool,
    /// Calls in a row that trapped or met a limit.
    bad: u32,
    /// CPU time of those since the last rest, times how often it is rested for.
    owed: Duration,
    /// Until when it rests.
    rests_until: Option<Instant>,
}

/// Why a start has failed.
#[derive(Debug)]
pub struct FailedStart {
    /// In words.
    pub reason: String,
    /// Whether the code is to blame, rather than that there was no room for what it did.
    pub is_own_fault: bool,
}

/// A plugin that did not start.
#[derive(Debug)]
struct Restart {
    at: Instant,
    pause: Duration,
    /// How many starts in a row have failed by the code's own fault.
    failed: u32,
}

impl Failing {
    /// One that is quarantined from before, or is not.
    pub fn from_before(quarantined: bool) -> Self {
        Self { quarantined, ..Self::default() }
    }

    /// Whether it is too early to try to start it again.
    pub fn must_wait(&self) -> bool {
        self.restart.as_ref().is_some_and(|restart| Instant::now() < restart.at)
    }

    /// How long it is until a plugin that did not start is tried again.
    pub fn until_restart(&self) -> Duration {
        let at = self.restart.as_ref().map(|restart| restart.at);
        at.map_or(RESTART.0, |at| at.saturating_duration_since(Instant::now()))
    }

    /// A start has gone well, or will be another's.
    pub fn has_started(&mut self) {
        self.restart = None;
    }

    /// A start has failed, by the code's own fault or not; returns the pause until the next one, and how many have
    /// failed in a row by its fault.
    fn note_start(&mut self, is_own_fault: bool) -> (Duration, u32) {
        let own = u32::from(is_own_fault);
        let (pause, failed) = match &self.restart {
            Some(last) => ((last.pause * 2).min(RESTART.1), last.failed + own),
            None => (RESTART.0, own),
        };
        self.restart = Some(Restart { at: Instant::now() + pause, pause, failed });
        (pause, failed)
    }

    /// A call has come to its end, within its limits.
    pub fn note_success(&mut self) {
        self.bad = 0;
    }

    /// A call has trapped or met a limit that began when the thread had used `cpu`.
    pub fn note_bad(&mut self, cpu: Duration) {
        let times = 1 << self.bad.min(DOUBLED);
        self.bad = self.bad.saturating_add(1);
        self.owed += thread_cpu().saturating_sub(cpu) * times;
        if self.owed >= WORTH_IT {
            let rest = std::mem::take(&mut self.owed).min(LONGEST_REST);
            self.rests_until = Some(Instant::now() + rest);
        }
    }

    /// For how long the plugin rests on.
    pub fn rest(&mut self) -> Option<Duration> {
        let left = self.rests_until?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.rests_until = None;
            return None;
        }
        Some(left)
    }
}

impl Actor {
    /// Takes in that a start has failed: it is tried again later, or not until someone acts.
    pub(super) fn note_failed_start(&mut self, failed: FailedStart) {
        let FailedStart { reason, is_own_fault } = failed;
        let (pause, failed) = self.failing.note_start(is_own_fault);
        if failed < self.session().limits().restarts || self.recorded.is_some() {
            tracing::error!(plugin = %self.plugin, "does not start, trying again in {pause:?}: {reason}");
            return self.show_failing("failing", reason);
        }
        tracing::error!(plugin = %self.plugin, "quarantined, it did not start {failed} times: {reason}");
        self.failing = Failing::from_before(true);
        self.inbox.show_quarantined(true);
        let quarantine = Quarantine { reason: reason.clone(), since: Timestamp::wall() };
        self.session_mut().effects.batch.quarantine = Some(Some(quarantine));
        self.show_failing("quarantined", reason);
    }

    /// Whether the plugin is quarantined.
    pub(super) fn is_quarantined(&self) -> bool {
        self.failing.quarantined
    }

    /// Lets a quarantined plugin be started again.
    pub(super) fn end_quarantine(&mut self) {
        if self.failing.quarantined {
            self.failing = Failing::default();
            self.inbox.show_quarantined(false);
            // Behind what says that it begins: that may be on its way to the commit.
            self.session_mut().effects.batch.quarantine = Some(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_starts_grow_and_rests_are_bounded() {
        let mut failing = Failing::default();
        let pauses: Vec<u64> = (0..9).map(|_| failing.note_start(true).0.as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        failing.has_started();
        assert_eq!(failing.note_start(true), (Duration::from_secs(1), 1));
        // What is not its fault makes it wait, and counts for nothing.
        assert_eq!(failing.note_start(false), (Duration::from_secs(2), 1));
        // As if each call had taken all of the thread's CPU time, and a minute before.
        for _ in 0..100 {
            failing.owed += Duration::from_secs(60);
            failing.note_bad(Duration::ZERO);
            assert!(failing.rest().expect("it rests") <= LONGEST_REST);
        }
    }

    #[test]
    fn who_traps_at_no_cost_rests_little() {
        let mut failing = Failing::default();
        failing.note_bad(thread_cpu());
        assert!(failing.rest().is_none());
    }
}
