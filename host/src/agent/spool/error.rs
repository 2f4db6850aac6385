//! Owns what can go wrong with the spool.

use std::path::{Path, PathBuf};

use thiserror::Error;

use super::database::FORMAT;
use crate::owner_only::{self, Foreign, ModeError};

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
    /// It, or a file in it, belongs to another user.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// The modes of its files cannot be checked.
    #[error(transparent)]
    Mode(ModeError),
    /// The database is missing although an agent has run there.
    #[error(
        "the notices {path} are missing or empty, but an agent has run here: put the file back, or start with --new-store to begin without notices; those that waited are lost"
    )]
    Lost {
        /// The database.
        path: PathBuf,
    },
    /// A new database was asked for, and there is one.
    #[error("{path} exists: start without --new-store to use it, or use another --agent-dir")]
    Present {
        /// The database.
        path: PathBuf,
    },
    /// The database's file is not there any more.
    #[error(
        "the notices {path} were removed or replaced while the agent runs, so no notice can be kept: restart the agent"
    )]
    Gone {
        /// The database.
        path: PathBuf,
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
    #[error(
        "cannot open {path}: if the disk is well, move it away and start with --new-store; the notices in it are lost"
    )]
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

impl SpoolError {
    /// The error of a directory that cannot be used.
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
