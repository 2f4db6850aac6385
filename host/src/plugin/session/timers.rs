//! What `wit/timers.wit` asks of a session: durable timers in log time.

use super::{Answer, Refusal, Session, allowed, check_key};
use crate::time::Timestamp;

impl Session {
    /// Sets a timer, or clears it.
    pub fn set_timer(&mut self, key: &str, at: Option<Timestamp>) -> Answer<()> {
        allowed!(check_key(key.as_bytes()));
        allowed!(self.may_effect(key.len() + 8));
        // What has passed falls due with the next entry: within this one it would fire for ever.
        let at = at.map(|at| at.max(Timestamp(self.world.time().0.saturating_add(1))));
        let known = self.effects.timers.get(key);
        if at.is_some() && known.is_none() && self.effects.timers.count() >= self.limits.timers {
            return Ok(Err(Refusal::TooMany(u32::try_from(self.limits.timers).unwrap_or(u32::MAX))));
        }
        if known != at {
            self.effects.set_timer(key.to_owned(), at);
        }
        Ok(Ok(()))
    }

    /// When a timer is due.
    pub fn timer(&self, key: &str) -> Answer<Option<Timestamp>> {
        allowed!(check_key(key.as_bytes()));
        Ok(Ok(self.effects.timers.get(key)))
    }
}
