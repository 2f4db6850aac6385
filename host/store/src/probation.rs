//! Owns the probation of new code: its duration, and the signs of a failure. It receives counts of handled
//! events, and returns the verdict.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The rules of probation. The section `replacement.probation` of the config.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Events and commands that the code must handle, default 1,000. A higher number makes it more likely to
    /// see a rare failure.
    pub events: u64,
    /// Time that the code must run, default 30 s; a bare number is in seconds. The later of the two conditions ends
    /// the probation.
    #[serde(alias = "seconds", with = "dim_model::time::in_seconds")]
    pub time: Duration,
    /// Time after which the probation ends, however few events there were, default 10 minutes; a bare number is in
    /// seconds. The host keeps the log from the takeover on for that time.
    #[serde(alias = "max_seconds", with = "dim_model::time::in_seconds")]
    pub max_time: Duration,
    /// Events that the code must reject before its rate of rejections counts, default 20.
    pub rejections: u64,
    /// Percentage points by which its rate of rejections may exceed that of the code before, default 5.
    pub points: u64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            events: 1_000,
            time: Duration::from_secs(30),
            max_time: Duration::from_secs(600),
            rejections: 20,
            points: 5,
        }
    }
}

/// The numbers of events that a plugin's code has handled and rejected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rates {
    /// The number of events and commands.
    pub events: u64,
    /// The number of events that it rejected, or could not handle after all attempts.
    pub rejected: u64,
}

impl Rates {
    /// Whether the rate of rejections exceeds that of `other` by more than `points` percentage points.
    fn exceed(&self, other: &Self, points: u64) -> bool {
        let per_cent = |rates: &Self| (rates.rejected * 100) as f64 / rates.events.max(1) as f64;
        per_cent(self) > per_cent(other) + points as f64
    }
}

/// The probation of new code so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probation {
    /// The time in which the code was watched, in nanoseconds. It excludes time in which the plugin was paused
    /// or the host was down, in which the code could not fail.
    pub watched: u64,
    /// The numbers of this code.
    pub rates: Rates,
    /// The numbers of the code before.
    pub before: Rates,
}

/// The result of a probation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The code has proven itself.
    Confirmed,
    /// The code had no event that it could have failed at.
    Unproven,
    /// The code fails, with the reason.
    Fails(String),
}

impl Probation {
    /// Begins the probation of code whose predecessor has the numbers `before`.
    pub fn new(before: Rates) -> Self {
        Self { watched: 0, rates: Rates::default(), before }
    }

    /// The verdict, once there is one. Traps and exceeded limits lead to a verdict elsewhere.
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
        let is_long = elapsed >= rules.time;
        if is_long && rates.events >= rules.events {
            return Some(Verdict::Confirmed);
        }
        let is_over = elapsed >= rules.max_time.max(rules.time);
        is_over.then_some(if rates.events == 0 { Verdict::Unproven } else { Verdict::Confirmed })
    }

    /// The time after which a verdict is possible without further events, at least 10 ms.
    pub fn pause(&self, rules: &Rules) -> Duration {
        let end = if self.rates.events >= rules.events { rules.time } else { rules.max_time.max(rules.time) };
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
