//! The test vectors of the protocol in `tests/topics`: blocks with all keys and their content, from which another
//! implementation can be written. Each is what this crate makes of fixed input, and is verified here with other
//! libraries: COSE with `coset`, the age format with `age`, and the encryption with its primitives alone.
//! `DIM_WRITE_VECTORS=1` writes the files.

#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;

use bytes::Bytes;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use coset::{CborSerializable as _, CoseSign, CoseSign1};
use dim_age::x25519::Identity;
use dim_model::ident::{GroupName, Topic};
use dim_model::time::Timestamp;
use dim_topics::bundle::{Bundle, Event, Header, Listed, Sealing, Start};
use dim_topics::head::{Head, LogHead, Place, Received, RosterHead};
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::membership::encryption::Secret;
use dim_topics::membership::exchange::Announced;
use dim_topics::membership::key_grant::{Epoch, EpochId, Granted, KeyGrant};
use dim_topics::membership::roster::{Admins, Group, MemberRow, Roster, SignedRoster};
use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use hkdf::Hkdf;
use ipld_core::ipld::Ipld;
use serde_json::{Value, json};
use sha2::Sha256;

/// A time in 2026, in nanoseconds.
const TIME: u64 = 1_764_500_000_000_000_000;

const EPOCH: [u8; 16] = [0xe0; 16];
const SECRET: [u8; 32] = [0x5e; 32];
const NONCE: [u8; 24] = [0x0c; 24];

fn key(number: u8) -> SigningKey {
    SigningKey::from_bytes(&[number; 32])
}

fn id(number: u8) -> WriterId {
    WriterId::of(&key(number).verifying_key())
}

/// The key for which the secrets of a member are encrypted. X25519 ignores some bits of the first byte.
fn identity(number: u8) -> Identity {
    Identity::new(&[number << 3; 32])
}

fn topic() -> Topic {
    "dim.jobs.updates".parse().unwrap()
}

fn group() -> GroupName {
    "workers".parse().unwrap()
}

fn fleet() -> String {
    id(1).name().to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// A DAG-CBOR value as JSON, with bytes in hex after `0x`.
fn shown(value: Ipld) -> Value {
    match value {
        Ipld::Null => Value::Null,
        Ipld::Bool(it) => it.into(),
        Ipld::Integer(it) => u64::try_from(it).unwrap().into(),
        Ipld::String(it) => it.into(),
        Ipld::Bytes(it) => format!("0x{}", hex(&it)).into(),
        Ipld::List(it) => it.into_iter().map(shown).collect(),
        Ipld::Map(it) => it.into_iter().map(|(key, value)| (key, shown(value))).collect(),
        Ipld::Link(it) => json!({ "/": it.to_string() }),
        Ipld::Float(_) => unreachable!("the protocol has no floats"),
    }
}

fn map(bytes: &[u8]) -> BTreeMap<String, Ipld> {
    serde_ipld_dagcbor::from_slice(bytes).unwrap()
}

fn payload_of_one(block: &[u8]) -> Vec<u8> {
    CoseSign1::from_slice(block).unwrap().payload.unwrap()
}

fn header() -> Header {
    let before = Listed { first: 0, count: 42, time: Timestamp(TIME - 9), digest: Digest::of(b"before") };
    Header {
        topic: topic(),
        writer: id(2),
        incarnation: Incarnation([0x1c; 16]),
        began: Timestamp(TIME - 5),
        first: 0,
        recent: Vec::new(),
        start: Some(Start { previous: Incarnation([0x1b; 16]), next: 42, recent: vec![before] }),
    }
}

fn events() -> Vec<Event> {
    let event = |after: u64, data: &'static str| Event { time: Timestamp(TIME + after), data: data.into() };
    vec![event(0, r#"{"job_id":"a","status":"running"}"#), event(7, r#"{"job_id":"a","status":"completed"}"#)]
}

fn keys() -> Value {
    json!({
        "writer": { "private": hex(&[2; 32]), "public": hex(&id(2).0) },
        "admins": [
            { "private": hex(&[1; 32]), "public": hex(&id(1).0) },
            { "private": hex(&[9; 32]), "public": hex(&id(9).0) },
        ],
        "sealing": {
            "private": identity(2).to_text().as_str(),
            "public": identity(2).recipient().to_string(),
        },
    })
}

/// A vector: the block, its CID, its payload, and what is special about it.
fn vector(about: &str, block: &[u8], payload: &[u8], more: Value) -> Value {
    let mut all = json!({
        "about": about,
        "fleet": fleet(),
        "keys": keys(),
        "block": hex(block),
        "cid": Digest::of(block).to_string(),
        "payload": shown(Ipld::Map(map(payload))),
    });
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn bundle(sealing: Option<&Sealing>) -> Bundle {
    Bundle::form(&fleet(), header(), &events(), &key(2), sealing)
}

fn sealing() -> Sealing {
    Sealing { epoch: EPOCH, secret: Secret::new(SECRET), nonce: NONCE }
}

fn shown_events() -> Value {
    let event = |event: Event| json!({ "time": event.time.0, "data": hex(&event.data) });
    events().into_iter().map(event).collect()
}

fn first_roster() -> SignedRoster {
    let mut roster = Roster::first(&key(1), Timestamp(TIME * 2));
    roster.groups.insert(group(), Group { rekeyed: 1, history: true });
    let row = |number: u8, label: &str, is_keeper| MemberRow {
        label: label.parse().unwrap(),
        sealing: identity(number).recipient(),
        peers: Default::default(),
        addresses: vec!["/ip4/192.0.2.7/tcp/4001".to_owned()],
        groups: [group()].into(),
        is_keeper,
        since: 1,
    };
    roster.members = [(id(2), row(2, "node-1", true)), (id(3), row(3, "node-2", false))].into();
    let mut draft = roster.draft().unwrap();
    draft.sign(&key(1));
    draft
}

/// The second version: another admin, two signatures from now on, and a member less.
fn second_roster() -> SignedRoster {
    let mut roster = first_roster().next();
    let last = bundle(None).listed();
    roster.remove(&id(3), [((topic(), Incarnation([0x1c; 16])), last)].into());
    roster.appoint(Admins { keys: [id(1), id(9)].into(), threshold: 2 }).unwrap();
    let draft = roster.draft().unwrap();
    draft.approve(&key(1)).unwrap().approve(&key(9)).unwrap().approve(&key(1)).unwrap()
}

fn head() -> Vec<u8> {
    let bundle = bundle(None);
    let second = second_roster();
    let head = Head {
        writer: id(2),
        incarnation: Incarnation([0x1c; 16]),
        began: Timestamp(TIME - 5),
        number: 3,
        time: Timestamp(TIME + 20),
        hello: true,
        place: Place { peer: None, addresses: vec!["/ip4/192.0.2.7/tcp/4001".to_owned()] },
        topics: vec![LogHead {
            topic: topic(),
            incarnation: Incarnation([0x1c; 16]),
            next: 2,
            kept: Timestamp(TIME),
            recent: vec![bundle.listed()],
            earlier: vec![(Incarnation([0x1b; 16]), 42)],
            index: Some(Digest::of(b"index")),
        }],
        received: vec![Received {
            topic: topic(),
            writer: id(3),
            incarnation: Incarnation([0x3c; 16]),
            next: 12,
            from: 4,
        }],
        wants: vec![(id(3), Digest::of(b"wanted"))],
        alarms: vec![(topic(), id(3))],
        roster: Some(RosterHead { version: 2, digest: second.digest, block: Digest::of(&second.to_block()) }),
        grants: vec![Announced { group: group(), digest: Digest::of(b"grant"), receiver: None }],
        needs: vec![(group(), None)],
    };
    head.sign(&fleet(), &key(2)).block.to_vec()
}

fn grant() -> Bytes {
    let epoch = Epoch {
        id: EpochId { number: 4, id: EPOCH },
        roster: 2,
        time: Timestamp(TIME),
        secret: Secret::new(SECRET),
    };
    let (group, epochs, mut next) = (group(), [epoch], 0_u8);
    let granted = Granted { group: &group, roster: 2, epochs: &epochs, receiver: None, refused: &[] };
    let mut random = |bytes: &mut [u8]| {
        bytes.fill_with(|| {
            next = next.wrapping_add(1);
            next
        })
    };
    KeyGrant::seal(&fleet(), granted, &[identity(2).recipient()], &key(2), &mut random)
}

fn vectors() -> BTreeMap<&'static str, Value> {
    let (plain, encrypted, grant) = (bundle(None).block, bundle(Some(&sealing())).block, grant());
    let secret = json!({ "epoch": hex(&EPOCH), "secret": hex(&SECRET) });
    let rosters = [first_roster(), second_roster()].map(|roster| {
        let block = roster.to_block();
        let payload = CoseSign::from_slice(&block).unwrap().payload.unwrap();
        (block, payload)
    });
    [
        ("bundle", {
            let about = "The first bundle of a process start, not encrypted.";
            vector(about, &plain, &payload_of_one(&plain), json!({ "events": shown_events() }))
        }),
        ("encrypted-bundle", {
            let about = "The same bundle on an encrypted topic.";
            let more = json!({ "events": shown_events(), "key_epoch": secret });
            vector(about, &encrypted, &payload_of_one(&encrypted), more)
        }),
        ("head", {
            let head = head();
            vector("A head with all its parts.", &head, &payload_of_one(&head), json!({}))
        }),
        ("roster", vector("The first roster of a fleet.", &rosters[0].0, &rosters[0].1, json!({}))),
        ("second-roster", {
            let about = "The second roster: a member is removed, and a second admin is appointed.";
            vector(about, &rosters[1].0, &rosters[1].1, json!({}))
        }),
        ("key-grant", {
            let about = "The secret of a key epoch for a group of one member.";
            vector(about, &grant, &payload_of_one(&grant), json!({ "key_epoch": secret }))
        }),
    ]
    .into()
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/topics/{name}.json"))
}

fn stored(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file(name)).unwrap()).unwrap()
}

#[test]
fn the_vectors_are_what_this_implementation_makes() {
    for (name, vector) in vectors() {
        if std::env::var_os("DIM_WRITE_VECTORS").is_some() {
            let text = serde_json::to_string_pretty(&vector).unwrap();
            std::fs::write(file(name), format!("{text}\n")).unwrap();
        }
        assert_eq!(stored(name), vector, "{name}");
    }
}

#[test]
fn this_implementation_reads_the_vectors() {
    let (plain, encrypted) = (stored("bundle"), stored("encrypted-bundle"));
    let open = |vector: &Value| Bundle::open(unhex(&vector["block"]).into(), &fleet()).unwrap();
    assert_eq!(open(&plain).events().unwrap(), events());
    open(&encrypted).events().unwrap_err();
    let secret = Secret::new(unhex(&encrypted["key_epoch"]["secret"]).try_into().unwrap());
    assert_eq!(open(&encrypted).decrypted_events(&fleet(), &secret).unwrap(), events());
    Head::open(&unhex(&stored("head")["block"]), &fleet()).unwrap();
    for name in ["roster", "second-roster"] {
        SignedRoster::open(&unhex(&stored(name)["block"]).into(), &fleet()).unwrap();
    }
    let grant = KeyGrant::open(&unhex(&stored("key-grant")["block"]).into(), &fleet()).unwrap();
    assert_eq!(grant.unseal(&identity(2)).unwrap().unwrap()[0].secret, secret);
}

#[test]
fn another_implementation_verifies_the_signatures() {
    let writer = key(2).verifying_key();
    for name in ["bundle", "encrypted-bundle", "head", "key-grant"] {
        let message = CoseSign1::from_slice(&unhex(&stored(name)["block"])).unwrap();
        let verify = |signature: &[u8], signed: &[u8]| {
            writer.verify_strict(signed, &Signature::from_slice(signature).unwrap())
        };
        message.verify_signature(b"", verify).unwrap_or_else(|why| panic!("{name}: {why}"));
    }
    for (name, signers) in [("roster", 1), ("second-roster", 2)] {
        let message = CoseSign::from_slice(&unhex(&stored(name)["block"])).unwrap();
        assert_eq!(message.signatures.len(), signers, "{name}");
        for index in 0..signers {
            let key: [u8; 32] = message.signatures[index].protected.header.key_id[..].try_into().unwrap();
            let verify = |signature: &[u8], signed: &[u8]| {
                let key = VerifyingKey::from_bytes(&key).unwrap();
                key.verify_strict(signed, &Signature::from_slice(signature).unwrap())
            };
            message.verify_signature(index, b"", verify).unwrap();
        }
    }
}

#[test]
fn another_implementation_decrypts_the_key_and_the_events() {
    let grant = map(&payload_of_one(&unhex(&stored("key-grant")["block"])));
    let Some(Ipld::Bytes(sealed)) = grant.get("sealed") else { panic!("the age file") };
    let identity: age::x25519::Identity = identity(2).to_text().parse().unwrap();
    let decryptor = age::Decryptor::new(&sealed[..]).unwrap();
    let mut secrets = Vec::new();
    let mut reader = decryptor.decrypt(std::iter::once(&identity as &dyn age::Identity)).unwrap();
    reader.read_to_end(&mut secrets).unwrap();
    let secrets: Vec<Ipld> = serde_ipld_dagcbor::from_slice(&secrets).unwrap();
    assert_eq!(secrets, [Ipld::Bytes(SECRET.to_vec())]);

    // The key of the log: HKDF-SHA256 of the secret, for the parts of the place, each after its length.
    let (fleet, topic) = (fleet(), topic());
    let parts: [&[u8]; 5] =
        [b"dim-topic-1", fleet.as_bytes(), topic.as_str().as_bytes(), &id(2).0, &[0x1c; 16]];
    let info: Vec<u8> = parts
        .iter()
        .flat_map(|part| [&u32::try_from(part.len()).unwrap().to_be_bytes()[..], part].concat())
        .collect();
    let mut key = [0; 32];
    Hkdf::<Sha256>::new(None, &SECRET).expand(&info, &mut key).unwrap();
    // The associated data: the payload without nonce and body.
    let mut payload = map(&payload_of_one(&unhex(&stored("encrypted-bundle")["block"])));
    let Some(Ipld::Bytes(body)) = payload.remove("body") else { panic!("a body") };
    let Some(Ipld::Bytes(nonce)) = payload.remove("nonce") else { panic!("a nonce") };
    let associated = serde_ipld_dagcbor::to_vec(&payload).unwrap();
    let text = XChaCha20Poly1305::new(&key.into())
        .decrypt(XNonce::from_slice(&nonce), Payload { msg: &body, aad: &associated })
        .unwrap();
    let raw = zstd::decode_all(&text[..]).unwrap();
    let frames: Vec<(u64, Ipld)> = serde_ipld_dagcbor::from_slice(&raw).unwrap();
    let expected: Vec<_> =
        events().iter().map(|it| (it.time.0 - TIME, Ipld::Bytes(it.data.to_vec()))).collect();
    assert_eq!(frames, expected);
}
