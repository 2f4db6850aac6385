//! Owns the expected echoes of the host's own publishes. A daemon sends them back to its own subscribers, but the
//! plugins have received these messages from the log already. It receives publishes and messages, and returns whether
//! a message is an echo.
//!
//! Messages with equal bytes cannot be distinguished, so expected echoes are counted by topic and content.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use dim_ipfs::BackendError;
use dim_model::ident::Topic;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

/// The duration for which an echo is expected. A later message is from another program.
const LAPSE: Duration = Duration::from_secs(30);

/// An expected echo.
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

/// The expected echoes of all topics.
#[derive(Debug, Default)]
pub struct Echoes(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The times of the publishes, for each expected echo.
    expected: HashMap<Expected, VecDeque<Instant>>,
    order: VecDeque<(Instant, Expected)>,
    /// The number of publishes of which it is unknown whether they were sent. A missing echo of such a publish proves
    /// nothing.
    doubtful: HashMap<Expected, usize>,
    /// The time since which each topic is subscribed.
    listened: BTreeMap<Topic, Instant>,
    /// The number of accepted publishes whose echo is missing although the topic was subscribed.
    lost: BTreeMap<Topic, u64>,
}

impl Echoes {
    /// Expects the echo of a publish. It is called before the publish is sent.
    pub fn expect(&self, topic: &Topic, data: &[u8]) -> Expected {
        let expected = Expected::of(topic, data);
        let now = Instant::now();
        let mut inner = self.lock();
        inner.lapse(now);
        inner.expected.entry(expected.clone()).or_default().push_back(now);
        inner.order.push_back((now, expected.clone()));
        expected
    }

    /// Stops expecting an echo after the publish was refused.
    pub fn forget(&self, expected: Expected) {
        self.lock().take(&expected);
    }

    /// Notes that a publish has failed.
    pub fn failed(&self, expected: Expected, error: &BackendError) {
        if error.certainly_not_sent() {
            self.forget(expected);
        } else {
            self.doubt(expected);
        }
    }

    /// Records that it is unknown whether a publish was sent.
    pub fn doubt(&self, expected: Expected) {
        *self.lock().doubtful.entry(expected).or_default() += 1;
    }

    /// Records that a topic is subscribed from now on.
    pub fn stream_began(&self, topic: &Topic) {
        self.lock().listened.insert(topic.clone(), Instant::now());
    }

    /// Returns the number of messages of each topic that were certainly lost between the daemon and this host:
    /// publishes of the host that the daemon accepted and did not send back.
    pub fn lost(&self) -> BTreeMap<Topic, u64> {
        let mut inner = self.lock();
        inner.lapse(Instant::now());
        inner.lost.clone()
    }

    /// Returns whether a message from this daemon is an expected echo. Each expected echo matches one message.
    pub fn is_echo(&self, topic: &Topic, data: &[u8]) -> bool {
        let mut inner = self.lock();
        inner.lapse(Instant::now());
        inner.take(&Expected::of(topic, data))
    }

    /// Stops expecting the echoes of a topic. Its stream ended, so they will not arrive.
    pub fn stream_ended(&self, topic: &Topic) {
        let mut inner = self.lock();
        inner.expected.retain(|expected, _| expected.topic != *topic);
        inner.doubtful.retain(|expected, _| expected.topic != *topic);
        inner.listened.remove(topic);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no thread panics while it holds the echoes")
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
