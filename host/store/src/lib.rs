//! The durable state of a host. It owns the state directory and its database, the event log, and the commit,
//! which is the only writer.
//!
//! It receives log entries from the network and the API, and batches of effects from plugins. It makes both
//! durable in one transaction and one sync, and hands out snapshots to read from. No other crate writes a row.

// The database and the rows in it.
mod tables;
mod directory;
mod error;
mod format;
mod lock;
mod medium;
mod usage;
mod verified_file;
mod committed;
pub mod owner_only;
pub mod components;
pub mod copy;
pub mod dead_letters;
pub mod documents;
pub mod followed_names;
pub mod change_history;
pub mod event_log_rows;
pub mod names;
pub mod heard_topics;
pub mod outbox;
pub mod pins;
pub mod topic_rows;
pub mod mirrors;
pub mod retry_rows;
pub mod rollback_rows;
pub mod plugin_registry;
pub mod checkpoint;
mod compaction;

// The content of the rows and the batches of a plugin.
pub mod effect;
pub mod batch;
pub mod entry_context;
pub mod grants;
pub mod plugin_limits;
pub mod probation;
pub mod handover;
pub mod catch_ups;
pub mod change;
pub mod interest;

// The way of an entry: into the log, through the commit, out by retention.
pub mod event_log;
pub mod commit;
pub mod retry_scheduler;
pub mod retention;
pub mod disk_monitor;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::fs::Dir;
use redb::{
    Database, Durability, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction,
};

pub use error::StoreError;
pub use format::FORMAT;
pub use lock::{LOCK, Lock, LockError};
pub use medium::{Disk, Found, Medium, Memory};
pub use tables::*;
pub use usage::Usage;

/// The prefix of the name of the directory in which a backup is restored.
pub const HALF_RESTORED: &str = ".restoring-";

/// Default size of the cache for the database's pages, in bytes. The database's own default is 1 GiB.
pub const CACHE_BYTES: usize = 192 << 20;

/// From this size on, in bytes, each commit also prepares the database for a quick start after a crash. Below
/// it, the host reads the whole file in a fraction of a second, so commits are spared the work.
const LARGE: u64 = 256 << 20;

/// Up to this size, in bytes, the host verifies the checksums of all pages each time it opens the database.
/// This takes a fraction of a second; a larger database would delay the start by seconds.
const CHECKED: u64 = LARGE;

/// The state directory of one host.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    dir: Dir,
    database: Database,
    medium: Arc<dyn Medium>,
    /// The identity of the database's file when the store was opened.
    found: Found,
    _lock: lock::Lock,
}

/// The reaction when the database is missing although a host has run in the state directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Absent {
    /// The store is not opened. An empty store would lose the jobs, the nodes and the state of plugins, and
    /// would replace the documents under the fleet's names by empty ones.
    #[default]
    Refused,
    /// The operator has requested a new store. An existing store is refused.
    Created,
}

/// The durability of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// It is on the disk when the commit returns.
    Now,
    /// It becomes durable with the next synced transaction.
    Later,
}

impl Store {
    /// Opens the state directory, and creates it if it is missing.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_on(path, Arc::new(Disk), CACHE_BYTES, Absent::Refused)
    }

    /// Opens a state directory with its database on `medium`. The page cache uses at most `cache` bytes of memory.
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
            // Another medium may have created the file. It contains the host's secret.
            owner_only::open(&file).map_err(|source| StoreError::Directory { path: file.clone(), source })?;
        }
        let found = medium.found(&file);
        let store = Self { path: path.to_owned(), dir, database, medium, found, _lock: lock };
        format::settle(&store, absent)?;
        Ok(store)
    }

    /// The path of the database file of a state directory.
    pub fn file(state_dir: &Path) -> PathBuf {
        state_dir.join("dim.redb")
    }

    /// The path of the state directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The state directory, for the files beside the database.
    pub fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Whether the database's file is still the one that was opened. If it was removed or replaced, everything
    /// that the host commits is lost at the next start.
    pub fn is_in_place(&self) -> bool {
        self.medium.found(&Self::file(&self.path)) == self.found
    }

    /// The disk space of the database, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.medium.taken(&Self::file(&self.path))
    }

    /// The free space of the disk, in bytes.
    pub fn free(&self) -> Result<u64, StoreError> {
        let directory = |source| StoreError::Directory { path: self.path.clone(), source };
        self.medium.free(&self.path).map_err(directory)
    }

    /// Begins a synced transaction. Only the commit, and code that runs before it starts, may call this.
    pub fn begin(&self) -> Result<WriteTransaction, StoreError> {
        Ok(self.database.begin_write()?)
    }

    /// Sets whether the end of a transaction waits for the disk. With each sync, a large database also stores
    /// the set of its used pages; otherwise the host would read the whole file after a crash.
    pub fn set_sync(&self, write: &mut WriteTransaction, sync: Sync) -> Result<(), StoreError> {
        write.set_durability(match sync {
            Sync::Now => Durability::Immediate,
            Sync::Later => Durability::None,
        })?;
        write.set_quick_repair(sync == Sync::Now && self.file_bytes() >= LARGE);
        Ok(())
    }

    /// A view of the committed data as of now, unaffected by later commits.
    pub fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let read = self.database.begin_read()?;
        Ok(Snapshot { state: read.open_table(STATE)?, read })
    }

    /// A value of the host itself.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.database.begin_read()?;
        Ok(read.open_table(META)?.get(key)?.map(|value| value.value().to_vec()))
    }

    /// Sets a value of the host itself. Must run before the commit starts.
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

/// Reserves `count` numbers of a series that never repeats; returns the first.
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

/// The value of a stored counter. It spares the database a scan of all rows.
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

/// A stored key and its value.
pub type Row = Result<(Vec<u8>, Vec<u8>), StoreError>;

/// The committed data as of one moment.
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

    /// All stored keys and their values from the bound `from` on, in order, across plugins.
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

    /// Opens any table.
    pub fn table<K: redb::Key + 'static, V: redb::Value + 'static>(
        &self,
        table: redb::TableDefinition<'_, K, V>,
    ) -> Result<ReadOnlyTable<K, V>, StoreError> {
        Ok(self.read.open_table(table)?)
    }
}
