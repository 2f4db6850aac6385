//! The host of a fleet's coordination plugins.

pub mod ident;
pub mod time;

pub mod backend;
pub mod commit;
pub mod log;
pub mod outbox;
pub mod plugin;
pub mod subscription;

pub mod api;
mod backoff;
mod bundled;
pub mod cli;
pub mod config;
pub mod dead;
pub mod documents;
mod echo;
pub mod followed;
pub mod host;
pub mod interest;
pub mod keys;
pub mod names;
pub mod replay;
mod retention;
mod retries;
pub mod store;

/// Chooses who does the cryptography of TLS, once for the process.
pub fn install_tls() {
    // Another part of the process may have chosen already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
