//! Owns trying plugins without a host and without a network: the real engine, the real actor and the real commit on
//! a store in memory, in virtual time, on one thread.
//!
//! A call never waits and state is the host's, so a week of traffic is tried in a second, and what a plugin does
//! with it is the same each time.
//!
//! ```no_run
//! use dim::test::{Bench, Runs, Scenario};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bench = Bench::new()?;
//! let plugin = bench.plugin(&std::fs::read("counter.wasm")?)?;
//! let scenario = Scenario::parse("counts", "steps:\n- message: ticks\n  expect: { state: { ticks: 1 } }\n")?;
//! let report = scenario.run(&bench, &plugin, &Runs::default())?;
//! assert!(report.is_well(), "{report}");
//! # Ok(())
//! # }
//! ```

mod bench;
mod identity;
mod wiring;
mod trial;
mod scenario;
mod run;
mod matching;
mod shown;
mod report;
mod bless;
mod events;
mod player;
mod compare;
mod end;

use thiserror::Error;

use crate::commit::CommitError;
use crate::host::HostError;
use crate::plugin::EngineError;
use crate::store::StoreError;
use crate::time::Timestamp;

pub use bench::{Bench, Given, Plugin};
pub use bless::bless;
pub use compare::{CompareError, Comparison, Differing, StateDifference, compare};
pub use events::{Events, EventsError};
pub use identity::{Identity, name_for, peer_of};
pub use matching::{Difference, Match, differences};
pub use player::{Totals, try_on};
pub use report::{Failure, Report, Why};
pub use run::Runs;
pub use scenario::{Scenario, ScenarioError};
pub use trial::{Between, Cause, Happened, Listening, Trial};

/// Why something cannot be tried.
#[derive(Debug, Error)]
pub enum TestError {
    /// The store in memory, or the directory beside it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What a host is made of.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The commit.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A directory.
    #[error("cannot use a directory")]
    Directory(#[source] std::io::Error),
    /// The file is no plugin that runs here.
    #[error(transparent)]
    Component(#[from] EngineError),
    /// What is given does not fit the plugin.
    #[error("{0}")]
    Given(String),
    /// The plugin does not start.
    #[error("the plugin does not start: {0}")]
    DoesNotStart(String),
    /// There is no end of it.
    #[error(
        "timers fall due more than {0} times in one stretch of time, which has come to {1}: does one set itself to a time that has passed? If not, let time pass in several steps"
    )]
    Endless(u64, Timestamp),
}
