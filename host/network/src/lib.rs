//! The exchange with the network: the subscriptions, the followed names, the outbox and the publication of the host's
//! own names. The driver of reliable topics connects the protocol of `dim-topics` to the backend and the store.
//!
//! Inbound: the crate receives messages and records from a backend (`dim-ipfs`), checks them and appends entries to
//! the event log (`dim-store`). Outbound: it sends committed rows of the outbox and of names to the backend, and
//! retries until the backend accepts them.

pub mod subscription;
pub mod name_follower;
pub mod outbox;
pub mod reliable_topics;
pub mod lone_writer;
pub mod name_publisher;
pub mod encrypted_documents;
pub mod own_messages;
mod settings;

pub use settings::Settings;
