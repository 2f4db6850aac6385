//! Owns the rollback data: for each checkpoint the old value of every row that has changed since, without a
//! copy of the rest.

use dim_model::entry::Generation;
use redb::{ReadableTable, Table, WriteTransaction};

use crate::{MARKS, META, PluginId, Snapshot, StoreError, UNDO, add_to_counter, counter};

/// The part of a plugin's data that a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// The context.
    EntryContext = 0,
    /// The state.
    State = 1,
    /// The timers.
    Timers = 2,
    /// The host's own names.
    Names = 3,
}

/// The key of a checkpoint: the plugin, and the first generation that a rollback to it reverts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub PluginId, pub Generation);

impl Place {
    fn prefix(self, part: Part) -> Vec<u8> {
        let Self(plugin, generation) = self;
        let mut bytes = Vec::with_capacity(32);
        bytes.extend_from_slice(&plugin.0.to_be_bytes());
        bytes.extend_from_slice(&generation.0.to_be_bytes());
        bytes.push(part as u8);
        bytes
    }
}

/// The rows that are saved with a checkpoint.
pub struct Saved<'txn> {
    table: Table<'txn, &'static [u8], Option<&'static [u8]>>,
    place: Place,
    /// The number of bytes that were added.
    pub bytes: u64,
}

impl<'txn> Saved<'txn> {
    /// Opens the rows of the checkpoint `place`.
    pub fn open(write: &'txn WriteTransaction, place: Place) -> Result<Self, StoreError> {
        Ok(Self { table: write.open_table(UNDO)?, place, bytes: 0 })
    }

    /// Saves the value of `key`, unless an older value of it is saved; returns whether it did.
    pub fn save(&mut self, part: Part, key: &[u8], before: Option<&[u8]>) -> Result<bool, StoreError> {
        let mut row = self.place.prefix(part);
        row.extend_from_slice(key);
        if self.table.get(row.as_slice())?.is_some() {
            return Ok(false);
        }
        self.table.insert(row.as_slice(), before)?;
        self.bytes += (row.len() + before.map_or(0, <[u8]>::len)) as u64;
        Ok(true)
    }

    /// Replaces a saved value.
    pub fn replace(&mut self, part: Part, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let mut row = self.place.prefix(part);
        row.extend_from_slice(key);
        self.table.insert(row.as_slice(), Some(value))?;
        Ok(())
    }

    /// The saved value of a key, if there is one.
    pub fn get(&self, part: Part, key: &[u8]) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        let mut row = self.place.prefix(part);
        row.extend_from_slice(key);
        Ok(self.table.get(row.as_slice())?.map(|value| value.value().map(<[u8]>::to_vec)))
    }

    /// Calls `take` with each key of a part and its saved value.
    pub fn each(
        &self,
        part: Part,
        mut take: impl FnMut(&[u8], Option<&[u8]>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let prefix = self.place.prefix(part);
        for row in self.table.range(prefix.as_slice()..)? {
            let (key, value) = row?;
            let Some(key) = key.value().strip_prefix(prefix.as_slice()) else { break };
            take(key, value.value())?;
        }
        Ok(())
    }

    /// Removes all rows.
    pub fn forget(&mut self) -> Result<(), StoreError> {
        let (from, to) = (self.place.prefix(Part::EntryContext), Place(self.place.0, self.place.1.next()));
        let to = to.prefix(Part::EntryContext);
        self.table.retain_in(from.as_slice()..to.as_slice(), |_, _| false)?;
        Ok(())
    }
}

/// The context that is saved with a checkpoint.
pub fn saved_context(snapshot: &Snapshot, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
    let row = snapshot.table(UNDO)?.get(place.prefix(Part::EntryContext).as_slice())?;
    Ok(row.and_then(|context| context.value().map(<[u8]>::to_vec)))
}

/// The checkpoints of a plugin, newest first, in their stored form.
pub fn checkpoints(
    table: &impl ReadableTable<(u32, u32), &'static [u8]>,
    plugin: PluginId,
) -> Result<impl Iterator<Item = Result<(Place, Vec<u8>), StoreError>>, StoreError> {
    let rows = table.range((plugin.0, 0)..=(plugin.0, u32::MAX))?.rev();
    Ok(rows.map(move |row| {
        let (key, checkpoint) = row?;
        Ok((Place(plugin, Generation(key.value().1)), checkpoint.value().to_vec()))
    }))
}

/// Writes a checkpoint.
pub fn put_checkpoint(write: &WriteTransaction, place: Place, checkpoint: &[u8]) -> Result<(), StoreError> {
    write.open_table(MARKS)?.insert((place.0.0, place.1.0), checkpoint)?;
    Ok(())
}

/// Removes a checkpoint whose rows have `bytes` bytes.
pub fn remove_checkpoint(write: &WriteTransaction, place: Place, bytes: u64) -> Result<(), StoreError> {
    write.open_table(MARKS)?.remove((place.0.0, place.1.0))?;
    add_bytes(write, -(bytes as i64))
}

/// Adds to the stored counter of the bytes of saved rows.
pub fn add_bytes(write: &WriteTransaction, change: i64) -> Result<(), StoreError> {
    if change == 0 { Ok(()) } else { add_to_counter(write, BYTES, change) }
}

const BYTES: &str = "undo-bytes";

/// The size of all saved rows in bytes.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// The size of all saved rows in bytes, as of a snapshot.
pub fn bytes_of(snapshot: &Snapshot) -> Result<u64, StoreError> {
    bytes(&snapshot.table(META)?)
}
