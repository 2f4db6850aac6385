//! Owns the pauses between retries: they double, have a maximum, and are random, so that many callers that failed
//! together do not retry together.

use std::time::Duration;

use rand::RngExt as _;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);

/// The pauses between the retries of one operation.
#[derive(Debug)]
pub struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// Makes a back-off that starts at 100 ms.
    pub fn new() -> Self {
        Self { pause: FIRST }
    }

    /// Returns the next pause: a random time between half and all of a time that doubles up to 10 s.
    pub fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST);
        pause.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// Starts again at 100 ms, after a success.
    pub fn reset(&mut self) {
        self.pause = FIRST;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
