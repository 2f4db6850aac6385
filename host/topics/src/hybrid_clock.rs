//! Owns the hybrid logical clock (Kulkarni et al., 2014) of a member: time of day that never decreases and that is
//! later than each time which the member has received.

use std::time::Duration;

use dim_model::time::Timestamp;

/// The duration by which a received time may be ahead of the own time of day. A time further ahead is not followed.
pub const MAX_AHEAD: Duration = Duration::from_secs(60);

/// A hybrid logical clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HybridClock {
    last: Timestamp,
}

impl HybridClock {
    /// Creates a clock that continues after `last`.
    pub fn after(last: Timestamp) -> Self {
        Self { last }
    }

    /// Returns the time of an event that happens at `wall`. Each time is later than the one before.
    pub fn tick(&mut self, wall: Timestamp) -> Timestamp {
        self.last = wall.max(Timestamp(self.last.0.saturating_add(1)));
        self.last
    }

    /// Follows a received time. Returns false if it is too far ahead of `wall`.
    pub fn observe(&mut self, received: Timestamp, wall: Timestamp) -> bool {
        let is_near = received <= wall.after(MAX_AHEAD);
        if is_near {
            self.last = self.last.max(received);
        }
        is_near
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_increase_although_the_clock_goes_back() {
        let mut clock = HybridClock::default();
        assert_eq!(clock.tick(Timestamp(10)), Timestamp(10));
        assert_eq!(clock.tick(Timestamp(3)), Timestamp(11));
        assert!(clock.observe(Timestamp(20), Timestamp(3)));
        assert_eq!(clock.tick(Timestamp(4)), Timestamp(21));
        assert_eq!(clock.tick(Timestamp(40)), Timestamp(40));
    }

    #[test]
    fn a_time_from_the_future_is_not_followed() {
        let mut clock = HybridClock::default();
        let wall = Timestamp(1_000);
        assert!(clock.observe(wall.after(MAX_AHEAD), wall));
        let last = clock.tick(wall);
        assert!(!clock.observe(Timestamp(wall.after(MAX_AHEAD).0 + 1), wall));
        assert_eq!(clock.tick(wall), Timestamp(last.0 + 1));
    }
}
