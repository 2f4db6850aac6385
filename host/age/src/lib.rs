//! The [age](https://age-encryption.org/v1) format: files that are encrypted with a passphrase or for X25519 keys.
//!
//! A file is a header of text and a payload. The header holds the file key, encrypted for each recipient, and a MAC. The
//! payload is a nonce of 16 bytes and chunks of 64 KiB, each encrypted with ChaCha20-Poly1305 by the STREAM
//! construction: chunks cannot be reordered, and a truncated payload is detected.
//!
//! The crate [`age`](https://docs.rs/age) does the same and more, with fifty dependencies. The tests compare with it.

mod header;
pub mod passphrase;
pub mod payload;
pub mod x25519;

use std::io;

use thiserror::Error;
use zeroize::Zeroizing;

/// The key of one file, from which the keys of its header and its payload are derived.
pub type FileKey = Zeroizing<[u8; 16]>;

/// An error that prevents decryption.
#[derive(Debug, Error)]
pub enum DecryptError {
    /// The input is not a file in the age format, or is encrypted in a way that is not supported.
    #[error("the header of the age format is missing or invalid: {0}")]
    Header(&'static str),
    /// The file is encrypted for another kind of recipient.
    #[error("the file is not encrypted with a passphrase")]
    Recipient,
    /// The passphrase does not decrypt the file key.
    #[error("the passphrase is wrong, or the encrypted file key was changed")]
    Passphrase,
    /// The file is encrypted for other keys.
    #[error("the file is encrypted for other keys")]
    OtherKeys,
    /// The file demands more work than this host accepts.
    #[error("the scrypt work factor is {0}, and the maximum is {max}", max = passphrase::MAX_WORK_FACTOR)]
    ExcessiveWork(u8),
    /// A read failed, or the payload was changed or truncated.
    #[error("cannot read the encrypted file")]
    Io(#[from] io::Error),
}
