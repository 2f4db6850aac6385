//! Owns the membership of a fleet as one member knows it: the newest roster and the key epochs of the groups. It receives
//! verified rosters and key grants. It says who may write, which key encrypts, and which key decrypts.
//!
//! ```text
//! admin ──signs──► roster ──names──► members, keepers, groups
//!                                      │
//!                    keeper ──seals──► key grant ──► epochs: one secret for each group and period
//!                                                      │
//!                                     writer and reader: the key of a log
//! ```
//!
//! The roster says since which version a group needs new keys. A keeper that has this version makes a new epoch, and a
//! writer that has it writes with no older one. So a removed member reads nothing that is written by members that know
//! of the removal.

pub mod encryption;
pub mod exchange;
pub mod key_grant;
pub mod observed;
pub mod roster;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use dim_age::x25519::{Identity, Recipient};
use dim_model::ident::GroupName;
use dim_model::time::{Timestamp, nanoseconds};
use ed25519_dalek::SigningKey;
use thiserror::Error;

use crate::bundle::Bundle;
use crate::identity::{Digest, WriterId};
use crate::malformed::Malformed;
use encryption::Secret;
use key_grant::{Epoch, EpochId, Granted, KeyGrant, MAX_EPOCHS};
use roster::{MemberRow, SignedRoster};

/// The age at which keepers replace a key epoch.
pub const EPOCH_AGE: Duration = Duration::from_secs(7 * 24 * 3_600);

/// The time that a keeper waits for each keeper before it, so that usually one of them makes a new epoch.
pub const KEEPER_PAUSE: Duration = Duration::from_secs(1);

/// The maximum number of secrets of one epoch that other members than keepers may offer.
const MAX_OFFERED: usize = 4;

/// The maximum number of epochs of a group that are kept.
pub const MAX_KEPT: usize = 1_024;

/// The maximum number of refused rosters that are remembered. The first ones are a proof.
pub const MAX_FORKS: usize = 16;

/// What a roster that was received changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RosterChange {
    /// Nothing: it is the current one or an earlier one.
    None,
    /// It is the current one now.
    New,
}

/// The reason why a valid roster is refused: the admins have signed two different rosters of one version. The one that
/// was seen first stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Error)]
#[error("two different rosters have version {version}: {kept} is valid here, and {refused} is refused")]
pub struct RosterFork {
    /// The version.
    pub version: u64,
    /// The digest of the one that is kept.
    pub kept: Digest,
    /// The digest of the one that is refused.
    pub refused: Digest,
}

/// The reason why the bundle, the head or the key grant of another is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Error)]
pub enum Refusal {
    /// This member has no roster yet, so it knows nobody.
    #[error("this host has no roster yet")]
    NoRoster,
    /// The writer is no member.
    #[error("the writer is no member of the fleet")]
    Stranger,
    /// The writer was removed, and the events are beyond the end of its log.
    #[error("the writer was removed from the fleet")]
    Removed,
    /// The writer does not belong to the group.
    #[error("the writer does not belong to the group of the topic")]
    OtherGroup,
    /// The events are not encrypted, and the topic is.
    #[error("the events are not encrypted, and the topic is")]
    Plain,
    /// The key grant was made with a later roster than this member has.
    #[error("it needs a later roster")]
    LaterRoster,
    /// A member that issues no keys of the group gave one to all.
    #[error("the writer issues no keys of the group")]
    NoKeeper,
}

impl Refusal {
    /// A short name, for metrics and the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoRoster => "no_roster",
            Self::Stranger => "stranger",
            Self::Removed => "removed",
            Self::OtherGroup => "other_group",
            Self::Plain => "not_encrypted",
            Self::LaterRoster => "later_roster",
            Self::NoKeeper => "no_keeper",
        }
    }
}

/// The reason why nothing can be encrypted for a group.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NoKey {
    /// This host belongs to no fleet with a roster.
    #[error("this host belongs to no fleet with a roster: run `dim fleet join`")]
    NoFleet,
    /// This host has no roster yet.
    #[error("this host has no roster yet: run `dim fleet add` with its line, where the admin key is")]
    NoRoster,
    /// This host is no member of the fleet.
    #[error("this host is no member of the fleet")]
    NoMember,
    /// This host does not belong to the group.
    #[error("this host does not belong to group {0}: run `dim fleet add` with its line and `--group {0}`")]
    OtherGroup(GroupName),
    /// The roster has expired.
    #[error("the roster expired at {0}: an admin must publish a new one, for example with `dim fleet renew`")]
    Expired(Timestamp),
    /// No keeper has made a key for the current roster yet.
    #[error("no keeper of group {0} has made a key for the current roster yet")]
    NoEpoch(GroupName),
}

/// The membership of a fleet as one member knows it.
#[derive(Debug)]
pub struct Membership {
    fleet: String,
    id: WriterId,
    identity: Identity,
    roster: Option<SignedRoster>,
    epochs: BTreeMap<GroupName, BTreeMap<EpochId, Epoch>>,
    /// The secrets of other members than keepers, which only read.
    offered: BTreeMap<(GroupName, [u8; 16]), Vec<Secret>>,
    forks: BTreeSet<RosterFork>,
}

impl Membership {
    /// The membership of the member `id`, which decrypts with `identity`, from its store.
    pub fn new(fleet: String, id: WriterId, identity: Identity, roster: Option<SignedRoster>) -> Self {
        let (epochs, offered) = (BTreeMap::new(), BTreeMap::new());
        Self { fleet, id, identity, roster, epochs, offered, forks: BTreeSet::new() }
    }

    /// The name of the fleet.
    pub fn fleet(&self) -> &str {
        &self.fleet
    }

    /// The public key for which the secrets of this member are encrypted.
    pub fn recipient(&self) -> Recipient {
        self.identity.recipient()
    }

    /// The newest roster.
    pub fn roster(&self) -> Option<&SignedRoster> {
        self.roster.as_ref()
    }

    /// The rosters that were refused, because the admins have signed others of their versions.
    pub fn forks(&self) -> impl Iterator<Item = &RosterFork> {
        self.forks.iter()
    }

    /// Takes in a refusal that is durable.
    pub fn restore_fork(&mut self, fork: RosterFork) {
        if self.forks.len() < MAX_FORKS {
            self.forks.insert(fork);
        }
    }

    /// Takes in a roster of the fleet. It replaces the current one if it is newer and continues it.
    pub fn take_roster(&mut self, new: SignedRoster) -> Result<RosterChange, RosterFork> {
        let Some(current) = &self.roster else {
            self.roster = Some(new);
            return Ok(RosterChange::New);
        };
        let (version, newest) = (new.roster.version, current.roster.version);
        // The versions that both name must be the same. If there are none, the signatures of the admins decide alone.
        let common = version.min(newest);
        let named = current.digest_of(common).zip(new.digest_of(common));
        let admins = |it: &SignedRoster| -> Vec<_> {
            it.roster.authority.iter().map(|authority| authority.admins.clone()).collect()
        };
        let (old_admins, new_admins) = (admins(current), admins(&new));
        let (shorter, longer) =
            if version < newest { (new_admins, old_admins) } else { (old_admins, new_admins) };
        let is_continued = named.is_none_or(|(one, other)| one == other) && longer.starts_with(&shorter);
        if !is_continued {
            let (kept, refused) = named.unwrap_or((current.digest, new.digest));
            let fork = RosterFork { version: common, kept, refused };
            self.restore_fork(fork);
            return Err(fork);
        }
        if version <= newest {
            return Ok(RosterChange::None);
        }
        self.roster = Some(new);
        Ok(RosterChange::New)
    }

    /// Takes in epochs that are durable.
    pub fn restore(&mut self, group: GroupName, epochs: impl IntoIterator<Item = Epoch>) {
        let known = self.epochs.entry(group).or_default();
        known.extend(epochs.into_iter().map(|epoch| (epoch.id, epoch)));
        while known.len() > MAX_KEPT {
            known.pop_first();
        }
    }

    /// Reads the epochs of a key grant. Returns those that are unknown; there are none if the grant is for others. Those of
    /// a keeper are made durable and restored before they are used; those of another member only read
    /// ([`Membership::offer`]).
    pub fn read_grant(&self, grant: &KeyGrant) -> Result<Result<Vec<Epoch>, Malformed>, Refusal> {
        let roster = &self.roster.as_ref().ok_or(Refusal::NoRoster)?.roster;
        if grant.roster > roster.version {
            return Err(Refusal::LaterRoster);
        }
        let row = roster.members.get(&grant.writer).ok_or(Refusal::Stranger)?;
        if !row.groups.contains(&grant.group) {
            return Err(Refusal::OtherGroup);
        }
        let epochs = match grant.unseal(&self.identity) {
            Ok(epochs) => epochs.unwrap_or_default(),
            Err(why) => return Ok(Err(why)),
        };
        // A keeper cannot replace a secret that another keeper made.
        let known = self.epochs.get(&grant.group);
        let is_new = |epoch: &Epoch| known.is_none_or(|known| !known.contains_key(&epoch.id));
        Ok(Ok(epochs.into_iter().filter(is_new).collect()))
    }

    /// Whether a member issues the keys of a group.
    pub fn is_keeper(&self, member: &WriterId, group: &GroupName) -> bool {
        let row = self.roster.as_ref().and_then(|it| it.roster.members.get(member));
        row.is_some_and(|row| row.is_keeper && row.groups.contains(group))
    }

    /// Takes in epochs of a member that is no keeper, because the keepers do not have them. They read and never write, so
    /// that only keepers decide with which keys members write. A secret may be wrong: each is tried.
    pub fn offer(&mut self, group: &GroupName, epochs: Vec<Epoch>) {
        for epoch in epochs {
            let offered = self.offered.entry((group.clone(), epoch.id.id)).or_default();
            if offered.len() < MAX_OFFERED && !offered.contains(&epoch.secret) {
                offered.push(epoch.secret);
            }
        }
        while self.offered.len() > MAX_KEPT {
            self.offered.pop_first();
        }
    }

    /// Whether a bundle may be taken in, by its writer. `group` is the group of its topic, if the topic is encrypted. A
    /// bundle of a former member must be fetched by a digest that is known, up to the last one that counts.
    pub fn check_bundle(
        &self,
        bundle: &Bundle,
        group: Option<&GroupName>,
        is_fetched: bool,
    ) -> Result<(), Refusal> {
        if group.is_some() && !bundle.is_encrypted() {
            return Err(Refusal::Plain);
        }
        let header = &bundle.header;
        let roster = &self.roster.as_ref().ok_or(Refusal::NoRoster)?.roster;
        if let Some(removed) = roster.removed.get(&header.writer) {
            let last = removed.cuts.get(&(header.topic.clone(), header.incarnation));
            let counts = is_fetched && last.is_some_and(|last| bundle.next() <= last.next());
            return if counts { Ok(()) } else { Err(Refusal::Removed) };
        }
        let member = roster.members.get(&header.writer).ok_or(Refusal::Stranger)?;
        match group {
            Some(group) if !member.groups.contains(group) => Err(Refusal::OtherGroup),
            _ => Ok(()),
        }
    }

    /// Whether a writer is a member.
    pub fn check_member(&self, writer: &WriterId) -> Result<&MemberRow, Refusal> {
        let roster = &self.roster.as_ref().ok_or(Refusal::NoRoster)?.roster;
        match roster.members.get(writer) {
            Some(member) => Ok(member),
            None if roster.removed.contains_key(writer) => Err(Refusal::Removed),
            None => Err(Refusal::Stranger),
        }
    }

    /// The epoch with which this member writes: the highest one that the current roster allows.
    pub fn current_epoch(&self, group: &GroupName, now: Timestamp) -> Result<&Epoch, NoKey> {
        let roster = &self.roster.as_ref().ok_or(NoKey::NoRoster)?.roster;
        let me = roster.members.get(&self.id).ok_or(NoKey::NoMember)?;
        if !me.groups.contains(group) {
            return Err(NoKey::OtherGroup(group.clone()));
        }
        if roster.expires < now {
            return Err(NoKey::Expired(roster.expires));
        }
        self.newest_epoch(group).ok_or_else(|| NoKey::NoEpoch(group.clone()))
    }

    /// The highest epoch of a group that the current roster allows.
    fn newest_epoch(&self, group: &GroupName) -> Option<&Epoch> {
        let rekeyed = self.roster.as_ref()?.roster.groups.get(group)?.rekeyed;
        self.epochs.get(group)?.values().rev().find(|epoch| epoch.roster >= rekeyed)
    }

    /// The secrets that may be that of an epoch of a group, by the 16 bytes of its identity.
    pub fn secrets(&self, group: &GroupName, id: &[u8; 16]) -> impl Iterator<Item = &Secret> {
        let known = self.epochs(group).filter(|epoch| epoch.id.id == *id).map(|epoch| &epoch.secret);
        let offered = self.offered.get(&(group.clone(), *id));
        known.chain(offered.into_iter().flatten())
    }

    /// The epochs of a group.
    pub fn epochs(&self, group: &GroupName) -> impl Iterator<Item = &Epoch> {
        self.epochs.get(group).into_iter().flat_map(BTreeMap::values)
    }

    /// Forgets the epochs of a group that were replaced before a time. Returns them.
    pub fn forget_before(&mut self, group: &GroupName, time: Timestamp) -> Vec<EpochId> {
        let newest = self.newest_epoch(group).map(|epoch| epoch.id);
        let Some(epochs) = self.epochs.get_mut(group) else { return Vec::new() };
        let mut forgotten = Vec::new();
        // An epoch is replaced when the next one is made.
        let replaced: Vec<Timestamp> = epochs.values().skip(1).map(|epoch| epoch.time).collect();
        let mut replaced = replaced.into_iter().chain([Timestamp(u64::MAX)]);
        epochs.retain(|id, _| {
            let at = replaced.next().expect("one for each");
            let is_kept = at >= time || Some(*id) == newest;
            forgotten.extend((!is_kept).then_some(*id));
            is_kept
        });
        forgotten
    }

    /// The groups of this member for which it has no epoch with which it may write.
    pub fn groups_without_epoch(&self) -> Vec<GroupName> {
        let me = self.roster.as_ref().and_then(|it| it.roster.members.get(&self.id));
        let groups = me.iter().flat_map(|me| &me.groups);
        groups.filter(|group| self.newest_epoch(group).is_none()).cloned().collect()
    }

    /// The groups for which this member must make a new epoch as a keeper, with the number of keepers that come before
    /// it.
    pub fn due_epochs(&self, now: Timestamp) -> Vec<(GroupName, usize)> {
        let Some(roster) = self.roster.as_ref().map(|it| &it.roster) else { return Vec::new() };
        let Some(me) = roster.members.get(&self.id).filter(|me| me.is_keeper) else { return Vec::new() };
        let is_due = |group: &&GroupName| {
            let newest = self.newest_epoch(group);
            newest.is_none_or(|epoch| epoch.time.0.saturating_add(nanoseconds(EPOCH_AGE)) < now.0)
        };
        let rank = |group: &GroupName| {
            let keepers = roster.members.iter().take_while(|(id, _)| **id != self.id);
            keepers.filter(|(_, it)| it.is_keeper && it.groups.contains(group)).count()
        };
        me.groups.iter().filter(is_due).map(|group| (group.clone(), rank(group))).collect()
    }

    /// Makes a new epoch of a group, as a keeper. Returns it, and the key grant for all members of the group. It is made
    /// durable and restored before it is used.
    ///
    /// # Panics
    /// This member has no roster.
    pub fn new_epoch(
        &self,
        group: &GroupName,
        time: Timestamp,
        key: &SigningKey,
        random: &mut dyn FnMut(&mut [u8]),
    ) -> (Epoch, Bytes) {
        let roster = self.roster.as_ref().expect("a keeper has a roster").roster.version;
        let highest = self.epochs.get(group).and_then(|epochs| epochs.last_key_value());
        let number = highest.map_or(0, |(id, _)| id.number.saturating_add(1));
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        random(&mut id);
        random(&mut secret);
        let epoch = Epoch { id: EpochId { number, id }, roster, time, secret: Secret::new(secret) };
        let receivers = self.receivers(group);
        let epochs = std::slice::from_ref(&epoch);
        let granted = Granted { group, roster, epochs, receiver: None, refused: &[] };
        let grant = KeyGrant::seal(&self.fleet, granted, &receivers, key, random);
        (epoch, grant)
    }

    fn receivers(&self, group: &GroupName) -> Vec<Recipient> {
        let members = self.roster.iter().flat_map(|it| it.roster.members.values());
        members.filter(|member| member.groups.contains(group)).map(|member| member.sealing).collect()
    }

    /// Answers a member that lacks epochs of a group. `wanted` is the epoch that it names, if it names one;
    /// the answer has others, too, and says if the member may not have it. Returns the key grant; `None` if this member
    /// has no answer.
    pub fn answer(
        &self,
        member: &WriterId,
        group: &GroupName,
        wanted: Option<&[u8; 16]>,
        key: &SigningKey,
        random: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Bytes> {
        let roster = &self.roster.as_ref()?.roster;
        let me = roster.members.get(&self.id).filter(|me| me.groups.contains(group))?;
        let row = roster.members.get(member).filter(|row| row.groups.contains(group))?;
        let settings = roster.groups.get(group)?;
        let may_have = |epoch: &&Epoch| settings.history || epoch.roster >= row.since;
        let is_refused = |id: &&[u8; 16]| self.epochs(group).any(|it| it.id.id == **id && !may_have(&it));
        let refused: Vec<[u8; 16]> = wanted.filter(is_refused).copied().into_iter().collect();
        let mut epochs: Vec<Epoch> = self.epochs(group).filter(may_have).cloned().collect();
        // The wanted epoch, and the newest ones.
        let place = wanted.and_then(|id| epochs.iter().position(|epoch| epoch.id.id == *id));
        let wanted = place.map(|place| epochs.remove(place));
        let surplus = (epochs.len() + usize::from(wanted.is_some())).saturating_sub(MAX_EPOCHS);
        // Only a keeper decides with which epochs others write.
        let others = if me.is_keeper { epochs.split_off(surplus) } else { Vec::new() };
        let epochs: Vec<Epoch> = wanted.into_iter().chain(others).collect();
        if epochs.is_empty() && refused.is_empty() {
            return None;
        }
        let (roster, receiver) = (roster.version, Some(*member));
        let granted = Granted { group, roster, epochs: &epochs, receiver, refused: &refused };
        Some(KeyGrant::seal(&self.fleet, granted, &[row.sealing], key, random))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use roster::{Group, Roster};

    fn key(number: u8) -> SigningKey {
        SigningKey::from_bytes(&[number; 32])
    }

    fn id(number: u8) -> WriterId {
        WriterId::of(&key(number).verifying_key())
    }

    fn identity(number: u8) -> Identity {
        Identity::new(&[number; 32])
    }

    fn group() -> GroupName {
        "jobs".parse().unwrap()
    }

    fn random() -> impl FnMut(&mut [u8]) {
        |bytes| rand::fill(bytes)
    }

    /// The admin has key 0; the members have keys from 1 on, and the first of them is a keeper.
    fn row(number: u8, since: u64) -> MemberRow {
        MemberRow {
            label: format!("m{number}").parse().unwrap(),
            sealing: identity(number).recipient(),
            peers: BTreeSet::new(),
            addresses: Vec::new(),
            groups: [group()].into(),
            is_keeper: number == 1,
            since,
        }
    }

    fn first(members: std::ops::RangeInclusive<u8>) -> SignedRoster {
        let mut roster = Roster::first(&key(0), Timestamp(1_000));
        roster.groups.insert(group(), Group { rekeyed: 1, history: false });
        roster.members = members.map(|number| (id(number), row(number, 1))).collect();
        signed(roster)
    }

    fn signed(roster: Roster) -> SignedRoster {
        let mut draft = roster.draft().unwrap();
        draft.sign(&key(0));
        let fleet = draft.roster.fleet.clone();
        let opened = SignedRoster::open(&draft.to_block(), &fleet).unwrap();
        assert_eq!(opened, draft);
        opened
    }

    fn member(number: u8, roster: &SignedRoster) -> Membership {
        let fleet = roster.roster.fleet.clone();
        Membership::new(fleet, id(number), identity(number), Some(roster.clone()))
    }

    type Taken = Result<Result<Vec<Epoch>, Malformed>, Refusal>;

    /// Lets a member take in a key grant.
    fn take(membership: &mut Membership, block: &Bytes) -> Taken {
        let grant = KeyGrant::open(block, membership.fleet()).unwrap();
        let epochs = membership.read_grant(&grant)?;
        membership.restore(grant.group, epochs.clone().unwrap_or_default());
        Ok(epochs)
    }

    /// Lets the member with key `number` make an epoch.
    fn make(membership: &mut Membership, time: u64, number: u8) -> (Epoch, Bytes) {
        let (epoch, grant) =
            membership.new_epoch(&group(), Timestamp(time), &key(number), &mut |it| rand::fill(it));
        membership.restore(group(), [epoch.clone()]);
        (epoch, grant)
    }

    #[test]
    fn a_newer_roster_replaces_the_current_one_and_a_fork_does_not() {
        let one = first(1..=2);
        let mut it = member(1, &one);
        let mut next = one.next();
        next.members.remove(&id(2));
        let two = signed(next);
        let other = signed(one.next());
        assert_eq!(it.take_roster(two.clone()), Ok(RosterChange::New));
        assert_eq!(it.take_roster(two.clone()), Ok(RosterChange::None));
        assert_eq!(it.take_roster(one.clone()), Ok(RosterChange::None));
        let fork = RosterFork { version: 2, kept: two.digest, refused: other.digest };
        assert_eq!(it.take_roster(other.clone()), Err(fork));
        // What continues the other one is refused, too.
        let three = signed(other.next());
        assert_eq!(it.take_roster(three), Err(fork));
        assert_eq!(it.forks().collect::<Vec<_>>(), [&fork]);
        assert_eq!(it.roster().unwrap().digest, two.digest);
    }

    #[test]
    fn a_member_that_was_away_for_long_takes_the_newest_roster() {
        let one = first(1..=2);
        let mut it = member(1, &one);
        let mut newest = one;
        for _ in 0..roster::RECENT + 9 {
            newest = signed(newest.next());
        }
        assert_eq!(it.take_roster(newest.clone()), Ok(RosterChange::New));
        assert_eq!(newest.digest_of(1), None, "nothing connects them but the admins");
        assert_eq!(newest.digest_of(newest.roster.version - 64), Some(newest.roster.recent[0]));
    }

    #[test]
    fn new_keys_are_needed_after_a_removal_and_the_removed_member_gets_none() {
        let one = first(1..=3);
        let (mut keeper, mut other, mut gone) = (member(1, &one), member(2, &one), member(3, &one));
        assert_eq!(keeper.due_epochs(Timestamp(1)), [(group(), 0)]);
        assert_eq!(other.due_epochs(Timestamp(1)), []);
        assert_eq!(other.current_epoch(&group(), Timestamp(1)), Err(NoKey::NoEpoch(group())));
        let (epoch, block) = make(&mut keeper, 1, 1);
        assert_eq!(keeper.due_epochs(Timestamp(1)), []);
        for it in [&mut other, &mut gone] {
            assert_eq!(take(it, &block), Ok(Ok(vec![epoch.clone()])));
            assert_eq!(take(it, &block), Ok(Ok(vec![])));
            assert_eq!(it.current_epoch(&group(), Timestamp(1)), Ok(&epoch));
        }
        let mut next = one.next();
        next.remove(&id(3), BTreeMap::new());
        let two = signed(next);
        for it in [&mut keeper, &mut other] {
            it.take_roster(two.clone()).unwrap();
            assert_eq!(it.current_epoch(&group(), Timestamp(1)), Err(NoKey::NoEpoch(group())));
            // What was written before is still read.
            assert!(it.secrets(&group(), &epoch.id.id).eq([&epoch.secret]));
        }
        let (newer, block) = make(&mut keeper, 2, 1);
        assert!(newer.id > epoch.id);
        assert_eq!(take(&mut gone, &block), Err(Refusal::LaterRoster));
        gone.take_roster(two).unwrap();
        assert_eq!(take(&mut gone, &block), Ok(Ok(vec![])));
        assert_eq!(gone.current_epoch(&group(), Timestamp(2)), Err(NoKey::NoMember));
        assert_eq!(take(&mut other, &block), Ok(Ok(vec![newer.clone()])));
        assert_eq!(other.current_epoch(&group(), Timestamp(2)), Ok(&newer));
        assert_eq!(other.check_member(&id(3)), Err(Refusal::Removed));
        assert_eq!(other.check_member(&id(9)), Err(Refusal::Stranger));
        assert_eq!(keeper.answer(&id(3), &group(), None, &key(1), &mut random()), None);
    }

    #[test]
    fn nobody_writes_with_a_key_that_no_keeper_has_made() {
        let one = first(1..=3);
        let (mut it, mut other) = (member(2, &one), member(3, &one));
        let (epoch, block) = make(&mut other, 1, 3);
        let grant = KeyGrant::open(&block, it.fleet()).unwrap();
        assert!(!it.is_keeper(&grant.writer, &group()) && it.is_keeper(&id(1), &group()));
        let epochs = it.read_grant(&grant).unwrap().unwrap();
        it.offer(&group(), epochs);
        assert!(it.secrets(&group(), &epoch.id.id).eq([&epoch.secret]), "it reads");
        assert_eq!(it.current_epoch(&group(), Timestamp(1)), Err(NoKey::NoEpoch(group())));
        // A secret that is wrong does not replace the right one.
        let wrong = Epoch { secret: Secret::new([7; 32]), ..epoch.clone() };
        it.offer(&group(), vec![wrong]);
        assert_eq!(it.secrets(&group(), &epoch.id.id).count(), 2);
        let (_, block) = make(&mut other, 1, 9);
        assert_eq!(take(&mut it, &block), Err(Refusal::Stranger));
    }

    #[test]
    fn a_new_member_gets_earlier_keys_only_if_the_group_has_a_history() {
        for history in [false, true] {
            let one = first(1..=1);
            let mut keeper = member(1, &one);
            let (earlier, _) = make(&mut keeper, 1, 1);
            let mut next = one.next();
            next.members.insert(id(2), row(2, 2));
            next.groups.insert(group(), Group { rekeyed: if history { 1 } else { 2 }, history });
            let two = signed(next);
            keeper.take_roster(two.clone()).unwrap();
            let mut it = member(2, &two);
            let wanted = Some(&earlier.id.id);
            let answer = keeper.answer(&id(2), &group(), wanted, &key(1), &mut random()).unwrap();
            let refused = KeyGrant::open(&answer, it.fleet()).unwrap().refused;
            assert_eq!(refused, if history { vec![] } else { vec![earlier.id.id] });
            if history {
                assert_eq!(take(&mut it, &answer), Ok(Ok(vec![earlier.clone()])));
                assert_eq!(it.current_epoch(&group(), Timestamp(1)), Ok(&earlier));
            } else {
                let (newer, block) = make(&mut keeper, 2, 1);
                assert_eq!(take(&mut it, &block), Ok(Ok(vec![newer])));
                assert_eq!(it.secrets(&group(), &earlier.id.id).count(), 0);
            }
        }
    }

    #[test]
    fn nothing_is_written_with_an_expired_roster_and_old_keys_are_replaced_and_forgotten() {
        let one = first(1..=1);
        let mut it = member(1, &one);
        let (epoch, _) = make(&mut it, 5, 1);
        assert_eq!(it.current_epoch(&group(), Timestamp(1_000)), Ok(&epoch));
        let expired = NoKey::Expired(Timestamp(1_000));
        assert_eq!(it.current_epoch(&group(), Timestamp(1_001)), Err(expired));
        let week = nanoseconds(EPOCH_AGE);
        assert_eq!(it.due_epochs(Timestamp(week)), []);
        assert_eq!(it.due_epochs(Timestamp(week + 6)), [(group(), 0)]);
        let (newer, _) = make(&mut it, week + 6, 1);
        assert_eq!(it.forget_before(&group(), Timestamp(week + 6)), []);
        assert_eq!(it.forget_before(&group(), Timestamp(week + 7)), [epoch.id]);
        assert!(it.epochs(&group()).eq([&newer]));
    }

    #[test]
    fn admins_change_only_with_the_signatures_of_both_thresholds() {
        let one = first(1..=1);
        let fleet = one.roster.fleet.clone();
        let admins = roster::Admins { keys: [id(0), id(7), id(8)].into(), threshold: 2 };
        let appoint = |signers: &[u8]| {
            let mut next = one.next();
            next.appoint(admins.clone()).unwrap();
            signers.iter().for_each(|signer| next.sign_appointment(&key(*signer)));
            next
        };
        let open = |roster: Roster, signers: &[u8]| {
            let mut draft = roster.draft().unwrap();
            signers.iter().for_each(|signer| draft.sign(&key(*signer)));
            SignedRoster::open(&draft.to_block(), &fleet)
        };
        open(appoint(&[0, 7]), &[7, 8]).unwrap();
        for (appointing, signing) in
            [(&[7, 8][..], &[7, 8][..]), (&[0], &[7, 8]), (&[0, 7], &[7]), (&[0, 7], &[7, 9])]
        {
            open(appoint(appointing), signing).expect_err(&format!("{appointing:?} {signing:?}"));
        }
        // A draft may lack signatures, and each admin adds its own.
        let mut draft = appoint(&[]).draft().unwrap();
        let mut awaited = Vec::new();
        for signer in [0, 7, 8] {
            awaited.push(draft.awaited().len());
            draft = draft.approve(&key(signer)).unwrap();
            draft = SignedRoster::open_draft(&draft.to_block(), &fleet).unwrap();
        }
        // The one of the admin before and of any two; then of the two that have not signed the roster; then of none.
        assert_eq!(awaited, [3, 2, 2]);
        assert_eq!(draft.awaited(), [].into());
        assert_eq!(SignedRoster::open(&draft.to_block(), &fleet).unwrap(), draft);
        // Only the appointment that is made may be incomplete.
        let mut twice = appoint(&[]);
        twice.appoint(admins.clone()).unwrap();
        SignedRoster::open_draft(&twice.draft().unwrap().to_block(), &fleet).unwrap_err();
        // A key that is not that of the fleet founds no fleet, whatever it signs, alone or beside the key of the fleet.
        let mut stolen = Roster::first(&key(9), Timestamp(1_000));
        stolen.fleet.clone_from(&fleet);
        open(stolen.clone(), &[9]).unwrap_err();
        for keys in [vec![9], vec![0, 9]] {
            stolen.authority.clear();
            stolen
                .appoint(roster::Admins { keys: keys.into_iter().map(id).collect(), threshold: 1 })
                .unwrap();
            stolen.sign_appointment(&key(9));
            open(stolen.clone(), &[9]).unwrap_err();
            let mut draft = stolen.clone().draft().unwrap();
            draft.sign(&key(9));
            SignedRoster::open_draft(&draft.to_block(), &fleet).unwrap_err();
        }
    }

    #[test]
    fn a_bundle_of_a_removed_writer_counts_up_to_its_cut() {
        use crate::bundle::{Event, Header};
        use crate::identity::Incarnation;
        let topic: dim_model::ident::Topic = "jobs".parse().unwrap();
        let incarnation = Incarnation([1; 16]);
        let bundle = |number: u8, count: usize| {
            let header = Header {
                topic: topic.clone(),
                writer: id(number),
                incarnation,
                began: Timestamp(1),
                first: 0,
                recent: Vec::new(),
                start: None,
            };
            let events = vec![Event { time: Timestamp(2), data: Bytes::from_static(b"x") }; count];
            Bundle::form("fleet", header, &events, &key(number), None)
        };
        let mut roster = first(1..=2).next();
        let last = bundle(2, 3).listed();
        roster.remove(&id(2), [((topic.clone(), incarnation), last)].into());
        let it = member(1, &signed(roster));
        for is_fetched in [false, true] {
            assert_eq!(it.check_bundle(&bundle(1, 9), None, is_fetched), Ok(()));
            assert_eq!(it.check_bundle(&bundle(1, 9), Some(&group()), is_fetched), Err(Refusal::Plain));
            let of_removed = if is_fetched { Ok(()) } else { Err(Refusal::Removed) };
            assert_eq!(it.check_bundle(&bundle(2, 3), None, is_fetched), of_removed);
            assert_eq!(it.check_bundle(&bundle(2, 4), None, is_fetched), Err(Refusal::Removed));
            assert_eq!(it.check_bundle(&bundle(3, 1), None, is_fetched), Err(Refusal::Stranger));
        }
    }
}
