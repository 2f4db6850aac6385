//! Owns backups: a running host's store as of one moment and its keys, encrypted with a passphrase, and
//! the way back into a new state directory.
//!
//! A backup is an [age](https://age-encryption.org/v1) file, so `age --decrypt` opens it too. Inside are
//! records, each 4 bytes of length, big-endian, and a protobuf message: a head, the keys, the components
//! that were installed, the rows of the tables in their order, and an end that counts them. The config and the plugins' files are the
//! operator's own and are not in it; compiled components are compiled again.

mod record;
mod restored;
mod written;

use std::io;

use age::secrecy::SecretString;
use thiserror::Error;

use crate::host::HostError;
use crate::store::StoreError;

pub use record::Head;
pub use restored::{restore, verify};
pub use written::write;

/// Shortest passphrase, in characters.
const SHORTEST: usize = 8;

/// Why a backup cannot be made or used.
#[derive(Debug, Error)]
pub enum BackupError {
    /// There is no passphrase worth the name.
    #[error("a backup holds the host's private keys: its passphrase needs at least {SHORTEST} characters")]
    Passphrase,
    /// The backup cannot be opened with the passphrase.
    #[error("this passphrase does not open the backup, or it is no backup")]
    Closed(#[source] age::DecryptError),
    /// It opens and makes no sense.
    #[error("the backup is damaged: {0}")]
    Damaged(String),
    /// It comes from a newer host.
    #[error("the backup holds a store of format {found}, this host knows {known}: use a newer dim")]
    Newer {
        /// The format of its store.
        found: u64,
        /// The newest that this host knows.
        known: u64,
    },
    /// The state cannot go where it is to.
    #[error("{path} {why}: a backup is restored into a new state directory or an empty one")]
    Unfit {
        /// Where.
        path: std::path::PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// It cannot be read or written.
    #[error("cannot read or write it")]
    Io(#[from] io::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The keys.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// What opens a backup. It is not shown.
#[derive(Clone, Debug)]
pub struct Passphrase(SecretString);

impl Passphrase {
    /// Takes a passphrase; one of a few characters is refused.
    pub fn new(text: String) -> Result<Self, BackupError> {
        if text.chars().count() < SHORTEST {
            return Err(BackupError::Passphrase);
        }
        Ok(Self(SecretString::from(text)))
    }
}
