//! Owns the admin of a simulated fleet: the newest roster, what becomes of it, and what former members may know.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dim_age::x25519::Identity;
use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;
use dim_topics::bundle::{Bundle, Event};
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::membership::encryption::Secret;
use dim_topics::membership::key_grant::Epoch;
use dim_topics::membership::roster::{Group, MemberRow, Roster, SignedRoster};
use ed25519_dalek::SigningKey;
use rand::RngExt as _;

use crate::fleet::{Fleet, Happening, fail_unless};
use crate::node::{Node, START};
use crate::troubles::{RosterTroubles, Troubles};

/// The pause until the admin tries again to reach a member.
const AGAIN: Duration = Duration::from_secs(1);

/// What the admin does.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Add { node: usize },
    Remove { node: usize },
    Rekey,
    ReplaceKeepers,
}

/// The admin of a fleet.
pub struct Admin {
    key: SigningKey,
    troubles: RosterTroubles,
    pub roster: SignedRoster,
    /// The members that were removed, with the versions of the roster.
    pub removed: BTreeMap<usize, u64>,
    /// The members that joined later.
    pub added: BTreeMap<usize, u64>,
    /// The blocks of rosters and key grants.
    pub blocks: BTreeMap<Digest, Bytes>,
    /// All secrets, with the versions of the roster for which they were made.
    secrets: BTreeMap<[u8; 16], (Secret, u64)>,
    /// The version of the roster with which each bundle was formed.
    formed: BTreeMap<(Topic, WriterId, Incarnation, u64), u64>,
}

/// The group of all members.
pub fn group() -> GroupName {
    "all".parse().expect("a group")
}

/// The key with which a member decrypts secrets.
pub fn identity(store_key: &[u8; 32]) -> Identity {
    // X25519 ignores three bits of the first byte, in which the keys of members differ.
    let mut random = *store_key;
    random.reverse();
    Identity::new(&random)
}

fn row(number: usize, store_key: &[u8; 32], since: u64, is_keeper: bool) -> MemberRow {
    MemberRow {
        label: format!("m{number}").parse().expect("a label"),
        sealing: identity(store_key).recipient(),
        peers: Default::default(),
        addresses: Vec::new(),
        groups: [group()].into(),
        is_keeper,
        since,
    }
}

impl Admin {
    pub fn new(troubles: &Troubles, nodes: &[Node]) -> Option<Self> {
        let roster_troubles = troubles.roster.clone()?;
        let key = SigningKey::from_bytes(&[99; 32]);
        let mut roster = Roster::first(&key, Timestamp(START * 2));
        roster.groups.insert(group(), Group { rekeyed: 1, history: roster_troubles.has_history });
        for (number, node) in nodes.iter().enumerate().take(troubles.members) {
            let is_keeper = number < roster_troubles.keepers;
            roster.members.insert(node.store.id, row(number, &node.store.key, 1, is_keeper));
        }
        let mut it = Self {
            roster: roster.clone().draft().expect("a small roster"),
            key,
            troubles: roster_troubles,
            removed: BTreeMap::new(),
            added: BTreeMap::new(),
            blocks: BTreeMap::new(),
            secrets: BTreeMap::new(),
            formed: BTreeMap::new(),
        };
        it.sign(roster);
        Some(it)
    }

    fn sign(&mut self, roster: Roster) {
        let mut draft = roster.draft().expect("a small roster");
        draft.sign(&self.key);
        self.roster = draft;
    }

    /// The name of the fleet.
    pub fn fleet(&self) -> &str {
        &self.roster.roster.fleet
    }

    /// Remembers epochs, so that the checker can read what is published.
    pub fn learn(&mut self, epochs: &[Epoch]) {
        self.secrets.extend(epochs.iter().map(|epoch| (epoch.id.id, (epoch.secret.clone(), epoch.roster))));
    }

    /// Notes a bundle and the version of the roster that its writer had. Returns its events.
    pub fn published(&mut self, bundle: &Bundle, version: u64) -> Vec<Event> {
        let epoch = bundle.epoch().expect("every topic is encrypted");
        let header = &bundle.header;
        let place = (header.topic.clone(), header.writer, header.incarnation, header.first);
        let (secret, roster) = &self.secrets[epoch];
        // A writer that has lost its newest roster in a crash may still have a key for it.
        self.formed.insert(place, version.max(*roster));
        bundle.decrypted_events(self.fleet(), secret).expect("own events can be read")
    }

    /// Checks that a member may know events that it was delivered.
    pub fn check_reader(&self, node: usize, place: (Topic, WriterId, Incarnation, u64)) {
        let formed = self.formed[&place];
        if let Some(removed) = self.removed.get(&node) {
            assert!(
                formed < *removed,
                "former member {node} reads what was written after its removal: {place:?}"
            );
        }
        if let Some(added) = self.added.get(&node).filter(|_| !self.troubles.has_history) {
            assert!(formed >= *added, "new member {node} reads what was written before it joined: {place:?}");
        }
    }

    /// The end of the log of a removed writer; `None` if the writer is a member.
    pub fn cut(&self, topic: &Topic, writer: &WriterId, incarnation: &Incarnation) -> Option<u64> {
        let removed = self.roster.roster.removed.get(writer)?;
        Some(removed.cuts.get(&(topic.clone(), *incarnation)).map_or(0, |last| last.next()))
    }

    /// Whether events from before its time are told as gaps to a member, because it does not get their keys.
    pub fn lacks_history(&self, node: usize) -> bool {
        self.added.contains_key(&node) && !self.troubles.has_history
    }
}

impl Fleet {
    /// Plans what the admin does.
    pub fn plan_admin(&mut self) {
        let Troubles { members, late_joiners, length, roster: Some(roster), .. } = self.troubles.clone()
        else {
            return;
        };
        for node in 0..members {
            let first = Duration::from_millis(1) + self.random(Duration::from_millis(100));
            if node == 0 {
                self.at(first, Happening::Publish);
            }
        }
        for node in members..members + late_joiners {
            let at = self.random(length);
            self.at(at, Happening::Admin(Change::Add { node }));
        }
        let mut victims: Vec<usize> = (0..members).collect();
        for _ in 0..roster.removals {
            let node = victims.swap_remove(self.rng.random_range(0..victims.len()));
            let at = self.random(length);
            self.at(at, Happening::Admin(Change::Remove { node }));
        }
        for _ in 0..roster.rekeys {
            let at = self.random(length);
            self.at(at, Happening::Admin(Change::Rekey));
        }
        if roster.loses_keepers {
            let at = self.random(length);
            self.at(at, Happening::Admin(Change::ReplaceKeepers));
        }
    }

    /// Changes the roster, and gives it to a member.
    pub fn change_roster(&mut self, change: Change) {
        let Some(admin) = &self.admin else { return };
        let mut next = admin.roster.next();
        let version = next.version;
        match change {
            Change::Add { node } => {
                let store = &self.nodes[node].store;
                next.members.insert(store.id, row(node, &store.key, version, false));
                let history = admin.troubles.has_history;
                let group = next.groups.get_mut(&group()).expect("it is there");
                group.rekeyed = if history { group.rekeyed } else { version };
                self.admin.as_mut().expect("it is there").added.insert(node, version);
            }
            Change::Remove { node } => self.remove_from(&mut next, &[node]),
            Change::Rekey => next.groups.get_mut(&group()).expect("it is there").rekeyed = version,
            Change::ReplaceKeepers => {
                let keepers: Vec<usize> = (0..self.nodes.len())
                    .filter(|node| {
                        let row = next.members.get(&self.nodes[*node].store.id);
                        row.is_some_and(|row| row.is_keeper)
                    })
                    .collect();
                for node in &keepers {
                    self.nodes[*node].crash();
                    self.dead.insert(*node);
                }
                self.remove_from(&mut next, &keepers);
            }
        }
        self.admin.as_mut().expect("it is there").sign(next);
        self.publish_roster();
    }

    /// Removes members from a roster. The ends of their logs are those that one of the others knows.
    fn remove_from(&mut self, next: &mut Roster, nodes: &[usize]) {
        let version = next.version;
        let ids: Vec<WriterId> = nodes.iter().map(|node| self.nodes[*node].store.id).collect();
        let is_gone =
            |node: &usize| nodes.contains(node) || !next.members.contains_key(&self.nodes[*node].store.id);
        let others: Vec<usize> = (0..self.nodes.len()).filter(|node| !is_gone(node)).collect();
        let witness = others[self.rng.random_range(0..others.len())];
        for id in &ids {
            let checkpoints = self.nodes[witness].store.checkpoints.iter();
            let of_writer = checkpoints.filter(|((_, writer, _), _)| writer == id);
            let cuts = of_writer.filter_map(|((topic, _, incarnation), checkpoint)| {
                Some(((topic.clone(), *incarnation), checkpoint.last?))
            });
            next.remove(id, cuts.collect());
        }
        if !next.members.values().any(|row| row.is_keeper) {
            let id = self.nodes[witness].store.id;
            next.members.get_mut(&id).expect("it is a member").is_keeper = true;
        }
        let admin = self.admin.as_mut().expect("it is there");
        admin.removed.extend(nodes.iter().map(|node| (*node, version)));
    }

    /// Gives the newest roster to one member that runs, or tries it again later.
    pub fn publish_roster(&mut self) {
        let Some(admin) = &self.admin else { return };
        let block = admin.roster.to_block();
        let is_member = |node: &Node| admin.roster.roster.members.contains_key(&node.store.id);
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|node| self.nodes[*node].member.is_some() && is_member(&self.nodes[*node]))
            .collect();
        if running.is_empty() {
            let at = self.now + AGAIN;
            self.at(at, Happening::Publish);
            return;
        }
        let node = running[self.rng.random_range(0..running.len())];
        self.with_member(node, |member, now| {
            member.take_roster(&block, now).expect("the admin signs valid rosters");
        });
        self.form_bundles(node);
        // The member may crash before the roster is durable.
        if self.nodes[node].store.roster.as_ref().is_none_or(|(_, stored)| *stored != block) {
            let at = self.now + AGAIN;
            self.at(at, Happening::Publish);
        }
    }

    /// Takes in a roster or a key grant that was fetched.
    pub fn end_block_fetch(&mut self, node: usize, digest: &Digest, is_roster: bool) {
        if self.provider(node, digest).is_none() {
            return;
        }
        let admin = self.admin.as_ref().expect("only fleets with a roster have such blocks");
        let block = admin.blocks[digest].clone();
        self.nodes[node].blocks.insert(*digest);
        self.with_member(node, |member, now| {
            if is_roster {
                member.take_roster(&block, now).expect("the admin signs valid rosters");
            } else {
                // It may need a later roster, or be of a keeper that was removed.
                let _ = member.take_grant(&block, now);
            }
        });
        self.form_bundles(node);
    }

    /// Publishes what waited for a roster or a key.
    fn form_bundles(&mut self, node: usize) {
        for topic in self.topics.clone() {
            self.form_bundle(node, &topic);
        }
    }

    /// Makes epochs durable.
    pub fn store_epochs(&mut self, node: usize, number: u64, epochs: &[Epoch]) {
        if self.may_crash(node) {
            return;
        }
        self.nodes[node].store.epochs.extend(epochs.iter().cloned());
        self.admin.as_mut().expect("only fleets with a roster have epochs").learn(epochs);
        self.with_member(node, |member, now| member.epochs_stored(number, now));
        self.form_bundles(node);
    }

    /// Checks that every member has the newest roster and a key for it.
    pub fn check_membership(&self) -> Result<(), String> {
        let Some(admin) = &self.admin else { return Ok(()) };
        for node in self.nodes.iter().filter(|node| node.member.is_some()) {
            let id = node.store.id;
            if !admin.roster.roster.members.contains_key(&id) {
                continue;
            }
            let membership = node.member.as_ref().and_then(|member| member.membership());
            let membership = membership.expect("a fleet with a roster");
            let version = membership.roster().map_or(0, |it| it.roster.version);
            let newest = admin.roster.roster.version;
            fail_unless(version == newest, || format!("{id} has version {version} of the roster {newest}"))?;
            let epoch = membership.current_epoch(&group(), Timestamp(START));
            fail_unless(epoch.is_ok(), || format!("{id} cannot write: {epoch:?}"))?;
        }
        Ok(())
    }
}
