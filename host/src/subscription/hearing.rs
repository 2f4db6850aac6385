//! Owns the proof of listening: when each topic could have been heard, as far as it is proven. What
//! is proven, and what may have been missed, becomes entries of the log.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::backend::BackendError;
use crate::entry::{Event, Hearing, Kind};
use crate::ident::{PeerName, Topic};
use crate::time::Timestamp;

/// Two proofs that are further apart than this do not prove what lies between them.
const CONTINUOUS: Duration = Duration::from_secs(5);

/// How often in a row a topic must have no peers, while the daemon has some, until none are expected.
const GONE_AFTER: u32 = 3;

/// How well a topic is listened to.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TopicHearing {
    /// Since when the stream is open.
    pub connected_since: Option<Timestamp>,
    /// Until when listening is proven.
    pub proven_until: Option<Timestamp>,
    /// The topic's peers, as far as they are known.
    pub peers: Option<Vec<PeerName>>,
    /// Whether there was a peer: silence without one proves nothing then, for the daemon may be cut
    /// off. It ends when the daemon is seen not to be, by other peers or by a message.
    pub expects_peers: bool,
    /// How often in a row the topic had no peers while the daemon had some.
    #[serde(skip)]
    without_peers: u32,
    /// Why listening is not proven by now, as far as that is known.
    pub deaf: Option<String>,
    /// Messages that were taken in since the host started.
    pub received: u64,
    /// Messages that came and could not be taken in.
    pub lost: u64,
    /// Gaps that were told.
    pub gaps: u64,
    /// How long they were, in all.
    pub deaf_for: Duration,
}

/// What is listened to.
#[derive(Debug, Default)]
pub struct Hearings(Mutex<BTreeMap<Topic, TopicHearing>>);

impl Hearings {
    /// Takes in until when listening was proven before this start of the host, and whether there
    /// were peers.
    pub fn restore(&self, topic: &Topic, until: Timestamp, had_peers: bool) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.proven_until = hearing.proven_until.max(Some(until));
        hearing.expects_peers |= had_peers;
    }

    /// Says that a topic's stream is open.
    pub fn connected(&self, topic: &Topic, now: Timestamp) {
        self.lock().entry(topic.clone()).or_default().connected_since = Some(now);
    }

    /// Says that a topic has no stream, and why.
    pub fn disconnected(&self, topic: &Topic, why: &BackendError) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.connected_since = None;
        hearing.deaf = Some(why.to_string());
    }

    /// Says why nothing is proven of topics whose streams are open.
    pub(super) fn doubt(&self, why: &BackendError) {
        for hearing in self.lock().values_mut().filter(|hearing| hearing.connected_since.is_some()) {
            hearing.deaf = Some(why.to_string());
        }
    }

    /// Forgets a topic that no one wants any more.
    pub fn forget(&self, topic: &Topic) {
        self.lock().remove(topic);
    }

    /// How well each topic is listened to.
    pub fn all(&self) -> BTreeMap<Topic, TopicHearing> {
        self.lock().clone()
    }

    /// Takes in proof that whoever was connected before `time` could hear until then. Returns what
    /// the log is to say.
    pub(super) fn prove(&self, time: Timestamp) -> Vec<Kind> {
        let mut heard = Vec::new();
        let mut kinds = Vec::new();
        for (topic, hearing) in self.lock().iter_mut() {
            let Some(span) = hearing.prove(time) else { continue };
            if let Some(since) = span.missed_since {
                hearing.gaps += 1;
                hearing.deaf_for += span.since.since(since);
                kinds.push(Kind::Event(Event::Gap { topic: topic.clone(), since, until: span.since }));
            }
            heard.push(Hearing { topic: topic.clone(), since: span.since, until: time });
        }
        if !heard.is_empty() {
            kinds.push(Kind::Heard(heard));
        }
        kinds
    }

    /// Notes that a message came in: whoever is not expected to have peers hears all the same.
    pub fn received(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.expects_peers &= hearing.peer_count() > 0;
            hearing.received += 1;
        }
    }

    /// Notes that a message came that could not be taken in.
    pub fn lost(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.lost += 1;
        }
    }

    /// Takes in a topic's peers, and whether the daemon has any peer at all; returns what the log is
    /// to say if they have changed, or were not known.
    pub(super) fn set_peers(&self, topic: &Topic, peers: Vec<PeerName>, is_connected: bool) -> Option<Kind> {
        let mut topics = self.lock();
        let hearing = topics.get_mut(topic)?;
        if peers.is_empty() && is_connected {
            hearing.without_peers += 1;
            hearing.expects_peers &= hearing.without_peers < GONE_AFTER;
        } else {
            hearing.without_peers = 0;
            hearing.expects_peers |= !peers.is_empty();
        }
        if hearing.peers.as_ref() == Some(&peers) {
            return None;
        }
        hearing.peers = Some(peers.clone());
        Some(Kind::Peers { topic: topic.clone(), peers })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Topic, TopicHearing>> {
        self.0.lock().expect("no one panics while holding the hearings")
    }
}

/// A span of listening that ends now.
struct Span {
    since: Timestamp,
    /// From when on something may have been missed, until `since`.
    missed_since: Option<Timestamp>,
}

impl TopicHearing {
    /// How many peers the topic has, as far as they are known.
    pub fn peer_count(&self) -> usize {
        self.peers.as_ref().map_or(0, Vec::len)
    }

    fn prove(&mut self, time: Timestamp) -> Option<Span> {
        let connected = self.connected_since.filter(|since| *since <= time)?;
        if self.expects_peers && self.peer_count() == 0 {
            self.deaf = Some("there were peers, and there are none: the daemon may be cut off".to_owned());
            return None;
        }
        let before = self.proven_until.filter(|until| *until <= time);
        let span = match before {
            Some(until) if until >= connected && time.since(until) <= CONTINUOUS => {
                Span { since: until, missed_since: None }
            }
            // Connected all the while, but frozen or suspended: only this moment is proven.
            Some(until) if until >= connected => Span { since: time, missed_since: Some(until) },
            // A gap begins at the last proof, not when it was noticed.
            Some(until) => Span { since: fresh(connected, time), missed_since: Some(until) },
            None => Span { since: fresh(connected, time), missed_since: None },
        };
        self.proven_until = Some(time);
        self.deaf = None;
        Some(span)
    }
}

/// The first proof after a connection reaches back to it, unless that is too long ago.
fn fresh(connected: Timestamp, time: Timestamp) -> Timestamp {
    if time.since(connected) <= CONTINUOUS { connected } else { time }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(count: u64) -> Timestamp {
        Timestamp(count * 1_000_000_000)
    }

    fn topic() -> Topic {
        "beats".parse().unwrap()
    }

    fn gaps(kinds: &[Kind]) -> Vec<(u64, u64)> {
        let gap = |kind: &Kind| match kind {
            Kind::Event(Event::Gap { since, until, .. }) => {
                Some((since.0 / 1_000_000_000, until.0 / 1_000_000_000))
            }
            _ => None,
        };
        kinds.iter().filter_map(gap).collect()
    }

    #[test]
    fn a_gap_begins_at_the_last_proof() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        assert_eq!(gaps(&hearings.prove(seconds(101))), []);
        hearings.disconnected(&topic(), &BackendError::Timeout("pubsub/sub"));
        assert_eq!(hearings.prove(seconds(110)), []);
        hearings.connected(&topic(), seconds(120));
        assert_eq!(gaps(&hearings.prove(seconds(121))), [(101, 120)]);
    }

    #[test]
    fn a_suspended_host_has_not_listened() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        hearings.prove(seconds(101));
        let kinds = hearings.prove(seconds(4_000));
        assert_eq!(gaps(&kinds), [(101, 4_000)]);
        let Some(Kind::Heard(heard)) = kinds.last() else { panic!("{kinds:?}") };
        assert_eq!((heard[0].since, heard[0].until), (seconds(4_000), seconds(4_000)));
    }

    #[test]
    fn a_topic_that_lost_its_peers_is_not_listened_to() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        let peer: PeerName = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG".parse().unwrap();
        assert!(hearings.set_peers(&topic(), vec![peer.clone()], true).is_some());
        assert_eq!(hearings.prove(seconds(101)).len(), 1);
        for round in 0..10 {
            hearings.set_peers(&topic(), Vec::new(), false);
            assert_eq!(hearings.prove(seconds(102 + round)), [], "the daemon may be cut off");
        }
        // A message says that it is not.
        hearings.received(&topic());
        assert_eq!(gaps(&hearings.prove(seconds(120))), [(101, 120)]);
        hearings.set_peers(&topic(), vec![peer], true);
        assert_eq!(hearings.prove(seconds(121)).len(), 1);
        // And so do peers that it has elsewhere.
        for _ in 1..GONE_AFTER {
            hearings.set_peers(&topic(), Vec::new(), true);
            assert_eq!(hearings.prove(seconds(122)), [], "peers come and go");
        }
        hearings.set_peers(&topic(), Vec::new(), true);
        assert_eq!(hearings.prove(seconds(123)).len(), 1);
    }

    #[test]
    fn the_first_answer_after_a_start_is_told_even_if_there_is_nobody() {
        let hearings = Hearings::default();
        hearings.restore(&topic(), seconds(100), true);
        hearings.connected(&topic(), seconds(110));
        let nobody = Kind::Peers { topic: topic(), peers: Vec::new() };
        assert_eq!(hearings.set_peers(&topic(), Vec::new(), false), Some(nobody));
        assert_eq!(hearings.set_peers(&topic(), Vec::new(), false), None);
    }
}
