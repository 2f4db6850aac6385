//! Owns the errors of the spool, with their texts for the operator.

use std::path::{Path, PathBuf};

use dim_store::owner_only::{self, Foreign, ModeError};
use thiserror::Error;

use super::database::FORMAT;

/// The error of an operation of the spool.
#[derive(Debug, Error)]
pub enum SpoolError {
    /// The directory cannot be used.
    #[error("cannot use the agent's directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Other users have write access to the directory.
    #[error(
        "other users may write into the agent's directory {path} (mode {mode:03o}): run `chmod go-w {path}`, or use another --agent-dir"
    )]
    Shared {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The directory or a file in it belongs to another user.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The modes of the files cannot be checked.
    #[error(transparent)]
    Mode(ModeError),
    /// The database is missing although an agent has run there.
    #[error(
        "the notices {path} are missing or empty, but an agent has run here: restore the file, or start with --new-store to begin without notices; the waiting notices are lost then"
    )]
    Lost {
        /// The database.
        path: PathBuf,
    },
    /// A new database was requested, but one exists.
    #[error("{path} exists: start without --new-store to use it, or use another --agent-dir")]
    Present {
        /// The database.
        path: PathBuf,
    },
    /// The file of the database was removed or replaced.
    #[error(
        "the notices {path} were removed or replaced while the agent runs, so it stores no more notices: restart the agent"
    )]
    Gone {
        /// The database.
        path: PathBuf,
    },
    /// Another agent uses the directory.
    #[error("the agent's directory {path} is in use by {holder}: stop it, or use another --agent-dir")]
    Held {
        /// The directory.
        path: PathBuf,
        /// The name that the other agent wrote.
        holder: String,
    },
    /// A newer agent wrote the database.
    #[error(
        "the notices in {path} have format {found}, this agent knows {FORMAT}: use a newer dim, or another --agent-dir"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its format version.
        found: u64,
    },
    /// The database cannot be opened.
    #[error(
        "cannot open {path}: if the disk has no error, move the file away and start with --new-store; the notices in it are lost"
    )]
    Open {
        /// The database.
        path: PathBuf,
        /// The reason.
        source: Box<redb::DatabaseError>,
    },
    /// The spool is full.
    #[error("the spool is full: {notices} notices of {bytes} bytes wait")]
    Full {
        /// The number of waiting notices.
        notices: u64,
        /// Their size, in bytes.
        bytes: u64,
    },
    /// The disk failed.
    #[error("the notice cannot be kept")]
    Database(#[from] Box<redb::Error>),
}

impl SpoolError {
    /// Makes the error of a directory that cannot be used.
    pub(super) fn of_directory(path: &Path, source: std::io::Error) -> Self {
        match owner_only::refusal(path, &source) {
            Some(foreign) => Self::Foreign(foreign),
            None => Self::Directory { path: path.to_owned(), source },
        }
    }
}

impl From<ModeError> for SpoolError {
    fn from(error: ModeError) -> Self {
        match error {
            ModeError::Foreign(foreign) => Self::Foreign(foreign),
            error => Self::Mode(error),
        }
    }
}
