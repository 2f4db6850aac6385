//! Owns the connections of the own daemon to the daemons of other members. It receives the places that heads name and
//! failed fetches. It keeps the daemon connected to members whose logs this host reads, because a daemon asks them first
//! for what it lacks, and connects it again at once if a block cannot be fetched.
//!
//! Anybody may state any place, so the numbers are limited, and the daemon verifies the peer at each address.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dim_ipfs::Daemon;
use dim_model::ident::PeerName;
use dim_topics::head::{MAX_ADDRESSES, Place};
use dim_topics::identity::WriterId;
use dim_topics::time::Moment;
use tokio::sync::{Semaphore, mpsc};

use super::ReliableTopics;

/// The maximum number of members to whose daemons the own daemon keeps connected.
pub const MAX_KEPT: usize = 64;

/// A silent member makes room for another one after this time.
const SILENT: Duration = Duration::from_secs(3_600);

/// The shortest time between two attempts to connect to the daemon of a member.
const PAUSE: Duration = Duration::from_secs(30);

/// The maximum number of attempts at once.
const MAX_ATTEMPTS: usize = 4;

/// The maximum number of changes that wait for the daemon.
const MAX_CHANGES: usize = 256;

/// The connections to the daemons of other members.
#[derive(Debug)]
pub struct Connections {
    own: Option<PeerName>,
    kept: BTreeMap<WriterId, Kept>,
    /// The times of the attempts in the last [`PAUSE`].
    attempts: BTreeMap<WriterId, Moment>,
    permits: Arc<Semaphore>,
    /// The changes that the daemon is told next.
    changes: Option<mpsc::Sender<Change>>,
}

/// A daemon to which the own one keeps connected.
#[derive(Debug)]
struct Kept {
    daemon: Daemon,
    heard: Moment,
    /// The time at which the member named it.
    named: Moment,
}

/// A change of the connections that the own daemon keeps.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Keep(Daemon),
    Release(PeerName),
}

impl Default for Connections {
    fn default() -> Self {
        let permits = Arc::new(Semaphore::new(MAX_ATTEMPTS));
        Self { own: None, kept: BTreeMap::new(), attempts: BTreeMap::new(), permits, changes: None }
    }
}

impl Connections {
    /// Notes the own daemon, which may have been started again. Returns the daemons that it is to keep connected to.
    fn set_own(&mut self, own: Option<PeerName>) -> Vec<Change> {
        self.own = own;
        let peers: BTreeSet<PeerName> = self.kept.values().map(|kept| kept.daemon.peer.clone()).collect();
        peers.into_iter().map(|peer| Change::Keep(self.with_all_addresses(peer))).collect()
    }

    /// Notes the daemon of a member whose log this host reads.
    fn heard(&mut self, writer: WriterId, daemon: Daemon, now: Moment) -> Vec<Change> {
        let mut changes = Vec::new();
        if Some(&daemon.peer) == self.own.as_ref() {
            return changes;
        }
        if let Some(kept) = self.kept.get_mut(&writer) {
            kept.heard = now;
            if kept.daemon == daemon || now.since(kept.named) < PAUSE {
                return changes;
            }
            kept.named = now;
            let before = std::mem::replace(&mut kept.daemon, daemon.clone()).peer;
            changes.push(self.release(before));
        } else {
            if self.kept.len() >= MAX_KEPT {
                let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.heard);
                let silent = oldest.filter(|(_, kept)| now.since(kept.heard) > SILENT);
                let Some(silent) = silent.map(|(writer, _)| *writer) else { return changes };
                let peer = self.kept.remove(&silent).expect("it was found").daemon.peer;
                changes.push(self.release(peer));
            }
            self.kept.insert(writer, Kept { daemon: daemon.clone(), heard: now, named: now });
        }
        changes.push(Change::Keep(self.with_all_addresses(daemon.peer)));
        changes
    }

    /// A daemon with the addresses that all members name for it: one of them may lie.
    fn with_all_addresses(&self, peer: PeerName) -> Daemon {
        let named = self.kept.values().filter(|kept| kept.daemon.peer == peer);
        let mut addresses = Vec::new();
        for address in named.flat_map(|kept| &kept.daemon.addresses) {
            if addresses.len() < MAX_ADDRESSES && !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        Daemon { peer, addresses }
    }

    /// Releases a daemon that no other member uses. Otherwise it keeps the addresses that the others name.
    fn release(&self, peer: PeerName) -> Change {
        let is_used = self.kept.values().any(|kept| kept.daemon.peer == peer);
        if is_used { Change::Keep(self.with_all_addresses(peer)) } else { Change::Release(peer) }
    }

    /// Whether the daemon of a member may be tried now.
    fn may_try(&mut self, writer: WriterId, now: Moment) -> bool {
        self.attempts.retain(|_, at| now.since(*at) < PAUSE);
        let may = !self.attempts.contains_key(&writer);
        if may {
            self.attempts.insert(writer, now);
        }
        may
    }
}

/// The place that heads name for a daemon.
pub(super) fn place_of(daemon: &Daemon) -> Place {
    let addresses = daemon.addresses.iter().take(MAX_ADDRESSES).map(ToString::to_string).collect();
    Place { peer: Some(daemon.peer.clone()), addresses }
}

/// The daemon at a place that a head names.
fn daemon_at(place: &Place) -> Option<Daemon> {
    Some(Daemon::stated(place.peer.clone()?, &place.addresses))
}

impl ReliableTopics {
    /// Notes the own daemon.
    pub(super) fn set_place(&mut self, place: Place) {
        let changes = self.connections.set_own(place.peer.clone());
        self.change_connections(changes);
        self.mirrors.set_daemon(place.peer.clone());
        self.member.set_place(place);
    }

    /// Keeps the daemon connected to that of a member whose log this host reads.
    pub(super) fn keep_connected(&mut self, writer: WriterId) {
        let place = self.member.place(&writer).filter(|_| self.member.is_read(&writer));
        let Some(daemon) = place.and_then(daemon_at) else { return };
        let changes = self.connections.heard(writer, daemon, self.now().moment);
        self.change_connections(changes);
    }

    /// Changes the connections of the daemon, one after the other.
    pub(super) fn keep_connections(&mut self) {
        let (sender, mut changes) = mpsc::channel(MAX_CHANGES);
        self.connections.changes = Some(sender);
        let backend = self.parts.backend.clone();
        self.spawn_until_stop(async move {
            while let Some(change) = changes.recv().await {
                let result = match &change {
                    Change::Keep(daemon) => backend.swarm.keep_connected(daemon).await,
                    Change::Release(peer) => backend.swarm.release(peer).await,
                };
                if let Err(error) = result {
                    // The daemon does not run. All are kept again once it does.
                    tracing::debug!(?change, "the connections of the daemon cannot be changed: {error}");
                }
            }
        });
    }

    fn change_connections(&self, changes: Vec<Change>) {
        for change in changes {
            // If there are too many, those that are left out follow with the next look at the own daemon.
            let _ = self.connections.changes.as_ref().map(|sender| sender.try_send(change));
        }
    }

    /// Connects the daemon to that of a member, from which a block cannot be fetched.
    pub(super) fn connect_to(&mut self, writer: WriterId) {
        let Some(daemon) = self.member.place(&writer).and_then(daemon_at) else { return };
        if Some(&daemon.peer) == self.connections.own.as_ref() {
            return;
        }
        let Ok(permit) = self.connections.permits.clone().try_acquire_owned() else { return };
        if !self.connections.may_try(writer, self.now().moment) {
            return;
        }
        let backend = self.parts.backend.clone();
        self.spawn_until_stop(async move {
            match backend.swarm.connect(&daemon).await {
                Ok(()) => {
                    tracing::debug!(%writer, peer = %daemon.peer, "connected to the daemon of a member")
                }
                Err(error) => tracing::debug!(%writer, "cannot connect to the daemon of a member: {error}"),
            }
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(number: u32) -> Daemon {
        let names = [
            "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo",
            "12D3KooWBhMbLvQGgJfCLzXYkGMTAnQjzVJzDqUkjPUpSgKFgNHE",
        ];
        let address = format!("/ip4/192.0.2.1/tcp/{}", 1_000 + number);
        Daemon::stated(names[number as usize % 2].parse().unwrap(), &[address])
    }

    fn at(seconds: u64) -> Moment {
        Moment::default().after(Duration::from_secs(seconds))
    }

    fn writer(number: u8) -> WriterId {
        WriterId([number; 32])
    }

    #[test]
    fn a_daemon_is_kept_until_its_last_member_uses_another_one() {
        let mut it = Connections::default();
        it.set_own(Some(daemon(1).peer));
        assert_eq!(it.heard(writer(1), daemon(1), at(0)), [], "it is the own one");
        assert_eq!(it.heard(writer(1), daemon(0), at(0)), [Change::Keep(daemon(0))]);
        assert_eq!(it.heard(writer(1), daemon(0), at(1)), []);
        assert_eq!(it.heard(writer(2), daemon(0), at(1)), [Change::Keep(daemon(0))]);
        assert_eq!(it.heard(writer(1), daemon(2), at(29)), [], "it names another one too soon");
        // It has another address now. The other member may be right, too.
        let both = Daemon { addresses: [daemon(2), daemon(0)].map(|it| it.addresses).concat(), ..daemon(0) };
        let changes = it.heard(writer(1), daemon(2), at(30));
        assert_eq!(changes.last(), Some(&Change::Keep(both)));
        it.set_own(None);
        let changes = it.heard(writer(1), daemon(1), at(60));
        let expected = [Change::Keep(daemon(0)), Change::Keep(daemon(1))];
        assert_eq!(changes, expected, "another member uses the one before");
        let changes = it.heard(writer(2), daemon(1), at(60));
        assert_eq!(changes, [Change::Release(daemon(0).peer), Change::Keep(daemon(1))]);
        assert_eq!(it.set_own(None), [Change::Keep(daemon(1))], "the daemon has forgotten it");
    }

    #[test]
    fn only_a_silent_member_makes_room() {
        let mut it = Connections::default();
        for number in 0..MAX_KEPT as u8 {
            it.heard(writer(number), daemon(0), at(u64::from(number)));
        }
        assert_eq!(it.heard(writer(200), daemon(1), at(3_600)), []);
        let changes = it.heard(writer(200), daemon(1), at(3_601));
        assert_eq!(changes, [Change::Keep(daemon(0)), Change::Keep(daemon(1))], "others use the daemon");
        assert_eq!(it.kept.len(), MAX_KEPT);
        assert!(!it.kept.contains_key(&writer(0)));
    }

    #[test]
    fn a_daemon_is_not_tried_all_the_time() {
        let mut it = Connections::default();
        assert!(it.may_try(writer(1), at(0)));
        assert!(!it.may_try(writer(1), at(29)));
        assert!(it.may_try(writer(2), at(29)));
        assert!(it.may_try(writer(1), at(30)));
        assert_eq!(it.attempts.len(), 2);
    }
}
