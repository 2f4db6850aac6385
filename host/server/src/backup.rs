//! Owns backups. Creation receives a running host's store and keys and returns one encrypted file with their state at
//! one moment; restoration makes a new state directory from the file.
//!
//! A backup is an [age](https://age-encryption.org/v1) file, so `age --decrypt` opens it too. It contains records;
//! each is 4 bytes of length, big-endian, and a protobuf message. The order is: a head, the keys, the other secrets,
//! the installed components, the rows of the tables in their order, and an end with the number of records. The config
//! and the plugins' files belong to the operator and are not included. The host compiles the components again.

mod record;
mod restore;
mod create;

use std::io;

use dim_age::DecryptError;
use dim_store::StoreError;
use secrecy::SecretString;
use thiserror::Error;

use crate::host::HostError;

pub use create::write;
pub use record::Head;
pub use restore::{restore, verify};

/// The minimum length of a passphrase, in characters.
const SHORTEST: usize = 8;

/// The passphrase of a backup. Its debug form hides it.
#[derive(Clone, Debug)]
pub struct Passphrase(SecretString);

/// The error of a passphrase with fewer than 8 characters.
#[derive(Debug, Error)]
#[error("a backup holds the host's private keys: its passphrase needs at least {SHORTEST} characters")]
pub struct ShortPassphrase;

impl Passphrase {
    /// Makes a passphrase. Returns an error if it has fewer than 8 characters.
    pub fn new(text: String) -> Result<Self, ShortPassphrase> {
        if text.chars().count() < SHORTEST {
            return Err(ShortPassphrase);
        }
        Ok(Self(SecretString::from(text)))
    }

    /// Returns the text, for the derivation of keys.
    pub fn secret(&self) -> &SecretString {
        &self.0
    }
}

/// An error that prevents a backup, its verification or its restoration.
#[derive(Debug, Error)]
pub enum BackupError {
    /// The passphrase is too short.
    #[error(transparent)]
    Passphrase(#[from] ShortPassphrase),
    /// The backup cannot be opened with the passphrase.
    #[error("this passphrase does not open the backup, or it is no backup")]
    Closed(#[source] DecryptError),
    /// The decrypted content is invalid.
    #[error("the backup is damaged: {0}")]
    Damaged(String),
    /// A newer host wrote the backup.
    #[error("the backup holds a store of format {found}, this host knows {known}: use a newer dim")]
    Newer {
        /// The format of its store.
        found: u64,
        /// The newest format that this host reads.
        known: u64,
    },
    /// The target cannot become a state directory.
    #[error("{path} {why}: a backup is restored into a new state directory or an empty one")]
    Unfit {
        /// The target directory.
        path: std::path::PathBuf,
        /// The reason, as a predicate of the path.
        why: &'static str,
    },
    /// A read or a write failed.
    #[error("cannot read or write it")]
    Io(#[from] io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key or another part of the host failed.
    #[error(transparent)]
    Host(#[from] HostError),
}
