//! Owns the proof of listening: the spans of time in which the host could hear each topic. It receives proofs, peers
//! and the states of streams, and returns entries for the log: proven spans and gaps.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use dim_ipfs::BackendError;
use dim_model::entry::{Event, Hearing, Kind};
use dim_model::ident::{PeerName, Topic};
use dim_model::time::Timestamp;

/// The maximum time between two proofs. If the time is longer, the span between them is not proven.
const CONTINUOUS: Duration = Duration::from_secs(5);

/// The maximum time between two proofs where peers are expected. Peers are requested less often, and a daemon may
/// answer slowly.
const CONTINUOUS_WITH_PEERS: Duration = Duration::from_secs(10);

/// The number of consecutive answers without peers of the topic after which none are expected. Only answers count
/// while the daemon has a peer on another topic.
const GONE_AFTER: u32 = 3;

/// The listening record of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ListeningRecord {
    /// The time since which the stream is open.
    pub connected_since: Option<Timestamp>,
    /// The start of the time for which missed messages are reported as a gap.
    #[serde(skip)]
    listened_since: Option<Timestamp>,
    /// The time since which there is no stream, because it was refused or ended.
    #[serde(skip)]
    pub cut_since: Option<Timestamp>,
    /// The time until which listening is proven.
    pub proven_until: Option<Timestamp>,
    /// The peers of the topic, or `None` before the first answer.
    pub peers: Option<Vec<PeerName>>,
    /// Whether the topic had a peer. Then silence without peers proves nothing, because the daemon may have no
    /// network. It becomes false when a message, or peers on other topics, show that the daemon has a network.
    pub expects_peers: bool,
    /// Whether another peer was ever heard on the topic. A publisher need not be a peer of the topic, so silence
    /// proves nothing while the daemon has no peer at all.
    pub expects_network: bool,
    /// The number of consecutive answers without peers of the topic while the daemon had a peer.
    #[serde(skip)]
    without_peers: u32,
    /// The last time at which the daemon reached other peers. If peers are expected, nothing after this time is
    /// proven.
    #[serde(skip)]
    reached_at: Option<Timestamp>,
    /// Whether the daemon reached no peer in the last answer.
    #[serde(skip)]
    is_cut_off: bool,
    /// Whether a proof failed since the last success. Then the time between two successes is not proven.
    #[serde(skip)]
    doubted: bool,
    /// Whether missed messages are fetched later, so that they are no gap.
    #[serde(skip)]
    is_reliable: bool,
    /// The reason why listening is not proven now, if it is known.
    pub deaf: Option<String>,
    /// The number of messages that were appended to the log since the start of the host.
    pub received: u64,
    /// The number of messages that arrived and were dropped.
    pub lost: u64,
    /// The number of messages of peers that the config does not allow on the topic.
    pub refused: u64,
    /// The peer of the last refused message.
    pub last_refused: Option<PeerName>,
    /// The number of reported gaps.
    pub gaps: u64,
    /// The total duration of the gaps.
    pub deaf_for: Duration,
}

/// The listening records of all topics.
#[derive(Debug, Default)]
pub struct ListeningRecords(Mutex<BTreeMap<Topic, ListeningRecord>>);

impl ListeningRecords {
    /// Restores that another peer was heard on a topic before this start of the host.
    pub fn restore_others(&self, topic: &Topic) {
        self.lock().entry(topic.clone()).or_default().expects_network = true;
    }

    /// Restores the time until which listening was proven before this start of the host, and whether the topic had
    /// peers.
    pub fn restore(&self, topic: &Topic, until: Timestamp, had_peers: bool) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.proven_until = hearing.proven_until.max(Some(until));
        hearing.listened_since = hearing.proven_until;
        hearing.expects_peers |= had_peers;
    }

    /// Records that the stream of a topic is open.
    pub fn connected(&self, topic: &Topic, is_reliable: bool, now: Timestamp) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.is_reliable = is_reliable;
        (hearing.connected_since, hearing.cut_since) = (Some(now), None);
        hearing.listened_since.get_or_insert(now);
    }

    /// Records that a topic has no stream, with the reason.
    pub fn disconnected(&self, topic: &Topic, why: &str) {
        let mut topics = self.lock();
        let hearing = topics.entry(topic.clone()).or_default();
        hearing.connected_since = None;
        // A failed attempt to reconnect does not restart the time. The wall clock is used, because log time does not
        // advance without entries.
        hearing.cut_since.get_or_insert_with(Timestamp::wall);
        hearing.deaf = Some(why.to_owned());
    }

    /// Records the reason why a proof failed, for each topic with an open stream.
    pub(super) fn doubt(&self, why: &BackendError) {
        for hearing in self.lock().values_mut().filter(|hearing| hearing.connected_since.is_some()) {
            hearing.deaf = Some(why.to_string());
            hearing.doubted = true;
        }
    }

    /// Removes the record of a topic that is no longer wanted.
    pub fn forget(&self, topic: &Topic) {
        self.lock().remove(topic);
    }

    /// Returns the start of the time for which missed messages are reported as a gap, or `None` if the topic is not
    /// wanted.
    pub fn listened_since(&self, topic: &Topic) -> Option<Timestamp> {
        self.lock().get(topic)?.listened_since
    }

    /// Returns the listening records of all topics.
    pub fn all(&self) -> BTreeMap<Topic, ListeningRecord> {
        self.lock().clone()
    }

    /// Records the proof that each topic with a stream from before `time` could be heard until then. Returns the
    /// entries for the log.
    pub(super) fn prove(&self, time: Timestamp) -> Vec<Kind> {
        let mut heard = Vec::new();
        let mut kinds = Vec::new();
        for (topic, hearing) in self.lock().iter_mut() {
            let Some(span) = hearing.prove(time) else { continue };
            if let Some(since) = span.missed_since.filter(|_| !hearing.is_reliable) {
                hearing.gaps += 1;
                hearing.deaf_for += span.since.since(since);
                let (topic, until) = (topic.clone(), span.since);
                kinds.push(Kind::Event(Event::Gap { topic, since, until, missing: None }));
            }
            heard.push(Hearing { topic: topic.clone(), since: span.since, until: span.until });
        }
        if !heard.is_empty() {
            kinds.push(Kind::Heard(heard));
        }
        kinds
    }

    /// Counts a message that was accepted.
    pub fn received(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.received += 1;
        }
    }

    /// Records that another peer was heard through the network. This proves that the daemon has a network, whatever
    /// peers it lists. Returns whether this is the first message of another peer on the topic.
    pub(super) fn heard_others(&self, topic: &Topic, now: Timestamp) -> bool {
        let mut topics = self.lock();
        let Some(hearing) = topics.get_mut(topic) else { return false };
        hearing.expects_peers &= hearing.peer_count() > 0;
        hearing.reached_at = Some(now);
        hearing.is_cut_off = false;
        !std::mem::replace(&mut hearing.expects_network, true)
    }

    /// Counts a message that was dropped.
    pub fn lost(&self, topic: &Topic) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.lost += 1;
        }
    }

    /// Counts a message of a peer that the config does not allow on the topic.
    pub fn refused(&self, topic: &Topic, from: &PeerName) {
        if let Some(hearing) = self.lock().get_mut(topic) {
            hearing.refused += 1;
            hearing.last_refused = Some(from.clone());
        }
    }

    /// Records the peers of a topic as requested at `asked_at`, and whether the daemon has any peer. Returns an entry
    /// for the log if the peers changed or were unknown.
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Topic, ListeningRecord>> {
        self.0.lock().expect("no thread panics while it holds the listening records")
    }
}

/// A proven span that ends now.
struct Span {
    since: Timestamp,
    until: Timestamp,
    /// The start of the gap before `since`, if there is a gap.
    missed_since: Option<Timestamp>,
}

impl ListeningRecord {
    /// Returns the number of known peers of the topic.
    pub fn peer_count(&self) -> usize {
        self.peers.as_ref().map_or(0, Vec::len)
    }

    fn prove(&mut self, time: Timestamp) -> Option<Span> {
        let connected = self.connected_since.filter(|since| *since <= time)?;
        // A daemon without a network still hears itself, so its echoes prove nothing.
        let (until, longest) = if self.expects_peers || self.expects_network {
            if self.is_cut_off {
                self.deaf =
                    Some("peers are expected and none is reachable: the daemon may be offline".to_owned());
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
            // The stream was open all the time, but the host was frozen or suspended. Only this moment is proven.
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

/// Returns the start of the first span after a connection: the time of the connection, unless that is too long ago.
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
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        assert_eq!(gaps(&listening_records.prove(seconds(101))), []);
        listening_records.disconnected(&topic(), "the daemon is away");
        assert_eq!(listening_records.prove(seconds(110)), []);
        listening_records.connected(&topic(), false, seconds(120));
        assert_eq!(gaps(&listening_records.prove(seconds(121))), [(101, 120)]);
    }

    #[test]
    fn a_suspended_host_has_not_listened() {
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        listening_records.prove(seconds(101));
        let kinds = listening_records.prove(seconds(4_000));
        assert_eq!(gaps(&kinds), [(101, 4_000)]);
        let Some(Kind::Heard(heard)) = kinds.last() else { panic!("{kinds:?}") };
        assert_eq!((heard[0].since, heard[0].until), (seconds(4_000), seconds(4_000)));
    }

    #[test]
    fn a_topic_that_lost_its_peers_is_not_listened_to() {
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        let peer: PeerName = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG".parse().unwrap();
        let set = |peers: &[&PeerName], is_connected, at| {
            let peers = peers.iter().map(|peer| (*peer).clone()).collect();
            listening_records.set_peers(&topic(), peers, is_connected, seconds(at))
        };
        assert!(set(&[&peer], true, 101).is_some());
        assert_eq!(listening_records.prove(seconds(101)).len(), 1);
        for round in 0..10 {
            set(&[], false, 102 + round);
            assert_eq!(listening_records.prove(seconds(102 + round)), [], "the daemon may be cut off");
        }
        // A message says that it is not.
        assert!(listening_records.heard_others(&topic(), seconds(120)));
        assert!(!listening_records.heard_others(&topic(), seconds(120)));
        assert_eq!(gaps(&listening_records.prove(seconds(120))), [(101, 120)]);
        set(&[&peer], true, 121);
        assert_eq!(listening_records.prove(seconds(121)).len(), 1);
        // And so do peers that it has elsewhere.
        for _ in 1..GONE_AFTER {
            set(&[], true, 122);
            assert_eq!(listening_records.prove(seconds(122)), [], "peers come and go");
        }
        set(&[], true, 123);
        assert_eq!(listening_records.prove(seconds(123)).len(), 1);
    }

    #[test]
    fn nothing_is_proven_beyond_the_moment_in_which_there_were_peers() {
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        let peer: PeerName = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG".parse().unwrap();
        listening_records.set_peers(&topic(), vec![peer.clone()], true, seconds(101));
        let heard_until = |kinds: &[Kind]| match kinds.last() {
            Some(Kind::Heard(heard)) => {
                Some((heard[0].since.0 / 1_000_000_000, heard[0].until.0 / 1_000_000_000))
            }
            _ => None,
        };
        assert_eq!(heard_until(&listening_records.prove(seconds(101))), Some((100, 101)));
        // Echoes come, and the peers may be gone by now.
        assert_eq!(heard_until(&listening_records.prove(seconds(103))), Some((101, 101)));
        listening_records.set_peers(&topic(), vec![peer.clone()], true, seconds(104));
        assert_eq!(heard_until(&listening_records.prove(seconds(104))), Some((101, 104)));
        listening_records.set_peers(&topic(), Vec::new(), false, seconds(107));
        assert_eq!(listening_records.prove(seconds(107)), []);
        listening_records.set_peers(&topic(), vec![peer], true, seconds(200));
        assert_eq!(gaps(&listening_records.prove(seconds(201))), [(104, 200)]);
    }

    #[test]
    fn who_was_heard_need_not_be_a_peer_of_the_topic() {
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        let nobody =
            |is_connected, at| listening_records.set_peers(&topic(), Vec::new(), is_connected, seconds(at));
        nobody(true, 100);
        listening_records.heard_others(&topic(), seconds(101));
        assert_eq!(listening_records.prove(seconds(101)).len(), 1);
        nobody(true, 104);
        assert_eq!(gaps(&listening_records.prove(seconds(104))), []);
        nobody(false, 106);
        assert_eq!(listening_records.prove(seconds(107)), [], "the daemon has lost its last peer");
        nobody(true, 120);
        assert_eq!(gaps(&listening_records.prove(seconds(121))), [(104, 120)]);
        // What the host knew before it was started again, it knows still.
        let again = ListeningRecords::default();
        again.restore(&topic(), seconds(121), false);
        again.restore_others(&topic());
        again.connected(&topic(), false, seconds(130));
        again.set_peers(&topic(), Vec::new(), false, seconds(131));
        assert_eq!(again.prove(seconds(132)), []);
    }

    #[test]
    fn a_proof_that_failed_is_a_gap_however_short_it_was() {
        let listening_records = ListeningRecords::default();
        listening_records.connected(&topic(), false, seconds(100));
        listening_records.prove(seconds(101));
        listening_records.doubt(&BackendError::Timeout("the echo of a probe"));
        assert_eq!(gaps(&listening_records.prove(seconds(105))), [(101, 105)]);
        assert_eq!(gaps(&listening_records.prove(seconds(106))), []);
    }

    #[test]
    fn the_first_answer_after_a_start_is_told_even_if_there_is_nobody() {
        let listening_records = ListeningRecords::default();
        listening_records.restore(&topic(), seconds(100), true);
        listening_records.connected(&topic(), false, seconds(110));
        let nobody = Kind::Peers { topic: topic(), peers: Vec::new() };
        assert_eq!(listening_records.set_peers(&topic(), Vec::new(), false, seconds(111)), Some(nobody));
        assert_eq!(listening_records.set_peers(&topic(), Vec::new(), false, seconds(112)), None);
    }
}
