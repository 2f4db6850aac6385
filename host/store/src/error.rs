//! Owns the errors of the store.

use std::path::{Path, PathBuf};

use dim_model::entry::MalformedEntry;
use redb::{DatabaseError, StorageError};
use thiserror::Error;

use crate::owner_only::{self, Foreign, ModeError};
use crate::{FORMAT, LockError};

/// An error of the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The state directory cannot be used.
    #[error("cannot use the state directory {path}")]
    Directory {
        /// The path of the directory.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// Other users may write into the state directory.
    #[error(
        "other users may write into the state directory {path} (mode {mode:03o}): chmod go-w it, or use another --state-dir"
    )]
    Shared {
        /// The path of the directory.
        path: PathBuf,
        /// The mode of the directory.
        mode: u32,
    },
    /// The state directory, or a file in it, belongs to another user.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The modes of the files cannot be checked.
    #[error(transparent)]
    Mode(ModeError),
    /// The database is missing although a host has run in the state directory.
    #[error(
        "the database {path} is missing or empty, but {trace} shows that a host has run here: restore a backup into an empty directory with `dim restore`, or start with --new-store to begin with an empty store, which has no jobs, no nodes and no state of plugins"
    )]
    Lost {
        /// The path of the database.
        path: PathBuf,
        /// The file that shows that a host has run here.
        trace: PathBuf,
    },
    /// The operator requested a new store, but a store exists.
    #[error("the database {path} exists: start without --new-store to use it, or use another --state-dir")]
    Present {
        /// The path of the database.
        path: PathBuf,
    },
    /// A restore of a backup into the state directory did not finish.
    #[error(
        "a restore into {path} was aborted: empty the directory and restore the backup again, or use another --state-dir"
    )]
    HalfRestored {
        /// The path of the directory.
        path: PathBuf,
    },
    /// Another host holds the lock of the state directory.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// A newer host wrote the store.
    #[error(
        "the store has format {found}, this host knows {FORMAT}: use a newer dim, or another --state-dir"
    )]
    Newer {
        /// The format of the store.
        found: u64,
    },
    /// A host from before the first release wrote the store.
    #[error(
        "the store has format {found}, from before the first release, which this host cannot read: use another --state-dir"
    )]
    Older {
        /// The format of the store.
        found: u64,
    },
    /// The database cannot be opened.
    #[error("cannot open {path}: restore it from a backup, or use another --state-dir")]
    Open {
        /// The path of the database.
        path: PathBuf,
        /// The error of the database.
        source: Box<redb::DatabaseError>,
    },
    /// The database found damage in its file and stopped.
    #[error("{path} is damaged: restore it from a backup, or use another --state-dir")]
    Damaged {
        /// The path of the database.
        path: PathBuf,
    },
    /// The store contains a value that no host writes.
    #[error("the store is damaged: {what}: {why}")]
    Corrupt {
        /// The damaged part.
        what: &'static str,
        /// The defect.
        why: String,
    },
    /// The database failed.
    #[error("the store failed")]
    Database(#[source] Box<redb::Error>),
}

impl StoreError {
    /// Makes the error of a part that cannot be read.
    pub fn corrupt(what: &'static str, why: impl ToString) -> Self {
        Self::Corrupt { what, why: why.to_string() }
    }
}

impl StoreError {
    /// Makes the error of a directory that cannot be used.
    pub(super) fn of_directory(path: &Path, source: std::io::Error) -> Self {
        match owner_only::refusal(path, &source) {
            Some(foreign) => Self::Foreign(foreign),
            None => Self::Directory { path: path.to_owned(), source },
        }
    }

    /// Makes the error of a database that cannot be opened.
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
