//! Fuzzes rosters and key grants, and the member that receives them.
//!
//! The parts are separated by `\n--\n`. The first byte of each says what it is: `r` and `g` a block of a roster or of a key
//! grant, `R` and `G` a payload that the admin or a keeper has signed.

use bytes::Bytes;
use dim_age::x25519::Identity;
use dim_model::ident::GroupName;
use dim_model::time::Timestamp;
use dim_topics::action::Action;
use dim_topics::block::{self, SignedByMany};
use dim_topics::identity::{Incarnation, WriterId};
use dim_topics::member::{Member, Setup};
use dim_topics::membership::encryption::Secret;
use dim_topics::membership::exchange::{Exchange, RandomSource};
use dim_topics::membership::key_grant::{Epoch, EpochId, Granted, KeyGrant};
use dim_topics::membership::roster::{Group, MAX_ADMINS, MemberRow, Roster, SignedRoster};
use dim_topics::membership::{MAX_KEPT, Membership};
use dim_topics::own_log::Author;
use ed25519_dalek::SigningKey;

use crate::bundles::now;
use crate::{APART, parts};

fn key(number: u8) -> SigningKey {
    SigningKey::from_bytes(&[number; 32])
}

fn id(number: u8) -> WriterId {
    WriterId::of(&key(number).verifying_key())
}

/// The key for which secrets are encrypted. X25519 ignores some bits of the first byte.
fn identity(number: u8) -> Identity {
    Identity::new(&[number << 3; 32])
}

/// The admin, the keeper and another member.
const ADMIN: u8 = 5;
const KEEPER: u8 = 1;
const MEMBER: u8 = 2;

fn group() -> GroupName {
    "all".parse().expect("a name")
}

fn fleet() -> String {
    id(ADMIN).name().to_string()
}

fn signed(roster: Roster) -> SignedRoster {
    let mut draft = roster.draft().expect("a small roster");
    draft.sign(&key(ADMIN));
    draft
}

fn first() -> SignedRoster {
    let mut roster = Roster::first(&key(ADMIN), Timestamp(u64::MAX));
    roster.groups.insert(group(), Group { rekeyed: 1, history: false });
    let row = |number: u8| MemberRow {
        label: format!("m{number}").parse().expect("a label"),
        sealing: identity(number).recipient(),
        peers: Default::default(),
        addresses: vec!["/ip4/127.0.0.1/tcp/4001".to_owned()],
        groups: [group()].into(),
        is_keeper: number == KEEPER,
        since: 1,
    };
    roster.members = [KEEPER, MEMBER].map(|number| (id(number), row(number))).into();
    signed(roster)
}

/// A member that has no roster yet.
fn member() -> Member {
    let author = Author {
        fleet: fleet(),
        key: key(MEMBER),
        incarnation: Incarnation([1; 16]),
        began: Timestamp(1_700_000_000_000_000_000),
    };
    let membership = Membership::new(fleet(), id(MEMBER), identity(MEMBER), None);
    let random = RandomSource::new(|bytes| bytes.fill(7));
    let exchange = Some(Exchange::new(membership, author.key.clone(), random));
    let setup = Setup {
        author,
        past: Default::default(),
        logs: Default::default(),
        topics: Default::default(),
        checkpoints: Vec::new(),
        alarmed: Default::default(),
        seed: 1,
        exchange,
    };
    Member::new(setup, now(0))
}

/// Gives the rosters and key grants to a member.
pub fn run(data: &[u8]) {
    let mut member = member();
    let (mut newest, mut authorities) = (0, 0);
    for (number, part) in parts(data).into_iter().enumerate() {
        let Some((kind, part)) = part.split_first() else { continue };
        let at = now(number as u64);
        let bytes = Bytes::copy_from_slice(part);
        let by_admin = |payload| {
            let mut block = SignedByMany::new(payload);
            block.sign(&key(ADMIN));
            block.to_block()
        };
        // What is wrong is refused with a reason.
        match kind {
            b'r' => drop(member.take_roster(&bytes, at)),
            b'R' => drop(member.take_roster(&by_admin(bytes), at)),
            b'g' => drop(member.take_grant(&bytes, at)),
            b'G' => drop(member.take_grant(&block::seal(part, &key(KEEPER)), at)),
            _ => continue,
        }
        for action in member.take_actions() {
            if let Action::StoreEpochs { number, .. } = action {
                member.epochs_stored(number, at);
            }
        }
        let membership = member.membership().expect("a fleet with a roster");
        let Some(roster) = membership.roster() else { continue };
        let version = roster.roster.version;
        assert!(version >= newest, "the roster goes back from {newest} to {version}");
        assert!(roster.roster.authority.len() >= authorities, "an appointment of admins is gone");
        (newest, authorities) = (version, roster.roster.authority.len());
        assert!(roster.roster.admins().keys.len() <= MAX_ADMINS && roster.awaited().is_empty());
        assert!(roster.roster.authority[0].admins.keys.contains(&id(ADMIN)), "another key founds the fleet");
        assert_eq!(SignedRoster::open(&roster.to_block(), &fleet()).as_ref(), Ok(roster));
        assert!(membership.epochs(&group()).count() <= MAX_KEPT);
    }
    member.wake(now(1_000));
}

/// Returns rosters of a fleet, and the keys that its keeper grants.
pub fn seeds() -> Vec<Vec<u8>> {
    let first = first();
    let mut second = first.next();
    second.groups.entry(group()).or_default().rekeyed = 2;
    let second = signed(second);
    let epoch = Epoch {
        id: EpochId { number: 1, id: [3; 16] },
        roster: 2,
        time: Timestamp(1_700_000_000_000_000_000),
        secret: Secret::new([4; 32]),
    };
    let (group, epochs) = (group(), [epoch]);
    let granted = Granted { group: &group, roster: 2, epochs: &epochs, receiver: None, refused: &[[9; 16]] };
    let receivers = [identity(MEMBER).recipient()];
    let mut random = |bytes: &mut [u8]| bytes.fill(6);
    let grant = KeyGrant::seal(&fleet(), granted, &receivers, &key(KEEPER), &mut random);
    let payload = |roster: &SignedRoster| {
        let block = SignedByMany::open(&roster.to_block()).expect("a block");
        [b"R", &block.payload[..]].concat()
    };
    let grant_payload = block::Unverified::parse(&grant).expect("a block").payload.to_vec();
    let blocks = [
        [b"r", &first.to_block()[..]].concat(),
        [b"r", &second.to_block()[..]].concat(),
        [b"g", &grant[..]].concat(),
    ];
    let payloads = [payload(&first), payload(&second), [b"G", &grant_payload[..]].concat()];
    vec![blocks.join(APART), payloads.join(APART)]
}
