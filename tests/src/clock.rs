//! A clock that is set: back, as by someone who corrects it, or ahead, as after a suspend.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use dim::time::{Clock, Timestamp};

/// The machine's clock, and what it was set ahead of it. Time that passes is not touched by it.
#[derive(Clone, Debug, Default)]
pub struct SetClock {
    ahead_nanoseconds: Arc<AtomicI64>,
}

impl SetClock {
    /// Sets the clock by so many seconds ahead; back, if there are less than none.
    pub fn set_by(&self, seconds: i64) {
        self.ahead_nanoseconds.fetch_add(seconds * 1_000_000_000, Ordering::SeqCst);
    }
}

impl Clock for SetClock {
    fn wall(&self) -> Timestamp {
        Timestamp(Timestamp::wall().0.saturating_add_signed(self.ahead_nanoseconds.load(Ordering::SeqCst)))
    }
}
