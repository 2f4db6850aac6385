//! Fuzzes bundles of reliable topics, and the reader that receives them.
//!
//! The first byte says whether the rest is a block, or a payload that the writer has signed. Several are separated by
//! `\n--\n`; all but the first are payloads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_topics::action::{Action, Outcome};
use dim_topics::block;
use dim_topics::bundle::{Bundle, Event, MAX_EVENTS};
use dim_topics::identity::Incarnation;
use dim_topics::member::{Member, Setup};
use dim_topics::own_log::{Author, OwnLog};
use dim_topics::reader::Since;
use dim_topics::time::{Moment, Now};
use ed25519_dalek::SigningKey;

use crate::{APART, parts};

/// The name of the fleet.
pub(crate) const FLEET: &str = "fleet";

/// The key of the writer.
pub(crate) fn key() -> SigningKey {
    SigningKey::from_bytes(&[3; 32])
}

/// The topic that the member subscribes to.
pub(crate) fn topic() -> Topic {
    "jobs".parse().expect("a topic")
}

/// A member that reads everything on the topic.
pub(crate) fn member() -> Member {
    let author = author(4);
    let setup = Setup {
        author,
        past: BTreeMap::new(),
        logs: BTreeMap::new(),
        topics: BTreeMap::from([(topic(), Since::Earliest)]),
        checkpoints: Vec::new(),
        alarmed: Default::default(),
        seed: 1,
        exchange: None,
    };
    Member::new(setup, now(0))
}

/// The time after some seconds.
pub(crate) fn now(seconds: u64) -> Now {
    let moment = Moment(Duration::from_secs(seconds));
    Now { moment, wall: Timestamp(1_700_000_000_000_000_000).after(moment.0) }
}

/// The identity with a key.
pub(crate) fn author(key: u8) -> Author {
    let (key, began) = (SigningKey::from_bytes(&[key; 32]), Timestamp(1_700_000_000_000_000_000));
    Author { fleet: FLEET.to_owned(), key, incarnation: Incarnation([1; 16]), began }
}

/// Checks what a member wants done: the events of an incarnation are delivered in order, and the memory is counted.
pub(crate) fn check(member: &mut Member, next: &mut BTreeMap<Incarnation, u64>) {
    for action in member.take_actions() {
        let Action::Deliver(delivery) = action else { continue };
        let expected = next.entry(delivery.checkpoint.incarnation).or_insert(delivery.first);
        assert_eq!(*expected, delivery.first, "the events before are delivered");
        if let Outcome::Events(events) = &delivery.outcome {
            assert_eq!(delivery.first + events.len() as u64, delivery.checkpoint.next);
        }
        *expected = delivery.checkpoint.next;
    }
    assert_eq!(member.budget().buffered, member.buffered(), "the bytes of bundles in memory");
}

/// Opens the bundles, and gives them to a member.
pub fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let (mut member, mut next) = (member(), BTreeMap::new());
    for (number, part) in parts(data).into_iter().enumerate() {
        let is_signed = number > 0 || !how.is_multiple_of(2);
        let block = if is_signed { block::seal(part, &key()) } else { Bytes::copy_from_slice(part) };
        let Ok(bundle) = Bundle::open(block, FLEET) else { continue };
        assert!((1..=MAX_EVENTS).contains(&bundle.count));
        if let Ok(events) = bundle.events() {
            assert_eq!(events.len(), bundle.count as usize);
            assert!(events.is_sorted_by_key(|event| event.time) && events[0].time >= bundle.time);
        }
        assert_eq!(Bundle::open(bundle.block.clone(), FLEET).as_ref(), Ok(&bundle));
        member.receive(Arc::new(bundle), now(number as u64));
        check(&mut member, &mut next);
    }
    member.wake(now(100_000));
    check(&mut member, &mut next);
}

/// The payloads of consecutive bundles, over a restart of their writer.
pub(crate) fn payloads() -> Vec<Vec<u8>> {
    let mut log = OwnLog::default();
    let mut payload = |incarnation: u8, time: u64| {
        let mut author = author(3);
        author.incarnation = Incarnation([incarnation; 16]);
        let time = Timestamp(author.began.0 + time);
        let events = [Event { time, data: b"one".as_slice().into() }, Event { time, data: Bytes::new() }];
        let bundle = log.form(&topic(), &events, &author, None);
        block::Unverified::parse(&bundle.block).expect("a block").payload.to_vec()
    };
    vec![payload(1, 5), payload(1, 6), payload(1, 7), payload(2, 8), payload(2, 9)]
}

/// Returns bundles in order and out of order, and a block.
pub fn seeds() -> Vec<Vec<u8>> {
    let payloads = payloads();
    let signed = |numbers: &[usize]| {
        let parts: Vec<&[u8]> = numbers.iter().map(|number| payloads[*number].as_slice()).collect();
        [&[1], parts.join(APART).as_slice()].concat()
    };
    let block = [&[0], block::seal(&payloads[0], &key()).as_ref()].concat();
    vec![signed(&[0]), signed(&[0, 1, 2, 3, 4]), signed(&[4, 2, 0, 3, 1, 1]), block]
}
