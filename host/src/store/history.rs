//! Owns the rows of changes of plugins' code, in the order in which they began.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};

use super::{HISTORY, Snapshot, StoreError, next_numbers};
use crate::change::{Change, State};
use crate::ident::PluginName;

/// Changes that are kept; beyond it the oldest go.
const KEPT: u64 = 10_000;

/// Puts a new change on record; returns its number.
pub fn add(write: &WriteTransaction, change: &Change) -> Result<u64, StoreError> {
    let number = next_numbers(write, "changes", 1)?;
    put(write, number, change)?;
    let mut table = write.open_table(HISTORY)?;
    while table.len()? > KEPT {
        table.pop_first()?;
    }
    Ok(number)
}

/// Changes what is on record, if it still is; returns what it says now.
pub fn amend(
    write: &WriteTransaction,
    number: u64,
    amend: impl FnOnce(&mut Change),
) -> Result<Option<Change>, StoreError> {
    let found = write.open_table(HISTORY)?.get(number)?.map(|change| decode(change.value())).transpose()?;
    let Some(mut change) = found else { return Ok(None) };
    amend(&mut change);
    put(write, number, &change)?;
    Ok(Some(change))
}

fn put(write: &WriteTransaction, number: u64, change: &Change) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(&change.for_the_record()).expect("a change is plain data");
    write.open_table(HISTORY)?.insert(number, bytes.as_slice())?;
    Ok(())
}

/// The change of a number, if it is still on record.
pub fn get(snapshot: &Snapshot, number: u64) -> Result<Option<Change>, StoreError> {
    snapshot.table(HISTORY)?.get(number)?.map(|change| decode(change.value())).transpose()
}

/// Goes through the changes of a plugin, newest first, until `each` breaks.
pub fn walk(
    snapshot: &Snapshot,
    plugin: &PluginName,
    mut each: impl FnMut(Change) -> ControlFlow<()>,
) -> Result<(), StoreError> {
    for row in snapshot.table(HISTORY)?.iter()?.rev() {
        let change = decode(row?.1.value())?;
        if change.plugin == *plugin && each(change).is_break() {
            break;
        }
    }
    Ok(())
}

/// The changes of a plugin, newest first, at most `limit`.
pub fn of(snapshot: &Snapshot, plugin: &PluginName, limit: usize) -> Result<Vec<Change>, StoreError> {
    let mut changes = Vec::new();
    if limit == 0 {
        return Ok(changes);
    }
    walk(snapshot, plugin, |change| {
        changes.push(change);
        if changes.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(changes)
}

/// How many changes are looked at for those that were taken back last: what lies further back has been seen, or shows
/// where the history is asked for.
const RECENT: usize = 200;

/// The plugins whose newest change was taken back, and that change.
pub fn taken_back(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Change>, StoreError> {
    let mut newest = BTreeMap::new();
    for row in snapshot.table(HISTORY)?.iter()?.rev().take(RECENT) {
        let change = decode(row?.1.value())?;
        newest.entry(change.plugin.clone()).or_insert(change);
    }
    newest.retain(|_, change| change.state == State::TakenBack);
    Ok(newest)
}

fn decode(bytes: &[u8]) -> Result<Change, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("changes", error))
}
