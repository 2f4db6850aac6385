//! Owns the recognition of plain copies. On a topic with the delivery `both`, a member publishes each event twice: in a
//! bundle, and as a plain message for programs that know no bundles. A host receives both and must deliver one.
//!
//! A copy has no mark, because the bytes of a plain message are the event. So a copy is recognised by its content and by
//! the daemon of its sender. Other programs may use the same daemon: a message that is no copy is held for a moment,
//! because the bundle may only be late, and is then delivered. If the bundle comes later still, its event is not delivered
//! again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use dim_model::ident::{PeerName, Topic};
use dim_topics::identity::WriterId;
use sha2::{Digest as _, Sha256};

/// The time for which a plain message of a member's daemon waits for the bundle with the same event.
pub const HOLD: Duration = Duration::from_secs(5);

/// The time for which events and messages are remembered.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The maximum number of events, and of messages, that are remembered. The oldest are forgotten.
const MAX_REMEMBERED: usize = 65_536;

/// The maximum number of messages that are held at once. Further ones are delivered at once.
const MAX_HELD: usize = 1_024;

/// The maximum number of daemons of a member that are remembered.
const MAX_DAEMONS: usize = 4;

/// A topic and the content of a message.
type Content = (Topic, [u8; 32]);

fn content(topic: &Topic, data: &[u8]) -> Content {
    (topic.clone(), Sha256::digest(data).into())
}

/// The decision about a plain message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is no copy, or its bundle has not come: deliver it.
    Deliver,
    /// It is the copy of an event of a member: drop it.
    Copy,
    /// It may be a copy whose bundle is late: ask again after [`HOLD`].
    Hold,
}

/// The recent events of members and the recent plain messages on topics with both deliveries.
#[derive(Debug, Default)]
pub struct PlainCopies {
    /// The daemons of members, as their heads name them and as their bundles came, the latest last.
    daemons: HashMap<WriterId, Vec<PeerName>>,
    /// The events of members, with their writers.
    events: HashMap<Content, HashSet<WriterId>>,
    event_order: VecDeque<(Instant, Content)>,
    /// The senders of the plain messages that were delivered.
    messages: HashMap<Content, Vec<PeerName>>,
    message_order: VecDeque<(Instant, Content, PeerName)>,
    held: usize,
}

impl PlainCopies {
    /// Notes a daemon of a member. Anybody can send the bundles of a member again, so a member may have several.
    pub fn member_is_at(&mut self, writer: WriterId, daemon: &PeerName) {
        let daemons = self.daemons.entry(writer).or_default();
        if !daemons.contains(daemon) {
            daemons.push(daemon.clone());
            let surplus = daemons.len().saturating_sub(MAX_DAEMONS);
            daemons.drain(..surplus);
        }
    }

    /// Whether a message may come from the daemon of a writer.
    fn may_be_of(&self, writer: &WriterId, sender: &PeerName) -> bool {
        self.daemons.get(writer).is_none_or(|daemons| daemons.contains(sender))
    }

    /// Notes an event of a member. Returns whether its plain copy was delivered already, so that it must not be delivered
    /// again.
    pub fn take_event(&mut self, topic: &Topic, writer: &WriterId, data: &[u8], now: Instant) -> bool {
        self.forget_old(now);
        let content = content(topic, data);
        let senders = self.messages.get(&content).map_or(&[][..], Vec::as_slice);
        let delivered = senders.iter().position(|sender| self.may_be_of(writer, sender));
        if let (Some(place), Some(senders)) = (delivered, self.messages.get_mut(&content)) {
            senders.swap_remove(place);
        }
        self.events.entry(content.clone()).or_default().insert(*writer);
        self.event_order.push_back((now, content));
        delivered.is_some()
    }

    /// Decides about a plain message. `was_held` says whether it was held before.
    pub fn judge(
        &mut self,
        topic: &Topic,
        from: &PeerName,
        data: &[u8],
        was_held: bool,
        now: Instant,
    ) -> Verdict {
        self.forget_old(now);
        self.held -= usize::from(was_held);
        let content = content(topic, data);
        let mut writers = self.events.get(&content).into_iter().flatten();
        if writers.any(|writer| self.may_be_of(writer, from)) {
            return Verdict::Copy;
        }
        let is_of_member = self.daemons.values().any(|daemons| daemons.contains(from));
        if is_of_member && !was_held && self.held < MAX_HELD {
            self.held += 1;
            return Verdict::Hold;
        }
        self.messages.entry(content.clone()).or_default().push(from.clone());
        self.message_order.push_back((now, content, from.clone()));
        Verdict::Deliver
    }

    fn forget_old(&mut self, now: Instant) {
        let is_old = |at: Instant, count: usize| {
            now.saturating_duration_since(at) > REMEMBERED || count > MAX_REMEMBERED
        };
        while let Some((at, content)) = self.event_order.front()
            && is_old(*at, self.event_order.len())
        {
            self.events.remove(content);
            self.event_order.pop_front();
        }
        while let Some((at, content, sender)) = self.message_order.front()
            && is_old(*at, self.message_order.len())
        {
            if let Some(senders) = self.messages.get_mut(content) {
                if let Some(place) = senders.iter().position(|it| it == sender) {
                    senders.swap_remove(place);
                }
                if senders.is_empty() {
                    self.messages.remove(content);
                }
            }
            self.message_order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITER: WriterId = WriterId([1; 32]);

    struct Fixture {
        copies: PlainCopies,
        topic: Topic,
        daemon: PeerName,
        other: PeerName,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Self {
            let peer = |text: &str| text.parse().unwrap();
            Self {
                copies: PlainCopies::default(),
                topic: "jobs".parse().unwrap(),
                daemon: peer("12D3KooWF5RBpjgTtfABAZ5VJc5yvXgWX5DahNPQhttJXnszhCxF"),
                other: peer("12D3KooWDgPRAqDjixSJ7UKTfa4iUtnzPRw9S9eyvMH2As69HVzy"),
                now: Instant::now(),
            }
        }

        fn knows_the_daemon(mut self) -> Self {
            self.copies.member_is_at(WRITER, &self.daemon);
            self
        }

        fn event(&mut self, data: &[u8]) -> bool {
            self.copies.take_event(&self.topic, &WRITER, data, self.now)
        }

        fn plain(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge(&self.topic, &self.daemon, data, false, self.now)
        }

        fn held(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge(&self.topic, &self.daemon, data, true, self.now)
        }

        fn of_other(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge(&self.topic, &self.other, data, false, self.now)
        }
    }

    #[test]
    fn an_event_is_delivered_once_in_whichever_order_its_copies_come() {
        let mut it = Fixture::new().knows_the_daemon();
        // The bundle first, and the copy twice, because the writer was started again.
        assert!(!it.event(b"a"));
        assert_eq!([it.plain(b"a"), it.plain(b"a")], [Verdict::Copy; 2]);
        // The copy first: it waits for the bundle.
        assert_eq!(it.plain(b"b"), Verdict::Hold);
        assert!(!it.event(b"b"));
        assert_eq!(it.held(b"b"), Verdict::Copy);
        // The bundle is very late.
        assert_eq!(it.plain(b"c"), Verdict::Hold);
        assert_eq!(it.held(b"c"), Verdict::Deliver);
        assert!(it.event(b"c"), "its copy was delivered");
        assert!(!it.event(b"c"), "a second event with the same content");
    }

    #[test]
    fn messages_of_other_programs_are_delivered() {
        let mut it = Fixture::new().knows_the_daemon();
        assert!(!it.event(b"a"));
        assert_eq!(it.of_other(b"a"), Verdict::Deliver, "it is of another daemon");
        assert_eq!(it.plain(b"x"), Verdict::Hold, "a program may use the daemon of a member");
        assert_eq!(it.held(b"x"), Verdict::Deliver);
        for number in 0..MAX_HELD {
            assert_eq!(it.plain(&number.to_be_bytes()), Verdict::Hold);
        }
        assert_eq!(it.plain(b"y"), Verdict::Deliver, "too many are held");
    }

    #[test]
    fn the_copy_of_a_member_whose_daemon_is_unknown_is_recognised_by_its_content() {
        let mut it = Fixture::new();
        assert_eq!(it.plain(b"a"), Verdict::Deliver);
        assert!(it.event(b"a"));
        assert!(!it.event(b"b"));
        assert_eq!(it.plain(b"b"), Verdict::Copy);
    }

    #[test]
    fn what_is_remembered_is_bounded_in_time_and_number() {
        let mut it = Fixture::new();
        assert!(!it.event(b"a"));
        assert_eq!(it.of_other(b"m"), Verdict::Deliver);
        it.now += REMEMBERED + Duration::from_secs(1);
        assert_eq!(it.plain(b"a"), Verdict::Deliver);
        assert!(!it.event(b"m"));
        for number in 0..MAX_REMEMBERED + 10 {
            it.event(&number.to_be_bytes());
            it.of_other(&(number + 1_000_000).to_be_bytes());
        }
        assert!(it.copies.events.len() <= MAX_REMEMBERED + 1);
        assert!(it.copies.messages.len() <= MAX_REMEMBERED + 1);
    }
}
