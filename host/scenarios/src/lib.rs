//! Owns trials of plugins without a host and without a network: the real engine, actor and commit on a store in memory,
//! in virtual time, on one thread. Receives scenarios or recorded events; returns reports and comparisons.
//!
//! A call never waits, and the state belongs to the host. So a trial runs a week of traffic in about a second, and each
//! run has the same results.
//!
//! ```no_run
//! use dim_scenarios::{Runs, Scenario, TestBench};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bench = TestBench::new()?;
//! let plugin = bench.plugin(&std::fs::read("counter.wasm")?)?;
//! let scenario = Scenario::parse("counts", "steps:\n- message: ticks\n  expect: { state: { ticks: 1 } }\n")?;
//! let report = scenario.run(&bench, &plugin, &Runs::default())?;
//! assert!(report.is_well(), "{report}");
//! # Ok(())
//! # }
//! ```

mod test_bench;
mod identity;
mod wiring;
mod trial;
mod scenario;
mod run;
mod matching;
mod notation;
mod report;
mod bless;
mod events;
mod player;
mod compare;
mod final_state;

use dim_model::time::Timestamp;
use dim_runtime::EngineError;
use dim_server::host::HostError;
use dim_store::StoreError;
use dim_store::commit::CommitError;
use thiserror::Error;

pub use bless::bless;
pub use compare::{CompareError, Comparison, Differing, StateDifference, compare};
pub use events::{Events, EventsError};
pub use identity::{Identity, name_for, peer_of};
pub use matching::{Difference, Match, differences};
pub use player::{Totals, try_on};
pub use report::{Failure, Report, Why};
pub use run::Runs;
pub use scenario::{Scenario, ScenarioError};
pub use test_bench::{Given, Plugin, TestBench};
pub use trial::{Between, Cause, Happened, Listening, Trial};

/// The reason why a trial cannot run.
#[derive(Debug, Error)]
pub enum TrialError {
    /// The store in memory, or its directory, failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part of the host failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The commit failed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A temporary directory or the cache directory failed.
    #[error("cannot use a directory")]
    Directory(#[source] std::io::Error),
    /// The component is not a plugin that can run here.
    #[error(transparent)]
    Component(#[from] EngineError),
    /// The given data does not fit the plugin.
    #[error("{0}")]
    Given(String),
    /// The given values do not fit the manifest.
    #[error(transparent)]
    Values(#[from] dim_runtime::ManifestError),
    /// The plugin does not start.
    #[error("the plugin does not start: {0}")]
    DoesNotStart(String),
    /// Timers fired too often while time passed: the limit, and the time that was reached.
    #[error(
        "timers fired more than {0} times while time passed in one step, which has reached {1}: does a timer set itself to a time in the past? If not, split the step into several"
    )]
    Endless(u64, Timestamp),
}
