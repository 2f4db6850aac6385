//! A clock that a test can set back, as after a correction, or ahead, as after a suspend.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use dim_model::time::{Clock, Timestamp};

/// The machine's clock plus an offset. The offset does not affect the monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct SetClock {
    ahead_nanoseconds: Arc<AtomicI64>,
}

impl SetClock {
    /// Adds `seconds` to the offset. A negative number sets the clock back.
    pub fn set_by(&self, seconds: i64) {
        self.ahead_nanoseconds.fetch_add(seconds * 1_000_000_000, Ordering::SeqCst);
    }
}

impl Clock for SetClock {
    fn wall(&self) -> Timestamp {
        Timestamp(Timestamp::wall().0.saturating_add_signed(self.ahead_nanoseconds.load(Ordering::SeqCst)))
    }
}
