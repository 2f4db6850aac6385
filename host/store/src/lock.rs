//! Owns the lock of a state directory. The lock file contains the name of its holder.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use cap_std::fs::{Dir, File};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

use crate::owner_only;

/// The name of the lock file.
pub const LOCK: &str = "lock";

/// The reason why the lock was not taken.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process holds the lock.
    #[error("the state directory {path} is in use by {holder}: stop it, or use another --state-dir")]
    Held {
        /// The path of the directory.
        path: PathBuf,
        /// The holder, as it has described itself.
        holder: String,
    },
    /// The lock file cannot be opened, locked or written.
    #[error("cannot lock the state directory {path}")]
    Io {
        /// The path of the directory.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
}

/// A held lock. The host holds it while it runs; the operating system releases it when the process ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Lock {
    /// Takes the lock, or returns its holder as an error.
    pub fn take(dir: &Dir, path: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: path.to_owned(), source };
        // Only the owner may open the file: a user who can open it can lock it and prevent the host from starting.
        let mut options = owner_only::options();
        let mut file =
            dir.open_with(LOCK, options.read(true).write(true).create(true).truncate(false)).map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                (&mut file).take(256).read_to_string(&mut holder).map_err(io)?;
                return Err(LockError::Held { path: path.to_owned(), holder: holder.trim().to_owned() });
            }
            Err(error) => return Err(io(error.into())),
        }
        file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(io)?;
        writeln!(file, "dim {} (pid {})", env!("CARGO_PKG_VERSION"), std::process::id()).map_err(io)?;
        Ok(Self(file))
    }
}
