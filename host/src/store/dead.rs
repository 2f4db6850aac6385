//! Owns the rows of dead letters: events that a plugin could not handle, in the order in which they
//! were set aside.

use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};
use serde::Deserialize;

use super::{DEAD, META, Store, StoreError, add_to_counter, counter, next_numbers, set_counter};
use crate::effect::DeadLetter;
use crate::entry::Generation;
use crate::ident::PluginName;

/// How many letters are kept.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// How many, default 10,000.
    pub max_count: u64,
    /// Bytes, default 256 MiB.
    pub max_bytes: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self { max_count: 10_000, max_bytes: 256 << 20 }
    }
}

/// Counted along: the table would have to be read.
const BYTES: &str = "dead-bytes";

/// Sets events aside, in the transaction of the commit.
/// Beyond what may be kept the oldest go, with a warning; returns how many did.
pub fn put(write: &WriteTransaction, letters: &[DeadLetter], kept: &Quota) -> Result<u64, StoreError> {
    let first = next_numbers(write, "dead", letters.len() as u64)?;
    let mut table = write.open_table(DEAD)?;
    let mut held = counter(&write.open_table(META)?, BYTES)?;
    for (id, letter) in (first..).zip(letters) {
        let bytes = serde_json::to_vec(letter).expect("a dead letter is plain data");
        table.insert(id, bytes.as_slice())?;
        held += bytes.len() as u64;
    }
    let mut dropped = 0;
    while table.len()? > kept.max_count || held > kept.max_bytes {
        let Some((_, letter)) = table.pop_first()? else { break };
        held = held.saturating_sub(letter.value().len() as u64);
        dropped += 1;
    }
    if dropped > 0 {
        tracing::warn!(dropped, "the oldest dead letters are dropped: there are too many");
    }
    set_counter(write, BYTES, held)?;
    Ok(dropped)
}

/// The bytes of all letters.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// Takes a letter away, if there is one.
pub fn take(write: &WriteTransaction, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let Some(bytes) = write.open_table(DEAD)?.remove(id)?.map(|bytes| bytes.value().to_vec()) else {
        return Ok(None);
    };
    add_to_counter(write, BYTES, -(bytes.len() as i64))?;
    read(&bytes).map(Some)
}

/// Takes away the letters of a plugin from number `from` on that codes from `first` on have set aside.
pub fn retract(
    write: &WriteTransaction,
    plugin: &PluginName,
    from: u64,
    first: Generation,
) -> Result<(), StoreError> {
    let mut gone = Vec::new();
    for row in write.open_table(DEAD)?.range(from..)? {
        let (id, letter) = row?;
        let letter = read(letter.value())?;
        if letter.plugin == *plugin && letter.by >= first {
            gone.push(id.value());
        }
    }
    gone.into_iter().try_for_each(|id| take(write, id).map(drop))
}

/// The dead letters from `after` on, at most `limit`, those of `plugin` if it is given.
pub fn list(
    store: &Store,
    plugin: Option<&PluginName>,
    after: Option<u64>,
    limit: usize,
) -> Result<Vec<(u64, DeadLetter)>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    let mut letters = Vec::new();
    for row in table.range(after.map_or(0, |id| id.saturating_add(1))..)? {
        if letters.len() == limit {
            break;
        }
        let (id, bytes) = row?;
        let letter = read(bytes.value())?;
        if plugin.is_none_or(|name| *name == letter.plugin) {
            letters.push((id.value(), letter));
        }
    }
    Ok(letters)
}

/// One dead letter.
pub fn get(store: &Store, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    table.get(id)?.map(|bytes| read(bytes.value())).transpose()
}

/// How many dead letters there are.
pub fn count(store: &Store) -> Result<u64, StoreError> {
    Ok(store.snapshot()?.table(DEAD)?.len()?)
}

fn read(bytes: &[u8]) -> Result<DeadLetter, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("dead letter", error))
}
