//! Owns the rows of the plugins in the store: which there are, their numbers and versions.

use std::collections::BTreeMap;

use redb::{ReadableTable, Table};
use serde::{Deserialize, Serialize};

use super::{Batch, Effects, Inspection, Timers, World};
use crate::entry::Offset;
use crate::ident::PluginName;
use crate::store::{self, CURSORS, PLUGINS, PluginId, Snapshot, StateKey, Store, StoreError, TIMERS, WORLDS};
use crate::time::Timestamp;

/// What the store knows of a plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number in keys.
    pub id: PluginId,
    /// The component that ran last.
    #[serde(flatten)]
    pub code: Code,
    /// The version of its state's layout; none before its first start.
    pub state_version: Option<u32>,
}

/// Which component a plugin runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Code {
    /// Its version.
    pub version: String,
    /// Its digest, in hex.
    pub digest: String,
    /// Where it was installed from, if it was while the host ran: then it lies in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installed: Option<String>,
}

/// A plugin as it stands in the store.
#[derive(Debug)]
pub struct Stored {
    /// Its row.
    pub row: Row,
    /// The next entry that it will read.
    pub cursor: Offset,
    /// What it can read no more, for it was away longer than the log is kept.
    pub missed: Option<Missed>,
    /// Its world as of the cursor.
    pub world: World,
    /// Its effects: none, on top of its timers and the size of its state.
    pub effects: Effects,
}

/// A time whose entries were trimmed before a plugin read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The time of the last entry that it handled.
    pub since: Timestamp,
    /// The time of the first entry that is left.
    pub until: Timestamp,
}

/// Enters a plugin with its component, before the commit runs. A new one starts at `head`.
pub fn enter(
    store: &Store,
    name: &PluginName,
    inspection: &Inspection,
    installed: Option<String>,
    head: Offset,
) -> Result<Stored, StoreError> {
    let known = row(&store.snapshot()?.table(PLUGINS)?, name)?;
    let entered = Row {
        // The first number that is given is 1.
        id: known.as_ref().map_or(PluginId(0), |known| known.id),
        code: Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            installed,
        },
        state_version: known.as_ref().and_then(|known| known.state_version),
    };
    // The disk may be full: what stands there already is not written again.
    let row = if known.as_ref() == Some(&entered) { entered } else { put(store, name, entered, head)? };
    stored(store, name, row)
}

/// Writes the row of a plugin; one without a number gets the next one, and starts at `head`.
fn put(store: &Store, name: &PluginName, mut row: Row, head: Offset) -> Result<Row, StoreError> {
    let write = store.begin()?;
    if row.id == PluginId(0) {
        let number = u32::try_from(store::next_numbers(&write, "plugins", 1)?);
        let number = number.map_err(|_| StoreError::corrupt("plugins", "their numbers are used up"))?;
        row.id = PluginId(number);
        write.open_table(CURSORS)?.insert(number, (head.0, 0))?;
    }
    put_row(&mut write.open_table(PLUGINS)?, name, &row)?;
    write.commit()?;
    Ok(row)
}

/// The number and the cursor of a plugin, if it was ever entered.
pub fn known(snapshot: &Snapshot, name: &PluginName) -> Result<Option<(PluginId, Offset)>, StoreError> {
    let Some(row) = row(&snapshot.table(PLUGINS)?, name)? else { return Ok(None) };
    let cursor = snapshot.table(CURSORS)?.get(row.id.0)?.map(|cursor| cursor.value().0);
    Ok(cursor.map(|cursor| (row.id, Offset(cursor))))
}

/// Which of these plugins has read least of the log, and how far.
pub fn furthest_behind<'a>(
    snapshot: &Snapshot,
    names: impl IntoIterator<Item = &'a PluginName>,
) -> Result<Option<(Offset, &'a PluginName)>, StoreError> {
    let mut least = None;
    for name in names {
        if let Some((_, cursor)) = known(snapshot, name)?
            && least.is_none_or(|(before, _)| cursor < before)
        {
            least = Some((cursor, name));
        }
    }
    Ok(least)
}

fn stored(store: &Store, name: &PluginName, row: Row) -> Result<Stored, StoreError> {
    let snapshot = store.snapshot()?;
    let id = row.id;
    let cursor = snapshot.table(CURSORS)?.get(id.0)?.map(|cursor| cursor.value());
    let (cursor, size) = cursor.ok_or_else(|| StoreError::corrupt("cursors", format!("{name} has none")))?;
    let cursor = Offset(cursor);
    let world = match snapshot.table(WORLDS)?.get(id.0)? {
        Some(bytes) => {
            serde_json::from_slice(bytes.value()).map_err(|error| StoreError::corrupt("worlds", error))?
        }
        None => World::default(),
    };
    let mut timers = Timers::default();
    let prefix = StateKey::new(id, b"");
    for stored in snapshot.table(TIMERS)?.range(prefix.as_bytes()..)? {
        let (key, at) = stored?;
        let Some(key) = StateKey::strip(id, key.value()) else { break };
        timers.put(&String::from_utf8_lossy(key), Some(Timestamp(at.value())));
    }
    let (cursor, missed) = match store.read_log(cursor, 1)?.first() {
        Some(first) if first.offset > cursor => {
            (first.offset, Some(Missed { since: world.time(), until: first.time }))
        }
        _ => (cursor, None),
    };
    let batch = Batch::new(name.clone(), id, 1, cursor);
    Ok(Stored { row, cursor, missed, world, effects: Effects::new(batch, timers, size) })
}

fn row(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &PluginName,
) -> Result<Option<Row>, StoreError> {
    let Some(bytes) = table.get(name.as_str())? else { return Ok(None) };
    let row = serde_json::from_slice(bytes.value()).map_err(|error| StoreError::corrupt("plugins", error))?;
    Ok(Some(row))
}

fn put_row(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    name: &PluginName,
    row: &Row,
) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(row).expect("a row is plain data");
    table.insert(name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// What the store knows of a plugin, as of what is committed.
pub fn read(store: &Store, name: &PluginName) -> Result<Option<Stored>, StoreError> {
    match row(&store.snapshot()?.table(PLUGINS)?, name)? {
        Some(row) => stored(store, name, row).map(Some),
        None => Ok(None),
    }
}

/// The plugins whose component was installed while a host ran.
pub fn installed(snapshot: &Snapshot) -> Result<BTreeMap<PluginName, Code>, StoreError> {
    let mut installed = BTreeMap::new();
    for entry in snapshot.table(PLUGINS)?.iter()? {
        let (name, bytes) = entry?;
        let row: Row =
            serde_json::from_slice(bytes.value()).map_err(|error| StoreError::corrupt("plugins", error))?;
        if row.code.installed.is_some() {
            let name = name.value().parse().map_err(|error| StoreError::corrupt("plugins", error))?;
            installed.insert(name, row.code);
        }
    }
    Ok(installed)
}

/// Notes that other code has taken over.
pub fn set_code(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    name: &PluginName,
    code: &Code,
) -> Result<(), StoreError> {
    if let Some(mut row) = row(table, name)? {
        row.code = code.clone();
        put_row(table, name, &row)?;
    }
    Ok(())
}

/// Notes the version of the state's layout after a start.
pub fn set_state_version(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    name: &PluginName,
    version: u32,
) -> Result<(), StoreError> {
    if let Some(mut row) = row(table, name)? {
        row.state_version = Some(version);
        put_row(table, name, &row)?;
    }
    Ok(())
}
