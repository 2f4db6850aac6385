//! The admin of a fleet with a roster, for tests and benchmarks: it adds and removes hosts without the command line.

use std::collections::{BTreeMap, BTreeSet};

use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;
use dim_topics::bundle::Listed;
use dim_topics::identity::{Incarnation, WriterId};
use dim_topics::membership::roster::{Group, MemberRow, Roster, SignedRoster};
use ed25519_dalek::SigningKey;

use crate::TestHost;

/// The admin of a fleet.
#[derive(Debug)]
pub struct FleetAdmin {
    /// Its key.
    pub key: SigningKey,
    /// The newest roster.
    pub roster: SignedRoster,
}

/// The group of all members.
pub fn all_members() -> GroupName {
    "all".parse().expect("a name")
}

/// The public keys of a host, as `dim fleet join` prints them.
pub fn keys_of(host: &TestHost) -> String {
    dim_network::reliable_topics::keys_line(&host.host.storage.keys).expect("the keys of a host")
}

impl FleetAdmin {
    /// Founds a fleet without members.
    pub fn new(number: u8) -> Self {
        let key = SigningKey::from_bytes(&[number; 32]);
        let mut roster = Roster::first(&key, Timestamp(u64::MAX));
        roster.groups.insert(all_members(), Group { rekeyed: 1, history: false });
        let roster = signed(roster, &key);
        Self { key, roster }
    }

    /// The name of the fleet.
    pub fn fleet(&self) -> String {
        self.roster.roster.fleet.clone()
    }

    /// Replaces the first roster by one with members: each has its keys, a name, and perhaps is a keeper.
    pub fn with_members(mut self, members: &[(&str, &str, bool)]) -> Self {
        let mut roster = self.roster.roster.clone();
        roster.members = members.iter().map(|(line, name, keeper)| member(line, name, *keeper, 1)).collect();
        self.roster = signed(roster, &self.key);
        self
    }

    /// Changes the roster.
    pub fn change(&mut self, change: impl FnOnce(&mut Roster)) {
        let mut next = self.roster.next();
        change(&mut next);
        self.roster = signed(next, &self.key);
    }

    /// Adds a member. Its group gets new keys.
    pub fn add(&mut self, line: &str, name: &str) {
        self.change(|roster| {
            let version = roster.version;
            roster.members.extend([member(line, name, false, version)]);
            roster.groups.get_mut(&all_members()).expect("it is there").rekeyed = version;
        });
    }

    /// Removes a member whose logs end with `cuts`.
    pub fn remove(&mut self, member: &WriterId, cuts: BTreeMap<(Topic, Incarnation), Listed>) {
        self.change(|roster| roster.remove(member, cuts));
    }

    /// Gives the roster to a host. Returns the version that the host has then, or why it refuses the roster.
    pub async fn offer(&self, host: &TestHost) -> Result<u64, String> {
        let reliable = &host.host.exchange.links.reliable;
        reliable.offer_roster(self.roster.to_block()).await.expect("the host runs")
    }
}

fn signed(roster: Roster, key: &SigningKey) -> SignedRoster {
    let mut draft = roster.draft().expect("a small roster");
    draft.sign(key);
    draft
}

fn member(line: &str, label: &str, is_keeper: bool, since: u64) -> (WriterId, MemberRow) {
    let (writer, sealing) = line.split_once(':').expect("a line with two keys");
    let row = MemberRow {
        label: label.parse().expect("a name"),
        sealing: sealing.parse().expect("an X25519 key"),
        peers: BTreeSet::new(),
        addresses: Vec::new(),
        groups: [all_members()].into(),
        is_keeper,
        since,
    };
    (WriterId::of_name(&writer.parse().expect("an IPNS name")).expect("an Ed25519 key"), row)
}
