//! Owns the rows of changes of plugins' code, in the order in which the changes began.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use dim_model::ident::PluginName;
use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};

use crate::change::{Change, State};
use crate::{HISTORY, Snapshot, StoreError, next_numbers};

/// Most changes that are kept; beyond that the oldest are removed.
const KEPT: u64 = 10_000;

/// Records a new change; returns its number.
pub fn add(write: &WriteTransaction, change: &Change) -> Result<u64, StoreError> {
    let number = next_numbers(write, "changes", 1)?;
    put(write, number, change)?;
    let mut table = write.open_table(HISTORY)?;
    while table.len()? > KEPT {
        table.pop_first()?;
    }
    Ok(number)
}

/// Updates the record of a change, if it still exists; returns the new record.
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

/// The change with a number, if it is still recorded.
pub fn get(snapshot: &Snapshot, number: u64) -> Result<Option<Change>, StoreError> {
    snapshot.table(HISTORY)?.get(number)?.map(|change| decode(change.value())).transpose()
}

/// Visits the changes of a plugin, newest first, until `each` breaks.
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

/// Most changes that are examined for the last rollbacks. Older ones are visible in the history of the plugin.
const RECENT: usize = 200;

/// The plugins whose newest change was taken back, with that change.
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
