//! Owns the database of a spool: its tables and the transactions on them. It receives notices and refusals, and
//! returns numbers and waiting notices.

use std::collections::VecDeque;
use std::path::Path;

use dim_model::ident::JobId;
use dim_model::time::Timestamp;
use dim_store::{Disk, Found, Medium as _};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::Serialize;

use super::{Contents, Refusal, Room, SpoolError};
use crate::notice::{Notice, Word};

/// The name of the database in an agent's directory.
pub const DATABASE: &str = "agent.redb";

/// The format version that this agent writes.
pub const FORMAT: u64 = 1;

/// The size of the page cache, in bytes.
const CACHE_BYTES: usize = 4 << 20;

/// The maximum number of stored refusals. The oldest is dropped first.
pub const REFUSALS: usize = 100;

/// The minimum difference between the times of two notices, in nanoseconds. The job tracker compares milliseconds.
pub const APART: u64 = 1_000_000;

/// Counters by name.
const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
/// Waiting notices by number.
const WAITING: TableDefinition<u64, &[u8]> = TableDefinition::new("waiting");
/// Refusals by the number of the notice.
const REFUSED: TableDefinition<u64, &[u8]> = TableDefinition::new("refused");

/// An open database, with running totals.
#[derive(Debug)]
pub struct Opened {
    database: Database,
    /// The identity of the database's file when it was opened.
    found: Found,
    waiting: u64,
    bytes: u64,
    last_given: Timestamp,
}

/// The result of a database operation. Each error inside the database counts as an error of the disk.
pub type OnDisk<R> = Result<R, Box<redb::Error>>;

fn disk<R, E: Into<redb::Error>>(result: Result<R, E>) -> OnDisk<R> {
    result.map_err(|error| Box::new(error.into()))
}

impl Opened {
    /// Opens the database, or creates an empty one.
    pub fn open(dir: &Path) -> Result<Self, SpoolError> {
        let path = dir.join(DATABASE);
        // The database is small, so each open can check its integrity and find damaged bits.
        let database = Disk
            .open(Database::builder().set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true), &path);
        let database =
            database.map_err(|source| SpoolError::Open { path: path.clone(), source: Box::new(source) })?;
        let found = Disk.found(&path);
        let mut opened = Self { database, found, waiting: 0, bytes: 0, last_given: Timestamp(0) };
        let found = opened.prepare()?;
        if found > FORMAT {
            return Err(SpoolError::Newer { path, found });
        }
        for (_, notice) in opened.waiting(0)? {
            opened.waiting += 1;
            opened.bytes += encode(&notice).len() as u64;
            opened.last_given = opened.last_given.max(notice.given);
        }
        Ok(opened)
    }

    /// Returns whether the file of the database is still the one that was opened.
    pub fn is_in_place(&self, dir: &Path) -> bool {
        Disk.found(&dir.join(DATABASE)) == self.found
    }

    /// Creates the tables and returns the format version.
    fn prepare(&self) -> OnDisk<u64> {
        let write = disk(self.database.begin_write())?;
        let found = {
            disk(write.open_table(WAITING))?;
            disk(write.open_table(REFUSED))?;
            let mut counts = disk(write.open_table(COUNTS))?;
            let found = disk(counts.get("format"))?.map(|found| found.value());
            if found.is_none() {
                disk(counts.insert("format", FORMAT))?;
            }
            found.unwrap_or(FORMAT)
        };
        disk(write.commit())?;
        Ok(found)
    }

    /// Stores a notice and returns its number.
    ///
    /// # Errors
    /// The spool is full, or the disk failed.
    pub fn keep(&mut self, job: JobId, word: Word, room: Room) -> Result<u64, SpoolError> {
        // Two notices of one job must not have the same time, and times must not decrease when the clock is set back.
        let given = Timestamp::wall().max(Timestamp(self.last_given.0.saturating_add(APART)));
        let row = encode(&Notice { job, given, word });
        if self.waiting >= room.notices || self.bytes + row.len() as u64 > room.bytes {
            return Err(SpoolError::Full { notices: self.waiting, bytes: self.bytes });
        }
        let number = self.insert(&row)?;
        self.waiting += 1;
        self.bytes += row.len() as u64;
        self.last_given = given;
        Ok(number)
    }

    fn insert(&self, row: &[u8]) -> OnDisk<u64> {
        let write = disk(self.database.begin_write())?;
        let number = add(&write, "given", 1)?;
        disk(disk(write.open_table(WAITING))?.insert(number, row))?;
        disk(write.commit())?;
        Ok(number)
    }

    /// Returns the notices with numbers above `after`.
    pub fn waiting(&self, after: u64) -> OnDisk<Vec<(u64, Notice)>> {
        let table = disk(disk(self.database.begin_read())?.open_table(WAITING))?;
        let mut waiting = Vec::new();
        for row in disk(table.range(after.saturating_add(1)..))? {
            let (number, row) = disk(row)?;
            waiting.push((number.value(), decode(row.value())?));
        }
        Ok(waiting)
    }

    /// Removes notices that were accepted.
    pub fn take(&mut self, numbers: &[u64]) -> OnDisk<()> {
        let write = disk(self.database.begin_write())?;
        let removed = remove(&write, numbers)?;
        add(&write, "taken", removed.notices)?;
        disk(write.commit())?;
        self.count_down(removed);
        Ok(())
    }

    /// Moves a notice to the refusals.
    pub fn refuse(&mut self, number: u64, refusal: &Refusal) -> OnDisk<()> {
        let write = disk(self.database.begin_write())?;
        let removed = remove(&write, &[number])?;
        if removed.notices > 0 {
            set_aside(&write, number, refusal)?;
        }
        disk(write.commit())?;
        self.count_down(removed);
        Ok(())
    }

    fn count_down(&mut self, removed: Removed) {
        self.waiting -= removed.notices;
        self.bytes -= removed.bytes;
    }

    /// Returns the contents.
    pub fn contents(&self) -> OnDisk<Contents> {
        let read = disk(self.database.begin_read())?;
        let counts = disk(read.open_table(COUNTS))?;
        let count = |name| OnDisk::Ok(disk(counts.get(name))?.map_or(0, |count| count.value()));
        let waiting = disk(read.open_table(WAITING))?;
        let oldest = disk(waiting.first())?.map(|(_, row)| decode::<Notice>(row.value())).transpose()?;
        let mut refusals = VecDeque::new();
        for row in disk(disk(read.open_table(REFUSED))?.iter())? {
            refusals.push_back(decode(disk(row)?.1.value())?);
        }
        Ok(Contents {
            waiting: self.waiting,
            bytes: self.bytes,
            oldest: oldest.map(|notice| notice.given),
            taken: count("taken")?,
            refused: count("refused")?,
            refusals: refusals.into(),
        })
    }
}

/// What was removed from the waiting notices.
#[derive(Clone, Copy, Debug, Default)]
struct Removed {
    notices: u64,
    bytes: u64,
}

/// Removes waiting notices. A number that is not there is passed over.
fn remove(write: &WriteTransaction, numbers: &[u64]) -> OnDisk<Removed> {
    let mut waiting = disk(write.open_table(WAITING))?;
    let mut removed = Removed::default();
    for number in numbers {
        if let Some(row) = disk(waiting.remove(number))? {
            removed.notices += 1;
            removed.bytes += row.value().len() as u64;
        }
    }
    Ok(removed)
}

/// Adds to a counter and returns the new value.
fn add(write: &WriteTransaction, name: &str, more: u64) -> OnDisk<u64> {
    let mut counts = disk(write.open_table(COUNTS))?;
    let count = disk(counts.get(name))?.map_or(0, |count| count.value()) + more;
    disk(counts.insert(name, count))?;
    Ok(count)
}

fn set_aside(write: &WriteTransaction, number: u64, refusal: &Refusal) -> OnDisk<u64> {
    let mut table = disk(write.open_table(REFUSED))?;
    disk(table.insert(number, encode(refusal).as_slice()))?;
    while disk(redb::ReadableTableMetadata::len(&table))? > REFUSALS as u64 {
        disk(table.pop_first())?;
    }
    add(write, "refused", 1)
}

fn encode(row: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(row).expect("notices are plain data")
}

fn decode<T: serde::de::DeserializeOwned>(row: &[u8]) -> OnDisk<T> {
    serde_json::from_slice(row).map_err(|error| Box::new(redb::Error::Corrupted(error.to_string())))
}
