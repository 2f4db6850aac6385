//! The host. It owns the configuration, the composition of a host from its parts, their start and shutdown, and
//! the deployment of plugins: installation, replacement, grants and removal.
//!
//! It receives a config and orders from the API, and returns the running parts and the results of the orders.
//!
//! An event takes this way through the crates:
//!
//! ```text
//! dim-ipfs      a Kubo daemon or the embedded backend delivers a message or a record
//!    │
//! dim-network   subscription, name_follower: checks, deduplicates, drops echoes
//!    │ event
//! dim-store     log: assigns the offset; the cursor of each plugin points into it
//!    │
//! dim-runtime   actor: one instance, one event at a time, under its limits and grants
//!    │ batch of effects
//! dim-store     commit: cursor, state, timers, outbox and names in one transaction and one sync
//!    │
//! dim-network   outbox, name_publisher: publish in order, with retry; the newest value of a name
//!    │
//! dim-ipfs
//! ```
//!
//! These rules hold in all crates:
//!
//! - The memory of a plugin is a cache. Its state belongs to the host. An effect that was not committed has not
//!   happened.
//! - A host function answers from local state and never waits.
//! - The context of an entry is fixed: a second handling of the entry starts from the same time, random numbers,
//!   peers and names.
//! - A crate depends only on crates above it in this list: `dim-model`, `dim-ipfs`, `dim-store`, then `dim-runtime`
//!   and `dim-network`, `dim-server`, then `dim-api`, `dim-scenarios` and `dim-agent`, and `dim`, the command line.
//!
//! A program can run a host inside itself:
//!
//! ```no_run
//! use dim_server::config::Config;
//! use dim_server::host::{Host, Options};
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

pub mod config;
pub mod secret;
pub mod host;
pub mod line_queue;

// Operations on a host and on its state directory.
pub mod backup;
pub mod dead_letters;
pub mod event_export;
pub mod replay;
