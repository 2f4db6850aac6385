//! Clocks of tests: one that a test can set back, as after a correction, or ahead, as after a suspend, and one on which
//! minutes pass in seconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dim_model::time::{Clock, Timestamp};

/// The machine's clock plus an offset. Only [`pass`](Self::pass) affects the monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct SetClock {
    ahead_nanoseconds: Arc<AtomicI64>,
    passed_nanoseconds: Arc<AtomicU64>,
}

impl SetClock {
    /// Adds `seconds` to the offset. A negative number sets the clock back.
    pub fn set_by(&self, seconds: i64) {
        self.ahead_nanoseconds.fetch_add(seconds * 1_000_000_000, Ordering::SeqCst);
    }

    /// Lets `time` pass at once.
    pub fn pass(&self, time: Duration) {
        self.set_by(i64::try_from(time.as_secs()).expect("a short time"));
        self.passed_nanoseconds.fetch_add(dim_model::time::nanoseconds(time), Ordering::SeqCst);
    }
}

impl Clock for SetClock {
    fn wall(&self) -> Timestamp {
        Timestamp(Timestamp::wall().0.saturating_add_signed(self.ahead_nanoseconds.load(Ordering::SeqCst)))
    }

    fn monotonic(&self) -> Instant {
        Instant::now() + Duration::from_nanos(self.passed_nanoseconds.load(Ordering::SeqCst))
    }
}

/// A clock that runs faster than the machine's, from the time at which it was made. Waits by it take less real time.
#[derive(Clone, Copy, Debug)]
pub struct FastClock {
    rate: u32,
    began: Instant,
    began_wall: Timestamp,
}

impl FastClock {
    /// Makes a clock on which `rate` seconds pass in a second.
    pub fn new(rate: u32) -> Self {
        Self { rate, began: Instant::now(), began_wall: Timestamp::wall() }
    }

    fn passed(&self) -> Duration {
        self.began.elapsed() * self.rate
    }
}

impl Clock for FastClock {
    fn wall(&self) -> Timestamp {
        self.began_wall.after(self.passed())
    }

    fn monotonic(&self) -> Instant {
        self.began + self.passed()
    }

    fn real(&self, duration: Duration) -> Duration {
        duration / self.rate
    }
}
