//! Owns the state directory: the lock, the format, and one transactional database.
//!
//! It receives whole transactions from the commit, which is the only writer, and hands out
//! snapshots to read from.

pub mod components;
pub mod copy;
pub mod dead;
pub mod documents;
pub mod followed;
pub mod history;
mod format;
mod lock;
pub mod log;
pub mod names;
pub mod others;
pub mod outbox;
mod packing;
pub mod pins;
pub mod retries;
mod tables;
pub mod undo;
mod usage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use redb::backends::InMemoryBackend;
use redb::{
    Builder, Database, Durability, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable,
    WriteTransaction,
};
use thiserror::Error;

use crate::entry::MalformedEntry;

pub use format::FORMAT;
pub use lock::LockError;
pub(crate) use lock::{LOCK, Lock};
pub use tables::*;
pub use usage::Usage;

/// What the name begins with of the directory in which a backup is restored.
pub const HALF_RESTORED: &str = ".restoring-";

/// Memory for the database's pages, in bytes, unless the config says otherwise. The database's own default is 1 GiB.
pub const CACHE_BYTES: usize = 192 << 20;

/// From this size on, in bytes, the database is kept ready for a quick start after a crash: below it, it
/// is read through in a fraction of a second, and each commit is spared the work.
const LARGE: u64 = 256 << 20;

/// What can go wrong with the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The directory cannot be used.
    #[error("cannot use the state directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others may write into it.
    #[error(
        "others may write into the state directory {path} (mode {mode:03o}): chmod go-w it, or use another --state-dir"
    )]
    Shared {
        /// Which.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A backup was being restored into it.
    #[error(
        "a restore into {path} was broken off: empty the directory and restore the backup again, or use another --state-dir"
    )]
    HalfRestored {
        /// The directory.
        path: PathBuf,
    },
    /// Another host holds it.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// It was written by a newer host.
    #[error(
        "the store has format {found}, this host knows {FORMAT}: use a newer dim, or another --state-dir"
    )]
    Newer {
        /// Its format.
        found: u64,
    },
    /// It was written by a host from before the first release.
    #[error(
        "the store has format {found}, from before the first release, which this host cannot read: use another --state-dir"
    )]
    Older {
        /// Its format.
        found: u64,
    },
    /// The database cannot be opened.
    #[error("cannot open {path}: restore it from a backup, or use another --state-dir")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::DatabaseError>,
    },
    /// The database gave up on what it found.
    #[error("{path} is damaged: restore it from a backup, or use another --state-dir")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// It holds what no host writes.
    #[error("the store is damaged: {what}: {why}")]
    Corrupt {
        /// Which part.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The database failed.
    #[error("the store failed")]
    Database(#[source] Box<redb::Error>),
}

impl StoreError {
    /// The error of a part that cannot be read.
    pub fn corrupt(what: &'static str, why: impl ToString) -> Self {
        Self::Corrupt { what, why: why.to_string() }
    }
}

impl From<MalformedEntry> for StoreError {
    fn from(error: MalformedEntry) -> Self {
        Self::corrupt("event log", error)
    }
}

macro_rules! from_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}

from_redb!(TransactionError, TableError, StorageError, CommitError, SetDurabilityError);

/// The state directory of one host.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    dir: Dir,
    database: Database,
    medium: Arc<dyn Medium>,
    _lock: lock::Lock,
}

/// What the database is written to. The disk, and what tests put in its place.
pub trait Medium: std::fmt::Debug + Send + std::marker::Sync + 'static {
    /// Opens the database that belongs to `file`, or makes an empty one. Called once for each
    /// start of a host, and may block.
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, redb::DatabaseError>;

    /// How many bytes of the disk the database takes. Asked with each commit.
    fn taken(&self, file: &Path) -> u64;

    /// How many bytes are left for it, in the state directory where it lies.
    fn free(&self, state_dir: &Path) -> std::io::Result<u64>;
}

/// A file of the file system.
#[derive(Clone, Copy, Debug)]
pub struct Disk;

impl Medium for Disk {
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, redb::DatabaseError> {
        builder.create(file)
    }

    fn taken(&self, file: &Path) -> u64 {
        // Its length may be far ahead of what was written. A block is what POSIX says it is.
        std::fs::metadata(file).map_or(0, |file| std::os::unix::fs::MetadataExt::blocks(&file) * 512)
    }

    fn free(&self, state_dir: &Path) -> std::io::Result<u64> {
        let disk = rustix::fs::statvfs(state_dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

/// The memory of this process: what lies in it is gone with the store.
#[derive(Clone, Copy, Debug)]
pub struct Memory;

impl Medium for Memory {
    fn open(&self, builder: &Builder, _: &Path) -> Result<Database, redb::DatabaseError> {
        builder.create_with_backend(InMemoryBackend::new())
    }

    fn taken(&self, _: &Path) -> u64 {
        0
    }

    fn free(&self, _: &Path) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
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
        Self::open_on(path, Arc::new(Disk), CACHE_BYTES)
    }

    /// Opens a state directory whose database lies on `medium`; its pages take `cache` bytes of memory at most.
    pub fn open_on(path: &Path, medium: Arc<dyn Medium>, cache: usize) -> Result<Self, StoreError> {
        let directory = |source| StoreError::Directory { path: path.to_owned(), source };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        builder.create(path).map_err(directory)?;
        let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(directory)?;
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(path).map_err(directory)?.permissions(),
        );
        // Whoever can write here has native code run in the host, for it lies here compiled.
        if mode & 0o022 != 0 {
            return Err(StoreError::Shared { path: path.to_owned(), mode: mode & 0o777 });
        }
        let lock = lock::Lock::take(&dir, path)?;
        let mut builder = Database::builder();
        let file = Self::file(path);
        if !file.exists() && holds_half_a_restore(path).map_err(directory)? {
            return Err(StoreError::HalfRestored { path: path.to_owned() });
        }
        let opened = medium.open(builder.set_cache_size(cache), &file);
        let database =
            opened.map_err(|source| StoreError::Open { path: file.clone(), source: Box::new(source) })?;
        if file.exists() {
            // It holds the host's secret.
            let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&file, owner_only).map_err(directory)?;
        }
        let store = Self { path: path.to_owned(), dir, database, medium, _lock: lock };
        format::settle(&store)?;
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

fn holds_half_a_restore(path: &Path) -> std::io::Result<bool> {
    let files: Vec<_> = std::fs::read_dir(path)?.collect::<Result<_, _>>()?;
    Ok(files.iter().any(|file| file.file_name().to_string_lossy().starts_with(HALF_RESTORED)))
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
