//! Owns the times at which a member sends heads. It receives what happened, and returns the time of the next head.

use std::time::Duration;

use crate::time::Moment;

/// The times of heads after the last bundle.
const AFTER_BUNDLE: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(4), Duration::from_secs(15)];

/// The time between heads of a quiet member.
const QUIET: Duration = Duration::from_secs(60);

/// The number of heads a second that all members together send at most, as far as they are known.
const HEADS_PER_SECOND: u32 = 10;

/// The time after which newly received events are acknowledged.
const ACKNOWLEDGE: Duration = Duration::from_secs(5);

/// The time after which the last received events are acknowledged once more, because a head can be lost.
const ACKNOWLEDGE_AGAIN: Duration = Duration::from_secs(20);

/// The shortest time between two heads.
const SHORTEST: Duration = Duration::from_millis(500);

/// The times of heads.
#[derive(Debug)]
pub struct HeadSchedule {
    next: Moment,
    /// The time of the last head.
    sent: Option<Moment>,
    /// The time of the last bundle, and the number of heads after it so far.
    bundle: Option<(Moment, usize)>,
    /// The time at which events of others became durable last, while an acknowledgement of them is due.
    received: Option<Moment>,
    /// The state of the generator of jitter.
    jitter: u64,
}

impl HeadSchedule {
    /// Creates a schedule whose first head is due at once. `seed` distinguishes the members of a fleet.
    pub fn new(now: Moment, seed: u64) -> Self {
        Self { next: now, sent: None, bundle: None, received: None, jitter: seed }
    }

    /// The time of the next head.
    pub fn next(&self) -> Moment {
        self.next
    }

    /// Notes that a bundle was published. `members` is the number of known members.
    pub fn published(&mut self, now: Moment, members: usize) {
        self.bundle = Some((now, 0));
        let earliest = self.sent.map_or(now, |sent| sent.after(spread(members)));
        self.not_later_than(now.after(AFTER_BUNDLE[0]).max(earliest));
    }

    /// Notes that events of others became durable. `members` is the number of known members.
    pub fn received(&mut self, now: Moment, members: usize) {
        self.received = Some(now);
        self.not_later_than(now.after(ACKNOWLEDGE.max(spread(members))));
    }

    /// Notes that another member asks for heads. `members` is the number of known members.
    pub fn asked(&mut self, now: Moment, members: usize) {
        let wait = self.random(spread(members).max(Duration::from_millis(100)));
        self.not_later_than(now.after(wait));
    }

    /// Requests a head soon.
    pub fn hurry(&mut self, now: Moment) {
        self.not_later_than(now);
    }

    /// Notes that a head was sent, and plans the next one.
    pub fn sent(&mut self, now: Moment, members: usize) {
        self.sent = Some(now);
        let after_bundle = match &mut self.bundle {
            Some((at, count)) => {
                while *count < AFTER_BUNDLE.len() && at.after(AFTER_BUNDLE[*count]) <= now {
                    *count += 1;
                }
                AFTER_BUNDLE.get(*count).map(|wait| at.after(*wait).max(now.after(spread(members))))
            }
            None => None,
        };
        let again = self.received.map(|at| at.after(ACKNOWLEDGE_AGAIN.max(spread(members) * 4)));
        let again = again.filter(|at| *at > now);
        self.received = self.received.filter(|_| again.is_some());
        let quiet = QUIET.max(spread(members));
        // Between 70 and 130 percent.
        let quiet = now.after(quiet.mul_f64(0.7) + self.random(quiet.mul_f64(0.6)));
        self.next = after_bundle.into_iter().chain(again).fold(quiet, Moment::min);
    }

    fn not_later_than(&mut self, at: Moment) {
        let earliest = self.sent.map_or(at, |sent| sent.after(SHORTEST));
        self.next = self.next.min(at.max(earliest));
    }

    /// Returns a duration below `limit` (SplitMix64).
    fn random(&mut self, limit: Duration) -> Duration {
        self.jitter = self.jitter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.jitter;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let share = ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        limit.mul_f64(share)
    }
}

/// The time within which a received event is acknowledged, unless two heads are lost. `members` is the number of known
/// members.
pub fn acknowledged_within(members: usize) -> Duration {
    ACKNOWLEDGE_AGAIN.max(spread(members) * 4) + ACKNOWLEDGE * 2
}

/// The time in which each of `members` members may send one head.
pub fn spread(members: usize) -> Duration {
    Duration::from_secs(1) * u32::try_from(members).unwrap_or(u32::MAX) / HEADS_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Moment {
        Moment(Duration::from_millis(milliseconds))
    }

    #[test]
    fn heads_follow_the_last_bundle_and_then_become_rare() {
        let mut schedule = HeadSchedule::new(at(0), 1);
        assert_eq!(schedule.next(), at(0));
        schedule.sent(at(0), 1);
        schedule.published(at(10_000), 1);
        for expected in [11_000, 14_000, 25_000] {
            assert_eq!(schedule.next(), at(expected));
            schedule.sent(at(expected), 1);
        }
        let quiet = schedule.next().since(at(25_000));
        assert!((42..78).contains(&quiet.as_secs()), "{quiet:?}");
    }

    #[test]
    fn what_was_received_is_acknowledged_twice() {
        let mut schedule = HeadSchedule::new(at(0), 1);
        schedule.sent(at(0), 1);
        schedule.received(at(1_000), 1);
        schedule.received(at(2_000), 1);
        for expected in [6_000, 22_000] {
            assert_eq!(schedule.next(), at(expected));
            schedule.sent(at(expected), 1);
        }
        assert!(schedule.next() > at(60_000));
    }

    #[test]
    fn heads_become_rare_in_a_large_fleet() {
        let mut schedule = HeadSchedule::new(at(0), 1);
        schedule.sent(at(0), 6_000);
        let quiet = schedule.next().since(at(0));
        assert!((420..780).contains(&quiet.as_secs()), "{quiet:?}");
        schedule.received(at(1_000), 6_000);
        schedule.published(at(1_000), 6_000);
        assert!(schedule.next() > at(400_000));
        schedule.asked(at(1_000), 100);
        assert!(schedule.next() <= at(11_000));
    }

    #[test]
    fn however_often_members_ask_two_heads_keep_a_distance() {
        let mut schedule = HeadSchedule::new(at(0), 1);
        schedule.sent(at(0), 1);
        schedule.asked(at(0), 1);
        schedule.hurry(at(1));
        assert_eq!(schedule.next(), at(500));
    }
}
