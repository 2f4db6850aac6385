//! The host of a fleet's coordination plugins.
//!
//! The way of an event, which is also the order of the modules below:
//!
//! ```text
//! backend (kubo | embedded)
//!    │ message, name change
//! subscription      one per topic and host, shared by all plugins; reconnects for ever
//!    │ event
//! log               gives it an offset; durable; the plugin's cursor points into it
//!    │
//! plugin            an actor: one instance, one event at a time, under its limits and grants
//!    │ effects      (state, publishes, names, timers: nothing has happened yet)
//! commit            cursor, state, timers, outbox and names in one transaction and one sync
//!    │
//! outbox, names     publishes in order, with retry; of a name the newest value
//!    │
//! backend
//! ```
//!
//! What holds everywhere:
//!
//! - A plugin's memory is a cache; its state is the host's. What was not committed has not happened.
//! - A call never waits: every host function answers from local state.
//! - An entry's world is fixed: handling it again starts from the same time, random, peers and names.
//! - Arrows point one way: a backend knows no plugin, and only `plugin/bindings.rs` holds bindings.
//!
//! A program can run a host inside itself:
//!
//! ```no_run
//! use dim::config::Config;
//! use dim::host::{Host, Options};
//!
//! # async fn embed() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::parse("ipfs:\n  ipns_key_name: my-fleet\n")?;
//! let host = Host::start(Options::new(config, "/var/lib/my-fleet")).await?;
//!
//! let tracker = host.plugins.get("job-tracker").expect("it comes with the host");
//! let update = r#"{"job_id":"render-7","event_type":"running"}"#;
//! let job = tracker.handle.command("update".to_owned(), update.to_owned()).await?;
//! println!("durable: {job}");
//!
//! host.shutdown().await;
//! # Ok(())
//! # }
//! ```

// The words, the time and the values that every stage speaks of.
pub mod ident;
pub mod time;
pub mod entry;
pub mod effect;

// The way of an event.
pub mod backend;
pub mod subscription;
pub mod log;
pub mod plugin;
pub mod commit;
pub mod outbox;
pub mod names;

// What the stages share: the store, and who wants what from outside.
pub mod store;
pub mod keys;
pub mod signing;
pub mod interest;
pub mod followed;
pub mod dead;
pub mod change;
pub mod feed;
pub mod room;
pub mod trouble;
mod retries;
mod retention;
mod echo;
mod backoff;
mod cause;
mod escape;
mod line_queue;
mod owner_only;

// The whole, and the ways to it.
mod bundled;
pub mod config;
pub mod contact;
pub mod secret;
pub mod host;
pub mod replay;
pub mod test;
pub mod backup;
pub mod export;
pub mod api;
pub mod cli;

// What runs on the nodes.
pub mod agent;

pub use dim_client::{Client, install_tls};
