//! Owns how much a call may publish: what the outbox has room for, and what the rate leaves. Both are settled before
//! the call, so that they can be recorded with the entry.

use crate::plugin::Limits;
use crate::time::Timestamp;

/// The rates may be exceeded for as long as this, in seconds, by who was silent for as long.
pub const BURST: u64 = 10;

/// How much a call may publish, and has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// So many messages.
    pub count: usize,
    /// So many bytes.
    pub bytes: usize,
    /// So many messages and changes of subscriptions by the rate alone.
    pub rate: usize,
    /// So many bytes of documents.
    pub document_bytes: usize,
    /// The limit that is met with one message more.
    pub count_limit: &'static str,
    /// It has published so many messages.
    pub used: usize,
    /// It has published so many bytes.
    pub used_bytes: usize,
    /// It has given names documents of so many bytes.
    pub used_document_bytes: usize,
    /// The limit that it has met.
    pub struck: Option<&'static str>,
}

/// The limit on messages that wait to be sent.
pub const OUTBOX: &str = "outbox";
/// The limit on messages a second.
pub const RATE: &str = "publishes-per-second";
/// The limit on bytes of messages a second.
pub const BYTE_RATE: &str = "publish-bytes-per-second";
/// The limit on bytes of documents a second.
pub const DOCUMENT_RATE: &str = "document-bytes-per-second";

impl Room {
    /// As much as is wanted.
    pub const ENDLESS: Self = Self {
        count: usize::MAX,
        bytes: usize::MAX,
        rate: usize::MAX,
        document_bytes: usize::MAX,
        count_limit: OUTBOX,
        used: 0,
        used_bytes: 0,
        used_document_bytes: 0,
        struck: None,
    };

    /// Takes room for a message; the error is the limit that was met.
    pub fn take(&mut self, bytes: usize) -> Result<(), &'static str> {
        let struck = if self.used >= self.count {
            Some(self.count_limit)
        } else if bytes > self.bytes.saturating_sub(self.used_bytes) {
            Some(BYTE_RATE)
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

    /// Takes room for what becomes an entry of the log but is not sent: a changed subscription. It counts as a message
    /// does, whatever the outbox has room for; the error is the limit that was met.
    pub fn take_change(&mut self) -> Result<(), &'static str> {
        if self.used >= self.rate {
            self.struck = Some(RATE);
            return Err(RATE);
        }
        self.used += 1;
        Ok(())
    }

    /// Gives back the room of a change that the entry has taken back.
    pub fn give_back_change(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// Takes room for a document; the error is the limit that was met.
    pub fn take_document(&mut self, bytes: usize) -> Result<(), &'static str> {
        if bytes > self.document_bytes.saturating_sub(self.used_document_bytes) {
            self.struck = Some(DOCUMENT_RATE);
            return Err(DOCUMENT_RATE);
        }
        self.used_document_bytes += bytes;
        Ok(())
    }

    /// Gives back what was taken: nothing comes of it.
    pub fn give_back(&mut self) {
        (self.used, self.used_bytes, self.used_document_bytes) = (0, 0, 0);
    }

    /// What was left when a limit was met, as it is recorded: the limit, and how many messages there was room for.
    pub fn met(&self) -> (&'static str, usize) {
        if self.struck == Some(RATE) { (RATE, self.rate) } else { (self.count_limit, self.count) }
    }

    /// Whether it was met, and there may be more room at another time.
    pub fn may_grow(&self, limits: &Limits) -> bool {
        let Some(struck) = self.struck else { return false };
        let burst = |per_second: u64| per_second.saturating_mul(BURST);
        let bytes = self.bytes as u64;
        match struck {
            RATE => (self.rate as u64) < burst(limits.publishes_per_second),
            BYTE_RATE => bytes < burst(limits.publish_bytes_per_second),
            DOCUMENT_RATE => (self.document_bytes as u64) < burst(limits.document_bytes_per_second),
            _ => self.count < limits.outbox,
        }
    }
}

/// What the rates leave, in log time: a plugin that lags behind is not held up by it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    /// When it was looked last; a plugin that begins may do as much as one that was silent for long.
    at: Option<Timestamp>,
    messages: f64,
    bytes: f64,
    document_bytes: f64,
}

impl Rate {
    /// What is left at `now`, after a call that has used this much; `outbox` is what that has room for.
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
            count_limit: if outbox <= rate { OUTBOX } else { RATE },
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
        assert_eq!(room.take(1), Err(RATE));
        // Looked at every millisecond, nothing is lost by rounding.
        room = rate.room(at(1), &limits, &room, usize::MAX);
        for millis in 2..=1_001 {
            room = rate.room(at(millis), &limits, &Room { used: 0, used_bytes: 0, ..room }, usize::MAX);
        }
        assert_eq!((room.count, room.bytes), (3, 1_000));
        assert_eq!(room.take(1_001), Err(BYTE_RATE));
        assert_eq!(room.struck, Some(BYTE_RATE));
        assert_eq!(rate.room(at(1_001), &limits, &Room::ENDLESS, 2).count_limit, OUTBOX);
        // Who wants more than a burst waits in vain.
        let (mut some, mut all) = (Room { count: 29, rate: 29, ..full }, full);
        while some.take(0).is_ok() {}
        while all.take(0).is_ok() {}
        assert!(some.may_grow(&limits) && !all.may_grow(&limits) && !full.may_grow(&limits));
        // Documents have a rate of their own.
        let limits = Limits { document_bytes_per_second: 100, ..limits };
        let (mut rate, all) = (Rate::default(), Room::ENDLESS);
        let mut room = rate.room(at(0), &limits, &all, usize::MAX);
        room.take_document(999).unwrap();
        assert_eq!(room.take_document(2), Err(DOCUMENT_RATE));
        room.take(1_000).unwrap();
        assert!(!room.may_grow(&limits), "there was all that a burst allows");
        let mut room = rate.room(at(500), &limits, &room, usize::MAX);
        assert_eq!(room.document_bytes, 51);
        assert_eq!(room.take_document(52), Err(DOCUMENT_RATE));
        assert!(room.may_grow(&limits));
        // A rate of nothing leaves nothing.
        let none = Limits { publishes_per_second: 0, ..limits };
        assert_eq!(Rate::default().room(at(0), &none, &Room::ENDLESS, 9).count, 0);
    }
}
