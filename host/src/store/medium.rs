//! Owns what the database is written to.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use redb::backends::InMemoryBackend;
use redb::{Builder, Database, DatabaseError};

use super::verified_file::VerifiedFile;

/// What is in the place of a database's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No file, or an empty one.
    Nothing,
    /// A file.
    File {
        /// The number of its device.
        device: u64,
        /// Its number there.
        inode: u64,
    },
    /// The database lies elsewhere.
    Elsewhere,
}

/// What the database is written to. The disk, and what tests put in its place.
pub trait Medium: std::fmt::Debug + Send + std::marker::Sync + 'static {
    /// Opens the database that belongs to `file`, or makes an empty one. Called once for each
    /// start of a host, and may block.
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError>;

    /// What is there in the place of `file` now. Asked several times a second.
    fn found(&self, file: &Path) -> Found {
        match std::fs::metadata(file) {
            Ok(found) if found.len() > 0 => Found::File { device: found.dev(), inode: found.ino() },
            _ => Found::Nothing,
        }
    }

    /// How many bytes of the disk the database takes. Asked with each commit.
    fn taken(&self, file: &Path) -> u64;

    /// How many bytes are left for it, in the state directory where it lies.
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
