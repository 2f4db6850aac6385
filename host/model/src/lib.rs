//! The values that all crates of the host share: identifiers, times, the entries of the event log, and the small
//! types that describe errors and health.
//!
//! The crate receives text and bytes from every border of the host and returns parsed types, whose values are valid.
//! It performs no I/O.

pub mod ident;
pub mod time;
pub mod entry;
pub mod feed;
pub mod live;
pub mod health;
pub mod connectivity;
pub mod error_chain;
pub mod escape;
pub mod backoff;
pub mod beginning;
pub mod suggestion;
pub mod signer;
mod schemas;
