//! Owns the marks: what a plugin was before other code took over, for the way back. What has changed since is
//! saved row by row with the mark.

use std::collections::{BTreeMap, BTreeSet};

use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::World;
use super::probation::Probation;
use super::roster::{self, Row};
use crate::entry::Offset;
use crate::ident::PluginName;
use crate::store::undo::{self, Place};
use crate::store::{MARKS, PluginId, Snapshot, StoreError};
use crate::time::Timestamp;

/// What a plugin was before other code took over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// Its row.
    pub before: Row,
    /// Its cursor.
    pub cursor: u64,
    /// Bytes of its state.
    pub state_size: u64,
    /// The number of the next dead letter of the host.
    pub next_dead: u64,
    /// The number of the next publish of the host.
    pub next_outbox: u64,
    /// When it was made.
    pub since: Timestamp,
    /// How the code since then does; none once it is confirmed.
    pub probation: Option<Probation>,
    /// The number of the newest change since then.
    pub change: u64,
    /// Bytes of the rows that are saved with it.
    pub bytes: u64,
}

impl Mark {
    /// The next entry that the code before it would have read.
    pub fn cursor(&self) -> Offset {
        Offset(self.cursor)
    }

    /// Puts it in its place.
    pub fn put(&self, write: &WriteTransaction, place: Place) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(self).expect("a mark is plain data");
        undo::put_mark(write, place, &bytes)
    }
}

/// The marks of a plugin, newest first.
pub fn marks(snapshot: &Snapshot, plugin: PluginId) -> Result<Vec<(Place, Mark)>, StoreError> {
    read(&snapshot.table(MARKS)?, plugin)
}

/// The marks of a plugin by now, newest first, within the transaction of the commit.
pub fn marks_within(write: &WriteTransaction, plugin: PluginId) -> Result<Vec<(Place, Mark)>, StoreError> {
    read(&write.open_table(MARKS)?, plugin)
}

/// The newest mark of a plugin by now, within the transaction of the commit.
pub fn newest_within(
    write: &WriteTransaction,
    plugin: PluginId,
) -> Result<Option<(Place, Mark)>, StoreError> {
    let table = write.open_table(MARKS)?;
    let newest = undo::marks(&table, plugin)?.next().transpose()?;
    newest.map(|(place, mark)| Ok((place, decode(&mark)?))).transpose()
}

/// Ends the probation of a plugin's code, which will not be watched any more; returns the number of the change
/// that it was on probation for.
pub fn end_probation(write: &WriteTransaction, plugin: PluginId) -> Result<Option<u64>, StoreError> {
    let newest = newest_within(write, plugin)?;
    let Some((place, mark)) = newest.filter(|(_, mark)| mark.probation.is_some()) else { return Ok(None) };
    let change = mark.change;
    Mark { probation: None, ..mark }.put(write, place)?;
    Ok(Some(change))
}

/// The mark from before the code of a plugin that is on probation; none if it is not.
pub fn of_probation(snapshot: &Snapshot, plugin: PluginId) -> Result<Option<(Place, Mark)>, StoreError> {
    let newest = marks(snapshot, plugin)?.into_iter().next();
    Ok(newest.filter(|(_, mark)| mark.probation.is_some()))
}

/// The world of a plugin as of a mark; none if it had none yet.
pub fn world(snapshot: &Snapshot, place: Place) -> Result<Option<World>, StoreError> {
    let saved = undo::saved_world(snapshot, place)?;
    saved.map(|world| World::from_bytes(&world)).transpose()
}

/// The marks of all plugins that are on probation.
pub fn on_probation(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Mark>, StoreError> {
    let mut all = BTreeMap::new();
    for (name, row) in roster::rows(snapshot)? {
        if let Some((_, mark)) = of_probation(snapshot, row.id)? {
            all.insert(name, mark);
        }
    }
    Ok(all)
}

/// The digests of the components that the store speaks of.
pub fn components(snapshot: &Snapshot) -> Result<BTreeSet<String>, StoreError> {
    let mut digests = BTreeSet::new();
    for row in roster::rows(snapshot)?.into_values() {
        digests.insert(row.code.digest);
        digests.extend(marks(snapshot, row.id)?.into_iter().map(|(_, mark)| mark.before.code.digest));
    }
    Ok(digests)
}

fn read(
    table: &impl ReadableTable<(u32, u32), &'static [u8]>,
    plugin: PluginId,
) -> Result<Vec<(Place, Mark)>, StoreError> {
    let marks = undo::marks(table, plugin)?;
    marks
        .map(|row| {
            let (place, mark) = row?;
            Ok((place, decode(&mark)?))
        })
        .collect()
}

fn decode(bytes: &[u8]) -> Result<Mark, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("marks", error))
}
