//! Owns the head: what a writer states about its own logs, and the position up to which it has received the logs of
//! others. This file has the wire format of heads; it receives statements and a key, or untrusted bytes, and returns
//! blocks or verified heads.
//!
//! The payload of the block is a DAG-CBOR map:
//!
//! | key | value |
//! |---|---|
//! | `v` | 1 |
//! | `fleet` | a text |
//! | `writer`, `incarnation`, `began` | as in a bundle |
//! | `number` | the number of the head in its incarnation, from 1 |
//! | `time` | the hybrid time |
//! | `hello` | whether the writer asks all others for their heads |
//! | `peer`, `addresses` | null or the peer id of the daemon, and its multiaddresses |
//! | `topics` | a map for each own log: `topic`; `incarnation` and `next`: the newest incarnation with events and the sequence after its last event; `kept`: the time of the earliest event that is kept; `recent`: the last bundles; `earlier`: `[incarnation, next]` of at most 32 incarnations before, newest first; `index`: null, or the digest of the root of the index |
//! | `received` | `[topic, writer, incarnation, next, from]`: events before `next` are durable at the sender of the head, and none from `from` on is missing |
//! | `alarms` | `[topic, writer]`: writers of whose identity the sender has an alarm |
//! | `wants` | `[writer, digest]`: blocks that the sender cannot fetch and asks the writer to send again |
//! | `roster` | in a fleet with a roster: `[version, digest of the payload, digest of the block]` of the newest roster that the sender has |
//! | `keys` | key grants of the sender: `[group, digest, receiver]`; the receiver is null if it is for the whole group |
//! | `needs` | `[group, epoch]`: key epochs that the sender lacks; null if it has none with which it may write |
//!
//! A head without `roster`, `keys` or `needs` has none of them.

use bytes::Bytes;
use dim_model::ident::{GroupName, PeerName, Topic};
use dim_model::time::Timestamp;
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::block::{self, Unverified};
use crate::bundle::{Listed, MAX_MESSAGE, VERSION, check_recent};
use crate::identity::{Digest, Incarnation, WriterId};
use crate::malformed::Malformed;
use crate::membership::exchange::{Announced, MAX_GRANTS, MAX_NEEDS, Need};

/// The maximum number of own logs in a head. A writer with more of them takes turns.
pub const MAX_TOPICS: usize = 32;

/// The maximum number of received positions in a head. A member that has more of them takes turns.
pub const MAX_RECEIVED: usize = 256;

/// The maximum number of wanted blocks in a head.
pub const MAX_WANTS: usize = 64;

/// The maximum number of alarms in a head.
pub const MAX_ALARMS: usize = 32;

/// The maximum number of addresses in a head.
pub const MAX_ADDRESSES: usize = 16;

/// The maximum number of earlier incarnations of an own log in a head.
pub const MAX_EARLIER: usize = 32;

/// The maximum length of an address, in bytes.
const MAX_ADDRESS: usize = 256;

/// The maximum size of the alarms in a head that this member sends, in bytes.
const ALARM_BYTES: usize = 6 << 10;

/// The maximum size of the own logs in a head that this member sends, in bytes.
const LOG_BYTES: usize = 18 << 10;

/// The maximum size of the received positions in a head that this member sends, in bytes.
const POSITION_BYTES: usize = 16 << 10;

/// Returns a function that says whether so many bytes fit beside the ones before.
fn room_of(mut room: usize) -> impl FnMut(usize) -> bool {
    move |bytes| {
        let fits = room >= bytes;
        room = room.saturating_sub(bytes);
        fits
    }
}

/// What a writer states about its own log of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// The topic.
    pub topic: Topic,
    /// The newest incarnation with events.
    pub incarnation: Incarnation,
    /// The sequence after its last event.
    pub next: u64,
    /// The hybrid time of the earliest bundle that the writer keeps.
    pub kept: Timestamp,
    /// The last bundles of the incarnation, at most 8, in order.
    pub recent: Vec<Listed>,
    /// The incarnations before, newest first, each with the sequence after its last event. At most 32.
    pub earlier: Vec<(Incarnation, u64)>,
    /// The root of the index of the bundles that the writer keeps. The last ones may be missing in it.
    pub index: Option<Digest>,
}

/// The position up to which a member has received an incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The topic.
    pub topic: Topic,
    /// The writer.
    pub writer: WriterId,
    /// The incarnation.
    pub incarnation: Incarnation,
    /// The sequence after the last event that is durable at the member.
    pub next: u64,
    /// The sequence from which on none is missing there: that of its first event, or that after its last gap.
    pub from: u64,
}

/// A place at which a daemon can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The peer id of the daemon.
    pub peer: Option<PeerName>,
    /// Its multiaddresses.
    pub addresses: Vec<String>,
}

/// What a head states about the newest roster of its writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RosterHead {
    /// The version.
    pub version: u64,
    /// The digest of the payload, which identifies the roster.
    pub digest: Digest,
    /// The digest of the block.
    pub block: Digest,
}

/// A head with a verified signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The writer.
    pub writer: WriterId,
    /// The process start of the writer.
    pub incarnation: Incarnation,
    /// The hybrid time of the process start.
    pub began: Timestamp,
    /// The number of the head in its incarnation, from 1.
    pub number: u64,
    /// The hybrid time.
    pub time: Timestamp,
    /// Whether the writer asks all others for their heads.
    pub hello: bool,
    /// The daemon of the writer.
    pub place: Place,
    /// The own logs.
    pub topics: Vec<LogHead>,
    /// The received positions.
    pub received: Vec<Received>,
    /// The wanted blocks of other writers.
    pub wants: Vec<(WriterId, Digest)>,
    /// The topics and writers about whose identity the writer of the head has an alarm.
    pub alarms: Vec<(Topic, WriterId)>,
    /// The newest roster.
    pub roster: Option<RosterHead>,
    /// The newest key grants of the writer, at most 16.
    pub grants: Vec<Announced>,
    /// The key epochs that the writer lacks, at most 16.
    pub needs: Vec<Need>,
}

#[derive(Serialize, Deserialize)]
struct Payload<'a> {
    v: u64,
    #[serde(default, borrow, skip_serializing_if = "Vec::is_empty")]
    keys: Vec<WireGrant<'a>>,
    peer: Option<&'a str>,
    time: u64,
    began: u64,
    fleet: &'a str,
    hello: bool,
    #[serde(default, borrow, skip_serializing_if = "Vec::is_empty")]
    needs: Vec<WireNeed<'a>>,
    wants: Vec<(WriterId, Digest)>,
    number: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    roster: Option<WireRoster>,
    #[serde(borrow)]
    topics: Vec<WireLog<'a>>,
    #[serde(borrow)]
    alarms: Vec<(&'a str, WriterId)>,
    writer: WriterId,
    #[serde(borrow)]
    received: Vec<WireReceived<'a>>,
    addresses: Vec<&'a str>,
    incarnation: Incarnation,
}

#[derive(Serialize, Deserialize)]
struct WireLog<'a> {
    kept: u64,
    next: u64,
    index: Option<Digest>,
    topic: &'a str,
    recent: Vec<Listed>,
    earlier: Vec<(Incarnation, u64)>,
    incarnation: Incarnation,
}

/// `[version, digest of the payload, digest of the block]`.
#[derive(Serialize, Deserialize)]
struct WireRoster(u64, Digest, Digest);

/// `[group, digest, receiver]`.
#[derive(Serialize, Deserialize)]
struct WireGrant<'a>(&'a str, Digest, Option<WriterId>);

/// `[group, epoch]`.
#[derive(Serialize, Deserialize)]
struct WireNeed<'a>(&'a str, #[serde(borrow)] Option<&'a serde_bytes::Bytes>);

/// `[topic, writer, incarnation, next, from]`.
#[derive(Serialize, Deserialize)]
struct WireReceived<'a>(&'a str, WriterId, Incarnation, u64, u64);

impl Head {
    /// Signs a head. Statements that do not fit into one message are left out, from the end; the result says how many
    /// logs and received positions it holds.
    pub fn sign(&self, fleet: &str, key: &SigningKey) -> SignedHead {
        let wants: Vec<_> = self.wants.iter().take(MAX_WANTS).copied().collect();
        let mut fits = room_of(ALARM_BYTES);
        let alarms: Vec<_> = self
            .alarms
            .iter()
            .take(MAX_ALARMS)
            .map(|(topic, writer)| (topic.as_str(), *writer))
            .take_while(|(topic, _)| fits(topic.len() + 40))
            .collect();
        let addresses = self.place.addresses.iter().map(String::as_str);
        let addresses: Vec<_> =
            addresses.filter(|address| address.len() <= MAX_ADDRESS).take(MAX_ADDRESSES).collect();
        let mut fits = room_of(LOG_BYTES);
        let topics: Vec<_> = self
            .topics
            .iter()
            .take(MAX_TOPICS)
            .take_while(|it| {
                fits(it.topic.as_str().len() + 140 + it.recent.len() * 60 + it.earlier.len() * 27)
            })
            .map(|it| WireLog {
                kept: it.kept.0,
                next: it.next,
                index: it.index,
                topic: it.topic.as_str(),
                recent: it.recent.clone(),
                earlier: it.earlier.clone(),
                incarnation: it.incarnation,
            })
            .collect();
        let mut fits = room_of(POSITION_BYTES);
        let received: Vec<_> = self
            .received
            .iter()
            .take(MAX_RECEIVED)
            .take_while(|it| fits(it.topic.as_str().len() + 77))
            .map(|it| WireReceived(it.topic.as_str(), it.writer, it.incarnation, it.next, it.from))
            .collect();
        let (logs, positions) = (topics.len(), received.len());
        let grants = self.grants.iter().take(MAX_GRANTS);
        let needs =
            self.needs.iter().take(MAX_NEEDS).map(|(group, id)| {
                WireNeed(group.as_str(), id.as_ref().map(|id| serde_bytes::Bytes::new(id)))
            });
        let payload = Payload {
            v: VERSION,
            keys: grants.map(|it| WireGrant(it.group.as_str(), it.digest, it.receiver)).collect(),
            needs: needs.collect(),
            roster: self.roster.as_ref().map(|it| WireRoster(it.version, it.digest, it.block)),
            peer: self.place.peer.as_ref().map(PeerName::as_str),
            time: self.time.0,
            began: self.began.0,
            fleet,
            hello: self.hello,
            wants,
            number: self.number,
            topics,
            alarms,
            writer: self.writer,
            received,
            addresses,
            incarnation: self.incarnation,
        };
        let payload = serde_ipld_dagcbor::to_vec(&payload).expect("a map of plain fields");
        SignedHead { block: block::seal(&payload, key), logs, positions }
    }

    /// Parses and verifies a block as a head of `fleet`.
    pub fn open(block: &[u8], fleet: &str) -> Result<Self, Malformed> {
        if block.len() > MAX_MESSAGE {
            return Err(Malformed::TooLarge { bytes: block.len(), limit: MAX_MESSAGE });
        }
        let envelope = Unverified::parse(block)?;
        let payload: Payload<'_> = serde_ipld_dagcbor::from_slice(envelope.payload)
            .map_err(|_| Malformed::Payload("not the DAG-CBOR map of a head"))?;
        if payload.v != VERSION {
            return Err(Malformed::Version(payload.v));
        }
        if payload.fleet != fleet {
            return Err(Malformed::Elsewhere);
        }
        let is_over = payload.topics.len() > MAX_TOPICS
            || payload.received.len() > MAX_RECEIVED
            || payload.wants.len() > MAX_WANTS
            || payload.alarms.len() > MAX_ALARMS
            || payload.addresses.len() > MAX_ADDRESSES
            || payload.keys.len() > MAX_GRANTS
            || payload.needs.len() > MAX_NEEDS
            || payload.addresses.iter().any(|address| address.len() > MAX_ADDRESS);
        if is_over {
            return Err(Malformed::Payload("a list of the head is too long"));
        }
        envelope.verify(&payload.writer)?;
        payload.into_head()
    }
}

/// A signed head.
#[derive(Clone, Debug)]
pub struct SignedHead {
    /// The block.
    pub block: Bytes,
    /// The number of own logs in it.
    pub logs: usize,
    /// The number of received positions in it.
    pub positions: usize,
}

impl Payload<'_> {
    fn into_head(self) -> Result<Head, Malformed> {
        let topic = |text: &str| text.parse::<Topic>().map_err(|_| Malformed::Payload("a topic is invalid"));
        let log = |it: WireLog<'_>| {
            let WireLog { kept, next, index, topic: name, recent, earlier, incarnation } = it;
            check_recent(&recent, next, Timestamp(u64::MAX))?;
            if earlier.len() > MAX_EARLIER {
                return Err(Malformed::Payload("it lists too many earlier incarnations"));
            }
            let (topic, kept) = (topic(name)?, Timestamp(kept));
            Ok(LogHead { topic, incarnation, next, kept, recent, earlier, index })
        };
        let position = |WireReceived(name, writer, incarnation, next, from): WireReceived<'_>| {
            Ok(Received { topic: topic(name)?, writer, incarnation, next, from })
        };
        let peer = self.peer.map(str::parse).transpose();
        let alarm = |(name, writer): (&str, WriterId)| Ok((topic(name)?, writer));
        let group =
            |text: &str| text.parse::<GroupName>().map_err(|_| Malformed::Payload("a group is invalid"));
        let grant = |WireGrant(name, digest, receiver): WireGrant<'_>| {
            Ok(Announced { group: group(name)?, digest, receiver })
        };
        let need = |WireNeed(name, id): WireNeed<'_>| {
            let id = id.map(|id| id.as_ref().try_into()).transpose();
            let id = id.map_err(|_| Malformed::Payload("the identity of an epoch does not have 16 bytes"))?;
            Ok((group(name)?, id))
        };
        Ok(Head {
            writer: self.writer,
            incarnation: self.incarnation,
            began: Timestamp(self.began),
            number: self.number,
            time: Timestamp(self.time),
            hello: self.hello,
            place: Place {
                peer: peer.map_err(|_| Malformed::Payload("the peer id is invalid"))?,
                addresses: self.addresses.into_iter().map(str::to_owned).collect(),
            },
            topics: self.topics.into_iter().map(log).collect::<Result<_, _>>()?,
            received: self.received.into_iter().map(position).collect::<Result<_, _>>()?,
            wants: self.wants,
            alarms: self.alarms.into_iter().map(alarm).collect::<Result<_, _>>()?,
            roster: self.roster.map(|WireRoster(version, digest, block)| RosterHead {
                version,
                digest,
                block,
            }),
            grants: self.keys.into_iter().map(grant).collect::<Result<_, _>>()?,
            needs: self.needs.into_iter().map(need).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLEET: &str = "fleet";

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[3; 32])
    }

    fn listed(first: u64) -> Listed {
        Listed { first, count: 1, time: Timestamp(first), digest: Digest([9; 32]) }
    }

    fn head(topics: usize, received: usize, name: &str) -> Head {
        let topic = |it: usize| format!("{name}{it}").parse::<Topic>().unwrap();
        let writer = WriterId::of(&key().verifying_key());
        let incarnation = Incarnation([1; 16]);
        Head {
            writer,
            incarnation,
            began: Timestamp(5),
            number: 7,
            time: Timestamp(9),
            hello: true,
            place: Place { peer: None, addresses: vec!["/ip4/127.0.0.1/tcp/4001".to_owned()] },
            topics: (0..topics)
                .map(|it| LogHead {
                    topic: topic(it),
                    incarnation,
                    next: 20,
                    kept: Timestamp(1),
                    recent: (12..20).map(listed).collect(),
                    earlier: (0..8).map(|it| (Incarnation([it; 16]), u64::MAX)).collect(),
                    index: Some(Digest([7; 32])),
                })
                .collect(),
            received: (0..received)
                .map(|it| Received { topic: topic(it), writer, incarnation, next: u64::MAX, from: u64::MAX })
                .collect(),
            wants: vec![(writer, Digest([8; 32]))],
            alarms: (0..received.min(MAX_ALARMS)).map(|it| (topic(it), writer)).collect(),
            roster: Some(RosterHead { version: 3, digest: Digest([1; 32]), block: Digest([2; 32]) }),
            grants: [None, Some(writer)]
                .map(|receiver| Announced {
                    group: "jobs".parse().unwrap(),
                    digest: Digest([3; 32]),
                    receiver,
                })
                .to_vec(),
            needs: [None, Some([5; 16])].map(|id| ("jobs".parse().unwrap(), id)).to_vec(),
        }
    }

    #[test]
    fn a_head_comes_back_as_it_was_signed() {
        let head = head(2, 3, "jobs");
        let signed = head.sign(FLEET, &key());
        assert_eq!((signed.logs, signed.positions), (2, 3));
        assert_eq!(Head::open(&signed.block, FLEET).unwrap(), head);
        assert_eq!(Head::open(&signed.block, "other"), Err(Malformed::Elsewhere));
        let other = SigningKey::from_bytes(&[4; 32]);
        assert_eq!(Head::open(&head.sign(FLEET, &other).block, FLEET), Err(Malformed::Signature));
    }

    #[test]
    fn a_head_fits_into_a_message_however_much_there_is_to_state() {
        for name in ["jobs".to_owned(), "x".repeat(500)] {
            let mut head = head(1_000, 1_000, &name);
            head.wants = vec![head.wants[0]; 1_000];
            head.grants =
                vec![Announced { group: "g".repeat(64).parse().unwrap(), ..head.grants[1].clone() }; 1_000];
            head.needs = vec![("g".repeat(64).parse().unwrap(), Some([5; 16])); 1_000];
            head.place.addresses = vec!["x".repeat(MAX_ADDRESS); 1_000];
            let signed = head.sign(FLEET, &key());
            assert!(signed.block.len() <= MAX_MESSAGE, "{}", signed.block.len());
            assert!(signed.logs > 10 && signed.positions > 10, "{} {}", signed.logs, signed.positions);
            Head::open(&signed.block, FLEET).unwrap();
        }
    }

    #[test]
    fn a_log_whose_numbers_do_not_fit_together_is_refused() {
        let mut head = head(1, 0, "jobs");
        head.topics[0].next = 21;
        assert!(matches!(Head::open(&head.sign(FLEET, &key()).block, FLEET), Err(Malformed::Payload(_))));
    }
}
