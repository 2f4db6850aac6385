//! Owns the recognition of plain copies. On a topic with the delivery `both`, a member publishes each event twice: in a
//! bundle, and as a plain message for programs that know no bundles. A host receives both and must deliver one.
//!
//! A copy has no mark, because the bytes of a plain message are the event. So a copy is recognised by its content and by
//! the daemon of its sender. Other programs may use the same daemon: a message that is no copy is held for a moment,
//! because the bundle may only be late, and is then delivered. If the bundle comes later still, its event is not delivered
//! again.
//!
//! A daemon counts as that of a member if a signed head of the member names it and a bundle of the member came from it.
//! So nobody can pass off the daemon of another program as the own one, or the own daemon as that of another member.

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

/// The maximum number of members whose daemons are remembered. The copies of further ones are not recognised.
const MAX_MEMBERS: usize = 10_000;

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

/// What is known of the daemon of a member.
#[derive(Debug, Default)]
struct Daemon {
    /// The daemon that the last head names.
    named: Option<PeerName>,
    /// The daemon from which the last bundle came, if it was not the named one before.
    sender: Option<PeerName>,
    /// Whether a bundle came from the named daemon.
    is_confirmed: bool,
}

impl Daemon {
    fn confirmed(&self) -> Option<&PeerName> {
        self.named.as_ref().filter(|_| self.is_confirmed)
    }
}

/// The recent events of members and the recent plain messages on topics with both deliveries.
#[derive(Debug, Default)]
pub struct PlainCopies {
    daemons: HashMap<WriterId, Daemon>,
    /// The members at each confirmed daemon.
    members: HashMap<PeerName, HashSet<WriterId>>,
    /// The events of members, with the times at which they came last.
    events: HashMap<Content, HashMap<WriterId, Instant>>,
    event_order: VecDeque<(Instant, Content, WriterId)>,
    /// The senders of the plain messages that were delivered, with the times.
    messages: HashMap<Content, Vec<(PeerName, Instant)>>,
    message_order: VecDeque<(Instant, Content)>,
    held: usize,
}

impl PlainCopies {
    /// Notes the daemon that a signed head of a member names.
    pub fn head_names(&mut self, writer: WriterId, daemon: &PeerName) {
        self.update(writer, |known| {
            if known.named.as_ref() != Some(daemon) {
                known.is_confirmed = known.sender.as_ref() == Some(daemon);
                known.named = Some(daemon.clone());
            }
        });
    }

    /// Notes the daemon from which a bundle of a member came.
    pub fn bundle_came_from(&mut self, writer: WriterId, daemon: &PeerName) {
        self.update(writer, |known| {
            if known.named.as_ref() == Some(daemon) {
                known.is_confirmed = true;
            } else if known.sender.as_ref() != Some(daemon) {
                known.sender = Some(daemon.clone());
            }
        });
    }

    /// The number of members whose daemons are confirmed.
    pub fn confirmed(&self) -> usize {
        self.daemons.values().filter(|daemon| daemon.is_confirmed).count()
    }

    fn update(&mut self, writer: WriterId, change: impl FnOnce(&mut Daemon)) {
        if !self.daemons.contains_key(&writer) && self.daemons.len() >= MAX_MEMBERS {
            return;
        }
        let known = self.daemons.entry(writer).or_default();
        let before = known.confirmed().cloned();
        change(known);
        let after = known.confirmed().cloned();
        if before == after {
            return;
        }
        if let Some(before) = before
            && let Some(members) = self.members.get_mut(&before)
        {
            members.remove(&writer);
            if members.is_empty() {
                self.members.remove(&before);
            }
        }
        if let Some(after) = after {
            self.members.entry(after).or_default().insert(writer);
        }
    }

    /// Whether a message comes from the daemon of a member.
    fn is_of(&self, writer: &WriterId, sender: &PeerName) -> bool {
        self.members.get(sender).is_some_and(|members| members.contains(writer))
    }

    /// Notes an event of a member. Returns whether its plain copy was delivered already, so that it must not be delivered
    /// again.
    pub fn take_event(&mut self, topic: &Topic, writer: &WriterId, data: &[u8], now: Instant) -> bool {
        self.forget_old(now);
        let content = content(topic, data);
        let senders = self.messages.get(&content).map_or(&[][..], Vec::as_slice);
        let delivered = senders.iter().position(|(sender, _)| self.is_of(writer, sender));
        if let (Some(place), Some(senders)) = (delivered, self.messages.get_mut(&content)) {
            senders.swap_remove(place);
        }
        self.events.entry(content.clone()).or_default().insert(*writer, now);
        self.event_order.push_back((now, content, *writer));
        delivered.is_some()
    }

    /// Decides about a plain message that has arrived.
    pub fn judge(&mut self, topic: &Topic, from: &PeerName, data: &[u8], now: Instant) -> Verdict {
        self.forget_old(now);
        if self.is_copy(topic, from, data) {
            return Verdict::Copy;
        }
        if self.members.contains_key(from) && self.held < MAX_HELD {
            self.held += 1;
            return Verdict::Hold;
        }
        self.delivered(topic, from, data, now);
        Verdict::Deliver
    }

    /// Decides about a plain message that was held. It is a copy, or it is delivered.
    pub fn judge_held(&mut self, topic: &Topic, from: &PeerName, data: &[u8], now: Instant) -> Verdict {
        self.forget_old(now);
        self.held -= 1;
        if self.is_copy(topic, from, data) {
            return Verdict::Copy;
        }
        self.delivered(topic, from, data, now);
        Verdict::Deliver
    }

    fn is_copy(&self, topic: &Topic, from: &PeerName, data: &[u8]) -> bool {
        let writers = self.events.get(&content(topic, data));
        writers.is_some_and(|writers| writers.keys().any(|writer| self.is_of(writer, from)))
    }

    fn delivered(&mut self, topic: &Topic, from: &PeerName, data: &[u8], now: Instant) {
        let content = content(topic, data);
        self.messages.entry(content.clone()).or_default().push((from.clone(), now));
        self.message_order.push_back((now, content));
    }

    fn forget_old(&mut self, now: Instant) {
        let is_old = |at: Instant, count: usize| {
            now.saturating_duration_since(at) > REMEMBERED || count > MAX_REMEMBERED
        };
        while let Some((at, content, writer)) = self.event_order.front()
            && is_old(*at, self.event_order.len())
        {
            if let Some(writers) = self.events.get_mut(content) {
                // The same event may have come again since.
                writers.retain(|it, last| it != writer || *last > *at);
                if writers.is_empty() {
                    self.events.remove(content);
                }
            }
            self.event_order.pop_front();
        }
        while let Some((at, content)) = self.message_order.front()
            && is_old(*at, self.message_order.len())
        {
            if let Some(senders) = self.messages.get_mut(content) {
                senders.retain(|(_, time)| *time > *at);
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
            self.copies.bundle_came_from(WRITER, &self.daemon);
            self.copies.head_names(WRITER, &self.daemon);
            self
        }

        fn event(&mut self, data: &[u8]) -> bool {
            self.copies.take_event(&self.topic, &WRITER, data, self.now)
        }

        fn plain(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge(&self.topic, &self.daemon, data, self.now)
        }

        fn held(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge_held(&self.topic, &self.daemon, data, self.now)
        }

        fn of_other(&mut self, data: &[u8]) -> Verdict {
            self.copies.judge(&self.topic, &self.other, data, self.now)
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
    fn nobody_takes_the_daemon_of_another_for_the_own_or_the_own_for_that_of_another() {
        // An attacker names the daemon of a program, and publishes what the program will publish.
        let mut it = Fixture::new();
        it.copies.head_names(WRITER, &it.daemon);
        it.copies.bundle_came_from(WRITER, &it.other);
        assert!(!it.event(b"a"));
        assert_eq!((it.copies.confirmed(), it.plain(b"a")), (0, Verdict::Deliver));
        // It sends the bundles of a member again, and publishes what the member will publish.
        let mut it = Fixture::new().knows_the_daemon();
        it.copies.bundle_came_from(WRITER, &it.other);
        assert_eq!(it.of_other(b"b"), Verdict::Deliver);
        assert!(!it.event(b"b"), "the event of the member is delivered");
        assert_eq!(it.plain(b"b"), Verdict::Copy);
        // A member that has another daemon now.
        it.copies.head_names(WRITER, &it.other);
        assert_eq!(it.of_other(b"b"), Verdict::Copy);
        assert_eq!(it.plain(b"b"), Verdict::Deliver);
    }

    #[test]
    fn what_is_remembered_is_bounded_in_time_and_number() {
        let mut it = Fixture::new().knows_the_daemon();
        assert!(!it.event(b"a"));
        assert!(!it.event(b"b"));
        assert_eq!(it.of_other(b"m"), Verdict::Deliver);
        it.now += REMEMBERED / 2;
        assert!(!it.event(b"b"));
        it.now += REMEMBERED / 2 + Duration::from_secs(1);
        assert_eq!(it.plain(b"a"), Verdict::Hold, "it is forgotten");
        assert_eq!(it.plain(b"b"), Verdict::Copy, "it came again");
        for number in 0..MAX_REMEMBERED + 10 {
            it.event(&number.to_be_bytes());
            it.of_other(&(number + 1_000_000).to_be_bytes());
        }
        assert!(it.copies.events.len() <= MAX_REMEMBERED + 1);
        assert!(it.copies.messages.len() <= MAX_REMEMBERED + 1);
        for number in 0..MAX_MEMBERS as u64 + 10 {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_be_bytes());
            it.copies.head_names(WriterId(id), &it.other);
        }
        assert_eq!(it.copies.daemons.len(), MAX_MEMBERS);
    }
}
