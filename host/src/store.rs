//! Owns the state directory: the lock, the format, and one transactional database.
//!
//! It receives whole transactions from the commit, which is the only writer, and hands out
//! snapshots to read from.

pub mod components;
pub mod copy;
pub mod dead;
mod directory;
pub mod documents;
mod error;
pub mod followed;
pub mod history;
mod format;
mod lock;
pub mod log;
mod medium;
pub mod names;
pub mod others;
pub mod outbox;
mod packing;
pub mod pins;
pub mod retries;
mod tables;
pub mod undo;
mod usage;
mod verified_file;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::fs::Dir;
use redb::{
    Database, Durability, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction,
};

use crate::owner_only;

pub use error::StoreError;
pub use format::FORMAT;
pub use lock::LockError;
pub(crate) use lock::{LOCK, Lock};
pub use medium::{Disk, Found, Medium, Memory};
pub use tables::*;
pub use usage::Usage;

/// What the name begins with of the directory in which a backup is restored.
pub const HALF_RESTORED: &str = ".restoring-";

/// Memory for the database's pages, in bytes, unless the config says otherwise. The database's own default is 1 GiB.
pub const CACHE_BYTES: usize = 192 << 20;

/// From this size on, in bytes, the database is kept ready for a quick start after a crash: below it, it
/// is read through in a fraction of a second, and each commit is spared the work.
const LARGE: u64 = 256 << 20;

/// Up to this size, in bytes, the checksums of all pages are verified each time the database is opened, in a
/// fraction of a second. A larger one would start seconds later.
const CHECKED: u64 = LARGE;

/// The state directory of one host.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    dir: Dir,
    database: Database,
    medium: Arc<dyn Medium>,
    /// The database's file as it was when it was opened.
    found: Found,
    _lock: lock::Lock,
}

/// What happens where the database is missing although a host has run in the state directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Absent {
    /// The store is not opened: jobs, nodes and the state of plugins are lost, and the documents under the
    /// fleet's names would be replaced by empty ones.
    #[default]
    Refused,
    /// The operator has said that a new store is to be made. One that is there is refused instead.
    Created,
}

/// How durable a transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// It is on the disk when the commit returns.
    Now,
    /// It becomes durable with the next one that is.
    Later,
}

impl Store {
    /// Opens the state directory, creating it if it is missing.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_on(path, Arc::new(Disk), CACHE_BYTES, Absent::Refused)
    }

    /// Opens a state directory whose database lies on `medium`; its pages take `cache` bytes of memory at most.
    pub fn open_on(
        path: &Path,
        medium: Arc<dyn Medium>,
        cache: usize,
        absent: Absent,
    ) -> Result<Self, StoreError> {
        let (dir, lock) = directory::take(path)?;
        let file = Self::file(path);
        let is_new = medium.found(&file) == Found::Nothing;
        directory::expect_database(path, is_new, absent)?;
        let mut builder = Database::builder();
        let opened =
            medium.open(builder.set_cache_size(cache).set_check_integrity_on_open(is_checked(&file)), &file);
        let database = opened.map_err(|error| StoreError::of_open(&file, error))?;
        if file.exists() {
            // Another medium may have made it. It holds the host's secret.
            owner_only::open(&file).map_err(|source| StoreError::Directory { path: file.clone(), source })?;
        }
        let found = medium.found(&file);
        let store = Self { path: path.to_owned(), dir, database, medium, found, _lock: lock };
        format::settle(&store, absent)?;
        Ok(store)
    }

    /// Where the database of a state directory lies.
    pub fn file(state_dir: &Path) -> PathBuf {
        state_dir.join("dim.redb")
    }

    /// Where the store lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state directory, for what lies beside the database.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Whether the database's file is still the one that was opened. If it was removed or replaced, what is
    /// committed is gone at the next start.
    pub fn is_in_place(&self) -> bool {
        self.medium.found(&Self::file(&self.path)) == self.found
    }

    /// How many bytes the database takes of the disk.
    pub fn file_bytes(&self) -> u64 {
        self.medium.taken(&Self::file(&self.path))
    }

    /// How many bytes the disk has left.
    pub fn free(&self) -> Result<u64, StoreError> {
        let directory = |source| StoreError::Directory { path: self.path.clone(), source };
        self.medium.free(&self.path).map_err(directory)
    }

    /// Begins a transaction that is synced. Only the commit and what runs before it may.
    pub fn begin(&self) -> Result<WriteTransaction, StoreError> {
        Ok(self.database.begin_write()?)
    }

    /// Says whether the end of a transaction waits for the disk. A large database says with each sync
    /// which of its pages are in use, too: after a crash the whole file would have to be read to know.
    pub fn set_sync(&self, write: &mut WriteTransaction, sync: Sync) -> Result<(), StoreError> {
        write.set_durability(match sync {
            Sync::Now => Durability::Immediate,
            Sync::Later => Durability::None,
        })?;
        write.set_quick_repair(sync == Sync::Now && self.file_bytes() >= LARGE);
        Ok(())
    }

    /// What is committed now, unmoved by later commits.
    pub fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let read = self.database.begin_read()?;
        Ok(Snapshot { state: read.open_table(STATE)?, read })
    }

    /// A value of the host's own.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.database.begin_read()?;
        Ok(read.open_table(META)?.get(key)?.map(|value| value.value().to_vec()))
    }

    /// Sets a value of the host's own, before the commit runs.
    pub fn set_meta(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let write = self.begin()?;
        write.open_table(META)?.insert(key, value)?;
        write.commit()?;
        Ok(())
    }
}

fn is_checked(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.len() <= CHECKED)
}

/// Takes `count` numbers of a series that never repeats; returns the first.
pub fn next_numbers(write: &WriteTransaction, series: &str, count: u64) -> Result<u64, StoreError> {
    let mut table = write.open_table(META)?;
    let key = format!("next-{series}");
    let next = match table.get(key.as_str())? {
        Some(bytes) => number(bytes.value())?,
        None => 1,
    };
    table.insert(key.as_str(), (next + count).to_be_bytes().as_slice())?;
    Ok(next)
}

/// A number that is counted along, for the database would have to look at every row.
fn counter(meta: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<u64, StoreError> {
    meta.get(name)?.map_or(Ok(0), |bytes| number(bytes.value()))
}

fn add_to_counter(write: &WriteTransaction, name: &str, change: i64) -> Result<(), StoreError> {
    let before = counter(&write.open_table(META)?, name)?;
    set_counter(write, name, before.saturating_add_signed(change))
}

fn set_counter(write: &WriteTransaction, name: &str, value: u64) -> Result<(), StoreError> {
    write.open_table(META)?.insert(name, value.to_be_bytes().as_slice())?;
    Ok(())
}

fn number(bytes: &[u8]) -> Result<u64, StoreError> {
    let bytes = <[u8; 8]>::try_from(bytes).map_err(|_| StoreError::corrupt("meta", "not a number"))?;
    Ok(u64::from_be_bytes(bytes))
}

/// A key as it is stored, and its value.
pub type Row = Result<(Vec<u8>, Vec<u8>), StoreError>;

/// The committed state as of one moment.
#[derive(Debug)]
pub struct Snapshot {
    state: ReadOnlyTable<&'static [u8], &'static [u8]>,
    read: ReadTransaction,
}

impl Snapshot {
    /// The value of a plugin's key.
    pub fn state(&self, key: &StateKey) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.state.get(key.as_bytes())?.map(|value| value.value().to_vec()))
    }

    /// A plugin's keys and values from `range` on, in order.
    pub fn scan(
        &self,
        from: std::ops::Bound<&[u8]>,
    ) -> Result<impl Iterator<Item = Row> + use<>, StoreError> {
        let range = self.state.range::<&[u8]>((from, std::ops::Bound::Unbounded))?;
        Ok(range.map(|row| {
            let (key, value) = row?;
            Ok((key.value().to_vec(), value.value().to_vec()))
        }))
    }

    /// Any table.
    pub fn table<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        table: redb::TableDefinition<'_, K, V>,
    ) -> Result<ReadOnlyTable<K, V>, StoreError> {
        Ok(self.read.open_table(table)?)
    }
}
