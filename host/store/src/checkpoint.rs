//! Owns the checkpoints of plugins: the row, cursor and context of a plugin before a takeover, for a rollback.
//! The old values of rows that change afterwards are saved with the checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use dim_model::entry::Offset;
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::entry_context::EntryContext;
use crate::plugin_registry::{self, Row};
use crate::probation::Probation;
use crate::rollback_rows::{self, Place};
use crate::{MARKS, PluginId, Snapshot, StoreError};

/// The data of a plugin from before a takeover.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The row.
    pub before: Row,
    /// The cursor.
    pub cursor: u64,
    /// The size of the state in bytes.
    pub state_size: u64,
    /// The number of the host's next dead letter.
    pub next_dead: u64,
    /// The number of the host's next publish.
    pub next_outbox: u64,
    /// The time at which the checkpoint was made.
    pub since: Timestamp,
    /// The probation of the code since then; `None` once it is confirmed.
    pub probation: Option<Probation>,
    /// The number of the newest change since then.
    pub change: u64,
    /// The size of the rows that are saved with it, in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// The next entry that the code before would have read.
    pub fn cursor(&self) -> Offset {
        Offset(self.cursor)
    }

    /// Writes the checkpoint at `place`.
    pub fn put(&self, write: &WriteTransaction, place: Place) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(self).expect("a checkpoint is plain data");
        rollback_rows::put_checkpoint(write, place, &bytes)
    }
}

/// The checkpoints of a plugin, newest first.
pub fn checkpoints(snapshot: &Snapshot, plugin: PluginId) -> Result<Vec<(Place, Checkpoint)>, StoreError> {
    read(&snapshot.table(MARKS)?, plugin)
}

/// The checkpoints of a plugin, newest first, within the transaction of the commit.
pub fn checkpoints_within(
    write: &WriteTransaction,
    plugin: PluginId,
) -> Result<Vec<(Place, Checkpoint)>, StoreError> {
    read(&write.open_table(MARKS)?, plugin)
}

/// The newest checkpoint of a plugin, within the transaction of the commit.
pub fn newest_within(
    write: &WriteTransaction,
    plugin: PluginId,
) -> Result<Option<(Place, Checkpoint)>, StoreError> {
    let table = write.open_table(MARKS)?;
    let newest = rollback_rows::checkpoints(&table, plugin)?.next().transpose()?;
    newest.map(|(place, checkpoint)| Ok((place, decode(&checkpoint)?))).transpose()
}

/// Ends the probation of a plugin's code without a verdict; returns the number of its change.
pub fn end_probation(write: &WriteTransaction, plugin: PluginId) -> Result<Option<u64>, StoreError> {
    let newest = newest_within(write, plugin)?;
    let Some((place, checkpoint)) = newest.filter(|(_, checkpoint)| checkpoint.probation.is_some()) else {
        return Ok(None);
    };
    let change = checkpoint.change;
    Checkpoint { probation: None, ..checkpoint }.put(write, place)?;
    Ok(Some(change))
}

/// The checkpoint from before the code that is on probation; `None` if no code is.
pub fn of_probation(
    snapshot: &Snapshot,
    plugin: PluginId,
) -> Result<Option<(Place, Checkpoint)>, StoreError> {
    let newest = checkpoints(snapshot, plugin)?.into_iter().next();
    Ok(newest.filter(|(_, checkpoint)| checkpoint.probation.is_some()))
}

/// The context of a plugin as of a checkpoint; `None` if it had none yet.
pub fn context(snapshot: &Snapshot, place: Place) -> Result<Option<EntryContext>, StoreError> {
    let saved = rollback_rows::saved_context(snapshot, place)?;
    saved.map(|context| EntryContext::from_bytes(&context)).transpose()
}

/// The checkpoints of all plugins that are on probation.
pub fn on_probation(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Checkpoint>, StoreError> {
    let mut all = BTreeMap::new();
    for (name, row) in plugin_registry::rows(snapshot)? {
        if let Some((_, checkpoint)) = of_probation(snapshot, row.id)? {
            all.insert(name, checkpoint);
        }
    }
    Ok(all)
}

/// The digests of the components that rows and checkpoints refer to.
pub fn components(snapshot: &Snapshot) -> Result<BTreeSet<String>, StoreError> {
    let mut digests = BTreeSet::new();
    for row in plugin_registry::rows(snapshot)?.into_values() {
        digests.insert(row.code.digest);
        digests.extend(
            checkpoints(snapshot, row.id)?.into_iter().map(|(_, checkpoint)| checkpoint.before.code.digest),
        );
    }
    Ok(digests)
}

fn read(
    table: &impl ReadableTable<(u32, u32), &'static [u8]>,
    plugin: PluginId,
) -> Result<Vec<(Place, Checkpoint)>, StoreError> {
    let checkpoints = rollback_rows::checkpoints(table, plugin)?;
    checkpoints
        .map(|row| {
            let (place, checkpoint) = row?;
            Ok((place, decode(&checkpoint)?))
        })
        .collect()
}

fn decode(bytes: &[u8]) -> Result<Checkpoint, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("marks", error))
}
