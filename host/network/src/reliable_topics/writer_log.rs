//! Owns the report about the writers of a reliable topic, for the operator.

use dim_model::ident::{IpnsName, Topic};
use dim_topics::identity::{Incarnation, WriterId};
use dim_topics::member::{Member, Reported, WriterStatus};
use dim_topics::reader::{Position, ReaderCounters};

use super::mirrors::Mirrors;

/// One incarnation of a writer, as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterLog {
    /// The writer, by the IPNS name of its key.
    pub writer: IpnsName,
    /// Whether this host is the writer.
    pub is_own: bool,
    /// Whether the daemon of this host keeps the log of this other writer.
    pub is_mirrored: bool,
    /// The process start of the writer.
    pub incarnation: Incarnation,
    /// The sequence after the last event that the writer is known to have published.
    pub end: u64,
    /// The sequence after the last event that is durable at this host.
    pub received: u64,
    /// The counters of the writer, over all incarnations since the start of this host.
    pub counters: ReaderCounters,
    /// The positions that other members report.
    pub readers: Vec<ReaderPosition>,
}

/// The position of another member in the log of a writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReaderPosition {
    /// The member, by the IPNS name of its key.
    pub reader: IpnsName,
    /// The sequence after the last event that is durable there.
    pub received: u64,
    /// The sequence from which on no event is missing there.
    pub from: u64,
}

/// Returns the logs of the writers of a topic.
pub fn of_topic(member: &Member, mirrors: &Mirrors, topic: &Topic) -> Vec<WriterLog> {
    let id = member.id();
    let log = |writer: WriterId, counters: ReaderCounters, position: Position| {
        let positions = member.positions_of(topic, &writer).into_iter();
        let readers = positions.filter(|it| it.incarnation == position.incarnation);
        let reader = |Reported { member, next, from, .. }| ReaderPosition {
            reader: member.name(),
            received: next,
            from,
        };
        WriterLog {
            writer: writer.name(),
            is_own: writer == id,
            is_mirrored: mirrors.has(topic, &writer),
            incarnation: position.incarnation,
            end: position.end,
            received: position.received,
            counters,
            readers: readers.map(reader).collect(),
        }
    };
    let own = member.own_end(topic).into_iter().flat_map(|end| {
        let ends = [(end.incarnation, end.next)].into_iter().chain(end.earlier.iter().copied());
        let position = |(incarnation, end)| Position { incarnation, end, received: end };
        ends.map(move |it| log(id, ReaderCounters::default(), position(it)))
    });
    let others =
        member.writers(topic).into_iter().flat_map(|WriterStatus { writer, positions, counters }| {
            let log = &log;
            positions.into_iter().map(move |position| log(writer, counters, position))
        });
    own.chain(others).collect()
}
