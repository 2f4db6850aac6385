//! Owns the judgement of new code: how long it is watched, and what tells that it fails.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How new code is watched. The section `replacement.probation` of the config.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Events and commands that it must handle, default 1,000. More: a rare failure is more likely seen.
    pub events: u64,
    /// Seconds that it must run, default 30. Whichever of the two comes later ends the probation.
    pub seconds: u64,
    /// Seconds after which the probation ends however few events there were, default 600. The log is kept
    /// from the takeover on for as long.
    pub max_seconds: u64,
    /// Events that it must reject before its rate of rejections counts, default 20.
    pub rejections: u64,
    /// Percentage points by which its rate of rejections may lie above that of the code before it, default 5.
    pub points: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self { events: 1_000, seconds: 30, max_seconds: 600, rejections: 20, points: 5 }
    }
}

/// What a plugin's code has handled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    /// Events and commands.
    pub events: u64,
    /// Events among them that it rejected, or could not handle after all tries.
    pub rejected: u64,
}

impl Rates {
    /// Whether more than `points` percentage points more are rejected than in `other`.
    fn exceed(&self, other: &Self, points: u64) -> bool {
        let per_cent = |rates: &Self| (rates.rejected * 100) as f64 / rates.events.max(1) as f64;
        per_cent(self) > per_cent(other) + points as f64
    }
}

/// The time in which new code is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probation {
    /// Nanoseconds for which it has been watched. Time in which the plugin was paused, or the host was down, is
    /// none of them: it could not have failed then.
    pub watched: u64,
    /// What it has handled.
    pub rates: Rates,
    /// What the code before it had handled.
    pub before: Rates,
}

/// What a probation ends with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has proven itself.
    Confirmed,
    /// Nothing came that it could have failed at.
    Unproven,
    /// It fails, and why.
    Fails(String),
}

impl Probation {
    /// Begins after code that has handled `before`.
    pub fn new(before: Rates) -> Self {
        Self { watched: 0, rates: Rates::default(), before }
    }

    /// The verdict, once there is one. Traps and limits are a verdict of their own.
    pub fn verdict(&self, rules: &Rules) -> Option<Verdict> {
        let Self { watched, rates, before } = self;
        if rates.rejected >= rules.rejections.max(1) && rates.exceed(before, rules.points) {
            let why = format!(
                "it rejected {} of {} events, the code before it {} of {}",
                rates.rejected, rates.events, before.rejected, before.events
            );
            return Some(Verdict::Fails(why));
        }
        let elapsed = Duration::from_nanos(*watched);
        let is_long = elapsed >= Duration::from_secs(rules.seconds);
        if is_long && rates.events >= rules.events {
            return Some(Verdict::Confirmed);
        }
        let is_over = elapsed >= Duration::from_secs(rules.max_seconds.max(rules.seconds));
        is_over.then_some(if rates.events == 0 { Verdict::Unproven } else { Verdict::Confirmed })
    }

    /// How long it is until time alone may bring a verdict.
    pub fn pause(&self, rules: &Rules) -> Duration {
        let seconds = if self.rates.events >= rules.events { rules.seconds } else { rules.max_seconds };
        let end = Duration::from_secs(seconds.max(rules.seconds));
        end.saturating_sub(Duration::from_nanos(self.watched)).max(Duration::from_millis(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(rates: (u64, u64), before: (u64, u64), seconds: u64) -> Option<Verdict> {
        let rates_of = |(events, rejected)| Rates { events, rejected };
        let watched = seconds * 1_000_000_000;
        let probation = Probation { watched, rates: rates_of(rates), before: rates_of(before) };
        probation.verdict(&Rules::default())
    }

    #[test]
    fn it_ends_after_enough_events_and_enough_time() {
        assert_eq!(verdict((1_000, 0), (0, 0), 29), None);
        assert_eq!(verdict((999, 0), (0, 0), 599), None);
        assert_eq!(verdict((1_000, 0), (0, 0), 30), Some(Verdict::Confirmed));
        assert_eq!(verdict((1, 0), (0, 0), 600), Some(Verdict::Confirmed));
        assert_eq!(verdict((0, 0), (0, 0), 600), Some(Verdict::Unproven));
    }

    #[test]
    fn more_rejections_than_before_are_a_failure_and_as_many_are_none() {
        assert_eq!(verdict((19, 19), (0, 0), 1), None);
        assert!(matches!(verdict((20, 20), (0, 0), 1), Some(Verdict::Fails(_))));
        assert_eq!(verdict((100, 35), (100, 30), 1), None);
        assert!(matches!(verdict((100, 36), (100, 30), 1), Some(Verdict::Fails(_))));
    }
}
