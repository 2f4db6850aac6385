//! Tracks the queued, running and finished jobs of the fleet.
//!
//! The tracker receives job events, results and verdicts on nodes. It publishes the jobs as a document under
//! an IPNS key.

mod document;
mod import;
mod job;
mod merge;
mod store;
mod traces;
mod tracker;

use dim_guest::export_plugin;

pub use tracker::JobTracker;

export_plugin!(JobTracker, manifest: "../plugin.toml");
