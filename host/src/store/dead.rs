//! Owns the rows of dead letters: events that a plugin could not handle, in the order in which they
//! were set aside.

use redb::{ReadableTableMetadata as _, WriteTransaction};

use super::{DEAD, Store, StoreError, next_numbers};
use crate::effect::DeadLetter;
use crate::ident::PluginName;

/// How many letters are kept; beyond it the oldest go, with a warning.
pub const MAX_LETTERS: u64 = 10_000;

/// Sets events aside, in the transaction of the commit.
pub fn put(write: &WriteTransaction, letters: &[DeadLetter]) -> Result<(), StoreError> {
    let first = next_numbers(write, "dead", letters.len() as u64)?;
    let mut table = write.open_table(DEAD)?;
    for (id, letter) in (first..).zip(letters) {
        let bytes = serde_json::to_vec(letter).expect("a dead letter is plain data");
        table.insert(id, bytes.as_slice())?;
    }
    while table.len()? > MAX_LETTERS {
        let Some((id, _)) = table.pop_first()? else { break };
        tracing::warn!(id = id.value(), "the oldest dead letter is dropped: there are {MAX_LETTERS}");
    }
    Ok(())
}

/// Takes a letter away; returns whether there was one.
pub fn remove(write: &WriteTransaction, id: u64) -> Result<bool, StoreError> {
    Ok(write.open_table(DEAD)?.remove(id)?.is_some())
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
        let (id, bytes) = row?;
        let letter = read(bytes.value())?;
        if plugin.is_none_or(|name| *name == letter.plugin) {
            letters.push((id.value(), letter));
        }
        if letters.len() == limit {
            break;
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
