//! Owns the meaning of `wit/timers.wit` for a session: durable timers in log time.

use dim_model::time::Timestamp;

use super::{Answer, Refusal, Session, allowed, check_key};

impl Session {
    /// Sets or clears a timer.
    pub fn set_timer(&mut self, key: &str, at: Option<Timestamp>) -> Answer<()> {
        allowed!(check_key(key.as_bytes()));
        allowed!(self.may_effect(key.len() + 8));
        // A timer in the past is due with the next entry. Within this entry it would fire without end.
        let at = at.map(|at| at.max(Timestamp(self.context.time().0.saturating_add(1))));
        let known = self.effects.timers.get(key);
        if at.is_some() && known.is_none() && self.effects.timers.count() >= self.code.limits.timers {
            return Ok(Err(Refusal::TooMany(u32::try_from(self.code.limits.timers).unwrap_or(u32::MAX))));
        }
        if known != at {
            self.effects.set_timer(key.to_owned(), at);
        }
        Ok(Ok(()))
    }

    /// The time at which a timer is due.
    pub fn timer(&self, key: &str) -> Answer<Option<Timestamp>> {
        allowed!(check_key(key.as_bytes()));
        Ok(Ok(self.effects.timers.get(key)))
    }
}
