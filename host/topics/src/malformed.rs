//! Owns the error of untrusted bytes that are no valid block, bundle or head.

use thiserror::Error;

/// The error of bytes that are no valid block, bundle or head.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// There are more bytes than allowed.
    #[error("{bytes} bytes are more than {limit}")]
    TooLarge {
        /// The number of bytes.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The envelope is invalid.
    #[error("the block is invalid: {0}")]
    Block(&'static str),
    /// The writer did not sign the block.
    #[error("the block is not signed by its writer")]
    Signature,
    /// The payload is invalid.
    #[error("the payload is invalid: {0}")]
    Payload(&'static str),
    /// The payload has a version that this host does not know.
    #[error("the payload has version {0}, and this host knows version {known}", known = crate::bundle::VERSION)]
    Version(u64),
    /// The block is of another fleet or topic.
    #[error("the block is of another fleet or topic")]
    Elsewhere,
    /// The events cannot be read.
    #[error("the events are unreadable: {0}")]
    Events(&'static str),
}
