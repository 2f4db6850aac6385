//! Owns the reaction to a plugin that keeps failing. The host restarts it with growing pauses and quarantines
//! it if it does not start at all. A plugin that traps or exceeds a limit is throttled for longer than its
//! failed calls took.
//!
//! Events do not lead to a quarantine: otherwise a peer that may publish on a topic could stop every plugin
//! that subscribes to it. An event that traps delays the others by a bounded time, and then the next entries
//! follow.

use std::time::{Duration, Instant};

use dim_model::time::Timestamp;
use dim_store::plugin_registry::Quarantine;

use super::Actor;
use crate::instance::thread_cpu;

/// The shortest and the longest pause before a plugin that does not start is started again.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Most doublings of the throttle. After a call that trapped or exceeded a limit, a plugin is throttled for the
/// CPU time of the call. Each further such call in a row doubles the factor, up to 32.
const DOUBLED: u32 = 5;

/// Longest throttle after such a call.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// Shortest throttle; shorter ones are accumulated.
const WORTH_IT: Duration = Duration::from_millis(10);

/// The failures of a plugin.
#[derive(Debug, Default)]
pub struct Failing {
    /// The next restart, if the plugin did not start.
    restart: Option<Restart>,
    /// Whether the plugin is stopped until the operator resumes it or other code arrives.
    quarantined: bool,
    /// The number of calls in a row that trapped or exceeded a limit.
    bad: u32,
    /// The throttle that is due and was too short so far.
    owed: Duration,
    /// The end of the current throttle.
    rests_until: Option<Instant>,
}

/// A failed start.
#[derive(Debug)]
pub struct FailedStart {
    /// The reason in words.
    pub reason: String,
    /// Whether the code is the cause, and not a temporary lack of space for its effects.
    pub is_own_fault: bool,
}

/// The restart of a plugin that did not start.
#[derive(Debug)]
struct Restart {
    at: Instant,
    pause: Duration,
    /// The number of starts in a row that failed because of the code.
    failed: u32,
}

impl Failing {
    /// Creates the state of a plugin that is quarantined already, or is not.
    pub fn from_before(quarantined: bool) -> Self {
        Self { quarantined, ..Self::default() }
    }

    /// Whether the pause before the next start is not over.
    pub fn must_wait(&self, now: Instant) -> bool {
        self.restart.as_ref().is_some_and(|restart| now < restart.at)
    }

    /// The time until the next start.
    pub fn until_restart(&self, now: Instant) -> Duration {
        let at = self.restart.as_ref().map(|restart| restart.at);
        at.map_or(RESTART.0, |at| at.saturating_duration_since(now))
    }

    /// Records a successful start, or a change of the code.
    pub fn has_started(&mut self) {
        self.restart = None;
    }

    /// Records a failed start. Returns the pause until the next one, and the number of starts in a row that
    /// failed because of the code.
    fn note_start(&mut self, is_own_fault: bool, now: Instant) -> (Duration, u32) {
        let own = u32::from(is_own_fault);
        let (pause, failed) = match &self.restart {
            Some(last) => ((last.pause * 2).min(RESTART.1), last.failed + own),
            None => (RESTART.0, own),
        };
        self.restart = Some(Restart { at: now + pause, pause, failed });
        (pause, failed)
    }

    /// Records a call that ended within its limits.
    pub fn note_success(&mut self) {
        self.bad = 0;
    }

    /// Records a call that trapped or exceeded a limit. `cpu` is the thread's CPU time at its beginning.
    pub fn note_bad(&mut self, cpu: Duration, now: Instant) {
        let times = 1 << self.bad.min(DOUBLED);
        self.bad = self.bad.saturating_add(1);
        self.owed += thread_cpu().saturating_sub(cpu) * times;
        if self.owed >= WORTH_IT {
            let rest = std::mem::take(&mut self.owed).min(LONGEST_REST);
            self.rests_until = Some(now + rest);
        }
    }

    /// The rest of the current throttle.
    pub fn rest(&mut self, now: Instant) -> Option<Duration> {
        let left = self.rests_until?.saturating_duration_since(now);
        if left.is_zero() {
            self.rests_until = None;
            return None;
        }
        Some(left)
    }
}

impl Actor {
    /// The rest of the current throttle.
    pub(super) fn rest(&mut self) -> Option<Duration> {
        self.failing.rest(self.monotonic())
    }

    /// Records a failed start: it is repeated later, or the plugin is quarantined.
    pub(super) fn note_failed_start(&mut self, failed: FailedStart) {
        let FailedStart { reason, is_own_fault } = failed;
        let (pause, failed) = self.failing.note_start(is_own_fault, self.monotonic());
        if failed < self.session().limits().restarts || self.attempts.recorded.is_some() {
            tracing::error!(plugin = %self.plugin, "does not start, trying again in {pause:?}: {reason}");
            return self.show_failing("failing", reason);
        }
        tracing::error!(plugin = %self.plugin, "quarantined, it did not start {failed} times: {reason}");
        self.failing = Failing::from_before(true);
        self.inbox.show_quarantined(true);
        let quarantine = Quarantine { reason: reason.clone(), since: Timestamp::wall() };
        self.session_mut().effects.batch.code.quarantine = Some(Some(quarantine));
        self.show_failing("quarantined", reason);
    }

    /// Whether the plugin is quarantined.
    pub(super) fn is_quarantined(&self) -> bool {
        self.failing.quarantined
    }

    /// Ends the quarantine of a plugin, so that it is started again.
    pub(super) fn end_quarantine(&mut self) {
        if self.failing.quarantined {
            self.failing = Failing::default();
            self.inbox.show_quarantined(false);
            // This batch follows the one with the quarantine, which may not be committed yet.
            self.session_mut().effects.batch.code.quarantine = Some(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_starts_grow_and_rests_are_bounded() {
        let (mut failing, now) = (Failing::default(), Instant::now());
        let pauses: Vec<u64> = (0..9).map(|_| failing.note_start(true, now).0.as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        failing.has_started();
        assert_eq!(failing.note_start(true, now), (Duration::from_secs(1), 1));
        // A failure without the code's fault lengthens the pause but does not count.
        assert_eq!(failing.note_start(false, now), (Duration::from_secs(2), 1));
        // As if each call had taken the whole CPU time of the thread, after a minute of earlier calls.
        for _ in 0..100 {
            failing.owed += Duration::from_secs(60);
            failing.note_bad(Duration::ZERO, now);
            assert!(failing.rest(now).expect("it rests") <= LONGEST_REST);
        }
    }

    #[test]
    fn who_traps_at_no_cost_rests_little() {
        let (mut failing, now) = (Failing::default(), Instant::now());
        failing.note_bad(thread_cpu(), now);
        assert!(failing.rest(now).is_none());
    }
}
