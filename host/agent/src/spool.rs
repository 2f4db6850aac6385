//! Owns the agent's directory: its lock, and the notices that no receiver has accepted yet, in the order in which
//! they were given. It receives notices and returns their numbers once they are on the disk.

mod database;
mod error;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use dim_model::ident::JobId;
use dim_model::time::Timestamp;
use dim_store::owner_only;
use dim_store::{Absent, LOCK, Lock, LockError};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::notice::{Notice, Word};
use database::{DATABASE, Opened};

pub use error::SpoolError;

/// The capacity of a spool.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// The maximum number of notices.
    pub notices: u64,
    /// The maximum size of all notices, in bytes.
    pub bytes: u64,
}

impl Default for Room {
    /// Returns 10,000 notices and 16 MiB: enough for days of a busy node, and little for any disk.
    fn default() -> Self {
        Self { notices: 10_000, bytes: 16 << 20 }
    }
}

/// A notice that was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// The notice.
    pub notice: Notice,
    /// The time of the refusal.
    pub refused: Timestamp,
    /// The reason.
    pub reason: String,
}

/// The contents of a spool, for the status.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// The number of waiting notices.
    pub waiting: u64,
    /// The size of the waiting notices, in bytes.
    pub bytes: u64,
    /// The time at which the oldest waiting notice was given.
    pub oldest: Option<Timestamp>,
    /// The number of accepted notices.
    pub taken: u64,
    /// The number of refused notices.
    pub refused: u64,
    /// The last refusals.
    pub refusals: Vec<Refusal>,
}

/// The spool of one agent.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    room: Room,
    /// The open database, or `None` after an error of the disk. Then the next call opens it again.
    opened: Mutex<Option<Opened>>,
    /// Notified after each notice that is stored.
    pub kept: Notify,
    _lock: Lock,
}

impl Spool {
    /// Opens the spool in a directory, which is created if it is missing. Blocks.
    pub fn open(path: &Path, room: Room, absent: Absent) -> Result<Self, SpoolError> {
        let directory = |source| SpoolError::of_directory(path, source);
        owner_only::create_dir_all(path).map_err(directory)?;
        let mode = std::fs::metadata(path).map_err(directory)?.permissions().mode();
        // Another user with write access could send notices as this node.
        if mode & 0o022 != 0 {
            return Err(SpoolError::Shared { path: path.to_owned(), mode: mode & 0o777 });
        }
        owner_only::settle(path, &[DATABASE, "agent.sums", LOCK])?;
        let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(directory)?;
        // An agent that held the lock wrote its name into the file, and made the database.
        let has_run = dir.metadata(LOCK).is_ok_and(|lock| lock.len() > 0);
        let lock = Lock::take(&dir, path).map_err(|error| match error {
            LockError::Held { path, holder } => SpoolError::Held { path, holder },
            LockError::Io { path, source } => SpoolError::Directory { path, source },
        })?;
        let (file, is_missing) = (path.join(DATABASE), is_missing(&path.join(DATABASE)));
        match absent {
            Absent::Created if !is_missing => return Err(SpoolError::Present { path: file }),
            Absent::Refused if is_missing && has_run => return Err(SpoolError::Lost { path: file }),
            _ => {}
        }
        let opened = Opened::open(path)?;
        Ok(Self {
            dir: path.to_owned(),
            room,
            opened: Mutex::new(Some(opened)),
            kept: Notify::new(),
            _lock: lock,
        })
    }

    /// Stores a notice and returns its number. The notice is on the disk when this returns. Blocks.
    pub fn keep(&self, job: JobId, word: Word) -> Result<u64, SpoolError> {
        let number = self.with(|opened| {
            // Notices that are in the open file are still sent.
            if !opened.is_in_place(&self.dir) {
                return Err(SpoolError::Gone { path: self.dir.join(DATABASE) });
            }
            opened.keep(job, word, self.room)
        })?;
        self.kept.notify_one();
        Ok(number)
    }

    /// Returns the notices with numbers above `after`, in order. Blocks.
    pub fn waiting(&self, after: u64) -> Result<Vec<(u64, Notice)>, SpoolError> {
        self.with(|opened| Ok(opened.waiting(after)?))
    }

    /// Removes accepted notices. Blocks.
    pub fn taken(&self, numbers: &[u64]) -> Result<(), SpoolError> {
        self.with(|opened| Ok(opened.take(numbers)?))
    }

    /// Moves a notice that was finally refused to the refusals. Blocks.
    pub fn refused(&self, number: u64, refusal: &Refusal) -> Result<(), SpoolError> {
        self.with(|opened| Ok(opened.refuse(number, refusal)?))
    }

    /// Returns the contents. Blocks.
    pub fn contents(&self) -> Result<Contents, SpoolError> {
        self.with(|opened| Ok(opened.contents()?))
    }

    fn with<R>(&self, work: impl FnOnce(&mut Opened) -> Result<R, SpoolError>) -> Result<R, SpoolError> {
        let mut slot = self.opened.lock().expect("no one panics while holding the spool");
        let mut opened = match slot.take() {
            Some(opened) => opened,
            // The existing database is opened again. A missing one is not created, because its notices would be lost
            // silently.
            None if is_missing(&self.dir.join(DATABASE)) => {
                return Err(SpoolError::Gone { path: self.dir.join(DATABASE) });
            }
            None => Opened::open(&self.dir)?,
        };
        let result = work(&mut opened);
        if !matches!(result, Err(SpoolError::Database(_))) {
            *slot = Some(opened);
        }
        result
    }
}

fn is_missing(database: &Path) -> bool {
    std::fs::metadata(database)
        .map_or_else(|error| error.kind() == std::io::ErrorKind::NotFound, |database| database.len() == 0)
}

/// Runs work on the spool on a thread that may block.
pub async fn on_disk<R: Send + 'static>(
    spool: &Arc<Spool>,
    work: impl FnOnce(&Spool) -> R + Send + 'static,
) -> R {
    let spool = spool.clone();
    tokio::task::spawn_blocking(move || work(&spool)).await.expect("the spool does not panic")
}

#[cfg(test)]
mod tests {
    use super::super::notice::{EventType, JobEvent};
    use super::database::{APART, REFUSALS};
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
        let spool = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        for number in 0..3 {
            spool.keep(job(number), word()).unwrap();
        }
        spool.taken(&[1]).unwrap();
        // One that is gone is not taken twice.
        spool.taken(&[1]).unwrap();
        drop(spool);
        let spool = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        let waiting = spool.waiting(0).unwrap();
        let jobs: Vec<&str> = waiting.iter().map(|(_, notice)| notice.job.as_str()).collect();
        assert_eq!(jobs, ["j1", "j2"]);
        // The tracker tells them apart by the millisecond.
        assert!(waiting[1].1.given.0 - waiting[0].1.given.0 >= APART);
        // A number is not given twice, whatever has left.
        spool.taken(&[3]).unwrap();
        assert_eq!(spool.keep(job(3), word()).unwrap(), 4);
        let contents = spool.contents().unwrap();
        assert_eq!((contents.waiting, contents.taken), (2, 2));
        assert_eq!(contents.oldest, Some(waiting[0].1.given));
    }

    #[test]
    fn a_full_spool_refuses_and_has_room_again() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room { notices: 2, bytes: 1_000 }, Absent::Refused).unwrap();
        spool.keep(job(0), word()).unwrap();
        spool.keep(job(1), word()).unwrap();
        assert!(matches!(spool.keep(job(2), word()), Err(SpoolError::Full { notices: 2, .. })));
        spool.taken(&[1]).unwrap();
        let long = Word::Event(JobEvent {
            event_type: EventType::Failed,
            data: serde_json::from_str(&format!("\"{}\"", "x".repeat(1_000))).unwrap(),
            result: None,
        });
        assert!(matches!(spool.keep(job(3), long), Err(SpoolError::Full { notices: 1, .. })));
        spool.keep(job(4), word()).unwrap();
    }

    #[test]
    fn only_the_last_refusals_are_remembered_and_all_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
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
        let _first = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        let second = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap_err().to_string();
        assert!(second.contains(&format!("pid {}", std::process::id())), "{second}");
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            Spool::open(&open, Room::default(), Absent::Refused),
            Err(SpoolError::Shared { .. })
        ));
    }

    #[test]
    fn notices_that_are_missing_are_not_taken_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let open = |absent| Spool::open(dir.path(), Room::default(), absent);
        let file = dir.path().join(DATABASE);
        open(Absent::Refused).unwrap().keep(job(0), word()).unwrap();
        assert!(matches!(open(Absent::Created), Err(SpoolError::Present { .. })));
        std::fs::rename(&file, dir.path().join("away")).unwrap();
        let lost = open(Absent::Refused).unwrap_err().to_string();
        assert!(lost.contains("--new-store") && lost.contains("agent.redb"), "{lost}");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(open(Absent::Refused), Err(SpoolError::Lost { .. })), "an empty one is none");
        std::fs::rename(dir.path().join("away"), &file).unwrap();
        assert_eq!(open(Absent::Refused).unwrap().contents().unwrap().waiting, 1);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(open(Absent::Created).unwrap().contents().unwrap().waiting, 0);
    }

    #[test]
    fn a_notice_is_not_acknowledged_once_the_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        spool.keep(job(0), word()).unwrap();
        std::fs::remove_file(dir.path().join(DATABASE)).unwrap();
        for _ in 0..2 {
            let gone = spool.keep(job(1), word()).unwrap_err();
            assert!(matches!(gone, SpoolError::Gone { .. }), "{gone}");
        }
    }

    #[test]
    fn the_notices_are_the_owners_alone_from_the_first_byte() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let spool = Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        let mode =
            |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(DATABASE), mode(LOCK)), (0o600, 0o600));
        drop(spool);
        for name in [DATABASE, LOCK] {
            std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(0o644)).unwrap();
        }
        Spool::open(dir.path(), Room::default(), Absent::Refused).unwrap();
        assert_eq!((mode(DATABASE), mode(LOCK)), (0o600, 0o600));
    }
}
