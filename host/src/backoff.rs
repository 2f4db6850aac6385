//! Owns how long to wait before trying again: longer each time, capped, and spread out so that many
//! who failed together do not come back together.

use std::time::Duration;

use rand::RngExt as _;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);

/// Waiting times of one thing that is tried again and again.
#[derive(Debug)]
pub struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// Starts at 100 ms.
    pub fn new() -> Self {
        Self { pause: FIRST }
    }

    /// The next pause: between half and all of a time that doubles up to 10 s.
    pub fn next(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST);
        pause.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// It went well.
    pub fn reset(&mut self) {
        self.pause = FIRST;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
