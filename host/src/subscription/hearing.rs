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

/// The same where peers are expected: they are asked for less often, and by a daemon that may be slow.
const CONTINUOUS_WITH_PEERS: Duration = Duration::from_secs(10);

/// How often in a row a topic must have no peers, while the daemon has some, until none are expected.
const GONE_AFTER: u32 = 3;

/// How well a topic is listened to.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TopicHearing {
    /// Since when the stream is open.
    pub connected_since: Option<Timestamp>,
    /// From when on whatever could not be heard is told as a gap.
    #[serde(skip)]
    listened_since: Option<Timestamp>,
    /// Since when there is no stream, because it was refused or cut.
    #[serde(skip)]
    pub cut_since: Option<Timestamp>,
    /// Until when listening is proven.
    pub proven_until: Option<Timestamp>,
    /// The topic's peers, as far as they are known.
    pub peers: Option<Vec<PeerName>>,
    /// Whether the topic had a peer: silence without one proves nothing then, for the daemon may be cut
    /// off. It ends when the daemon is seen not to be, by other peers or by a message.
    pub expects_peers: bool,
    /// Whether someone else was ever heard on it, who need not be a peer of the topic to publish: silence
    /// proves nothing then while the daemon has no peer at all.
    pub expects_network: bool,
    /// How often in a row the topic had no peers while the daemon had some.
    #[serde(skip)]
    without_peers: u32,
    /// When the daemon was last seen to reach others. Where they are expected nothing is proven beyond it.
    #[serde(skip)]
    reached_at: Option<Timestamp>,
    /// Whether the daemon was seen to reach nobody since.
    #[serde(skip)]
    is_cut_off: bool,
    /// Whether a proof has failed since the last one: what lies between is not proven.
    #[serde(skip)]
    doubted: bool,
    /// Why listening is not proven by now, as far as that is known.
    pub deaf: Option<String>,
    /// Messages that were taken in since the host started.
    pub received: u64,
    /// Messages that came and could not be taken in.
    pub lost: u64,
    /// Messages of peers that may not speak on it.
    pub refused: u64,
    /// The last of those peers.
    pub last_refused: Option<PeerName>,
    /// Gaps that were told.
    pub gaps: u64,
    /// How long they were, in all.
    pub deaf_for: Duration,
}

/// What is listened to.
#[derive(Debug, Default)]
pub struct Hearings(Mutex<BTreeMap<Topic, TopicHearing>>);

impl Hearings {
    /// Takes in that someone else was heard on a topic before this start of the host.
    pub fn restore_others(&self, topic: &Topic) {
        self.lock().entry(topic.clone()).or_default().expects_network = true;
    }

    /// Takes in until when listening was proven before this start of the host, and whether there
    /// were peers.
    pub fn restore(&self, topic: &Topic, until: Timestamp, had_peers: bool) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.proven_until = hearing.proven_until.max(Some(until));
        hearing.listened_since = hearing.proven_until;
        hearing.expects_peers |= had_peers;
    }

    /// Says that a topic's stream is open.
    pub fn connected(&self, topic: &Topic, now: Timestamp) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        (hearing.connected_since, hearing.cut_since) = (Some(now), None);
        hearing.listened_since.get_or_insert(now);
    }

    /// Says that a topic has no stream, and why.
    pub fn disconnected(&self, topic: &Topic, why: &str) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.connected_since = None;
        // Trying in vain does not begin it anew. The clock on the wall, for the log's stands still with nothing to log.
        hearing.cut_since.get_or_insert_with(Timestamp::wall);
        hearing.deaf = Some(why.to_owned());
    }

    /// Says why nothing is proven of topics whose streams are open.
    pub(super) fn doubt(&self, why: &BackendError) {
        for hearing in self.lock().values_mut().filter(|hearing| hearing.connected_since.is_some()) {
            hearing.deaf = Some(why.to_string());
            hearing.doubted = true;
        }
    }

    /// Forgets a topic that no one wants any more.
    pub fn forget(&self, topic: &Topic) {
        self.lock().remove(topic);
    }

    /// From when on whatever could not be heard of a topic is told as a gap; none if nobody wants it.
    pub fn listened_since(&self, topic: &Topic) -> Option<Timestamp> {
        self.lock().get(topic)?.listened_since
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
            heard.push(Hearing { topic: topic.clone(), since: span.since, until: span.until });
        }
        if !heard.is_empty() {
            kinds.push(Kind::Heard(heard));
        }
        kinds
    }

    /// Notes that a message came in.
    pub fn received(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.received += 1;
        }
    }

    /// Notes that someone else was heard, through the network: the daemon is not cut off, whatever its
    /// peers are. Returns whether that is news.
    pub(super) fn heard_others(&self, topic: &Topic, now: Timestamp) -> bool {
        let mut topics = self.lock();
        let Some(hearing) = topics.get_mut(topic) else { return false };
        hearing.expects_peers &= hearing.peer_count() > 0;
        hearing.reached_at = Some(now);
        hearing.is_cut_off = false;
        !std::mem::replace(&mut hearing.expects_network, true)
    }

    /// Notes that a message came that could not be taken in.
    pub fn lost(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.lost += 1;
        }
    }

    /// Notes that a message came from a peer that may not speak on the topic.
    pub fn refused(&self, topic: &Topic, from: &PeerName) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.refused += 1;
            hearing.last_refused = Some(from.clone());
        }
    }

    /// Takes in the peers that a topic had when they were asked for at `asked_at`, and whether the daemon
    /// has any peer at all; returns what the log is to say if they have changed, or were not known.
    pub(super) fn set_peers(
        &self,
        topic: &Topic,
        peers: Vec<PeerName>,
        is_connected: bool,
        asked_at: Timestamp,
    ) -> Option<Kind> {
        let mut topics = self.lock();
        let hearing = topics.get_mut(topic)?;
        if peers.is_empty() && is_connected {
            hearing.without_peers += 1;
            hearing.expects_peers &= hearing.without_peers < GONE_AFTER;
        } else {
            hearing.without_peers = 0;
            hearing.expects_peers |= !peers.is_empty();
        }
        hearing.is_cut_off = peers.is_empty() && (hearing.expects_peers || !is_connected);
        if !hearing.is_cut_off {
            hearing.reached_at = hearing.reached_at.max(Some(asked_at));
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
    until: Timestamp,
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
        // A daemon that is cut off hears itself all the same.
        let (until, longest) = if self.expects_peers || self.expects_network {
            if self.is_cut_off {
                self.deaf =
                    Some("there were others, and nobody is reached: the daemon may be cut off".to_owned());
            }
            (self.reached_at.filter(|_| !self.is_cut_off)?.min(time), CONTINUOUS_WITH_PEERS)
        } else {
            (time, CONTINUOUS)
        };
        if until < connected || self.proven_until.is_some_and(|before| until < before) {
            return None;
        }
        let is_continuous = |before: Timestamp| !self.doubted && until.since(before) <= longest;
        let (since, missed_since) = match self.proven_until {
            Some(before) if before >= connected && is_continuous(before) => (before, None),
            // Connected all the while, but frozen or suspended: only this moment is proven.
            Some(before) if before >= connected => (until, Some(before)),
            // A gap begins at the last proof, not when it was noticed.
            Some(before) => (fresh(connected, until), Some(before)),
            None => (fresh(connected, until), None),
        };
        self.proven_until = Some(until);
        self.doubted = false;
        self.deaf = None;
        Some(Span { since, until, missed_since })
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
        hearings.disconnected(&topic(), "the daemon is away");
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
        let set = |peers: &[&PeerName], is_connected, at| {
            let peers = peers.iter().map(|peer| (*peer).clone()).collect();
            hearings.set_peers(&topic(), peers, is_connected, seconds(at))
        };
        assert!(set(&[&peer], true, 101).is_some());
        assert_eq!(hearings.prove(seconds(101)).len(), 1);
        for round in 0..10 {
            set(&[], false, 102 + round);
            assert_eq!(hearings.prove(seconds(102 + round)), [], "the daemon may be cut off");
        }
        // A message says that it is not.
        assert!(hearings.heard_others(&topic(), seconds(120)));
        assert!(!hearings.heard_others(&topic(), seconds(120)));
        assert_eq!(gaps(&hearings.prove(seconds(120))), [(101, 120)]);
        set(&[&peer], true, 121);
        assert_eq!(hearings.prove(seconds(121)).len(), 1);
        // And so do peers that it has elsewhere.
        for _ in 1..GONE_AFTER {
            set(&[], true, 122);
            assert_eq!(hearings.prove(seconds(122)), [], "peers come and go");
        }
        set(&[], true, 123);
        assert_eq!(hearings.prove(seconds(123)).len(), 1);
    }

    #[test]
    fn nothing_is_proven_beyond_the_moment_in_which_there_were_peers() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        let peer: PeerName = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG".parse().unwrap();
        hearings.set_peers(&topic(), vec![peer.clone()], true, seconds(101));
        let heard_until = |kinds: &[Kind]| match kinds.last() {
            Some(Kind::Heard(heard)) => {
                Some((heard[0].since.0 / 1_000_000_000, heard[0].until.0 / 1_000_000_000))
            }
            _ => None,
        };
        assert_eq!(heard_until(&hearings.prove(seconds(101))), Some((100, 101)));
        // Echoes come, and the peers may be gone by now.
        assert_eq!(heard_until(&hearings.prove(seconds(103))), Some((101, 101)));
        hearings.set_peers(&topic(), vec![peer.clone()], true, seconds(104));
        assert_eq!(heard_until(&hearings.prove(seconds(104))), Some((101, 104)));
        hearings.set_peers(&topic(), Vec::new(), false, seconds(107));
        assert_eq!(hearings.prove(seconds(107)), []);
        hearings.set_peers(&topic(), vec![peer], true, seconds(200));
        assert_eq!(gaps(&hearings.prove(seconds(201))), [(104, 200)]);
    }

    #[test]
    fn who_was_heard_need_not_be_a_peer_of_the_topic() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        let nobody = |is_connected, at| hearings.set_peers(&topic(), Vec::new(), is_connected, seconds(at));
        nobody(true, 100);
        hearings.heard_others(&topic(), seconds(101));
        assert_eq!(hearings.prove(seconds(101)).len(), 1);
        nobody(true, 104);
        assert_eq!(gaps(&hearings.prove(seconds(104))), []);
        nobody(false, 106);
        assert_eq!(hearings.prove(seconds(107)), [], "the daemon has lost its last peer");
        nobody(true, 120);
        assert_eq!(gaps(&hearings.prove(seconds(121))), [(104, 120)]);
        // What the host knew before it was started again, it knows still.
        let again = Hearings::default();
        again.restore(&topic(), seconds(121), false);
        again.restore_others(&topic());
        again.connected(&topic(), seconds(130));
        again.set_peers(&topic(), Vec::new(), false, seconds(131));
        assert_eq!(again.prove(seconds(132)), []);
    }

    #[test]
    fn a_proof_that_failed_is_a_gap_however_short_it_was() {
        let hearings = Hearings::default();
        hearings.connected(&topic(), seconds(100));
        hearings.prove(seconds(101));
        hearings.doubt(&BackendError::Timeout("the echo of a probe"));
        assert_eq!(gaps(&hearings.prove(seconds(105))), [(101, 105)]);
        assert_eq!(gaps(&hearings.prove(seconds(106))), []);
    }

    #[test]
    fn the_first_answer_after_a_start_is_told_even_if_there_is_nobody() {
        let hearings = Hearings::default();
        hearings.restore(&topic(), seconds(100), true);
        hearings.connected(&topic(), seconds(110));
        let nobody = Kind::Peers { topic: topic(), peers: Vec::new() };
        assert_eq!(hearings.set_peers(&topic(), Vec::new(), false, seconds(111)), Some(nobody));
        assert_eq!(hearings.set_peers(&topic(), Vec::new(), false, seconds(112)), None);
    }
}
