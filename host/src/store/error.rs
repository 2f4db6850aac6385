//! Owns what can go wrong with the store.

use std::path::{Path, PathBuf};

use redb::{DatabaseError, StorageError};
use thiserror::Error;

use super::{FORMAT, LockError};
use crate::entry::MalformedEntry;
use crate::owner_only::{self, Foreign, ModeError};

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
    /// It, or a file in it, belongs to another user.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The modes of its files cannot be checked.
    #[error(transparent)]
    Mode(ModeError),
    /// The database is missing although a host has run there.
    #[error(
        "the database {path} is missing or empty, but {trace} shows that a host has run here: restore a backup into an empty directory with `dim restore`, or start with --new-store to begin with an empty store, which has no jobs, no nodes and no state of plugins"
    )]
    Lost {
        /// The database.
        path: PathBuf,
        /// What shows that there was one.
        trace: PathBuf,
    },
    /// A new store was asked for, and there is one.
    #[error("the database {path} exists: start without --new-store to use it, or use another --state-dir")]
    Present {
        /// The database.
        path: PathBuf,
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

impl StoreError {
    /// The error of a directory that cannot be used.
    pub(super) fn of_directory(path: &Path, source: std::io::Error) -> Self {
        match owner_only::refusal(path, &source) {
            Some(foreign) => Self::Foreign(foreign),
            None => Self::Directory { path: path.to_owned(), source },
        }
    }

    /// The error of a database that cannot be opened.
    pub(super) fn of_open(path: &Path, source: DatabaseError) -> Self {
        if let DatabaseError::Storage(StorageError::Io(error)) = &source
            && let Some(foreign) = owner_only::refusal(path, error)
        {
            return Self::Foreign(foreign);
        }
        Self::Open { path: path.to_owned(), source: Box::new(source) }
    }
}

impl From<ModeError> for StoreError {
    fn from(error: ModeError) -> Self {
        match error {
            ModeError::Foreign(foreign) => Self::Foreign(foreign),
            error => Self::Mode(error),
        }
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
