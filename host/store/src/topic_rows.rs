//! Owns the rows of reliable topics: the own incarnations, the own bundles and the ends of the own logs, and the
//! positions in the logs of others. It receives what the protocol (`dim-topics`) asks to make durable, and returns the
//! state with which it continues after a start.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_topics::action::{Checkpoint, Delivery};
use dim_topics::bundle::{Bundle, Listed};
use dim_topics::identity::{Digest, Incarnation, WriterId};
use dim_topics::index::BundlePlace;
use dim_topics::own_log::LogEnd;
use dim_topics::reader::Since;
use prost::Message as _;
use redb::{AccessGuard, ReadableTable as _, ReadableTableMetadata as _, WriteTransaction};

use crate::outbox::Row as Publish;
use crate::{
    ALARMS, BUNDLE_DIGESTS, BUNDLES, CHECKPOINTS, INCARNATIONS, INDEX_PINS, KEPT_SINCE, LOG_ENDS, META,
    OUTBOX, PLACES, SUBSCRIBED, Snapshot, Store, StoreError, UNSENT_BUNDLES, add_to_counter, counter,
    next_numbers, outbox, set_counter,
};

/// The name of the stored counter of the bundles' bytes.
const BYTES: &str = "bundle-bytes";

/// The name of the stored fleet to which the rows belong.
const FLEET: &str = "topics-fleet";

/// The state of the reliable topics at a start.
#[derive(Debug, Default)]
pub struct TopicState {
    /// The earlier incarnations of this host, with the hybrid times of their process starts.
    pub past: BTreeMap<Incarnation, Timestamp>,
    /// The ends of the own logs.
    pub logs: BTreeMap<Topic, LogEnd>,
    /// The subscribed topics.
    pub topics: BTreeMap<Topic, Since>,
    /// The positions in the logs of others.
    pub checkpoints: Vec<(Topic, WriterId, Checkpoint)>,
    /// The hybrid times before which own bundles were removed.
    pub kept: BTreeMap<Topic, Timestamp>,
    /// The own bundles that were perhaps not published, in order.
    pub unsent: Vec<Bytes>,
    /// The own bundles that are kept, in the order of their commits.
    pub places: BTreeMap<Topic, Vec<BundlePlace>>,
    /// The roots of the indexes that the daemon has pinned last.
    pub pins: BTreeMap<Topic, Digest>,
    /// The topics and writers of alarms that heads report and that the operator has not acknowledged.
    pub alarmed: BTreeSet<(Topic, WriterId)>,
}

impl TopicState {
    /// Reads the state.
    pub fn read(snapshot: &Snapshot) -> Result<Self, StoreError> {
        let mut state = Self::default();
        for row in snapshot.table(INCARNATIONS)?.iter()? {
            let (id, began) = row?;
            state.past.insert(incarnation(id.value())?, Timestamp(began.value()));
        }
        for row in snapshot.table(LOG_ENDS)?.iter()? {
            let (topic, end) = row?;
            state.logs.insert(parse(topic.value())?, LogEndRow::read(end.value())?.into_end()?);
        }
        for row in snapshot.table(SUBSCRIBED)?.iter()? {
            let (topic, since) = row?;
            state.topics.insert(parse(topic.value())?, since_of(since.value())?);
        }
        for row in snapshot.table(CHECKPOINTS)?.iter()? {
            let (key, row) = row?;
            let (topic, key) = key.value();
            let (writer, checkpoint) = checkpoint(key, row.value())?;
            state.checkpoints.push((parse(topic)?, writer, checkpoint));
        }
        for row in snapshot.table(KEPT_SINCE)?.iter()? {
            let (topic, time) = row?;
            state.kept.insert(parse(topic.value())?, Timestamp(time.value()));
        }
        for row in snapshot.table(PLACES)?.iter()? {
            let (topic, place) = PlaceRow::read(row?.1.value())?.into_place()?;
            state.places.entry(topic).or_default().push(place);
        }
        for row in snapshot.table(INDEX_PINS)?.iter()? {
            let (topic, root) = row?;
            state.pins.insert(parse(topic.value())?, Digest(fixed(root.value())?));
        }
        let reported = alarms(snapshot)?.into_iter().filter(|it| it.is_reported && !it.is_acknowledged);
        state.alarmed = reported.map(|alarm| (alarm.topic, alarm.writer)).collect();
        let bundles = snapshot.table(BUNDLES)?;
        for row in snapshot.table(UNSENT_BUNDLES)?.iter()? {
            let number = row?.0.value();
            if let Some(bundle) = bundles.get(number)? {
                state.unsent.push(BundleRow::read(bundle.value())?.block);
            }
        }
        Ok(state)
    }
}

/// The fleet to which the rows belong; `None` in a store of a host that did not know fleets.
pub fn fleet(store: &Store) -> Result<Option<String>, StoreError> {
    Ok(store.meta(FLEET)?.and_then(|name| String::from_utf8(name).ok()))
}

/// Makes the rows those of a member of `fleet`. What was written and received in another fleet is forgotten: its members
/// have it, and the other fleet's do not. Subscriptions stay. Returns the number of bundles that were not published.
pub fn enter_fleet(write: &WriteTransaction, fleet: &str) -> Result<usize, StoreError> {
    let mut meta = write.open_table(META)?;
    let before = meta.insert(FLEET, fleet.as_bytes())?.map(|before| before.value().to_vec());
    drop(meta);
    // A store of a host that did not know fleets has none.
    if before.is_none_or(|before| before == fleet.as_bytes()) {
        return Ok(0);
    }
    let mut unsent = write.open_table(UNSENT_BUNDLES)?;
    let lost = unsent.len()?;
    unsent.retain(|_, ()| false)?;
    write.open_table(INCARNATIONS)?.retain(|_, _| false)?;
    write.open_table(LOG_ENDS)?.retain(|_, _| false)?;
    write.open_table(BUNDLES)?.retain(|_, _| false)?;
    write.open_table(PLACES)?.retain(|_, _| false)?;
    write.open_table(BUNDLE_DIGESTS)?.retain(|_, _| false)?;
    write.open_table(KEPT_SINCE)?.retain(|_, _| false)?;
    write.open_table(CHECKPOINTS)?.retain(|_, _| false)?;
    set_counter(write, BYTES, 0)?;
    Ok(usize::try_from(lost).unwrap_or(usize::MAX))
}

/// Adds the incarnation of this start in `fleet`. Called before the incarnation publishes anything.
pub fn begin(
    write: &WriteTransaction,
    fleet: &str,
    id: Incarnation,
    began: Timestamp,
) -> Result<(), StoreError> {
    write.open_table(META)?.insert(FLEET, fleet.as_bytes())?;
    write.open_table(INCARNATIONS)?.insert(id.0.as_slice(), began.0)?;
    Ok(())
}

/// Adds a subscription that is new.
pub fn subscribe(write: &WriteTransaction, topic: &Topic, since: Since) -> Result<(), StoreError> {
    write.open_table(SUBSCRIBED)?.insert(topic.as_str(), since_row(since))?;
    Ok(())
}

/// Removes a subscription, with the positions in the logs of its topic.
pub fn unsubscribe(write: &WriteTransaction, topic: &Topic) -> Result<(), StoreError> {
    write.open_table(SUBSCRIBED)?.remove(topic.as_str())?;
    let (lowest, highest) = ([0; 0], [u8::MAX; 49]);
    let range = (topic.as_str(), lowest.as_slice())..=(topic.as_str(), highest.as_slice());
    write.open_table(CHECKPOINTS)?.retain_in(range, |_, _| false)?;
    Ok(())
}

/// Adds a bundle of the waiting publishes `rows`, and removes these. Returns false and changes nothing if one of them
/// is void by now: what a rollback has voided gets no sequence.
pub fn append(
    write: &WriteTransaction,
    bundle: &Bundle,
    end: &LogEnd,
    rows: &[u64],
) -> Result<bool, StoreError> {
    let waiting = write.open_table(OUTBOX)?;
    for number in rows {
        let row = waiting.get(number)?.map(|row| Publish::read(row.value())).transpose()?;
        if row.is_none_or(|row| row.is_void) {
            return Ok(false);
        }
    }
    drop(waiting);
    outbox::forget(write, rows)?;
    let topic = bundle.header.topic.as_str();
    let number = next_numbers(write, "bundles", 1)?;
    let row = BundleRow { topic: topic.to_owned(), time: bundle.time.0, block: bundle.block.clone() };
    let row = row.encode_to_vec();
    write.open_table(BUNDLES)?.insert(number, row.as_slice())?;
    let place = PlaceRow::of(bundle, row.len());
    write.open_table(PLACES)?.insert(number, place.encode_to_vec().as_slice())?;
    write.open_table(BUNDLE_DIGESTS)?.insert(bundle.digest.0.as_slice(), number)?;
    write.open_table(UNSENT_BUNDLES)?.insert(number, ())?;
    write.open_table(LOG_ENDS)?.insert(topic, LogEndRow::from(end).encode_to_vec().as_slice())?;
    add_to_counter(write, BYTES, row.len() as i64)?;
    Ok(true)
}

/// Adds the places of all own bundles to a store that has none.
pub(crate) fn add_places(write: &WriteTransaction) -> Result<(), StoreError> {
    let mut places = write.open_table(PLACES)?;
    for row in write.open_table(BUNDLES)?.iter()? {
        let (number, row) = row?;
        let block = BundleRow::read(row.value())?.block;
        let bundle = Bundle::open_of_any_fleet(block)
            .map_err(|error| StoreError::corrupt("reliable topics", error))?;
        let place = PlaceRow::of(&bundle, row.value().len());
        places.insert(number.value(), place.encode_to_vec().as_slice())?;
    }
    Ok(())
}

/// Notes the root of the index of an own log that the daemon has pinned; `None` if the log has no bundles any more.
pub fn pinned(write: &WriteTransaction, topic: &Topic, root: Option<&Digest>) -> Result<(), StoreError> {
    let mut pins = write.open_table(INDEX_PINS)?;
    match root {
        Some(root) => pins.insert(topic.as_str(), root.0.as_slice())?,
        None => pins.remove(topic.as_str())?,
    };
    Ok(())
}

/// The places of the own bundles of a topic that are kept, in the order of their commits.
pub fn places(snapshot: &Snapshot, topic: &Topic) -> Result<Vec<BundlePlace>, StoreError> {
    let mut places = Vec::new();
    for row in snapshot.table(PLACES)?.iter()? {
        let (of, place) = PlaceRow::read(row?.1.value())?.into_place()?;
        places.extend((of == *topic).then_some(place));
    }
    Ok(places)
}

/// Notes that bundles were published.
pub fn sent(write: &WriteTransaction, digests: &[Digest]) -> Result<(), StoreError> {
    let numbers = write.open_table(BUNDLE_DIGESTS)?;
    let mut unsent = write.open_table(UNSENT_BUNDLES)?;
    for digest in digests {
        if let Some(number) = numbers.get(digest.0.as_slice())? {
            unsent.remove(number.value())?;
        }
    }
    Ok(())
}

/// Writes the position after a delivery.
pub fn advance(write: &WriteTransaction, delivery: &Delivery) -> Result<(), StoreError> {
    let mut table = write.open_table(CHECKPOINTS)?;
    let topic = delivery.stream.topic.as_str();
    for (key, row) in checkpoint_rows(delivery, |key| row_of(table.get((topic, key))?))? {
        match row {
            Some(row) => table.insert((topic, key.as_slice()), row.as_slice())?,
            None => table.remove((topic, key.as_slice()))?,
        };
    }
    Ok(())
}

/// The key of a row, and its new content; `None` if it is removed.
type ChangedRow = (Vec<u8>, Option<Vec<u8>>);

/// Returns the changed rows of positions after a delivery: the keys with the new rows, or `None` for a row that is
/// removed. `before` returns the present row of a key.
pub(crate) fn checkpoint_rows(
    delivery: &Delivery,
    before: impl Fn(&[u8]) -> Result<Option<Vec<u8>>, StoreError>,
) -> Result<Vec<ChangedRow>, StoreError> {
    let key = |id: &Incarnation| [delivery.writer.0.as_slice(), &id.0].concat();
    let mut rows = Vec::new();
    if let Some(replaced) = &delivery.replaced
        && let Some(row) = before(&key(replaced))?
    {
        let row = CheckpointRow { is_replaced: true, ..CheckpointRow::read(&row)? };
        rows.push((key(replaced), Some(row.encode_to_vec())));
    }
    rows.extend(delivery.removed.iter().map(|removed| (key(removed), None)));
    let row = CheckpointRow::from(&delivery.checkpoint).encode_to_vec();
    rows.push((key(&delivery.checkpoint.incarnation), Some(row)));
    Ok(rows)
}

/// Decodes the row of a position. Its key is the writer and the incarnation.
pub(crate) fn checkpoint(key: &[u8], row: &[u8]) -> Result<(WriterId, Checkpoint), StoreError> {
    let (writer, id) = key.split_at_checked(32).ok_or_else(|| corrupt("a short key"))?;
    let checkpoint = CheckpointRow::read(row)?.into_checkpoint(incarnation(id)?)?;
    Ok((WriterId(fixed(writer)?), checkpoint))
}

/// The bytes of a row, if there is one.
pub(crate) fn row_of(row: Option<AccessGuard<'_, &'static [u8]>>) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(row.map(|row| row.value().to_vec()))
}

/// The maximum number of alarms that are kept. The oldest are removed.
const MAX_ALARMS: u64 = 1_000;

/// An alarm about a writer, as it was raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaisedAlarm {
    /// The topic.
    pub topic: Topic,
    /// The writer.
    pub writer: WriterId,
    /// The finding, for the operator.
    pub finding: String,
    /// The time at which it was raised.
    pub at: Timestamp,
    /// Whether heads report it to the other members.
    pub is_reported: bool,
    /// Whether the operator has acknowledged it.
    pub is_acknowledged: bool,
}

/// Adds an alarm, unless the same one was raised before.
pub fn raise(write: &WriteTransaction, alarm: &RaisedAlarm) -> Result<(), StoreError> {
    let mut table = write.open_table(ALARMS)?;
    // By writer: the number of its rows, and the oldest of them.
    let (mut of_writers, mut acknowledged) = (BTreeMap::<Vec<u8>, (u64, u64)>::new(), None);
    for row in table.iter()? {
        let (number, row) = row?;
        let AlarmRow { topic, writer, finding, is_acknowledged, .. } = AlarmRow::read(row.value())?;
        if topic == alarm.topic.as_str() && writer == alarm.writer.0 && finding == alarm.finding {
            return Ok(());
        }
        if is_acknowledged {
            acknowledged.get_or_insert(number.value());
        }
        of_writers.entry(writer).or_insert((0, number.value())).0 += 1;
    }
    if table.len()? >= MAX_ALARMS {
        // A writer with many alarms does not displace those of others.
        let of_loudest = of_writers.into_values().max_by_key(|(count, _)| *count).map(|(_, oldest)| oldest);
        if let Some(number) = acknowledged.or(of_loudest) {
            table.remove(number)?;
        }
    }
    let number = next_numbers(write, "alarms", 1)?;
    let row = AlarmRow {
        topic: alarm.topic.to_string(),
        writer: alarm.writer.0.to_vec(),
        finding: alarm.finding.clone(),
        at: alarm.at.0,
        is_reported: alarm.is_reported,
        is_acknowledged: alarm.is_acknowledged,
    };
    table.insert(number, row.encode_to_vec().as_slice())?;
    Ok(())
}

/// Notes that the operator has acknowledged all alarms.
pub fn acknowledge_alarms(write: &WriteTransaction) -> Result<(), StoreError> {
    let mut table = write.open_table(ALARMS)?;
    let mut rows = Vec::new();
    for row in table.iter()? {
        let (number, row) = row?;
        rows.push((number.value(), AlarmRow { is_acknowledged: true, ..AlarmRow::read(row.value())? }));
    }
    for (number, row) in rows {
        table.insert(number, row.encode_to_vec().as_slice())?;
    }
    Ok(())
}

/// The alarms, oldest first.
pub fn alarms(snapshot: &Snapshot) -> Result<Vec<RaisedAlarm>, StoreError> {
    let rows = snapshot.table(ALARMS)?;
    let alarm = |row: &[u8]| {
        let AlarmRow { topic, writer, finding, at, is_reported, is_acknowledged } = AlarmRow::read(row)?;
        let (topic, writer, at) = (parse(&topic)?, WriterId(fixed(&writer)?), Timestamp(at));
        Ok(RaisedAlarm { topic, writer, finding, at, is_reported, is_acknowledged })
    };
    rows.iter()?.map(|row| alarm(row?.1.value())).collect()
}

/// The block of an own bundle that is kept.
pub fn block(snapshot: &Snapshot, digest: &Digest) -> Result<Option<Bytes>, StoreError> {
    let Some(number) = snapshot.table(BUNDLE_DIGESTS)?.get(digest.0.as_slice())? else { return Ok(None) };
    let row = snapshot.table(BUNDLES)?.get(number.value())?.map(|row| BundleRow::read(row.value()));
    Ok(row.transpose()?.map(|row| row.block))
}

/// The bytes of all own bundles.
pub fn bytes(meta: &impl redb::ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// The retention of the own bundles of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Bundles from before this hybrid time are removed.
    pub since: Timestamp,
    /// The most bytes that are kept.
    pub bytes: u64,
}

/// Removes the own bundles that retention does not keep. `kept` returns the retention of a topic. A bundle that was
/// not published is kept. Returns, for each topic from which bundles were removed, the time before which all were.
pub fn remove_old(
    write: &WriteTransaction,
    kept: impl Fn(&Topic) -> Kept,
) -> Result<BTreeMap<Topic, Timestamp>, StoreError> {
    let mut bundles = write.open_table(BUNDLES)?;
    let mut places = write.open_table(PLACES)?;
    let mut digests = write.open_table(BUNDLE_DIGESTS)?;
    let unsent = write.open_table(UNSENT_BUNDLES)?;
    // From the newest on, so that the newest bytes are kept.
    let mut held: BTreeMap<Topic, (Kept, u64)> = BTreeMap::new();
    let mut old = Vec::new();
    for row in places.iter()?.rev() {
        let (number, row) = row?;
        let (number, row) = (number.value(), PlaceRow::read(row.value())?);
        let size = row.size;
        let (topic, BundlePlace { listed, .. }) = row.into_place()?;
        let (kept, bytes) = held.entry(topic.clone()).or_insert_with(|| (kept(&topic), 0));
        *bytes += size;
        let is_old = listed.time < kept.since || *bytes > kept.bytes;
        if is_old && unsent.get(number)?.is_none() {
            old.push((number, topic, listed, size));
        }
    }
    let mut removed = 0;
    let mut earliest: BTreeMap<Topic, Timestamp> = BTreeMap::new();
    for (number, topic, listed, size) in old {
        bundles.remove(number)?;
        places.remove(number)?;
        digests.remove(listed.digest.0.as_slice())?;
        removed += size;
        let kept = earliest.entry(topic).or_default();
        *kept = (*kept).max(Timestamp(listed.time.0 + 1));
    }
    drop((bundles, places, digests, unsent));
    let mut kept = write.open_table(KEPT_SINCE)?;
    for (topic, time) in &earliest {
        kept.insert(topic.as_str(), time.0)?;
    }
    drop(kept);
    add_to_counter(write, BYTES, -(removed as i64))?;
    Ok(earliest)
}

fn corrupt(why: &str) -> StoreError {
    StoreError::corrupt("reliable topics", why.to_owned())
}

/// Decodes a topic.
pub(crate) fn parse(topic: &str) -> Result<Topic, StoreError> {
    topic.parse().map_err(|error| StoreError::corrupt("reliable topics", error))
}

/// Decodes a key or a digest.
pub(crate) fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], StoreError> {
    bytes.try_into().map_err(|_| corrupt("a key or digest of another length"))
}

fn incarnation(bytes: &[u8]) -> Result<Incarnation, StoreError> {
    fixed(bytes).map(Incarnation)
}

/// The kind of a [`Since`], and its time.
fn since_row(since: Since) -> (u8, u64) {
    match since {
        Since::Head(time) => (0, time.0),
        Since::Time(time) => (1, time.0),
        Since::Earliest => (2, 0),
    }
}

fn since_of((kind, time): (u8, u64)) -> Result<Since, StoreError> {
    match kind {
        0 => Ok(Since::Head(Timestamp(time))),
        1 => Ok(Since::Time(Timestamp(time))),
        2 => Ok(Since::Earliest),
        _ => Err(corrupt("an unknown beginning")),
    }
}

/// An own bundle. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct BundleRow {
    #[prost(string, tag = "1")]
    topic: String,
    /// The hybrid time of the first event.
    #[prost(fixed64, tag = "2")]
    time: u64,
    #[prost(bytes = "bytes", tag = "3")]
    block: Bytes,
}

/// The place of an own bundle. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct PlaceRow {
    #[prost(string, tag = "1")]
    topic: String,
    #[prost(bytes = "vec", tag = "2")]
    incarnation: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    listed: Option<ListedRow>,
    /// The size of the [`BundleRow`], in bytes.
    #[prost(uint64, tag = "4")]
    size: u64,
}

/// The place of a bundle. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct ListedRow {
    #[prost(uint64, tag = "1")]
    first: u64,
    #[prost(uint32, tag = "2")]
    count: u32,
    #[prost(fixed64, tag = "3")]
    time: u64,
    #[prost(bytes = "vec", tag = "4")]
    digest: Vec<u8>,
}

/// An incarnation and a sequence. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct EndRow {
    #[prost(bytes = "vec", tag = "1")]
    incarnation: Vec<u8>,
    #[prost(uint64, tag = "2")]
    next: u64,
}

/// The end of an own log. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct LogEndRow {
    #[prost(message, optional, tag = "1")]
    end: Option<EndRow>,
    #[prost(message, repeated, tag = "2")]
    recent: Vec<ListedRow>,
    #[prost(message, repeated, tag = "3")]
    earlier: Vec<EndRow>,
}

/// A position in the log of another writer. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct CheckpointRow {
    #[prost(fixed64, tag = "1")]
    began: u64,
    #[prost(uint64, tag = "2")]
    next: u64,
    #[prost(message, optional, tag = "3")]
    last: Option<ListedRow>,
    #[prost(fixed64, tag = "4")]
    time: u64,
    #[prost(message, optional, tag = "5")]
    before: Option<EndRow>,
    #[prost(bool, tag = "6")]
    is_replaced: bool,
    #[prost(fixed64, tag = "7")]
    floor: u64,
    #[prost(uint64, tag = "8")]
    from: u64,
}

/// An alarm. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct AlarmRow {
    #[prost(string, tag = "1")]
    topic: String,
    #[prost(bytes = "vec", tag = "2")]
    writer: Vec<u8>,
    #[prost(string, tag = "3")]
    finding: String,
    #[prost(fixed64, tag = "4")]
    at: u64,
    #[prost(bool, tag = "5")]
    is_reported: bool,
    #[prost(bool, tag = "6")]
    is_acknowledged: bool,
}

/// Decodes a row.
macro_rules! readable {
    ($($row:ident),*) => {
        $(impl $row {
            fn read(bytes: &[u8]) -> Result<Self, StoreError> {
                Self::decode(bytes).map_err(|error| StoreError::corrupt("reliable topics", error))
            }
        })*
    };
}
readable!(AlarmRow, BundleRow, PlaceRow, LogEndRow, CheckpointRow);

impl PlaceRow {
    fn of(bundle: &Bundle, size: usize) -> Self {
        Self {
            topic: bundle.header.topic.to_string(),
            incarnation: bundle.header.incarnation.0.to_vec(),
            listed: Some(ListedRow::from(&bundle.listed())),
            size: size as u64,
        }
    }

    fn into_place(self) -> Result<(Topic, BundlePlace), StoreError> {
        let listed = self.listed.ok_or_else(|| corrupt("a place without a bundle"))?.into_listed()?;
        Ok((parse(&self.topic)?, BundlePlace { incarnation: incarnation(&self.incarnation)?, listed }))
    }
}

impl From<&Listed> for ListedRow {
    fn from(it: &Listed) -> Self {
        Self { first: it.first, count: it.count, time: it.time.0, digest: it.digest.0.to_vec() }
    }
}

impl ListedRow {
    fn into_listed(self) -> Result<Listed, StoreError> {
        let Self { first, count, time, digest } = self;
        Ok(Listed { first, count, time: Timestamp(time), digest: Digest(fixed(&digest)?) })
    }
}

impl EndRow {
    fn of((id, next): (Incarnation, u64)) -> Self {
        Self { incarnation: id.0.to_vec(), next }
    }

    fn into_end(self) -> Result<(Incarnation, u64), StoreError> {
        Ok((incarnation(&self.incarnation)?, self.next))
    }
}

impl From<&LogEnd> for LogEndRow {
    fn from(it: &LogEnd) -> Self {
        Self {
            end: Some(EndRow::of((it.incarnation, it.next))),
            recent: it.recent.iter().map(ListedRow::from).collect(),
            earlier: it.earlier.iter().map(|end| EndRow::of(*end)).collect(),
        }
    }
}

impl LogEndRow {
    fn into_end(self) -> Result<LogEnd, StoreError> {
        let end = self.end.ok_or_else(|| corrupt("a log without an end"))?;
        let (incarnation, next) = end.into_end()?;
        let recent = self.recent.into_iter().map(ListedRow::into_listed).collect::<Result<_, _>>()?;
        let earlier = self.earlier.into_iter().map(EndRow::into_end).collect::<Result<_, _>>()?;
        Ok(LogEnd { incarnation, next, recent, earlier })
    }
}

impl From<&Checkpoint> for CheckpointRow {
    fn from(it: &Checkpoint) -> Self {
        Self {
            began: it.began.0,
            next: it.next,
            last: it.last.as_ref().map(ListedRow::from),
            time: it.time.0,
            before: it.before.map(EndRow::of),
            is_replaced: it.is_replaced,
            floor: it.floor.0,
            from: it.from,
        }
    }
}

impl CheckpointRow {
    fn into_checkpoint(self, incarnation: Incarnation) -> Result<Checkpoint, StoreError> {
        Ok(Checkpoint {
            incarnation,
            began: Timestamp(self.began),
            next: self.next,
            from: self.from,
            last: self.last.map(ListedRow::into_listed).transpose()?,
            time: Timestamp(self.time),
            before: self.before.map(EndRow::into_end).transpose()?,
            is_replaced: self.is_replaced,
            floor: Timestamp(self.floor),
        })
    }
}

#[cfg(test)]
mod tests {
    use dim_topics::bundle::Event;
    use dim_topics::own_log::{Author, OwnLog};
    use ed25519_dalek::SigningKey;

    use super::*;
    use crate::effect::Publish as Effect;

    fn topic() -> Topic {
        "jobs".parse().unwrap()
    }

    fn author() -> Author {
        let key = SigningKey::from_bytes(&[3; 32]);
        Author { fleet: "fleet".to_owned(), key, incarnation: Incarnation([1; 16]), began: Timestamp(1) }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    /// Puts a publish into the outbox and forms its bundle.
    fn formed(write: &WriteTransaction, log: &mut OwnLog, time: u64) -> (Bundle, LogEnd) {
        let publish = Effect { topic: topic(), data: b"x".as_slice().into() };
        outbox::enqueue(write, Some(&"p".parse().unwrap()), &[publish], Timestamp(time)).unwrap();
        let events = [Event { time: Timestamp(time), data: b"x".as_slice().into() }];
        let bundle = log.form(&topic(), &events, &author(), None);
        (bundle, log.formed().unwrap().clone())
    }

    #[test]
    fn what_is_void_is_not_stored_in_a_bundle() {
        let (_dir, store) = store();
        let mut log = OwnLog::default();
        let write = store.begin().unwrap();
        let (bundle, end) = formed(&write, &mut log, 5);
        outbox::void_since(&write, &"p".parse().unwrap(), 1).unwrap();
        assert!(!append(&write, &bundle, &end, &[1]).unwrap());
        log.abandon();
        let (bundle, end) = formed(&write, &mut log, 6);
        assert_eq!(bundle.header.first, 0, "the sequence is given again");
        assert!(append(&write, &bundle, &end, &[2]).unwrap());
        assert!(!append(&write, &bundle, &end, &[2]).unwrap(), "a publish is in one bundle");
        write.commit().unwrap();
        let state = TopicState::read(&store.snapshot().unwrap()).unwrap();
        assert_eq!(state.logs, BTreeMap::from([(topic(), end)]));
        assert_eq!(state.unsent, std::slice::from_ref(&bundle.block));
        assert_eq!(block(&store.snapshot().unwrap(), &bundle.digest).unwrap(), Some(bundle.block));
    }

    #[test]
    fn bundles_are_kept_for_a_time_and_up_to_a_size_and_until_they_are_sent() {
        let (_dir, store) = store();
        let mut log = OwnLog::default();
        let write = store.begin().unwrap();
        let mut bundles = Vec::new();
        for number in 1..=5 {
            let (bundle, end) = formed(&write, &mut log, number * 10);
            assert!(append(&write, &bundle, &end, &[number]).unwrap());
            bundles.push(bundle);
        }
        let size = bytes(&write.open_table(crate::META).unwrap()).unwrap() / 5;
        let all = |since, bytes| move |_: &Topic| Kept { since: Timestamp(since), bytes };
        assert_eq!(remove_old(&write, all(100, 0)).unwrap(), BTreeMap::new(), "none was sent");
        let digests: Vec<Digest> = bundles.iter().map(|bundle| bundle.digest).collect();
        sent(&write, &digests).unwrap();
        let removed = remove_old(&write, all(20, u64::MAX)).unwrap();
        assert_eq!(removed, BTreeMap::from([(topic(), Timestamp(11))]));
        let removed = remove_old(&write, all(0, size * 5 / 2)).unwrap();
        assert_eq!(removed, BTreeMap::from([(topic(), Timestamp(31))]));
        write.commit().unwrap();
        let snapshot = store.snapshot().unwrap();
        let left: Vec<bool> =
            digests.iter().map(|digest| block(&snapshot, digest).unwrap().is_some()).collect();
        assert_eq!(left, [false, false, false, true, true]);
        assert_eq!(TopicState::read(&snapshot).unwrap().kept, removed);
        assert_eq!(bytes(&snapshot.table(crate::META).unwrap()).unwrap(), {
            let rows = snapshot.table(BUNDLES).unwrap();
            rows.iter().unwrap().map(|row| row.unwrap().1.value().len() as u64).sum::<u64>()
        });
    }

    #[test]
    fn a_host_begins_anew_in_another_fleet() {
        let (_dir, store) = store();
        let mut log = OwnLog::default();
        let write = store.begin().unwrap();
        assert_eq!(enter_fleet(&write, "one").unwrap(), 0);
        begin(&write, "one", Incarnation([1; 16]), Timestamp(3)).unwrap();
        subscribe(&write, &topic(), Since::Earliest).unwrap();
        let (bundle, end) = formed(&write, &mut log, 5);
        assert!(append(&write, &bundle, &end, &[1]).unwrap());
        assert_eq!(enter_fleet(&write, "one").unwrap(), 0);
        write.commit().unwrap();
        assert_eq!(TopicState::read(&store.snapshot().unwrap()).unwrap().unsent.len(), 1);
        let write = store.begin().unwrap();
        assert_eq!(enter_fleet(&write, "two").unwrap(), 1);
        write.commit().unwrap();
        let snapshot = store.snapshot().unwrap();
        let TopicState { past, logs, topics, unsent, places, .. } = TopicState::read(&snapshot).unwrap();
        assert!(past.is_empty() && logs.is_empty() && unsent.is_empty() && places.is_empty());
        assert_eq!(topics, BTreeMap::from([(topic(), Since::Earliest)]));
        assert_eq!(block(&snapshot, &bundle.digest).unwrap(), None);
        assert_eq!(bytes(&snapshot.table(META).unwrap()).unwrap(), 0);
    }

    #[test]
    fn positions_and_alarms_come_back_as_they_were_written() {
        let (_dir, store) = store();
        let checkpoint = |id: u8, before| Checkpoint {
            incarnation: Incarnation([id; 16]),
            began: Timestamp(3),
            next: 7,
            from: 4,
            last: Some(Listed { first: 5, count: 2, time: Timestamp(4), digest: Digest([8; 32]) }),
            time: Timestamp(9),
            before,
            is_replaced: false,
            floor: Timestamp(2),
        };
        let delivery = |checkpoint: Checkpoint, removed| Delivery {
            stream: dim_topics::action::Stream::main(topic()),
            writer: WriterId([6; 32]),
            first: 5,
            outcome: dim_topics::action::Outcome::Events(Vec::new()),
            replaced: checkpoint.before.map(|(id, _)| id),
            checkpoint,
            removed,
        };
        let write = store.begin().unwrap();
        let (one, two, three) = (Incarnation([1; 16]), Incarnation([2; 16]), Incarnation([3; 16]));
        subscribe(&write, &topic(), Since::Head(Timestamp(4))).unwrap();
        begin(&write, "one", one, Timestamp(3)).unwrap();
        advance(&write, &delivery(checkpoint(1, None), vec![])).unwrap();
        advance(&write, &delivery(checkpoint(2, Some((one, 7))), vec![])).unwrap();
        advance(&write, &delivery(checkpoint(3, Some((two, 7))), vec![one])).unwrap();
        write.commit().unwrap();
        let state = TopicState::read(&store.snapshot().unwrap()).unwrap();
        assert_eq!(state.topics, BTreeMap::from([(topic(), Since::Head(Timestamp(4)))]));
        assert_eq!(state.past, BTreeMap::from([(one, Timestamp(3))]));
        let replaced = Checkpoint { is_replaced: true, ..checkpoint(2, Some((one, 7))) };
        let newest = Checkpoint { incarnation: three, ..checkpoint(3, Some((two, 7))) };
        let writer = WriterId([6; 32]);
        assert_eq!(state.checkpoints, [(topic(), writer, replaced), (topic(), writer, newest)]);
        let alarm = |number: u64| RaisedAlarm {
            topic: topic(),
            writer,
            finding: format!("it is running twice, {number}"),
            at: Timestamp(number),
            is_reported: number > MAX_ALARMS - 2,
            is_acknowledged: false,
        };
        let write = store.begin().unwrap();
        (0..=MAX_ALARMS).try_for_each(|number| raise(&write, &alarm(number))).unwrap();
        // The same alarm again.
        raise(&write, &RaisedAlarm { at: Timestamp(9_999), ..alarm(5) }).unwrap();
        write.commit().unwrap();
        let kept = alarms(&store.snapshot().unwrap()).unwrap();
        assert_eq!((kept.len() as u64, &kept[0]), (MAX_ALARMS, &alarm(1)));
        let state = TopicState::read(&store.snapshot().unwrap()).unwrap();
        assert_eq!(state.alarmed, BTreeSet::from([(topic(), writer)]));
        // The writer with the most alarms makes room for that of another one.
        let other = RaisedAlarm { writer: WriterId([7; 32]), ..alarm(1) };
        let write = store.begin().unwrap();
        raise(&write, &other).unwrap();
        (MAX_ALARMS + 1..MAX_ALARMS + 9).try_for_each(|number| raise(&write, &alarm(number))).unwrap();
        write.commit().unwrap();
        let kept = alarms(&store.snapshot().unwrap()).unwrap();
        assert!(kept.len() as u64 == MAX_ALARMS && kept.contains(&other));
        let write = store.begin().unwrap();
        acknowledge_alarms(&write).unwrap();
        raise(&write, &alarm(MAX_ALARMS)).unwrap();
        write.commit().unwrap();
        let snapshot = store.snapshot().unwrap();
        assert!(alarms(&snapshot).unwrap().iter().all(|alarm| alarm.is_acknowledged));
        assert_eq!(TopicState::read(&snapshot).unwrap().alarmed, BTreeSet::new());
        let write = store.begin().unwrap();
        unsubscribe(&write, &topic()).unwrap();
        write.commit().unwrap();
        let state = TopicState::read(&store.snapshot().unwrap()).unwrap();
        assert!(state.topics.is_empty() && state.checkpoints.is_empty());
    }
}
