//! Owns the roster: the list of the members of a fleet, which its admins sign. This file has the wire format of rosters;
//! it receives a roster and keys, or untrusted bytes, and returns blocks or verified rosters.
//!
//! The payload of the block is a canonical DAG-CBOR map. The block has one signature of each admin that approves.
//!
//! | key | value |
//! |---|---|
//! | `v` | 1 |
//! | `fleet` | the name of the fleet: the IPNS name of the key of its first admin |
//! | `version` | from 1, without holes |
//! | `recent` | the digests of the payloads of the versions before, at most 64, in order |
//! | `authority` | the sets of admins from the first to the current one: `[admins, threshold, signatures]` |
//! | `expires` | the time after which members write no encrypted topics, in nanoseconds since 1970 |
//! | `groups` | `[name, rekeyed, history]`: the version since which new keys are required, and whether new members receive earlier keys |
//! | `members` | maps: `name`, `writer`, `sealing`: an X25519 public key; `peers`; `addresses`; `groups`; `keeper`; `since`: the version with which it joined |
//! | `removed` | `[writer, version, cuts]`: former members, with the last bundles of their logs that count: `[topic, incarnation, [first, count, time, digest]]` |
//!
//! A set of admins is signed by as many admins as its threshold says, and as that of the set before. The first one is
//! signed by the key that the fleet is named after. So whoever knows the name of the fleet can verify any roster alone.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use dim_age::x25519::Recipient;
use dim_model::ident::{GroupName, MemberLabel, PeerName, Topic};
use dim_model::time::Timestamp;
use ed25519_dalek::{Signer as _, SigningKey};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::block::{self, MAX_BLOCK, SignedByMany};
use crate::bundle::Listed;
use crate::identity::{Digest, Incarnation, WriterId};
use crate::malformed::Malformed;

/// The version of the payload of rosters.
const VERSION: u64 = 1;

/// The maximum number of members.
pub const MAX_MEMBERS: usize = 4_096;

/// The maximum number of former members. The roster forgets those that were removed first.
pub const MAX_REMOVED: usize = 1_024;

/// The maximum number of groups.
pub const MAX_GROUPS: usize = 256;

/// The maximum number of admins of a fleet at a time.
pub const MAX_ADMINS: usize = block::MAX_SIGNERS;

/// The maximum number of sets of admins in the life of a fleet.
pub const MAX_AUTHORITIES: usize = 256;

/// The number of earlier versions that a roster names.
pub const RECENT: usize = 64;

/// The maximum number of peer ids, of addresses and of groups of a member.
const MAX_OF_MEMBER: usize = 16;

/// The maximum length of an address, in bytes.
const MAX_ADDRESS: usize = 256;

/// The maximum number of logs of a former member.
pub const MAX_CUTS: usize = 64;

/// The beginning of what the admins sign when a set of admins is appointed.
const APPOINTMENT: &str = "dim-fleet-admins-1";

/// The admins of a fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admins {
    /// Their public keys.
    pub keys: BTreeSet<WriterId>,
    /// The number of admins that must sign a roster.
    pub threshold: u32,
}

/// A set of admins with the signatures of those that appointed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// The admins.
    pub admins: Admins,
    /// The signatures of the admins before and of these.
    signatures: BTreeMap<WriterId, [u8; 64]>,
}

/// A group of members that share keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// The version of the roster since which new keys are required. Keys of earlier versions only read.
    pub rekeyed: u64,
    /// Whether new members receive the keys from before they joined.
    pub history: bool,
}

/// A member of a fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberRow {
    /// The operator's name of the member.
    pub label: MemberLabel,
    /// The key for which secrets are encrypted.
    pub sealing: Recipient,
    /// The peer ids of its daemons.
    pub peers: BTreeSet<PeerName>,
    /// The multiaddresses of its daemons.
    pub addresses: Vec<String>,
    /// The groups to which it belongs.
    pub groups: BTreeSet<GroupName>,
    /// Whether it issues keys.
    pub is_keeper: bool,
    /// The version of the roster with which it joined.
    pub since: u64,
}

/// A former member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemovedRow {
    /// The version of the roster that removed it.
    pub version: u64,
    /// The last bundles of its logs that count. Each lists those before it with their digests, so that the former member
    /// cannot change what it wrote.
    pub cuts: BTreeMap<(Topic, Incarnation), Listed>,
}

/// The list of the members of a fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The name of the fleet.
    pub fleet: String,
    /// The version, from 1.
    pub version: u64,
    /// The digests of the versions before, at most 64, in order.
    pub recent: Vec<Digest>,
    /// The sets of admins, the current one last.
    pub authority: Vec<Authority>,
    /// The time after which members write no encrypted topics.
    pub expires: Timestamp,
    /// The groups.
    pub groups: BTreeMap<GroupName, Group>,
    /// The members.
    pub members: BTreeMap<WriterId, MemberRow>,
    /// The former members.
    pub removed: BTreeMap<WriterId, RemovedRow>,
}

/// A roster with its signatures, which are verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRoster {
    /// The roster.
    pub roster: Roster,
    /// The digest of the payload. It is the same whoever has signed.
    pub digest: Digest,
    signed: SignedByMany,
}

/// The reason why a roster cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RosterError {
    /// The roster is too large.
    #[error("the roster has {bytes} bytes, and the maximum is {MAX_BLOCK}: remove members that are gone")]
    TooLarge {
        /// The size in bytes.
        bytes: usize,
    },
    /// The fleet would have no way to approve a roster.
    #[error("{threshold} signatures of {admins} admins cannot be had")]
    Threshold {
        /// The number of required signatures.
        threshold: u32,
        /// The number of admins.
        admins: usize,
    },
    /// The key is none of the admins whose signatures the roster needs.
    #[error("this is not the key of an admin whose signature the roster needs")]
    NoAdmin,
    /// A list is at its maximum.
    #[error("a fleet has at most {max} {what}")]
    TooMany {
        /// The entries of the list.
        what: &'static str,
        /// The maximum.
        max: usize,
    },
}

impl Admins {
    /// The number of the admins among `signers` suffices.
    fn approve(&self, signers: &BTreeSet<WriterId>) -> bool {
        self.keys.intersection(signers).count() >= self.threshold as usize
    }

    fn check(&self) -> Result<(), RosterError> {
        let admins = self.keys.len();
        if admins > MAX_ADMINS {
            return Err(RosterError::TooMany { what: "admins", max: MAX_ADMINS });
        }
        if self.threshold == 0 || self.threshold as usize > admins {
            return Err(RosterError::Threshold { threshold: self.threshold, admins });
        }
        Ok(())
    }
}

impl Authority {
    /// Begins a set of admins, without signatures.
    fn new(admins: Admins) -> Result<Self, RosterError> {
        admins.check()?;
        Ok(Self { admins, signatures: BTreeMap::new() })
    }

    /// Adds the signature of `key` to the set of admins that follows `before` in a fleet.
    fn sign(&mut self, fleet: &str, before: &[Self], key: &SigningKey) {
        let signature = key.sign(&self.signed_bytes(fleet, before)).to_bytes();
        self.signatures.insert(WriterId::of(&key.verifying_key()), signature);
    }

    /// The admins that have signed.
    fn signers(&self) -> BTreeSet<WriterId> {
        self.signatures.keys().copied().collect()
    }

    fn signed_bytes(&self, fleet: &str, before: &[Self]) -> Vec<u8> {
        let previous =
            before.last().map(|it| Digest::of(&it.signed_bytes(fleet, &before[..before.len() - 1])));
        let admins: Vec<&WriterId> = self.admins.keys.iter().collect();
        let statement = (APPOINTMENT, fleet, before.len(), previous, admins, self.admins.threshold);
        serde_ipld_dagcbor::to_vec(&statement).expect("texts, numbers and byte strings")
    }

    /// Checks the threshold and the signatures.
    fn verify(&self, fleet: &str, before: &[Self]) -> Result<(), Malformed> {
        self.admins.check().map_err(|_| Malformed::Payload("a threshold of admins cannot be met"))?;
        let signed = self.signed_bytes(fleet, before);
        for (signer, signature) in &self.signatures {
            block::verify(signer, &signed, signature)?;
        }
        Ok(())
    }

    /// Whether enough of the admins before and of these have signed.
    fn is_appointed(&self, fleet: &str, before: Option<&Self>) -> bool {
        let signers = self.signers();
        let is_allowed = match before {
            Some(before) => before.admins.approve(&signers),
            None => signers
                .iter()
                .any(|signer| self.admins.keys.contains(signer) && signer.name().as_str() == fleet),
        };
        is_allowed && self.admins.approve(&signers)
    }

    /// The admins before and these whose signatures are missing.
    fn awaited(&self, before: Option<&Self>) -> BTreeSet<WriterId> {
        let signers = self.signers();
        let sets = before.map(|it| &it.admins).into_iter().chain([&self.admins]);
        let short = sets.filter(|admins| !admins.approve(&signers));
        short.flat_map(|admins| &admins.keys).filter(|key| !signers.contains(key)).copied().collect()
    }
}

impl Roster {
    /// The first roster of the fleet of an admin.
    pub fn first(admin: &SigningKey, expires: Timestamp) -> Self {
        let id = WriterId::of(&admin.verifying_key());
        let fleet = id.name().to_string();
        let admins = Admins { keys: [id].into(), threshold: 1 };
        let mut authority = Authority::new(admins).expect("one of one admin");
        authority.sign(&fleet, &[], admin);
        Self {
            fleet,
            version: 1,
            recent: Vec::new(),
            authority: vec![authority],
            expires,
            groups: BTreeMap::new(),
            members: BTreeMap::new(),
            removed: BTreeMap::new(),
        }
    }

    /// Removes a member. Its logs end with `cuts`, and its groups need new keys.
    pub fn remove(&mut self, writer: &WriterId, cuts: BTreeMap<(Topic, Incarnation), Listed>) {
        let Some(row) = self.members.remove(writer) else { return };
        let version = self.version;
        for group in &row.groups {
            if let Some(group) = self.groups.get_mut(group) {
                group.rekeyed = version;
            }
        }
        self.removed.insert(*writer, RemovedRow { version, cuts });
        let oldest = self.removed.iter().min_by_key(|(_, row)| row.version).map(|(writer, _)| *writer);
        if let Some(oldest) = oldest.filter(|_| self.removed.len() > MAX_REMOVED) {
            self.removed.remove(&oldest);
        }
    }

    /// The admins that approve the roster.
    pub fn admins(&self) -> &Admins {
        &self.authority.last().expect("a roster has admins").admins
    }

    /// Replaces the admins. As many of the admins before as their threshold says, and as many of the new ones, must sign
    /// this appointment.
    pub fn appoint(&mut self, admins: Admins) -> Result<(), RosterError> {
        self.authority.push(Authority::new(admins)?);
        Ok(())
    }

    /// Adds a signature to the appointment of the current admins.
    pub fn sign_appointment(&mut self, key: &SigningKey) {
        let (last, before) = self.authority.split_last_mut().expect("a roster has admins");
        last.sign(&self.fleet, before, key);
    }

    /// The current admins with their signatures, and those before them.
    fn appointment(&self) -> (&Authority, Option<&Authority>) {
        let (last, before) = self.authority.split_last().expect("a roster has admins");
        (last, before.last())
    }

    /// Whether enough admins have appointed the current ones.
    fn has_appointed_admins(&self) -> bool {
        let (last, before) = self.appointment();
        last.is_appointed(&self.fleet, before)
    }

    /// Encodes the roster, without signatures.
    pub fn draft(self) -> Result<SignedRoster, RosterError> {
        for (what, count, max) in [
            ("members", self.members.len(), MAX_MEMBERS),
            ("removed members", self.removed.len(), MAX_REMOVED),
            ("groups", self.groups.len(), MAX_GROUPS),
            ("changes of its admins", self.authority.len(), MAX_AUTHORITIES),
        ] {
            if count > max {
                return Err(RosterError::TooMany { what, max });
            }
        }
        let payload = Bytes::from(self.payload());
        // Each admin may sign.
        let bytes = payload.len() + 128 * MAX_ADMINS;
        if bytes > MAX_BLOCK {
            return Err(RosterError::TooLarge { bytes });
        }
        let digest = Digest::of(&payload);
        Ok(SignedRoster { roster: self, digest, signed: SignedByMany::new(payload) })
    }

    fn payload(&self) -> Vec<u8> {
        let payload = Payload {
            v: VERSION,
            fleet: &self.fleet,
            groups: self
                .groups
                .iter()
                .map(|(name, it)| WireGroup(name.clone(), it.rekeyed, it.history))
                .collect(),
            recent: self.recent.clone(),
            expires: self.expires.0,
            members: self.members.iter().map(|(writer, it)| WireMember::of(writer, it)).collect(),
            removed: self.removed.iter().map(|(writer, it)| WireRemoved::of(writer, it)).collect(),
            version: self.version,
            authority: self.authority.iter().map(WireAuthority::of).collect(),
        };
        serde_ipld_dagcbor::to_vec(&payload).expect("a map of plain fields")
    }

    fn verify(&self) -> Result<(), Malformed> {
        let is_over = self.members.len() > MAX_MEMBERS
            || self.removed.len() > MAX_REMOVED
            || self.groups.len() > MAX_GROUPS
            || self.authority.len() > MAX_AUTHORITIES;
        if is_over {
            return Err(Malformed::Payload("a list of the roster is too long"));
        }
        let expected = (self.version.saturating_sub(1)).min(RECENT as u64);
        if self.version == 0 || self.recent.len() as u64 != expected {
            return Err(Malformed::Payload("it does not name the versions before"));
        }
        if self.groups.values().any(|group| group.rekeyed > self.version)
            || self.members.values().any(|member| member.since == 0 || member.since > self.version)
        {
            return Err(Malformed::Payload("it names a later version"));
        }
        let is_known = |member: &MemberRow| member.groups.iter().all(|group| self.groups.contains_key(group));
        if !self.members.values().all(is_known) {
            return Err(Malformed::Payload("a member belongs to a group that is not listed"));
        }
        if self.removed.keys().any(|writer| self.members.contains_key(writer)) {
            return Err(Malformed::Payload("a member is a former member, too"));
        }
        if self.authority.is_empty() {
            return Err(Malformed::Payload("it has no admins"));
        }
        for (index, authority) in self.authority.iter().enumerate() {
            let before = &self.authority[..index];
            authority.verify(&self.fleet, before)?;
            // The signatures of the last one may still be collected. The first one founds the fleet.
            let may_lack = index > 0 && index + 1 == self.authority.len();
            if !may_lack && !authority.is_appointed(&self.fleet, before.last()) {
                return Err(Malformed::Payload("the admins before have not appointed the admins"));
            }
        }
        Ok(())
    }
}

impl SignedRoster {
    /// Adds the signature of `key`.
    pub fn sign(&mut self, key: &SigningKey) {
        self.signed.sign(key);
    }

    /// Adds the signature of an admin: to the appointment of new admins while it lacks signatures, and then to the roster.
    /// The signatures of a roster whose appointment changes are gone, because they are of another roster.
    pub fn approve(mut self, key: &SigningKey) -> Result<Self, RosterError> {
        let signer = WriterId::of(&key.verifying_key());
        if !self.awaited().contains(&signer) {
            return Err(RosterError::NoAdmin);
        }
        if !self.roster.has_appointed_admins() {
            self.roster.sign_appointment(key);
            self = self.roster.draft()?;
        }
        if self.roster.has_appointed_admins() && self.roster.admins().keys.contains(&signer) {
            self.sign(key);
        }
        Ok(self)
    }

    /// The admins whose signatures are missing. There are none if enough admins have signed.
    pub fn awaited(&self) -> BTreeSet<WriterId> {
        let (admins, before) = self.roster.appointment();
        if !self.roster.has_appointed_admins() {
            return admins.awaited(before);
        }
        if self.is_approved() {
            return BTreeSet::new();
        }
        admins.admins.keys.difference(&self.signed.signers()).copied().collect()
    }

    /// Whether enough admins have signed.
    fn is_approved(&self) -> bool {
        self.roster.has_appointed_admins() && self.roster.admins().approve(&self.signed.signers())
    }

    /// Returns the block.
    pub fn to_block(&self) -> Bytes {
        self.signed.to_block()
    }

    /// Parses a block as a roster of `fleet`, and verifies its signatures. The roster and the appointment of its admins
    /// may have too few of them.
    pub fn open_draft(block: &Bytes, fleet: &str) -> Result<Self, Malformed> {
        let signed = SignedByMany::open(block)?;
        let payload: Payload<'_> = serde_ipld_dagcbor::from_slice(&signed.payload)
            .map_err(|_| Malformed::Payload("not the DAG-CBOR map of a roster"))?;
        if payload.v != VERSION {
            return Err(Malformed::Version(payload.v));
        }
        if payload.fleet != fleet {
            return Err(Malformed::Elsewhere);
        }
        let roster = payload.into_roster()?;
        roster.verify()?;
        // The digest identifies the roster, so there must be one form.
        if roster.payload() != signed.payload {
            return Err(Malformed::Payload("it is not canonical"));
        }
        let digest = Digest::of(&signed.payload);
        Ok(Self { roster, digest, signed })
    }

    /// Parses and verifies a block as a roster of `fleet` that enough of its admins have signed.
    pub fn open(block: &Bytes, fleet: &str) -> Result<Self, Malformed> {
        let it = Self::open_draft(block, fleet)?;
        if it.is_approved() { Ok(it) } else { Err(Malformed::Payload("too few admins have signed it")) }
    }

    /// The next version of the roster, with nothing changed. It names this one.
    pub fn next(&self) -> Roster {
        let mut next = self.roster.clone();
        next.version += 1;
        if next.recent.len() == RECENT {
            next.recent.remove(0);
        }
        next.recent.push(self.digest);
        next
    }

    /// The digest of an earlier version, if the roster names it.
    pub fn digest_of(&self, version: u64) -> Option<Digest> {
        let back = usize::try_from(self.roster.version.checked_sub(version)?).ok()?;
        if back == 0 {
            return Some(self.digest);
        }
        self.roster.recent.len().checked_sub(back).map(|index| self.roster.recent[index])
    }
}

#[derive(Serialize, Deserialize)]
struct Payload<'a> {
    v: u64,
    fleet: &'a str,
    groups: Vec<WireGroup>,
    recent: Vec<Digest>,
    expires: u64,
    #[serde(borrow)]
    members: Vec<WireMember<'a>>,
    #[serde(borrow)]
    removed: Vec<WireRemoved<'a>>,
    version: u64,
    #[serde(borrow)]
    authority: Vec<WireAuthority<'a>>,
}

/// `[name, rekeyed, history]`.
#[derive(Serialize, Deserialize)]
struct WireGroup(GroupName, u64, bool);

/// `[admins, threshold, [[key, signature] …]]`.
#[derive(Serialize, Deserialize)]
struct WireAuthority<'a>(
    Vec<WriterId>,
    u32,
    #[serde(borrow)] Vec<(WriterId, std::borrow::Cow<'a, serde_bytes::Bytes>)>,
);

#[derive(Serialize, Deserialize)]
struct WireMember<'a> {
    name: MemberLabel,
    peers: Vec<PeerName>,
    since: u64,
    groups: Vec<GroupName>,
    keeper: bool,
    writer: WriterId,
    #[serde(borrow)]
    sealing: &'a serde_bytes::Bytes,
    #[serde(borrow)]
    addresses: Vec<&'a str>,
}

/// `[writer, version, [[topic, incarnation, bundle] …]]`.
#[derive(Serialize, Deserialize)]
struct WireRemoved<'a>(WriterId, u64, #[serde(borrow)] Vec<(&'a str, Incarnation, Listed)>);

impl<'a> WireAuthority<'a> {
    fn of(it: &'a Authority) -> Self {
        let signature = |(key, bytes): (&WriterId, &'a [u8; 64])| {
            (*key, std::borrow::Cow::Borrowed(serde_bytes::Bytes::new(bytes)))
        };
        let signatures = it.signatures.iter().map(signature).collect();
        Self(it.admins.keys.iter().copied().collect(), it.admins.threshold, signatures)
    }
}

impl<'a> WireMember<'a> {
    fn of(writer: &WriterId, it: &'a MemberRow) -> Self {
        Self {
            name: it.label.clone(),
            peers: it.peers.iter().cloned().collect(),
            since: it.since,
            groups: it.groups.iter().cloned().collect(),
            keeper: it.is_keeper,
            writer: *writer,
            sealing: serde_bytes::Bytes::new(&it.sealing.0),
            addresses: it.addresses.iter().map(String::as_str).collect(),
        }
    }
}

impl<'a> WireRemoved<'a> {
    fn of(writer: &WriterId, it: &'a RemovedRow) -> Self {
        let cuts = it.cuts.iter().map(|((topic, incarnation), last)| (topic.as_str(), *incarnation, *last));
        Self(*writer, it.version, cuts.collect())
    }
}

impl Payload<'_> {
    fn into_roster(self) -> Result<Roster, Malformed> {
        let authority = |WireAuthority(keys, threshold, signatures): WireAuthority<'_>| {
            let signature = |(key, bytes): (WriterId, std::borrow::Cow<'_, serde_bytes::Bytes>)| {
                let bytes = bytes.as_ref().as_ref().try_into();
                Ok((key, bytes.map_err(|_| Malformed::Payload("a signature does not have 64 bytes"))?))
            };
            if signatures.len() > 2 * MAX_ADMINS {
                return Err(Malformed::Payload("an appointment has too many signatures"));
            }
            let signatures = signatures.into_iter().map(signature).collect::<Result<_, _>>()?;
            let admins = Admins { keys: keys.into_iter().collect(), threshold };
            Ok(Authority { admins, signatures })
        };
        let member = |it: WireMember<'_>| {
            let is_over = it.peers.len() > MAX_OF_MEMBER
                || it.addresses.len() > MAX_OF_MEMBER
                || it.groups.len() > MAX_OF_MEMBER
                || it.addresses.iter().any(|address| address.len() > MAX_ADDRESS);
            if is_over {
                return Err(Malformed::Payload("a list of a member is too long"));
            }
            let sealing = it.sealing.as_ref().try_into();
            let row = MemberRow {
                label: it.name,
                sealing: Recipient(sealing.map_err(|_| Malformed::Payload("a key does not have 32 bytes"))?),
                peers: it.peers.into_iter().collect(),
                addresses: it.addresses.into_iter().map(str::to_owned).collect(),
                groups: it.groups.into_iter().collect(),
                is_keeper: it.keeper,
                since: it.since,
            };
            Ok((it.writer, row))
        };
        let removed = |WireRemoved(writer, version, cuts): WireRemoved<'_>| {
            if cuts.len() > MAX_CUTS {
                return Err(Malformed::Payload("a former member has too many logs"));
            }
            let cut = |(topic, incarnation, last): (&str, Incarnation, Listed)| {
                let topic = topic.parse().map_err(|_| Malformed::Payload("a topic is invalid"))?;
                Ok(((topic, incarnation), last))
            };
            let cuts = cuts.into_iter().map(cut).collect::<Result<_, _>>()?;
            Ok((writer, RemovedRow { version, cuts }))
        };
        let group = |WireGroup(name, rekeyed, history): WireGroup| (name, Group { rekeyed, history });
        Ok(Roster {
            fleet: self.fleet.to_owned(),
            version: self.version,
            recent: self.recent,
            authority: self.authority.into_iter().map(authority).collect::<Result<_, _>>()?,
            expires: Timestamp(self.expires),
            groups: self.groups.into_iter().map(group).collect(),
            members: self.members.into_iter().map(member).collect::<Result<_, _>>()?,
            removed: self.removed.into_iter().map(removed).collect::<Result<_, _>>()?,
        })
    }
}
