//! Owns the allowance of a call for publishes: the free places in the outbox, and the remainder of the rates.
//! Both are computed before the call, so that they can be recorded with the entry.

use dim_model::time::Timestamp;
use dim_store::plugin_limits::{LimitName, Limits};

/// The time in seconds for which a plugin may exceed the rates after the same time without publishes.
pub const BURST: u64 = 10;

/// The allowance of a call, and its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Most messages.
    pub count: usize,
    /// Most bytes of messages.
    pub bytes: usize,
    /// Most messages and changes of subscriptions according to the rate alone.
    pub rate: usize,
    /// Most bytes of documents.
    pub document_bytes: usize,
    /// The limit that one more message exceeds.
    pub count_limit: LimitName,
    /// The number of messages so far.
    pub used: usize,
    /// The bytes of messages so far.
    pub used_bytes: usize,
    /// The bytes of documents so far.
    pub used_document_bytes: usize,
    /// The exceeded limit, if one was exceeded.
    pub struck: Option<LimitName>,
}

impl Room {
    /// An unlimited allowance.
    pub const ENDLESS: Self = Self {
        count: usize::MAX,
        bytes: usize::MAX,
        rate: usize::MAX,
        document_bytes: usize::MAX,
        count_limit: LimitName::OUTBOX,
        used: 0,
        used_bytes: 0,
        used_document_bytes: 0,
        struck: None,
    };

    /// Counts a message; the error is the exceeded limit.
    pub fn take(&mut self, bytes: usize) -> Result<(), LimitName> {
        let struck = if self.used >= self.count {
            Some(self.count_limit)
        } else if bytes > self.bytes.saturating_sub(self.used_bytes) {
            Some(LimitName::PUBLISH_BYTES_PER_SECOND)
        } else {
            None
        };
        if let Some(limit) = struck {
            self.struck = struck;
            return Err(limit);
        }
        self.used += 1;
        self.used_bytes += bytes;
        Ok(())
    }

    /// Counts a changed subscription, which becomes an entry of the log and is not sent. It counts as a message
    /// for the rate, independent of the outbox. The error is the exceeded limit.
    pub fn take_change(&mut self) -> Result<(), LimitName> {
        if self.used >= self.rate {
            self.struck = Some(LimitName::PUBLISHES_PER_SECOND);
            return Err(LimitName::PUBLISHES_PER_SECOND);
        }
        self.used += 1;
        Ok(())
    }

    /// Reverts the count of a change that the entry has cancelled.
    pub fn give_back_change(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// Counts a document; the error is the exceeded limit.
    pub fn take_document(&mut self, bytes: usize) -> Result<(), LimitName> {
        if bytes > self.document_bytes.saturating_sub(self.used_document_bytes) {
            self.struck = Some(LimitName::DOCUMENT_BYTES_PER_SECOND);
            return Err(LimitName::DOCUMENT_BYTES_PER_SECOND);
        }
        self.used_document_bytes += bytes;
        Ok(())
    }

    /// Reverts all counts, because the effects are reverted.
    pub fn give_back(&mut self) {
        (self.used, self.used_bytes, self.used_document_bytes) = (0, 0, 0);
    }

    /// The allowance for the record of an exceeded limit: the limit, and the number of messages.
    pub fn met(&self) -> (LimitName, usize) {
        if self.struck == Some(LimitName::PUBLISHES_PER_SECOND) {
            (LimitName::PUBLISHES_PER_SECOND, self.rate)
        } else {
            (self.count_limit, self.count)
        }
    }

    /// Whether a limit was exceeded that may be larger at another time.
    pub fn may_grow(&self, limits: &Limits) -> bool {
        let Some(struck) = self.struck else { return false };
        let burst = |per_second: u64| per_second.saturating_mul(BURST);
        let bytes = self.bytes as u64;
        match struck {
            LimitName::PUBLISHES_PER_SECOND => (self.rate as u64) < burst(limits.publishes_per_second),
            LimitName::PUBLISH_BYTES_PER_SECOND => bytes < burst(limits.publish_bytes_per_second),
            LimitName::DOCUMENT_BYTES_PER_SECOND => {
                (self.document_bytes as u64) < burst(limits.document_bytes_per_second)
            }
            _ => self.count < limits.outbox,
        }
    }
}

/// The remainder of the rates, in log time, so that a plugin that lags behind is not delayed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    /// The time of the last computation. A new plugin has a full allowance.
    at: Option<Timestamp>,
    messages: f64,
    bytes: f64,
    document_bytes: f64,
}

impl Rate {
    /// Computes the allowance at `now`, after a call with the use `used`; `outbox` is the number of free places
    /// in the outbox.
    pub fn room(&mut self, now: Timestamp, limits: &Limits, used: &Room, outbox: usize) -> Room {
        let elapsed = self.at.map_or(f64::INFINITY, |at| now.since(at).as_secs_f64());
        let left = |before: f64, used: usize, per_second: u64| {
            let per_second = per_second as f64;
            ((before - used as f64).max(0.0) + per_second * elapsed).min(per_second * BURST as f64)
        };
        self.messages = left(self.messages, used.used, limits.publishes_per_second);
        self.bytes = left(self.bytes, used.used_bytes, limits.publish_bytes_per_second);
        self.document_bytes =
            left(self.document_bytes, used.used_document_bytes, limits.document_bytes_per_second);
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
        let rate = self.messages as usize;
        Room {
            count: rate.min(outbox),
            bytes: self.bytes as usize,
            rate,
            document_bytes: self.document_bytes as usize,
            count_limit: if outbox <= rate { LimitName::OUTBOX } else { LimitName::PUBLISHES_PER_SECOND },
            ..Room::ENDLESS
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_leaves_a_burst_and_then_so_many_a_second() {
        let limits = Limits { publishes_per_second: 3, publish_bytes_per_second: 100, ..Limits::default() };
        let mut rate = Rate::default();
        let at = |millis: u64| Timestamp(1_000_000_000 + millis * 1_000_000);
        let mut room = rate.room(at(0), &limits, &Room::ENDLESS, usize::MAX);
        assert_eq!((room.count, room.bytes), (30, 1_000));
        let full = room;
        for _ in 0..30 {
            room.take(1).unwrap();
        }
        assert_eq!(room.take(1), Err(LimitName::PUBLISHES_PER_SECOND));
        // Frequent computations must not lose fractions to rounding.
        room = rate.room(at(1), &limits, &room, usize::MAX);
        for millis in 2..=1_001 {
            room = rate.room(at(millis), &limits, &Room { used: 0, used_bytes: 0, ..room }, usize::MAX);
        }
        assert_eq!((room.count, room.bytes), (3, 1_000));
        assert_eq!(room.take(1_001), Err(LimitName::PUBLISH_BYTES_PER_SECOND));
        assert_eq!(room.struck, Some(LimitName::PUBLISH_BYTES_PER_SECOND));
        assert_eq!(rate.room(at(1_001), &limits, &Room::ENDLESS, 2).count_limit, LimitName::OUTBOX);
        // More than a burst is never allowed, however long the plugin waits.
        let (mut some, mut all) = (Room { count: 29, rate: 29, ..full }, full);
        while some.take(0).is_ok() {}
        while all.take(0).is_ok() {}
        assert!(some.may_grow(&limits) && !all.may_grow(&limits) && !full.may_grow(&limits));
        // Documents have a separate rate.
        let limits = Limits { document_bytes_per_second: 100, ..limits };
        let (mut rate, all) = (Rate::default(), Room::ENDLESS);
        let mut room = rate.room(at(0), &limits, &all, usize::MAX);
        room.take_document(999).unwrap();
        assert_eq!(room.take_document(2), Err(LimitName::DOCUMENT_BYTES_PER_SECOND));
        room.take(1_000).unwrap();
        assert!(!room.may_grow(&limits), "there was all that a burst allows");
        let mut room = rate.room(at(500), &limits, &room, usize::MAX);
        assert_eq!(room.document_bytes, 51);
        assert_eq!(room.take_document(52), Err(LimitName::DOCUMENT_BYTES_PER_SECOND));
        assert!(room.may_grow(&limits));
        // A rate of zero allows nothing.
        let none = Limits { publishes_per_second: 0, ..limits };
        assert_eq!(Rate::default().room(at(0), &none, &Room::ENDLESS, 9).count, 0);
    }
}
