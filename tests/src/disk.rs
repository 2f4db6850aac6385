//! Fake disks that fail: one with I/O errors, one that is full, and one that loses power.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use dim_store::{Found, Medium};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, StorageBackend};

/// A disk whose reads, writes and syncs fail while it is broken.
#[derive(Clone, Debug, Default)]
pub struct FailingDisk {
    broken: Arc<AtomicBool>,
}

impl FailingDisk {
    /// Sets whether the disk is broken.
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

    fn taken(&self, file: &Path) -> u64 {
        std::fs::metadata(file).map_or(0, |file| file.len())
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
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

/// A disk of limited size. As on a real disk, a longer file needs no space. The first write to a block allocates it and
/// fails if the disk is full.
#[derive(Clone, Debug, Default)]
pub struct SmallDisk {
    inner: Arc<Mutex<Blocks>>,
}

/// Size of an allocated block, in bytes.
const BLOCK: u64 = 4096;

#[derive(Debug, Default)]
struct Blocks {
    capacity: u64,
    /// Bytes that other files use.
    others: u64,
    taken: std::collections::BTreeSet<u64>,
}

impl Blocks {
    fn free(&self) -> u64 {
        self.capacity.saturating_sub(self.others + self.taken.len() as u64 * BLOCK)
    }
}

impl SmallDisk {
    /// Creates a disk with `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        Self { inner: Arc::new(Mutex::new(Blocks { capacity, ..Blocks::default() })) }
    }

    /// Lets other files use all free space except `left` bytes.
    pub fn fill_up_to(&self, left: u64) {
        let mut blocks = self.lock();
        blocks.others = 0;
        blocks.others = blocks.free().saturating_sub(left);
    }

    /// Returns the bytes that the database uses.
    pub fn taken(&self) -> u64 {
        self.lock().taken.len() as u64 * BLOCK
    }

    /// Deletes the other files.
    pub fn clear(&self) {
        self.lock().others = 0;
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.inner.lock().expect("no one panics while holding the disk")
    }
}

impl Medium for SmallDisk {
    fn open(&self, builder: &Builder, file: &Path) -> Result<Database, DatabaseError> {
        let file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(file);
        let file = file.map_err(|error| DatabaseError::Storage(error.into()))?;
        builder.create_with_backend(Small { disk: self.clone(), file: FileBackend::new(file)? })
    }

    fn taken(&self, _: &Path) -> u64 {
        SmallDisk::taken(self)
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        Ok(self.lock().free())
    }
}

#[derive(Debug)]
struct Small {
    disk: SmallDisk,
    file: FileBackend,
}

impl StorageBackend for Small {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.lock().taken.split_off(&len.div_ceil(BLOCK));
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut blocks = self.disk.lock();
        for block in offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK) {
            if !blocks.taken.contains(&block) {
                if blocks.free() < BLOCK {
                    return Err(io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()));
                }
                blocks.taken.insert(block);
            }
        }
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

/// A disk that can lose power. Each write since the last sync is then kept, lost or torn. The disk is in memory, so
/// that no cache keeps lost writes.
#[derive(Clone, Debug, Default)]
pub struct TearingDisk {
    inner: Arc<Mutex<Torn>>,
    /// The minimum size that the disk reports for the database, in bytes.
    seeming: u64,
}

/// Size of the unit of a torn write, in bytes. A unit is written completely or not at all.
const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct Torn {
    /// The content as of the last sync.
    synced: Vec<u8>,
    /// The content that the host reads: the synced content with the later writes.
    seen: Vec<u8>,
    /// The writes since the last sync, in order.
    since: Vec<Change>,
    /// The number of power losses. A database that was opened before the last one can no longer use the disk.
    life: u64,
    /// The number of syncs before one in which power is lost, and the seed that decides about the writes.
    ends: Option<(u64, u64)>,
}

impl Torn {
    fn lose_power(&mut self, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut image = std::mem::take(&mut self.synced);
        for change in std::mem::take(&mut self.since) {
            match (change, random.random_range(0..3)) {
                (_, 0) => {}
                (Change::Bytes { at, mut data }, 1) => {
                    data.truncate(random.random_range(0..=data.len() / SECTOR) * SECTOR);
                    Change::Bytes { at, data }.apply(&mut image);
                }
                (change, _) => change.apply(&mut image),
            }
        }
        self.seen.clone_from(&image);
        self.synced = image;
        self.life += 1;
        self.ends = None;
    }
}

#[derive(Clone, Debug)]
enum Change {
    Length(usize),
    Bytes { at: usize, data: Vec<u8> },
}

impl Change {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Change::Length(length) => image.resize(*length, 0),
            Change::Bytes { at, data } => {
                if image.len() < at + data.len() {
                    image.resize(at + data.len(), 0);
                }
                image[*at..at + data.len()].copy_from_slice(data);
            }
        }
    }
}

impl TearingDisk {
    /// Creates a disk that reports a database of 1 TiB, so that the host treats it as large.
    pub fn seeming_large() -> Self {
        Self { seeming: 1 << 40, ..Self::default() }
    }

    /// Loses power. `seed` decides which writes since the last sync are kept.
    pub fn lose_power(&self, seed: u64) {
        self.lock().lose_power(seed);
    }

    /// Loses power in the sync after the next `syncs`, before that sync takes effect.
    pub fn lose_power_after(&self, syncs: u64, seed: u64) {
        self.lock().ends = Some((syncs, seed));
    }

    /// Cancels a planned power loss. Returns the number of power losses so far.
    pub fn keep_power(&self) -> u64 {
        let mut torn = self.lock();
        torn.ends = None;
        torn.life
    }

    fn lock(&self) -> MutexGuard<'_, Torn> {
        self.inner.lock().expect("no one panics while holding the disk")
    }
}

impl Medium for TearingDisk {
    fn open(&self, builder: &Builder, _: &Path) -> Result<Database, DatabaseError> {
        let life = self.lock().life;
        builder.create_with_backend(Tearing { disk: self.clone(), life })
    }

    fn found(&self, _: &Path) -> Found {
        Found::Elsewhere
    }

    fn taken(&self, _: &Path) -> u64 {
        self.seeming.max(self.lock().seen.len() as u64)
    }

    fn free(&self, _: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

#[derive(Debug)]
struct Tearing {
    disk: TearingDisk,
    life: u64,
}

impl Tearing {
    fn lock(&self) -> io::Result<MutexGuard<'_, Torn>> {
        let torn = self.disk.lock();
        if torn.life == self.life { Ok(torn) } else { Err(io::Error::other("the power is gone")) }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut torn = self.lock()?;
        change.apply(&mut torn.seen);
        torn.since.push(change);
        Ok(())
    }
}

impl StorageBackend for Tearing {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock()?.seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let torn = self.lock()?;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = torn.seen.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(usize::try_from(len).map_err(io::Error::other)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut torn = self.lock()?;
        match torn.ends {
            Some((0, seed)) => {
                torn.lose_power(seed);
                return Err(io::Error::other("the power is gone"));
            }
            Some((syncs, seed)) => torn.ends = Some((syncs - 1, seed)),
            None => {}
        }
        let since = std::mem::take(&mut torn.since);
        for change in since {
            change.apply(&mut torn.synced);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        self.change(Change::Bytes { at, data: data.to_vec() })
    }
}
