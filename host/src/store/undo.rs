//! Owns what a plugin had before other code took over: the old value of each row that has changed since, and
//! no copy of the rest. A mark says since when; its rows go with it.

use redb::{ReadableTable, Table, WriteTransaction};

use super::{MARKS, META, PluginId, Snapshot, StoreError, UNDO, add_to_counter, counter};
use crate::entry::Generation;

/// What a row was part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// The world.
    World = 0,
    /// The state.
    State = 1,
    /// The timers.
    Timers = 2,
    /// The host's own names.
    Names = 3,
}

/// A mark: the plugin, and the first code whose work can be taken back to it.
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

/// The rows that are saved for a mark.
pub struct Saved<'txn> {
    table: Table<'txn, &'static [u8], Option<&'static [u8]>>,
    place: Place,
    /// Bytes that were added.
    pub bytes: u64,
}

impl<'txn> Saved<'txn> {
    /// Those of `place`.
    pub fn open(write: &'txn WriteTransaction, place: Place) -> Result<Self, StoreError> {
        Ok(Self { table: write.open_table(UNDO)?, place, bytes: 0 })
    }

    /// Saves what stood under `key`, unless an older value of it is saved; returns whether it was.
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

    /// Puts a value in the place of a saved one.
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

    /// Gives each key of a part with its saved value.
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

    /// Forgets all of them.
    pub fn forget(&mut self) -> Result<(), StoreError> {
        let (from, to) = (self.place.prefix(Part::World), Place(self.place.0, self.place.1.next()));
        let to = to.prefix(Part::World);
        self.table.retain_in(from.as_slice()..to.as_slice(), |_, _| false)?;
        Ok(())
    }
}

/// The world that is saved for a mark.
pub fn saved_world(snapshot: &Snapshot, place: Place) -> Result<Option<Vec<u8>>, StoreError> {
    let row = snapshot.table(UNDO)?.get(place.prefix(Part::World).as_slice())?;
    Ok(row.and_then(|world| world.value().map(<[u8]>::to_vec)))
}

/// The marks of a plugin, newest first, as they are stored.
pub fn marks(
    table: &impl ReadableTable<(u32, u32), &'static [u8]>,
    plugin: PluginId,
) -> Result<impl Iterator<Item = Result<(Place, Vec<u8>), StoreError>>, StoreError> {
    let rows = table.range((plugin.0, 0)..=(plugin.0, u32::MAX))?.rev();
    Ok(rows.map(move |row| {
        let (key, mark) = row?;
        Ok((Place(plugin, Generation(key.value().1)), mark.value().to_vec()))
    }))
}

/// Puts a mark.
pub fn put_mark(write: &WriteTransaction, place: Place, mark: &[u8]) -> Result<(), StoreError> {
    write.open_table(MARKS)?.insert((place.0.0, place.1.0), mark)?;
    Ok(())
}

/// Forgets a mark, whose rows have `bytes` bytes.
pub fn remove_mark(write: &WriteTransaction, place: Place, bytes: u64) -> Result<(), StoreError> {
    write.open_table(MARKS)?.remove((place.0.0, place.1.0))?;
    add_bytes(write, -(bytes as i64))
}

/// Counts the bytes of saved rows along.
pub fn add_bytes(write: &WriteTransaction, change: i64) -> Result<(), StoreError> {
    if change == 0 { Ok(()) } else { add_to_counter(write, BYTES, change) }
}

const BYTES: &str = "undo-bytes";

/// The bytes of all saved rows.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// The bytes of all saved rows, as of a snapshot.
pub fn bytes_of(snapshot: &Snapshot) -> Result<u64, StoreError> {
    bytes(&snapshot.table(META)?)
}
