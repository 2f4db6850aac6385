//! A state document that follows the plugin's state at a distance.

use std::cell::Cell;
use std::time::Duration;

use crate::log::{self, Level};
use crate::time::Time;
use crate::{DueTimer, Failure, ipns, state, timers};

/// Publishes a document some time after the state that it shows has changed.
///
/// Building it for each event would cost more than everything else together, so a change only
/// arms a timer. The clock stands still during a call; the time that building takes is therefore
/// judged by the size of the last document, and the timer is set so that building takes no more
/// than about 5 % of a core.
#[derive(Debug)]
pub struct Document {
    key: String,
    timer: &'static str,
    least: Duration,
    /// Whether the timer is known to be armed; a cache of what [`timers`] knows.
    armed: Cell<bool>,
}

/// What building and handing over a byte is taken to cost.
const NANOSECONDS_A_BYTE: u64 = 10;

/// Largest document that any host takes, in bytes.
const LARGEST: usize = 16 << 20;

/// The inverse of the share of a core that building may take.
const SHARE: u64 = 20;

impl Document {
    /// A document under the IPNS key `key`, built by `timer` at least `least` after a change.
    pub fn new(key: String, timer: &'static str, least: Duration) -> Self {
        Self { key, timer, least, armed: Cell::new(false) }
    }

    /// Says that what the document shows has changed.
    pub fn touch(&self) -> Result<(), Failure> {
        if self.armed.get() {
            return Ok(());
        }
        if timers::get(self.timer)?.is_none() {
            let size: u64 = state::get_json(self.size_key().as_bytes())?.unwrap_or(0);
            let pause = Duration::from_nanos(size.saturating_mul(NANOSECONDS_A_BYTE * SHARE));
            timers::set(self.timer, Time::now().after(self.least.max(pause)).timestamp())?;
        }
        self.armed.set(true);
        Ok(())
    }

    /// Whether `timer` says that it is time to build the document.
    pub fn is_due(&self, timer: &DueTimer) -> bool {
        let due = timer.key == self.timer;
        if due {
            self.armed.set(false);
        }
        due
    }

    /// Publishes the document. One that is too large is told to the operator and left: the one before
    /// stays, and the next is built when there is something new to show.
    pub fn publish(&self, data: &[u8]) -> Result<(), Failure> {
        state::set_json(self.size_key().as_bytes(), &data.len())?;
        // No host takes more; what goes over the border in one call is limited, too.
        let shown = &data[..data.len().min(LARGEST + 1)];
        match ipns::update_state(&self.key, shown, None) {
            Err(ipns::Error::TooLarge(limit)) => {
                let (size, limit) = (data.len().to_string(), limit.to_string());
                let values = [("key", self.key.as_str()), ("bytes", &size), ("limit", &limit)];
                log::line(Level::Error, "the document is too large and is not published", &values);
                Ok(())
            }
            published => Ok(published?),
        }
    }

    fn size_key(&self) -> String {
        format!("document/{}", self.timer)
    }
}
