//! The job tracker with another layout of its state, as an example of an upgrade with a migration. All jobs share a
//! prefix, with an index of the open ones. In version 1 open and finished jobs have separate prefixes.

#[path = "../../../plugins/job-tracker/src/document.rs"]
mod document;
#[path = "../../../plugins/job-tracker/src/import.rs"]
mod import;
#[path = "../../../plugins/job-tracker/src/job.rs"]
mod job;
#[path = "../../../plugins/job-tracker/src/merge.rs"]
mod merge;
#[path = "tracker_2/store.rs"]
mod store;
#[path = "../../../plugins/job-tracker/src/traces.rs"]
mod traces;
#[path = "../../../plugins/job-tracker/src/tracker.rs"]
mod tracker;

use dim_guest::{Event, Failure, Plugin, Refusal, export_plugin};

use tracker::{Config, JobTracker};

struct Tracker2(JobTracker);

impl Plugin for Tracker2 {
    type Config = Config;

    fn start(config: Config, from_state_version: Option<u32>) -> Result<Self, String> {
        match from_state_version {
            None | Some(2) => {}
            Some(1) => store::migrate().map_err(|error| format!("migrating the jobs: {error:?}"))?,
            Some(other) => return Err(format!("state of version {other} is not known")),
        }
        JobTracker::start(config, from_state_version).map(Self)
    }

    fn handle(&mut self, event: Event) -> Result<(), Failure> {
        self.0.handle(event)
    }

    fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
        self.0.command(method, body)
    }

    fn query(&self, method: &str, body: &str) -> Result<String, Refusal> {
        self.0.query(method, body)
    }
}

export_plugin!(Tracker2, manifest: "tracker_2/plugin.toml");
