//! Which jobs are queued, running and finished.
//!
//! Job events, results and the verdicts on nodes come in; the jobs are published as a document
//! under an IPNS key.

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
