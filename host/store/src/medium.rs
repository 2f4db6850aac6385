//! Owns the medium of the database: a file on disk, or memory in tests. It opens the database and reports the
//! space that it uses.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use redb::backends::InMemoryBackend;
use redb::{Builder, Database, DatabaseError};

use crate::verified_file::VerifiedFile;

/// The identity of the file at the place of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No file, or an empty one.
    Nothing,
    /// A file.
    File {
        /// The number of its device.
        device: u64,
        /// The number of its inode.
        inode: u64,
    },
    /// The database is not in a file.
    Elsewhere,
}

/// A medium of the database: the disk, or its replacement in tests.
pub trait Medium: std::fmt::Debug + Send + std::marker::Sync + 'static {
    /// Opens the database at `file`, or creates an empty one. Called once for each start of a host; may block.
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError>;

    /// The identity of the file at `file` now. Called several times a second.
    fn found(&self, file: &Path) -> Found {
        match std::fs::metadata(file) {
            Ok(found) if found.len() > 0 => Found::File { device: found.dev(), inode: found.ino() },
            _ => Found::Nothing,
        }
    }

    /// The disk space of the database in bytes. Called with each commit.
    fn taken(&self, file: &Path) -> u64;

    /// The free space for the database in `state_dir`, in bytes.
    fn free(&self, state_dir: &Path) -> std::io::Result<u64>;
}

/// A file of the file system.
#[derive(Clone, Copy, Debug)]
pub struct Disk;

impl Medium for Disk {
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError> {
        let file = VerifiedFile::open(file)?;
        let is_sound = file.is_sound();
        let database = builder.create_with_backend(file)?;
        is_sound.store(true, Ordering::SeqCst);
        Ok(database)
    }

    fn taken(&self, file: &Path) -> u64 {
        // The length may be far ahead of the written blocks. `st_blocks` counts units of 512 bytes.
        std::fs::metadata(file).map_or(0, |file| std::os::unix::fs::MetadataExt::blocks(&file) * 512)
    }

    fn free(&self, state_dir: &Path) -> std::io::Result<u64> {
        let disk = rustix::fs::statvfs(state_dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

/// The memory of this process. Its content is lost with the store.
#[derive(Clone, Copy, Debug)]
pub struct Memory;

impl Medium for Memory {
    fn open(&self, builder: &Builder, _: &Path) -> Result<Database, DatabaseError> {
        builder.create_with_backend(InMemoryBackend::new())
    }

    fn found(&self, _: &Path) -> Found {
        Found::Elsewhere
    }

    fn taken(&self, _: &Path) -> u64 {
        0
    }

    fn free(&self, _: &Path) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
}
