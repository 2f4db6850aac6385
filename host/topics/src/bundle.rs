//! Owns the bundle: consecutive events of one incarnation and topic, compressed and signed. It is one pubsub message
//! and one block. This file has the wire format of bundles; it receives events and a key, or untrusted bytes, and
//! returns blocks or verified bundles.
//!
//! The payload of the block is a DAG-CBOR map:
//!
//! | key | value |
//! |---|---|
//! | `v` | 1 |
//! | `fleet`, `topic` | texts |
//! | `writer` | the Ed25519 public key, 32 bytes |
//! | `incarnation` | 16 bytes |
//! | `began` | the hybrid time of the process start, in nanoseconds since 1970 |
//! | `first`, `count` | the sequence of the first event, and the number of events |
//! | `time` | the hybrid time of the first event |
//! | `recent` | the bundles before this one in the incarnation, at most 8: `[first, count, time, digest]` |
//! | `start` | in the first bundle: null, or `[incarnation, next, recent]` of the incarnation before |
//! | `epoch`, `nonce` | null; on encrypted topics the 16 bytes of the identity of the key epoch, and 24 random bytes |
//! | `body` | a zstd frame of the events; on encrypted topics this frame, encrypted with XChaCha20-Poly1305 |
//!
//! The events are a DAG-CBOR list of `[nanoseconds after time, data]`. The associated data of the encryption is the
//! payload without `nonce` and `body`.

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::block::{self, Unverified};
use crate::compression;
use crate::identity::{Digest, Incarnation, WriterId};
use crate::index::BundlePlace;
use crate::malformed::Malformed;
use crate::membership::encryption::{Nonce, Secret, TextKey};

/// The version of the payloads of bundles and heads.
pub const VERSION: u64 = 1;

/// The maximum size of a block that is a pubsub message, in bytes. Larger blocks are only announced in heads.
pub const MAX_MESSAGE: usize = 56 << 10;

/// The maximum size of an event, in bytes.
pub const MAX_EVENT: usize = 1 << 20;

/// The maximum number of events in a bundle.
pub const MAX_EVENTS: u32 = 4_096;

/// The maximum size of the events of a bundle before compression, in bytes.
pub const MAX_RAW: usize = 4 << 20;

/// The number of earlier bundles that a bundle lists.
pub const RECENT: usize = 8;

/// The size before compression at which a bundle is full, in bytes. Heartbeats of this size are compressed to about
/// [`MAX_MESSAGE`].
const FULL: usize = 320 << 10;

/// The place of a bundle in its incarnation, and its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WireListed", into = "WireListed")]
pub struct Listed {
    /// The sequence of its first event.
    pub first: u64,
    /// The number of its events.
    pub count: u32,
    /// The hybrid time of its first event.
    pub time: Timestamp,
    /// The digest of its block.
    pub digest: Digest,
}

/// `[first, count, time, digest]`.
#[derive(Serialize, Deserialize)]
struct WireListed(u64, u32, u64, Digest);

impl From<WireListed> for Listed {
    fn from(WireListed(first, count, time, digest): WireListed) -> Self {
        Self { first, count, time: Timestamp(time), digest }
    }
}

impl From<Listed> for WireListed {
    fn from(it: Listed) -> Self {
        Self(it.first, it.count, it.time.0, it.digest)
    }
}

impl Listed {
    /// The sequence after its last event. It saturates.
    pub fn next(&self) -> u64 {
        self.first.saturating_add(u64::from(self.count))
    }
}

/// The end of the incarnation before, as the writer knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WireStart", into = "WireStart")]
pub struct Start {
    /// The incarnation before.
    pub previous: Incarnation,
    /// The sequence after its last event.
    pub next: u64,
    /// Its last bundles, at most 8, in order.
    pub recent: Vec<Listed>,
}

/// `[incarnation, next, recent]`.
#[derive(Serialize, Deserialize)]
struct WireStart(Incarnation, u64, Vec<Listed>);

impl From<WireStart> for Start {
    fn from(WireStart(previous, next, recent): WireStart) -> Self {
        Self { previous, next, recent }
    }
}

impl From<Start> for WireStart {
    fn from(it: Start) -> Self {
        Self(it.previous, it.next, it.recent)
    }
}

/// An event of a reliable topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its hybrid time.
    pub time: Timestamp,
    /// The bytes that were published.
    pub data: Bytes,
}

/// The encryption of a bundle.
#[derive(Clone, Debug)]
pub struct Sealing {
    /// The 16 bytes of the identity of the key epoch.
    pub epoch: [u8; 16],
    /// The secret of the epoch.
    pub secret: Secret,
    /// A random nonce, for this bundle alone.
    pub nonce: Nonce,
}

/// The parts of a bundle that are not events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The topic.
    pub topic: Topic,
    /// The writer.
    pub writer: WriterId,
    /// The process start of the writer.
    pub incarnation: Incarnation,
    /// The hybrid time of the process start.
    pub began: Timestamp,
    /// The sequence of the first event.
    pub first: u64,
    /// The bundles before this one in the incarnation, at most 8, in order.
    pub recent: Vec<Listed>,
    /// In the first bundle of an incarnation: the incarnation before, if there was one.
    pub start: Option<Start>,
}

/// A bundle with a verified signature. Its events may still be unreadable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// The parts that are not events.
    pub header: Header,
    /// The number of events.
    pub count: u32,
    /// The hybrid time of the first event.
    pub time: Timestamp,
    /// The digest of the block.
    pub digest: Digest,
    /// The block.
    pub block: Bytes,
    /// On encrypted topics: the identity of the key epoch, and the nonce.
    encrypted: Option<([u8; 16], Nonce)>,
    /// The compressed and perhaps encrypted events.
    body: Bytes,
}

#[derive(Serialize, Deserialize)]
struct Payload<'a> {
    v: u64,
    #[serde(borrow)]
    body: &'a serde_bytes::Bytes,
    time: u64,
    began: u64,
    count: u32,
    epoch: Option<&'a serde_bytes::Bytes>,
    first: u64,
    fleet: &'a str,
    nonce: Option<&'a serde_bytes::Bytes>,
    start: Option<Start>,
    topic: &'a str,
    recent: Vec<Listed>,
    writer: WriterId,
    incarnation: Incarnation,
}

/// The payload without `nonce` and `body`: the associated data of the encryption.
#[derive(Serialize)]
struct Associated<'a> {
    v: u64,
    time: u64,
    began: u64,
    count: u32,
    epoch: &'a serde_bytes::Bytes,
    first: u64,
    fleet: &'a str,
    start: &'a Option<Start>,
    topic: &'a str,
    recent: &'a [Listed],
    writer: WriterId,
    incarnation: Incarnation,
}

/// `[nanoseconds after the bundle's time, data]`.
#[derive(Serialize, Deserialize)]
struct WireEvent<'a>(u64, #[serde(borrow)] &'a serde_bytes::Bytes);

impl Bundle {
    /// Makes a bundle of as many of `events` as fit into one message, at least one, encrypts them if there is a `sealing`,
    /// and signs it. The times of the events must not decrease.
    ///
    /// # Panics
    /// There is no event, or the first one has more than [`MAX_EVENT`] bytes.
    pub fn form(
        fleet: &str,
        header: Header,
        events: &[Event],
        key: &SigningKey,
        sealing: Option<&Sealing>,
    ) -> Self {
        let fits = |event: &Event| event.data.len() <= MAX_EVENT;
        assert!(events.first().is_some_and(fits), "a bundle has an event within the limit");
        let mut raw = 0;
        let full = events.iter().take(MAX_EVENTS as usize).take_while(|event| {
            let is_first = raw == 0;
            raw += event.data.len() + 12;
            is_first || raw <= FULL
        });
        let mut count = full.count();
        loop {
            let bundle = Self::of(fleet, header.clone(), &events[..count], key, sealing);
            if count == 1 || bundle.block.len() <= MAX_MESSAGE {
                return bundle;
            }
            // A little less than the share that would fit, because a shorter text is compressed less.
            count = (count * MAX_MESSAGE / bundle.block.len() * 15 / 16).clamp(1, count - 1);
        }
    }

    fn of(
        fleet: &str,
        header: Header,
        events: &[Event],
        key: &SigningKey,
        sealing: Option<&Sealing>,
    ) -> Self {
        let time = events[0].time;
        let wire: Vec<WireEvent<'_>> = events
            .iter()
            .map(|it| WireEvent(it.time.0.saturating_sub(time.0), serde_bytes::Bytes::new(&it.data)))
            .collect();
        let raw = serde_ipld_dagcbor::to_vec(&wire).expect("numbers and byte strings");
        let mut body = compression::compress(&raw);
        let count = u32::try_from(events.len()).expect("at most MAX_EVENTS");
        if let Some(Sealing { epoch, secret, nonce }) = sealing {
            let associated = header.associated(fleet, count, time, epoch);
            body = header.text_key(fleet, secret).encrypt(nonce, &associated, &body);
        }
        let payload = Payload {
            v: VERSION,
            body: serde_bytes::Bytes::new(&body),
            time: time.0,
            began: header.began.0,
            count,
            epoch: sealing.map(|it| serde_bytes::Bytes::new(&it.epoch)),
            first: header.first,
            fleet,
            nonce: sealing.map(|it| serde_bytes::Bytes::new(&it.nonce)),
            start: header.start.clone(),
            topic: header.topic.as_str(),
            recent: header.recent.clone(),
            writer: header.writer,
            incarnation: header.incarnation,
        };
        let payload = serde_ipld_dagcbor::to_vec(&payload).expect("a map of plain fields");
        let block = block::seal(&payload, key);
        let encrypted = sealing.map(|it| (it.epoch, it.nonce));
        Self { header, count, time, digest: Digest::of(&block), block, encrypted, body: body.into() }
    }

    /// Parses and verifies a block as a bundle of `fleet`.
    pub fn open(block: Bytes, fleet: &str) -> Result<Self, Malformed> {
        Self::open_where(block, |of| of == fleet)
    }

    /// Parses and verifies a block as a bundle of any fleet.
    pub fn open_of_any_fleet(block: Bytes) -> Result<Self, Malformed> {
        Self::open_where(block, |_| true)
    }

    fn open_where(block: Bytes, is_expected: impl FnOnce(&str) -> bool) -> Result<Self, Malformed> {
        let envelope = Unverified::parse(&block)?;
        let payload: Payload<'_> = serde_ipld_dagcbor::from_slice(envelope.payload)
            .map_err(|_| Malformed::Payload("not the DAG-CBOR map of a bundle"))?;
        if payload.v != VERSION {
            return Err(Malformed::Version(payload.v));
        }
        if !is_expected(payload.fleet) {
            return Err(Malformed::Elsewhere);
        }
        let encrypted = payload.check()?;
        envelope.verify(&payload.writer)?;
        let topic = payload.topic.parse().map_err(|_| Malformed::Payload("the topic is invalid"))?;
        let header = Header {
            topic,
            writer: payload.writer,
            incarnation: payload.incarnation,
            began: Timestamp(payload.began),
            first: payload.first,
            recent: payload.recent,
            start: payload.start,
        };
        let body = block.slice_ref(payload.body);
        let (count, time) = (payload.count, Timestamp(payload.time));
        Ok(Self { header, count, time, digest: Digest::of(&block), encrypted, body, block })
    }

    /// The place of the bundle.
    pub fn listed(&self) -> Listed {
        Listed { first: self.header.first, count: self.count, time: self.time, digest: self.digest }
    }

    /// The place of the bundle in the log of its writer.
    pub fn place(&self) -> BundlePlace {
        BundlePlace { incarnation: self.header.incarnation, listed: self.listed() }
    }

    /// The sequence after the last event.
    pub fn next(&self) -> u64 {
        self.listed().next()
    }

    /// Whether the events are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.encrypted.is_some()
    }

    /// The 16 bytes of the identity of the key epoch, if the events are encrypted.
    pub fn epoch(&self) -> Option<&[u8; 16]> {
        self.encrypted.as_ref().map(|(epoch, _)| epoch)
    }

    /// The nonce, if the events are encrypted.
    pub fn nonce(&self) -> Option<&Nonce> {
        self.encrypted.as_ref().map(|(_, nonce)| nonce)
    }

    /// Decompresses events that are not encrypted.
    pub fn events(&self) -> Result<Vec<Event>, Malformed> {
        if self.is_encrypted() {
            return Err(Malformed::Events("they are encrypted"));
        }
        self.events_of(&self.body)
    }

    /// Decrypts and decompresses events that are encrypted with the secret of their key epoch.
    pub fn decrypted_events(&self, fleet: &str, secret: &Secret) -> Result<Vec<Event>, Malformed> {
        let Some((epoch, nonce)) = &self.encrypted else { return self.events() };
        let associated = self.header.associated(fleet, self.count, self.time, epoch);
        self.events_of(&self.header.text_key(fleet, secret).decrypt(nonce, &associated, &self.body)?)
    }

    fn events_of(&self, body: &[u8]) -> Result<Vec<Event>, Malformed> {
        let raw = Bytes::from(compression::decompress(body, MAX_RAW)?);
        let wire: Vec<WireEvent<'_>> = serde_ipld_dagcbor::from_slice(&raw)
            .map_err(|_| Malformed::Events("they are no DAG-CBOR list of times and data"))?;
        if wire.len() != self.count as usize {
            return Err(Malformed::Events("their number is not the count of the bundle"));
        }
        let event = |WireEvent(delay, data): WireEvent<'_>| Event {
            time: Timestamp(self.time.0.saturating_add(delay)),
            data: raw.slice_ref(data),
        };
        let events: Vec<Event> = wire.into_iter().map(event).collect();
        if !events.is_sorted_by_key(|event| event.time) {
            return Err(Malformed::Events("their times decrease"));
        }
        Ok(events)
    }
}

impl Header {
    /// The associated data of the encryption.
    fn associated(&self, fleet: &str, count: u32, time: Timestamp, epoch: &[u8; 16]) -> Vec<u8> {
        let associated = Associated {
            v: VERSION,
            time: time.0,
            began: self.began.0,
            count,
            epoch: serde_bytes::Bytes::new(epoch),
            first: self.first,
            fleet,
            start: &self.start,
            topic: self.topic.as_str(),
            recent: &self.recent,
            writer: self.writer,
            incarnation: self.incarnation,
        };
        serde_ipld_dagcbor::to_vec(&associated).expect("a map of plain fields")
    }

    fn text_key(&self, fleet: &str, secret: &Secret) -> TextKey {
        TextKey::of_log(secret, fleet, &self.topic, &self.writer, &self.incarnation)
    }
}

impl Payload<'_> {
    /// Checks that the fields fit together. Returns the identity of the key epoch and the nonce, if the events are
    /// encrypted.
    fn check(&self) -> Result<Option<([u8; 16], Nonce)>, Malformed> {
        let encrypted = match (self.epoch, self.nonce) {
            (None, None) => None,
            (Some(epoch), Some(nonce)) => match (epoch.as_ref().try_into(), nonce.as_ref().try_into()) {
                (Ok(epoch), Ok(nonce)) => Some((epoch, nonce)),
                _ => return Err(Malformed::Payload("the length of the epoch or of the nonce is wrong")),
            },
            _ => return Err(Malformed::Payload("it has one of epoch and nonce")),
        };
        if self.count == 0 || self.count > MAX_EVENTS {
            return Err(Malformed::Payload("the number of events is out of range"));
        }
        if self.first.checked_add(u64::from(self.count)).is_none() {
            return Err(Malformed::Payload("the sequence is out of range"));
        }
        check_recent(&self.recent, self.first, Timestamp(self.time))?;
        match &self.start {
            Some(_) if self.first != 0 => Err(Malformed::Payload("only a first bundle has a start")),
            Some(start) if start.previous == self.incarnation => {
                Err(Malformed::Payload("an incarnation does not follow itself"))
            }
            Some(start) => check_recent(&start.recent, start.next, Timestamp(u64::MAX)),
            None => Ok(()),
        }?;
        Ok(encrypted)
    }
}

/// Checks that `recent` are the bundles immediately before the sequence `next`: as many as there are, at most 8.
pub(crate) fn check_recent(recent: &[Listed], next: u64, time: Timestamp) -> Result<(), Malformed> {
    let malformed = |is_wrong: bool, why| if is_wrong { Err(Malformed::Payload(why)) } else { Ok(()) };
    malformed(recent.len() > RECENT, "it lists too many earlier bundles")?;
    let reaches_start = recent.first().map_or(next, |it| it.first) == 0;
    malformed(recent.len() < RECENT && !reaches_start, "it lists too few earlier bundles")?;
    let mut expected = recent.first().map_or(next, |it| it.first);
    let mut latest = Timestamp(0);
    for listed in recent {
        malformed(listed.first != expected || listed.count == 0, "the earlier bundles are not consecutive")?;
        malformed(listed.time < latest, "the times of the earlier bundles decrease")?;
        (expected, latest) = (listed.next(), listed.time);
    }
    malformed(expected != next, "the earlier bundles do not end before this one")?;
    malformed(latest > time, "an earlier bundle is later")
}

#[cfg(test)]
mod tests {
    use ipld_core::ipld::Ipld;

    use super::*;

    const FLEET: &str = "fleet";

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[3; 32])
    }

    fn header() -> Header {
        Header {
            topic: "jobs".parse().unwrap(),
            writer: WriterId::of(&key().verifying_key()),
            incarnation: Incarnation([1; 16]),
            began: Timestamp(5),
            first: 0,
            recent: Vec::new(),
            start: None,
        }
    }

    fn events(count: usize, data: impl Fn(usize) -> Vec<u8>) -> Vec<Event> {
        (0..count).map(|it| Event { time: Timestamp(100 + it as u64), data: data(it).into() }).collect()
    }

    /// Bytes that cannot be compressed.
    fn noise(seed: usize, len: usize) -> Vec<u8> {
        let mut state = seed as u64 + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        std::iter::repeat_with(&mut next).take(len).collect()
    }

    /// Signs a bundle whose payload was changed.
    fn changed(bundle: &Bundle, change: impl FnOnce(&mut std::collections::BTreeMap<String, Ipld>)) -> Bytes {
        let payload = Unverified::parse(&bundle.block).unwrap().payload;
        let Ipld::Map(mut map) = serde_ipld_dagcbor::from_slice(payload).unwrap() else { panic!("a map") };
        change(&mut map);
        block::seal(&serde_ipld_dagcbor::to_vec(&Ipld::Map(map)).unwrap(), &key())
    }

    #[test]
    fn a_bundle_comes_back_as_it_was_formed() {
        let events = events(3, |it| vec![it as u8; it]);
        let bundle = Bundle::form(FLEET, header(), &events, &key(), None);
        let opened = Bundle::open(bundle.block.clone(), FLEET).unwrap();
        assert_eq!(opened, bundle);
        assert_eq!(opened.events().unwrap(), events);
        assert_eq!((opened.count, opened.next(), opened.time), (3, 3, Timestamp(100)));
        assert_eq!(Bundle::open(bundle.block, "other"), Err(Malformed::Elsewhere));
    }

    fn sealing() -> Sealing {
        Sealing { epoch: [5; 16], secret: Secret::new([6; 32]), nonce: [7; 24] }
    }

    #[test]
    fn encrypted_events_come_back_with_their_secret_only() {
        let events = events(3, |it| format!("a secret text {it}").into_bytes());
        let bundle = Bundle::form(FLEET, header(), &events, &key(), Some(&sealing()));
        let opened = Bundle::open(bundle.block.clone(), FLEET).unwrap();
        assert_eq!(opened, bundle);
        assert_eq!(opened.epoch(), Some(&[5; 16]));
        assert_eq!(opened.decrypted_events(FLEET, &sealing().secret).unwrap(), events);
        assert_eq!(opened.events(), Err(Malformed::Events("they are encrypted")));
        opened.decrypted_events(FLEET, &Secret::new([8; 32])).unwrap_err();
        opened.decrypted_events("other", &sealing().secret).unwrap_err();
        assert_eq!(changed(&bundle, |_| ()), bundle.block, "it is canonical");
        // The writer itself cannot move the text to another place.
        for (key, value) in [
            ("first", Ipld::Integer(1)),
            ("time", Ipld::Integer(99)),
            ("began", Ipld::Integer(99)),
            ("epoch", Ipld::Bytes(vec![9; 16])),
            ("nonce", Ipld::Bytes(vec![9; 24])),
            ("topic", Ipld::String("other".to_owned())),
        ] {
            let mut moved = None;
            let block = changed(&bundle, |map| moved = map.insert(key.to_owned(), value));
            let Ok(moved) = Bundle::open(block, FLEET) else { continue };
            moved.decrypted_events(FLEET, &sealing().secret).expect_err(key);
        }
        let len = bundle.block.len();
        let text = b"secret text";
        assert!(
            !bundle.block.windows(text.len()).any(|it| it == text),
            "nothing of the text is in {len} bytes"
        );
    }

    #[test]
    fn encrypted_events_of_the_maximum_size_fit_into_a_block() {
        let events = events(1, |it| noise(it, MAX_EVENT));
        let bundle = Bundle::form(FLEET, header(), &events, &key(), Some(&sealing()));
        let opened = Bundle::open(bundle.block, FLEET).unwrap();
        assert_eq!(opened.decrypted_events(FLEET, &sealing().secret).unwrap(), events);
    }

    #[test]
    fn a_payload_is_canonical_dag_cbor() {
        let bundle = Bundle::form(FLEET, header(), &events(1, |_| vec![1]), &key(), None);
        assert_eq!(changed(&bundle, |_| ()), bundle.block);
    }

    #[test]
    fn a_bundle_holds_as_many_events_as_fit_into_a_message() {
        let heartbeat =
            |it| format!("{{\"node_id\":\"node-{it}\",\"timestamp\":{}}}", it * 7919).into_bytes();
        let bundle = Bundle::form(FLEET, header(), &events(5_000, heartbeat), &key(), None);
        assert!(bundle.count > 1_000, "{}", bundle.count);
        assert!(bundle.block.len() <= MAX_MESSAGE, "{}", bundle.block.len());
        let bundle = Bundle::form(FLEET, header(), &events(100, |it| noise(it, 10_000)), &key(), None);
        assert!((3..=5).contains(&bundle.count), "{}", bundle.count);
        assert!(bundle.block.len() <= MAX_MESSAGE, "{}", bundle.block.len());
        let tiny = Bundle::form(FLEET, header(), &events(5_000, |_| Vec::new()), &key(), None);
        assert_eq!(tiny.count, MAX_EVENTS);
    }

    #[test]
    fn an_event_of_the_maximum_size_makes_a_bundle_alone() {
        let bundle = Bundle::form(FLEET, header(), &events(2, |it| noise(it, MAX_EVENT)), &key(), None);
        assert_eq!(bundle.count, 1);
        assert!(bundle.block.len() > MAX_EVENT && bundle.block.len() <= block::MAX_BLOCK);
        Bundle::open(bundle.block, FLEET).unwrap();
    }

    #[test]
    fn numbers_that_do_not_fit_together_are_refused() {
        let listed = |first, count| Listed { first, count, time: Timestamp(50), digest: Digest([9; 32]) };
        let of = |first, recent: Vec<Listed>| {
            let header = Header { first, recent, ..header() };
            Bundle::open(Bundle::form(FLEET, header, &events(2, |_| vec![1]), &key(), None).block, FLEET)
        };
        of(7, vec![listed(0, 3), listed(3, 4)]).unwrap();
        of(20, (4..12).map(|it| listed(it, 1)).chain([]).collect()).unwrap_err();
        of(20, (12..20).map(|it| listed(it, 1)).collect()).unwrap();
        for (first, recent) in [
            (7, vec![]),
            (7, vec![listed(3, 4)]),
            (7, vec![listed(0, 3), listed(4, 3)]),
            (7, vec![listed(0, 3), listed(3, 3)]),
            (0, vec![listed(0, 0)]),
            (9, (0..9).map(|it| listed(it, 1)).collect()),
            (u64::MAX - 1, (1..9).map(|it| listed(u64::MAX - 1 - 9 + it, 1)).collect()),
        ] {
            let why = of(first, recent.clone()).unwrap_err();
            assert!(matches!(why, Malformed::Payload(_)), "{first} {recent:?}: {why}");
        }
        let start = |previous| Some(Start { previous, next: 0, recent: Vec::new() });
        let of = |first, start, recent| {
            let header = Header { first, recent, start, ..header() };
            Bundle::open(Bundle::form(FLEET, header, &events(1, |_| vec![1]), &key(), None).block, FLEET)
        };
        of(0, start(Incarnation([2; 16])), vec![]).unwrap();
        of(0, start(Incarnation([1; 16])), vec![]).unwrap_err();
        of(1, start(Incarnation([2; 16])), vec![listed(0, 1)]).unwrap_err();
    }

    #[test]
    fn fields_that_are_out_of_range_are_refused() {
        let bundle = Bundle::form(FLEET, header(), &events(2, |_| vec![1]), &key(), None);
        let refused = |key: &str, value: Ipld| {
            Bundle::open(changed(&bundle, |map| drop(map.insert(key.to_owned(), value))), FLEET).unwrap_err()
        };
        assert_eq!(refused("v", Ipld::Integer(2)), Malformed::Version(2));
        for (key, value) in [
            ("count", Ipld::Integer(0)),
            ("count", Ipld::Integer(i128::from(MAX_EVENTS) + 1)),
            ("first", Ipld::Integer(-1)),
            ("topic", Ipld::String(String::new())),
            ("epoch", Ipld::Bytes(vec![0; 16])),
            ("nonce", Ipld::Bytes(vec![0; 24])),
            ("writer", Ipld::Bytes(vec![0; 31])),
            ("incarnation", Ipld::Bytes(vec![0; 17])),
        ] {
            assert!(matches!(refused(key, value.clone()), Malformed::Payload(_)), "{key}: {value:?}");
        }
        // A later version of this format may add keys.
        let more = changed(&bundle, |map| drop(map.insert("later".into(), Ipld::Bool(true))));
        Bundle::open(more, FLEET).unwrap();
        let other = WriterId::of(&SigningKey::from_bytes(&[4; 32]).verifying_key());
        assert_eq!(refused("writer", Ipld::Bytes(other.0.to_vec())), Malformed::Signature);
    }

    #[test]
    fn events_that_cannot_be_read_are_an_error() {
        let bundle = Bundle::form(FLEET, header(), &events(2, |_| vec![1]), &key(), None);
        let with_body = |body: Vec<u8>| {
            let block = changed(&bundle, |map| drop(map.insert("body".into(), Ipld::Bytes(body))));
            Bundle::open(block, FLEET).unwrap().events().unwrap_err()
        };
        assert!(matches!(with_body(b"no frame".to_vec()), Malformed::Events(_)));
        let bomb = zstd::bulk::compress(&vec![0; MAX_RAW + 1], 19).unwrap();
        assert!(bomb.len() < 2_000);
        assert_eq!(with_body(bomb), Malformed::TooLarge { bytes: MAX_RAW + 1, limit: MAX_RAW });
        let one: Vec<(u64, &serde_bytes::Bytes)> = vec![(0, serde_bytes::Bytes::new(b"x"))];
        let one = serde_ipld_dagcbor::to_vec(&one).unwrap();
        let frame = zstd::bulk::compress(&one, 1).unwrap();
        assert!(matches!(with_body(frame.clone()), Malformed::Events(_)), "one event instead of two");
        assert!(matches!(with_body(frame[..frame.len() - 1].to_vec()), Malformed::Events(_)));
        let reversed: Vec<(u64, &serde_bytes::Bytes)> =
            vec![(2, serde_bytes::Bytes::new(b"x")), (1, serde_bytes::Bytes::new(b"y"))];
        let reversed = serde_ipld_dagcbor::to_vec(&reversed).unwrap();
        assert!(matches!(with_body(zstd::bulk::compress(&reversed, 1).unwrap()), Malformed::Events(_)));
    }
}
