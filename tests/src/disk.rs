//! A disk that fails when it is told to.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dim::store::Medium;
use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, StorageBackend};

/// A file whose reads, writes and syncs fail for as long as the disk is broken.
#[derive(Clone, Debug, Default)]
pub struct FailingDisk {
    broken: Arc<AtomicBool>,
}

impl FailingDisk {
    /// Breaks the disk, or mends it.
    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) { Err(io::Error::other("the disk is broken")) } else { Ok(()) }
    }
}

impl Medium for FailingDisk {
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError> {
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(file);
        let file = file.map_err(|error| DatabaseError::Storage(error.into()))?;
        builder.create_with_backend(Failing { disk: self.clone(), file: FileBackend::new(file)? })
    }
}

#[derive(Debug)]
struct Failing {
    disk: FailingDisk,
    file: FileBackend,
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.disk.check()?;
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.check()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.check()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.check()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}
