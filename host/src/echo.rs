//! Owns the echoes of the host's own publishes: a daemon sends them back to its own subscribers,
//! and what the host published has reached its plugins already.
//!
//! Equal bytes cannot be told apart, so expected echoes are counted by topic and content.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::ident::Topic;

/// How long an echo is expected. What comes later is another program's.
const LAPSE: Duration = Duration::from_secs(30);

/// One echo that is expected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Expected {
    topic: Topic,
    content: [u8; 32],
}

impl Expected {
    fn of(topic: &Topic, data: &[u8]) -> Self {
        Self { topic: topic.clone(), content: Sha256::digest(data).into() }
    }
}

/// The echoes that are expected.
#[derive(Debug, Default)]
pub struct Echoes(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The times at which each was published.
    expected: HashMap<Expected, VecDeque<Instant>>,
    order: VecDeque<(Instant, Expected)>,
    /// Publishes that may or may not have been sent: an echo that stays away says nothing of them.
    doubtful: HashMap<Expected, usize>,
    /// Since when each topic that is listened to is.
    listened: BTreeMap<Topic, Instant>,
    /// How many echoes of accepted publishes stayed away although the topic was listened to.
    lost: BTreeMap<Topic, u64>,
}

impl Echoes {
    /// Expects the echo of a publish that is about to be sent.
    pub fn expect(&self, topic: &Topic, data: &[u8]) -> Expected {
        let expected = Expected::of(topic, data);
        let now = Instant::now();
        let mut inner = self.lock();
        inner.lapse(now);
        inner.expected.entry(expected.clone()).or_default().push_back(now);
        inner.order.push_back((now, expected.clone()));
        expected
    }

    /// Stops expecting an echo, because the publish was refused.
    pub fn forget(&self, expected: Expected) {
        self.lock().take(&expected);
    }

    /// Notes that a publish may or may not have been sent.
    pub fn doubt(&self, expected: Expected) {
        *self.lock().doubtful.entry(expected).or_default() += 1;
    }

    /// Says that a topic is listened to from now on.
    pub fn stream_began(&self, topic: &Topic) {
        self.lock().listened.insert(topic.clone(), Instant::now());
    }

    /// How many messages of each topic were certainly lost between the daemon and this host: its own,
    /// which the daemon accepted and did not send back.
    pub fn lost(&self) -> BTreeMap<Topic, u64> {
        let mut inner = self.lock();
        inner.lapse(Instant::now());
        inner.lost.clone()
    }

    /// Whether a message from this daemon is an expected echo; each is expected once.
    pub fn is_echo(&self, topic: &Topic, data: &[u8]) -> bool {
        let mut inner = self.lock();
        inner.lapse(Instant::now());
        inner.take(&Expected::of(topic, data))
    }

    /// Stops expecting the echoes of a topic, whose stream has ended: they will not come.
    pub fn stream_ended(&self, topic: &Topic) {
        let mut inner = self.lock();
        inner.expected.retain(|expected, _| expected.topic != *topic);
        inner.doubtful.retain(|expected, _| expected.topic != *topic);
        inner.listened.remove(topic);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no one panics while holding the echoes")
    }
}

impl Inner {
    fn take(&mut self, expected: &Expected) -> bool {
        let Some(times) = self.expected.get_mut(expected) else { return false };
        times.pop_front();
        if times.is_empty() {
            self.expected.remove(expected);
            self.doubtful.remove(expected);
        }
        true
    }

    fn lapse(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(at, _)| now.duration_since(*at) > LAPSE) {
            let Some((at, expected)) = self.order.pop_front() else { return };
            if self.expected.get(&expected).and_then(VecDeque::front) != Some(&at) {
                continue;
            }
            let is_listened = self.listened.get(&expected.topic).is_some_and(|since| *since <= at);
            match self.doubtful.get_mut(&expected).filter(|count| **count > 0) {
                Some(count) => *count -= 1,
                None if is_listened => *self.lost.entry(expected.topic.clone()).or_default() += 1,
                None => {}
            }
            self.take(&expected);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_echo_is_dropped_once_and_not_after_it_lapsed() {
        let (echoes, topic) = (Echoes::default(), "jobs".parse::<Topic>().unwrap());
        echoes.expect(&topic, b"same");
        echoes.expect(&topic, b"same");
        assert!(echoes.is_echo(&topic, b"same"));
        assert!(!echoes.is_echo(&topic, b"other"));
        let other: Topic = "jobs2".parse().unwrap();
        assert!(!echoes.is_echo(&other, b"same"));
        echoes.expect(&other, b"same");
        echoes.stream_ended(&other);
        assert!(!echoes.is_echo(&other, b"same"));
        tokio::time::advance(LAPSE + Duration::from_secs(1)).await;
        assert!(!echoes.is_echo(&topic, b"same"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_accepted_and_does_not_come_back_is_lost() {
        let (echoes, topic) = (Echoes::default(), "jobs".parse::<Topic>().unwrap());
        let other: Topic = "jobs2".parse().unwrap();
        echoes.expect(&topic, b"before anyone listened");
        tokio::time::advance(Duration::from_secs(1)).await;
        echoes.stream_began(&topic);
        echoes.expect(&topic, b"came back");
        echoes.expect(&topic, b"stayed away");
        let doubtful = echoes.expect(&topic, b"perhaps never sent");
        echoes.doubt(doubtful);
        echoes.expect(&other, b"no one listens");
        assert!(echoes.is_echo(&topic, b"came back"));
        tokio::time::advance(LAPSE + Duration::from_secs(1)).await;
        assert_eq!(echoes.lost(), BTreeMap::from([(topic, 1)]));
    }
}
