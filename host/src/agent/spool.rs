//! Owns the agent's directory: the lock, and the notices that nobody has taken yet, in the order in
//! which they were given. What is kept here has reached the disk.

use std::collections::VecDeque;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::Notify;

use super::notice::{Notice, Word};
use crate::ident::JobId;
use crate::store::{Lock, LockError};
use crate::time::Timestamp;

/// The format that this agent writes.
const FORMAT: u64 = 1;

/// Memory for the database's pages, in bytes.
const CACHE_BYTES: usize = 4 << 20;

/// Refusals that are remembered; the oldest go first.
const REFUSALS: usize = 100;

/// Time that two notices differ by at least, in nanoseconds: the job tracker counts milliseconds.
const APART: u64 = 1_000_000;

/// Running numbers and counts.
const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
/// A notice's number, to the notice.
const WAITING: TableDefinition<u64, &[u8]> = TableDefinition::new("waiting");
/// A notice's number, to why nobody took it.
const REFUSED: TableDefinition<u64, &[u8]> = TableDefinition::new("refused");

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Notices.
    pub notices: u64,
    /// Bytes of notices.
    pub bytes: u64,
}

impl Default for Room {
    /// Days of a busy node, and little for any disk: 10,000 notices and 16 MiB.
    fn default() -> Self {
        Self { notices: 10_000, bytes: 16 << 20 }
    }
}

/// What can go wrong with the spool.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// The directory cannot be used.
    #[error("cannot use the agent's directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others may write into it.
    #[error(
        "others may write into the agent's directory {path} (mode {mode:03o}): chmod go-w it, or use another --agent-dir"
    )]
    Shared {
        /// Which.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another agent holds it.
    #[error("the agent's directory {path} is in use by {holder}: stop it, or use another --agent-dir")]
    Held {
        /// Which.
        path: PathBuf,
        /// Who, as it wrote itself.
        holder: String,
    },
    /// A newer agent wrote it.
    #[error(
        "the notices in {path} have format {found}, this agent knows {FORMAT}: use a newer dim, or another --agent-dir"
    )]
    Newer {
        /// Where.
        path: PathBuf,
        /// Their format.
        found: u64,
    },
    /// The database cannot be opened.
    #[error("cannot open {path}: if the disk is well, move it away, and the notices in it are lost")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::DatabaseError>,
    },
    /// There is no room.
    #[error("{notices} notices of {bytes} bytes wait already, and there is room for no more")]
    Full {
        /// How many wait.
        notices: u64,
        /// What they take.
        bytes: u64,
    },
    /// The disk failed.
    #[error("the notice cannot be kept")]
    Database(#[from] Box<redb::Error>),
}

/// What a notice came to that was not taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The notice.
    pub notice: Notice,
    /// When it was refused.
    pub refused: Timestamp,
    /// Why.
    pub reason: String,
}

/// What lies in the spool.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Notices that wait.
    pub waiting: u64,
    /// What they take.
    pub bytes: u64,
    /// When the oldest of them was given.
    pub oldest: Option<Timestamp>,
    /// Notices that were taken.
    pub taken: u64,
    /// Notices that were refused.
    pub refused: u64,
    /// The last of these.
    pub refusals: Vec<Refusal>,
}

/// The notices of one agent.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    room: Room,
    /// None after the disk failed: the database has to be opened anew.
    opened: Mutex<Option<Opened>>,
    /// Told of each notice that is kept.
    pub kept: Notify,
    _lock: Lock,
}

#[derive(Debug)]
struct Opened {
    database: Database,
    waiting: u64,
    bytes: u64,
    last_given: Timestamp,
}

impl Spool {
    /// Opens the spool in a directory, which is made if it is missing. Blocks.
    pub fn open(path: &Path, room: Room) -> Result<Self, SpoolError> {
        let directory = |source| SpoolError::Directory { path: path.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(directory)?;
        let mode = std::fs::metadata(path).map_err(directory)?.permissions().mode();
        // Whoever can write here speaks for the node.
        if mode & 0o022 != 0 {
            return Err(SpoolError::Shared { path: path.to_owned(), mode: mode & 0o777 });
        }
        let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(directory)?;
        let lock = Lock::take(&dir, path).map_err(|error| match error {
            LockError::Held { path, holder } => SpoolError::Held { path, holder },
            LockError::Io { path, source } => SpoolError::Directory { path, source },
        })?;
        let opened = Opened::open(path)?;
        Ok(Self {
            dir: path.to_owned(),
            room,
            opened: Mutex::new(Some(opened)),
            kept: Notify::new(),
            _lock: lock,
        })
    }

    /// Keeps a notice; it is on the disk when this returns its number. Blocks.
    pub fn keep(&self, job: JobId, word: Word) -> Result<u64, SpoolError> {
        let number = self.with(|opened| opened.keep(job, word, self.room))?;
        self.kept.notify_one();
        Ok(number)
    }

    /// The notices with numbers above `after`, in order. Blocks.
    pub fn waiting(&self, after: u64) -> Result<Vec<(u64, Notice)>, SpoolError> {
        self.with(|opened| Ok(opened.waiting(after)?))
    }

    /// Forgets a notice that was taken. Blocks.
    pub fn taken(&self, number: u64) -> Result<(), SpoolError> {
        self.with(|opened| Ok(opened.remove(number, None)?))
    }

    /// Sets a notice aside that nobody will take. Blocks.
    pub fn refused(&self, number: u64, refusal: &Refusal) -> Result<(), SpoolError> {
        self.with(|opened| Ok(opened.remove(number, Some(refusal))?))
    }

    /// What lies here. Blocks.
    pub fn contents(&self) -> Result<Contents, SpoolError> {
        self.with(|opened| Ok(opened.contents()?))
    }

    fn with<R>(&self, work: impl FnOnce(&mut Opened) -> Result<R, SpoolError>) -> Result<R, SpoolError> {
        let mut slot = self.opened.lock().expect("no one panics while holding the spool");
        let mut opened = match slot.take() {
            Some(opened) => opened,
            None => Opened::open(&self.dir)?,
        };
        let result = work(&mut opened);
        if !matches!(result, Err(SpoolError::Database(_))) {
            *slot = Some(opened);
        }
        result
    }
}

/// Does work on the spool where it may block.
pub async fn on_disk<R: Send + 'static>(
    spool: &Arc<Spool>,
    work: impl FnOnce(&Spool) -> R + Send + 'static,
) -> R {
    let spool = spool.clone();
    tokio::task::spawn_blocking(move || work(&spool)).await.expect("the spool does not panic")
}

/// Inside a database anything may fail, and all of it is the disk's failure.
type Disk<R> = Result<R, Box<redb::Error>>;

fn disk<R, E: Into<redb::Error>>(result: Result<R, E>) -> Disk<R> {
    result.map_err(|error| Box::new(error.into()))
}

impl Opened {
    fn open(dir: &Path) -> Result<Self, SpoolError> {
        let path = dir.join("agent.redb");
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(&path)
            .map_err(|source| SpoolError::Open { path: path.clone(), source: Box::new(source) })?;
        let mut opened = Self { database, waiting: 0, bytes: 0, last_given: Timestamp(0) };
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

    /// Makes the tables; returns the format.
    fn prepare(&self) -> Disk<u64> {
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

    fn keep(&mut self, job: JobId, word: Word, room: Room) -> Result<u64, SpoolError> {
        // Two notices of one job must not bear the same time, nor go back with the clock.
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

    fn insert(&self, row: &[u8]) -> Disk<u64> {
        let write = disk(self.database.begin_write())?;
        let number = add(&write, "given", 1)?;
        disk(disk(write.open_table(WAITING))?.insert(number, row))?;
        disk(write.commit())?;
        Ok(number)
    }

    fn waiting(&self, after: u64) -> Disk<Vec<(u64, Notice)>> {
        let table = disk(disk(self.database.begin_read())?.open_table(WAITING))?;
        let mut waiting = Vec::new();
        for row in disk(table.range(after.saturating_add(1)..))? {
            let (number, row) = disk(row)?;
            waiting.push((number.value(), decode(row.value())?));
        }
        Ok(waiting)
    }

    fn remove(&mut self, number: u64, refusal: Option<&Refusal>) -> Disk<()> {
        let write = disk(self.database.begin_write())?;
        let removed = disk(disk(write.open_table(WAITING))?.remove(number))?.map(|row| row.value().len());
        let Some(bytes) = removed else { return Ok(()) };
        match refusal {
            None => add(&write, "taken", 1)?,
            Some(refusal) => set_aside(&write, number, refusal)?,
        };
        disk(write.commit())?;
        self.waiting -= 1;
        self.bytes -= bytes as u64;
        Ok(())
    }

    fn contents(&self) -> Disk<Contents> {
        let read = disk(self.database.begin_read())?;
        let counts = disk(read.open_table(COUNTS))?;
        let count = |name| Disk::Ok(disk(counts.get(name))?.map_or(0, |count| count.value()));
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

/// Adds to a count; returns what it is then.
fn add(write: &WriteTransaction, name: &str, more: u64) -> Disk<u64> {
    let mut counts = disk(write.open_table(COUNTS))?;
    let count = disk(counts.get(name))?.map_or(0, |count| count.value()) + more;
    disk(counts.insert(name, count))?;
    Ok(count)
}

fn set_aside(write: &WriteTransaction, number: u64, refusal: &Refusal) -> Disk<u64> {
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

fn decode<T: serde::de::DeserializeOwned>(row: &[u8]) -> Disk<T> {
    serde_json::from_slice(row).map_err(|error| Box::new(redb::Error::Corrupted(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::super::notice::{EventType, JobEvent};
    use super::*;

    fn word() -> Word {
        Word::Event(JobEvent { event_type: EventType::Completed, data: None, result: None })
    }

    fn job(number: usize) -> JobId {
        format!("j{number}").parse().unwrap()
    }

    #[test]
    fn notices_outlive_the_agent_in_order_and_leave_when_they_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room::default()).unwrap();
        for number in 0..3 {
            spool.keep(job(number), word()).unwrap();
        }
        spool.taken(1).unwrap();
        // One that is gone is not taken twice.
        spool.taken(1).unwrap();
        drop(spool);
        let spool = Spool::open(dir.path(), Room::default()).unwrap();
        let waiting = spool.waiting(0).unwrap();
        let jobs: Vec<&str> = waiting.iter().map(|(_, notice)| notice.job.as_str()).collect();
        assert_eq!(jobs, ["j1", "j2"]);
        // The tracker tells them apart by the millisecond.
        assert!(waiting[1].1.given.0 - waiting[0].1.given.0 >= APART);
        // A number is not given twice, whatever has left.
        spool.taken(3).unwrap();
        assert_eq!(spool.keep(job(3), word()).unwrap(), 4);
        let contents = spool.contents().unwrap();
        assert_eq!((contents.waiting, contents.taken), (2, 2));
        assert_eq!(contents.oldest, Some(waiting[0].1.given));
    }

    #[test]
    fn a_full_spool_refuses_and_has_room_again() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room { notices: 2, bytes: 1_000 }).unwrap();
        spool.keep(job(0), word()).unwrap();
        spool.keep(job(1), word()).unwrap();
        assert!(matches!(spool.keep(job(2), word()), Err(SpoolError::Full { notices: 2, .. })));
        spool.taken(1).unwrap();
        let long = Word::Event(JobEvent {
            event_type: EventType::Failed,
            data: Some("x".repeat(1_000).into()),
            result: None,
        });
        assert!(matches!(spool.keep(job(3), long), Err(SpoolError::Full { notices: 1, .. })));
        spool.keep(job(4), word()).unwrap();
    }

    #[test]
    fn only_the_last_refusals_are_remembered_and_all_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room::default()).unwrap();
        for number in 0..REFUSALS + 2 {
            spool.keep(job(number), word()).unwrap();
        }
        for (number, notice) in spool.waiting(0).unwrap() {
            let reason = "conflict".to_owned();
            spool.refused(number, &Refusal { notice, refused: Timestamp::wall(), reason }).unwrap();
        }
        let contents = spool.contents().unwrap();
        assert_eq!((contents.waiting, contents.bytes), (0, 0));
        assert_eq!((contents.refused, contents.refusals.len()), (REFUSALS as u64 + 2, REFUSALS));
        assert_eq!(contents.refusals[0].notice.job, job(2));
    }

    #[test]
    fn a_second_agent_and_a_directory_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Spool::open(dir.path(), Room::default()).unwrap();
        let second = Spool::open(dir.path(), Room::default()).unwrap_err().to_string();
        assert!(second.contains(&format!("pid {}", std::process::id())), "{second}");
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(Spool::open(&open, Room::default()), Err(SpoolError::Shared { .. })));
    }
}
