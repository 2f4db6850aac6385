//! Owns a database file that verifies each block it reads. The checksum of each block is in memory from its
//! last write or first read on, and in a file beside the database while no host runs.
//!
//! A block that differs from the last write is an error, whatever it contains: values, keys, or pages of the
//! database.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::{Bound, Range};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, RwLock};

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend, StorageError};
use thiserror::Error;

use crate::owner_only;

/// Size of a block in bytes: the smallest page of the database.
const BLOCK: u64 = 4096;

/// The first bytes of the checksum file.
const MAGIC: &[u8; 8] = b"dimsums1";

/// Length of the header of the checksum file in bytes: the magic, the length of the database, the checksum of
/// its first block, and the checksum of all checksums.
const HEAD: usize = 24;

/// The value for an unknown checksum. A checksum of 0 counts as 1.
const UNKNOWN: u32 = 0;

/// The error of a block that differs from the last write.
#[derive(Debug, Error)]
#[error(
    "{path} is damaged: the {BLOCK} bytes from byte {offset} on are not what was written; check the disk and restore a backup"
)]
pub struct DamagedBlock {
    /// The path of the database.
    pub path: PathBuf,
    /// The offset of the block in bytes.
    pub offset: u64,
}

/// A file that verifies each block it reads.
#[derive(Debug)]
pub struct VerifiedFile {
    file: FileBackend,
    path: PathBuf,
    checksums: RwLock<Vec<AtomicU32>>,
    /// Whether the checksum file of the unchanged database is beside it.
    has_beside: AtomicBool,
    /// Whether the database has accepted the file. Checksums of a file that it refused are not kept.
    is_sound: Arc<AtomicBool>,
}

impl VerifiedFile {
    /// Opens a file with the checksums of the last close; creates an empty one if it is missing.
    pub fn open(path: &Path) -> Result<Self, DatabaseError> {
        let opened = owner_only::open(path).map_err(StorageError::from)?;
        let known = read_checksums(path, &opened).unwrap_or_default();
        let this = Self {
            file: FileBackend::new(opened)?,
            path: path.to_owned(),
            checksums: RwLock::new(known),
            has_beside: AtomicBool::new(true),
            is_sound: Arc::default(),
        };
        this.fit(this.file.len().map_err(StorageError::from)?);
        Ok(this)
    }

    /// The flag that the caller sets once the database has opened the file. Until then closing writes no checksums.
    pub fn is_sound(&self) -> Arc<AtomicBool> {
        self.is_sound.clone()
    }

    /// Removes the checksum file before the database changes.
    fn begin_change(&self) -> io::Result<()> {
        if self.has_beside.swap(false, Ordering::SeqCst) {
            match std::fs::remove_file(beside(&self.path)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Adjusts the number of checksums to a file of `len` bytes.
    fn fit(&self, len: u64) {
        let blocks = usize::try_from(len / BLOCK).expect("a file's blocks can be counted");
        let mut checksums = self.checksums.write().expect("no one panics while holding the checksums");
        checksums.resize_with(blocks, || AtomicU32::new(UNKNOWN));
    }

    /// Calls `each` with the checksum, the offset and the bytes of each block that is completely within `data`.
    fn each<E>(
        &self,
        offset: u64,
        data: &[u8],
        mut each: impl FnMut(&AtomicU32, u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let checksums = self.checksums.read().expect("no one panics while holding the checksums");
        let blocks = whole_blocks(offset, data.len());
        for (number, block) in
            blocks.clone().zip(data_from(offset, blocks.start, data).chunks_exact(BLOCK as usize))
        {
            let place = usize::try_from(number).ok().and_then(|number| checksums.get(number));
            place.map_or(Ok(()), |place| each(place, number * BLOCK, block))?;
        }
        Ok(())
    }

    fn forget(&self, offset: u64, len: usize) {
        let checksums = self.checksums.read().expect("no one panics while holding the checksums");
        for number in offset / BLOCK..(offset + len as u64).div_ceil(BLOCK) {
            if let Some(place) = usize::try_from(number).ok().and_then(|number| checksums.get(number)) {
                place.store(UNKNOWN, Ordering::Relaxed);
            }
        }
    }

    /// Writes the checksum file.
    fn leave_checksums(&self) -> io::Result<()> {
        let checksums = self.checksums.read().expect("no one panics while holding the checksums");
        let bytes: Vec<u8> =
            checksums.iter().flat_map(|checksum| checksum.load(Ordering::Relaxed).to_le_bytes()).collect();
        let mut first = vec![0; usize::try_from(self.file.len()?.min(BLOCK)).unwrap_or_default()];
        self.file.read(0, &mut first)?;
        let mut head = MAGIC.to_vec();
        head.extend(self.file.len()?.to_le_bytes());
        head.extend(crc32fast::hash(&first).to_le_bytes());
        head.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut beside = owner_only::open(&beside(&self.path))?;
        beside.set_len(0)?;
        beside.write_all(&head)?;
        beside.write_all(&bytes)?;
        beside.sync_all()
    }
}

/// The blocks that are completely within `len` bytes from `offset` on.
fn whole_blocks(offset: u64, len: usize) -> Range<u64> {
    let (first, end) = (offset.div_ceil(BLOCK), (offset + len as u64) / BLOCK);
    first..end.max(first)
}

/// The part of `data`, which begins at `offset`, from a block on.
fn data_from(offset: u64, block: u64, data: &[u8]) -> &[u8] {
    let skipped = usize::try_from(block * BLOCK - offset).unwrap_or(usize::MAX);
    data.get(skipped..).unwrap_or_default()
}

fn checksum(block: &[u8]) -> u32 {
    crc32fast::hash(block).max(UNKNOWN + 1)
}

/// The path of the checksum file of a database.
fn beside(database: &Path) -> PathBuf {
    database.with_extension("sums")
}

/// Reads the checksum file of a database; `None` if it is of another state of the database.
fn read_checksums(path: &Path, database: &File) -> Option<Vec<AtomicU32>> {
    let mut bytes = Vec::new();
    File::open(beside(path)).ok()?.read_to_end(&mut bytes).ok()?;
    let (head, checksums) = bytes.split_at_checked(HEAD)?;
    let len = database.metadata().ok()?.len();
    let mut first = vec![0; usize::try_from(len.min(BLOCK)).ok()?];
    database.read_exact_at(&mut first, 0).ok()?;
    let is_of_it = head[..8] == *MAGIC
        && head[8..16] == len.to_le_bytes()
        && head[16..20] == crc32fast::hash(&first).to_le_bytes()
        && head[20..] == crc32fast::hash(checksums).to_le_bytes();
    let read = |bytes: &[u8]| AtomicU32::new(u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    is_of_it.then(|| checksums.chunks_exact(4).map(read).collect())
}

impl StorageBackend for VerifiedFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)?;
        self.each(offset, out, |known, offset, block| {
            let found = checksum(block);
            match known.compare_exchange(UNKNOWN, found, Ordering::Relaxed, Ordering::Relaxed) {
                Err(known) if known != found => {
                    let damaged = DamagedBlock { path: self.path.clone(), offset };
                    Err(io::Error::new(io::ErrorKind::InvalidData, damaged))
                }
                _ => Ok(()),
            }
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.begin_change()?;
        self.file.set_len(len)?;
        self.fit(len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.begin_change()?;
        // A failed write leaves either the old or the new content, so the checksum is unknown.
        self.forget(offset, data.len());
        self.file.write(offset, data)?;
        self.each(offset, data, |known, _, block| {
            known.store(checksum(block), Ordering::Relaxed);
            Ok(())
        })
    }

    fn close(&self) -> io::Result<()> {
        if self.is_sound.load(Ordering::SeqCst)
            && let Err(error) = self.leave_checksums()
        {
            tracing::debug!("cannot keep the checksums of {}: {error}", self.path.display());
            let _ = std::fs::remove_file(beside(&self.path));
        }
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = BLOCK as usize;

    fn damage(path: &Path, offset: u64) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }

    /// A file that the database has opened.
    fn sound(path: &Path) -> VerifiedFile {
        let file = VerifiedFile::open(path).unwrap();
        file.is_sound().store(true, Ordering::SeqCst);
        file
    }

    fn reads(file: &VerifiedFile, offset: u64, len: usize) -> io::Result<()> {
        file.read(offset, &mut vec![0; len])
    }

    /// A closed file of four blocks.
    fn four_blocks(path: &Path) {
        let file = sound(path);
        file.set_len(4 * BLOCK).unwrap();
        for number in 0..4 {
            file.write(number * BLOCK, &[number as u8; PAGE]).unwrap();
        }
        file.close().unwrap();
    }

    #[test]
    fn a_flipped_bit_is_an_error_of_whoever_reads_the_block_and_of_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.redb");
        four_blocks(&path);
        let file = VerifiedFile::open(&path).unwrap();
        damage(&path, 2 * BLOCK + 77);
        reads(&file, 0, 2 * PAGE).unwrap();
        for (offset, len) in [(2 * BLOCK, PAGE), (0, 4 * PAGE), (BLOCK, 3 * PAGE)] {
            let error = reads(&file, offset, len).unwrap_err().to_string();
            assert!(error.contains("from byte 8192") && error.contains("restore a backup"), "{error}");
        }
        // A block that is written again is valid.
        file.write(2 * BLOCK, &[9; PAGE]).unwrap();
        reads(&file, 0, 4 * PAGE).unwrap();
        // A part of a block does not show the checksum of the whole.
        reads(&file, 2 * BLOCK + 1, 10).unwrap();
        file.write(2 * BLOCK + 1, &[1; 10]).unwrap();
        reads(&file, 2 * BLOCK, PAGE).unwrap();
    }

    #[test]
    fn a_bit_that_flipped_while_the_file_was_closed_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.redb");
        four_blocks(&path);
        damage(&path, 3 * BLOCK);
        let file = sound(&path);
        reads(&file, BLOCK, PAGE).unwrap();
        assert!(reads(&file, 3 * BLOCK, PAGE).is_err());
        file.close().unwrap();
        let file = sound(&path);
        assert!(reads(&file, 3 * BLOCK, PAGE).is_err(), "it stays so");
        file.write(0, &[5; PAGE]).unwrap();
        assert!(!beside(&path).exists(), "they are not of a file that changes");
    }

    #[test]
    fn what_was_read_of_a_file_that_the_database_refuses_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.redb");
        four_blocks(&path);
        let whole = std::fs::read(&path).unwrap();
        std::fs::remove_file(beside(&path)).unwrap();
        damage(&path, 3 * BLOCK);
        let file = VerifiedFile::open(&path).unwrap();
        reads(&file, 3 * BLOCK, PAGE).unwrap();
        file.close().unwrap();
        std::fs::write(&path, whole).unwrap();
        reads(&VerifiedFile::open(&path).unwrap(), 0, 4 * PAGE).unwrap();
    }

    #[test]
    fn checksums_of_another_state_of_the_file_count_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.redb");
        four_blocks(&path);
        let sums = std::fs::read(beside(&path)).unwrap();
        // Someone replaced the file by an older copy with another first block.
        for offset in 0..4 {
            damage(&path, offset * BLOCK);
        }
        reads(&VerifiedFile::open(&path).unwrap(), 0, 4 * PAGE).unwrap();
        for torn in [&sums[..sums.len() - 1], &sums[..10], b""] {
            std::fs::write(beside(&path), torn).unwrap();
            reads(&VerifiedFile::open(&path).unwrap(), 0, 4 * PAGE).unwrap();
        }
    }
}
