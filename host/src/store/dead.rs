//! Owns the rows of dead letters: events that a plugin could not handle, in the order in which they
//! were set aside.

use redb::{ReadableTableMetadata as _, WriteTransaction};

use super::{DEAD, META, Store, StoreError, counter, next_numbers, set_counter};
use crate::effect::DeadLetter;
use crate::ident::PluginName;

/// How many letters are kept; beyond it the oldest go, with a warning.
const MAX_LETTERS: u64 = 10_000;

/// Bytes that the letters may have; beyond it the oldest go, too.
const MAX_BYTES: u64 = 256 << 20;

/// Counted along: the table would have to be read.
const BYTES: &str = "dead-bytes";

/// Sets events aside, in the transaction of the commit.
pub fn put(write: &WriteTransaction, letters: &[DeadLetter]) -> Result<(), StoreError> {
    let first = next_numbers(write, "dead", letters.len() as u64)?;
    let mut table = write.open_table(DEAD)?;
    let mut held = counter(&write.open_table(META)?, BYTES)?;
    for (id, letter) in (first..).zip(letters) {
        let bytes = serde_json::to_vec(letter).expect("a dead letter is plain data");
        table.insert(id, bytes.as_slice())?;
        held += bytes.len() as u64;
    }
    let mut dropped = 0;
    while table.len()? > MAX_LETTERS || held > MAX_BYTES {
        let Some((_, letter)) = table.pop_first()? else { break };
        held = held.saturating_sub(letter.value().len() as u64);
        dropped += 1;
    }
    if dropped > 0 {
        tracing::warn!(dropped, "the oldest dead letters are dropped: there are too many");
    }
    set_counter(write, BYTES, held)
}

/// Takes a letter away, if there is one.
pub fn take(write: &WriteTransaction, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let Some(bytes) = write.open_table(DEAD)?.remove(id)?.map(|bytes| bytes.value().to_vec()) else {
        return Ok(None);
    };
    let held = counter(&write.open_table(META)?, BYTES)?;
    set_counter(write, BYTES, held.saturating_sub(bytes.len() as u64))?;
    read(&bytes).map(Some)
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
