//! Owns the times that a driver passes to the protocol.

use std::time::Duration;

use dim_model::time::Timestamp;

/// A time of the driver's monotonic clock, as the duration since any fixed time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Duration);

impl Moment {
    /// Returns this time plus `duration`.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// Returns the duration from `earlier` to this time, or zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The current time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// By the monotonic clock.
    pub moment: Moment,
    /// The time of day.
    pub wall: Timestamp,
}
