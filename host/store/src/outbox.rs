//! Owns the rows of the outbox: committed publishes that the backend has not accepted yet, in the order of
//! their commits. It also counts them for each plugin.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Timestamp;
use prost::Message as _;
use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};

use crate::effect::Publish;
use crate::{OUTBOX, Snapshot, Store, StoreError, add_to_counter, counter, next_numbers};

/// Adds publishes to the outbox, in the transaction of the commit.
pub fn enqueue(
    write: &WriteTransaction,
    plugin: Option<&PluginName>,
    publishes: &[Publish],
    now: Timestamp,
) -> Result<(), StoreError> {
    enqueue_at(write, plugin, publishes.iter().map(|publish| (publish, now)))
}

/// Adds publishes, each with its time.
pub(crate) fn enqueue_at<'a>(
    write: &WriteTransaction,
    plugin: Option<&PluginName>,
    publishes: impl ExactSizeIterator<Item = (&'a Publish, Timestamp)>,
) -> Result<(), StoreError> {
    let first = next_numbers(write, "outbox", publishes.len() as u64)?;
    let mut table = write.open_table(OUTBOX)?;
    let mut added = 0;
    for (number, (publish, time)) in (first..).zip(publishes) {
        let row = Row {
            plugin: plugin.map(PluginName::to_string),
            topic: publish.topic.to_string(),
            data: publish.data.clone(),
            time: time.0,
            is_void: false,
        };
        let row = row.encode_to_vec();
        table.insert(number, row.as_slice())?;
        added += row.len() as i64;
    }
    add_to_counter(write, BYTES, added)
}

/// The numbers of all waiting publishes.
pub fn numbers(snapshot: &Snapshot) -> Result<Vec<u64>, StoreError> {
    snapshot.table(OUTBOX)?.iter()?.map(|row| Ok(row?.0.value())).collect()
}

/// Removes publishes by their numbers, after they were accepted or have expired.
pub fn forget(write: &WriteTransaction, numbers: &[u64]) -> Result<(), StoreError> {
    let mut table = write.open_table(OUTBOX)?;
    let mut removed = 0;
    match numbers {
        // One pass over neighbours costs less than as many searches.
        [lowest, .., highest] if numbers.is_sorted() && highest - lowest < 2 * numbers.len() as u64 => {
            table.retain_in(*lowest..=*highest, |number, row| {
                let is_kept = numbers.binary_search(&number).is_err();
                removed += if is_kept { 0 } else { row.len() as i64 };
                is_kept
            })?;
        }
        _ => {
            for number in numbers {
                removed += table.remove(number)?.map_or(0, |row| row.value().len() as i64);
            }
        }
    }
    drop(table);
    add_to_counter(write, BYTES, -removed)
}

/// Voids the waiting publishes of a plugin from number `first` on. Their rows stay without data until their
/// turn, because they are counted.
pub fn void_since(write: &WriteTransaction, plugin: &PluginName, first: u64) -> Result<(), StoreError> {
    let mut table = write.open_table(OUTBOX)?;
    let mut void = Vec::new();
    for row in table.range(first..)? {
        let (number, row) = row?;
        if Label::read(row.value())?.owner()?.as_ref() == Some(plugin) {
            void.push((number.value(), Row::read(row.value())?, row.value().len() as i64));
        }
    }
    let mut change = 0;
    for (number, row, bytes) in void {
        let row = Row { data: Bytes::new(), is_void: true, ..row }.encode_to_vec();
        change += row.len() as i64 - bytes;
        table.insert(number, row.as_slice())?;
    }
    drop(table);
    add_to_counter(write, BYTES, change)
}

/// The name of the stored counter of the outbox's bytes.
pub(super) const BYTES: &str = "outbox-bytes";

/// The size of all waiting publishes in bytes.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// The number of waiting publishes, and the time since which the oldest waits.
pub fn waiting(store: &Store) -> Result<(u64, Option<Timestamp>), StoreError> {
    let table = store.snapshot()?.table(OUTBOX)?;
    let oldest = match table.first()? {
        Some((_, row)) => Some(Timestamp(Label::read(row.value())?.time)),
        None => None,
    };
    Ok((table.len()?, oldest))
}

/// A waiting publish. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Row {
    /// The plugin that published it; `None` for the API.
    #[prost(string, optional, tag = "1")]
    plugin: Option<String>,
    #[prost(string, tag = "2")]
    topic: String,
    /// The bytes of the message.
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
    /// The time of the commit, in nanoseconds since 1970.
    #[prost(fixed64, tag = "4")]
    pub time: u64,
    /// Whether a rollback has voided it.
    #[prost(bool, tag = "5")]
    pub is_void: bool,
}

impl Row {
    /// The topic.
    pub fn topic(&self) -> Result<Topic, StoreError> {
        self.topic.parse().map_err(|error| StoreError::corrupt("outbox", error))
    }

    /// Decodes a row.
    pub fn read(bytes: &[u8]) -> Result<Self, StoreError> {
        Row::decode(bytes).map_err(|error| StoreError::corrupt("outbox", error))
    }
}

/// The header of a [`Row`], decoded without its data, which may be large.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Label {
    #[prost(string, optional, tag = "1")]
    plugin: Option<String>,
    #[prost(string, tag = "2")]
    topic: String,
    #[prost(fixed64, tag = "4")]
    time: u64,
}

impl Label {
    /// Decodes the header of a row.
    pub fn read(bytes: &[u8]) -> Result<Self, StoreError> {
        Label::decode(bytes).map_err(|error| StoreError::corrupt("outbox", error))
    }

    /// The topic.
    pub fn topic(&self) -> Result<Topic, StoreError> {
        self.topic.parse().map_err(|error| StoreError::corrupt("outbox", error))
    }

    /// The plugin that published it; `None` for the API.
    pub fn owner(&self) -> Result<Option<PluginName>, StoreError> {
        let owner = self.plugin.as_deref().map(str::parse).transpose();
        owner.map_err(|error| StoreError::corrupt("outbox", error))
    }
}

/// The number of waiting publishes of each plugin and of the API, kept in memory for their quotas.
#[derive(Debug, Default)]
pub struct Backlog(Mutex<BTreeMap<Option<PluginName>, Arc<AtomicUsize>>>);

impl Backlog {
    /// Counts the rows of the store. Called once, before any publish is added.
    pub fn restore(store: &Store) -> Result<Self, StoreError> {
        let backlog = Self::default();
        for row in store.snapshot()?.table(OUTBOX)?.iter()? {
            backlog.added(Label::read(row?.1.value())?.owner()?.as_ref(), 1);
        }
        Ok(backlog)
    }

    /// The counter of the waiting publishes of a plugin, or of the API.
    pub fn length(&self, owner: Option<&PluginName>) -> Arc<AtomicUsize> {
        let mut lengths = self.0.lock().expect("no one panics while holding the lengths");
        lengths.entry(owner.cloned()).or_default().clone()
    }

    /// Adds to the count of a plugin, or of the API.
    pub fn added(&self, owner: Option<&PluginName>, count: usize) {
        self.length(owner).fetch_add(count, Ordering::Relaxed);
    }
}
