//! Fuzzes heads of reliable topics, nodes of indexes, and the reader that receives them.
//!
//! The first byte says whether the first part is a block, or a payload that the writer has signed. The parts are
//! separated by `\n--\n`. The further ones are blocks that are fetched: nodes of the index, one after the other.

use std::collections::BTreeMap;

use bytes::Bytes;
use dim_model::time::Timestamp;
use dim_topics::action::{Action, Stream};
use dim_topics::block;
use dim_topics::bundle::Listed;
use dim_topics::head::{Head, LogHead, Place, Received};
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::index::{BundlePlace, FAN_OUT, IndexBuilder, Node};

use crate::bundles::{FLEET, author, check, key, member, now, topic};
use crate::{APART, parts};

/// Opens the head, and gives it and the nodes to a member.
pub fn run(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let mut parts = parts(data).into_iter();
    let first = parts.next().unwrap_or_default();
    let block =
        if how.is_multiple_of(2) { Bytes::copy_from_slice(first) } else { block::seal(first, &key()) };
    let Ok(head) = Head::open(&block, FLEET) else { return };
    let writer = head.writer;
    let (mut member, mut next) = (member(), BTreeMap::new());
    member.receive_head(head, now(1));
    for (number, part) in parts.enumerate() {
        if let Ok(node) = Node::open(part) {
            let size = match &node {
                Node::Leaf(places) => places.len(),
                Node::Inner { children, .. } => children.len(),
            };
            assert!((1..=FAN_OUT).contains(&size));
        }
        let wanted = member.take_actions().into_iter().find_map(|action| match action {
            Action::FetchNode { digest, .. } => Some(digest),
            _ => None,
        });
        let Some(digest) = wanted else { break };
        member.node_fetched(&Stream::main(topic()), &writer, &digest, Some(part), now(2 + number as u64));
    }
    check(&mut member, &mut next);
    member.wake(now(100_000));
    check(&mut member, &mut next);
    assert!(member.budget().fetches <= dim_topics::action::MAX_FETCHES);
}

/// Returns a head with its index, and a head that states everything that a head can state.
pub fn seeds() -> Vec<Vec<u8>> {
    let writer = WriterId::of(&key().verifying_key());
    let incarnation = Incarnation([1; 16]);
    let listed = |number: u64| {
        let time = Timestamp(author(3).began.0 + number);
        Listed { first: number, count: 1, time, digest: Digest([number as u8; 32]) }
    };
    let mut index = IndexBuilder::default();
    (0..300).for_each(|number| index.add(BundlePlace { incarnation, listed: listed(number) }));
    let nodes = index.root().expect("it has bundles");
    let head = |index| Head {
        writer,
        incarnation,
        began: author(3).began,
        number: 1,
        time: author(3).began,
        hello: true,
        place: Place { peer: None, addresses: vec!["/ip4/127.0.0.1/tcp/4001".to_owned()] },
        topics: vec![LogHead {
            topic: topic(),
            incarnation,
            next: 300,
            kept: Timestamp(1),
            recent: (292..300).map(listed).collect(),
            earlier: vec![(Incarnation([2; 16]), 7)],
            index,
        }],
        received: vec![Received { topic: topic(), writer, incarnation, next: 3, from: 0 }],
        wants: vec![(writer, Digest([1; 32]))],
        alarms: vec![(topic(), writer)],
        roster: None,
        grants: Vec::new(),
        needs: Vec::new(),
    };
    let payload = |head: Head| {
        let signed = head.sign(FLEET, &key());
        block::Unverified::parse(&signed.block).expect("a block").payload.to_vec()
    };
    // The root comes first.
    let with_index: Vec<Vec<u8>> = [payload(head(Some(nodes.root)))]
        .into_iter()
        .chain(nodes.blocks.iter().rev().map(|(_, block)| block.to_vec()))
        .collect();
    let block = head(None).sign(FLEET, &key()).block;
    vec![
        [&[1], with_index.join(APART).as_slice()].concat(),
        [&[1], payload(head(None)).as_slice()].concat(),
        [&[0], block.as_ref()].concat(),
    ]
}
