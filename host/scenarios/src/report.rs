//! Owns the report of a scenario. Receives the results of its runs; returns text for people.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::matching::Difference;

/// The result of a scenario.
#[derive(Clone, Debug)]
pub struct Report {
    /// The name of the scenario.
    pub name: String,
    /// The failures; empty if the scenario passed.
    pub failures: Vec<Failure>,
    /// The number of entries for the plugin.
    pub entries: u64,
    /// The number of entries with a crash around them; none without a run with crashes.
    pub crashes: Option<u64>,
    /// The number of entries with a replacement after them; none without a run with replacements.
    pub replacements: Option<u64>,
    /// The duration of the plain run.
    pub plain: Duration,
    /// The duration of all runs.
    pub took: Duration,
    /// The results of each top-level step that differ from the expected ones, if the run records them.
    pub happened: Vec<Option<Map<String, Value>>>,
}

/// A failure of a scenario.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The run in which it occurred.
    pub why: Why,
    /// The place in the scenario; empty for the scenario as a whole.
    pub place: String,
    /// The reason; empty if there are only differences.
    pub reason: String,
    /// The differences between expected and actual values.
    pub differences: Vec<Difference>,
}

/// The run in which a failure occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The plain run, as the scenario is written.
    Step,
    /// The run with crashes.
    Crash,
    /// The run with replacements.
    Replacement,
}

impl Why {
    /// The name of the run in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Step => "as-written",
            Self::Crash => "crash",
            Self::Replacement => "replacement",
        }
    }
}

/// Maximum number of shown differences of one failure.
const DIFFERENCES: usize = 20;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = match self.why {
            Why::Step => None,
            Why::Crash => Some("after a crash and a restart"),
            Why::Replacement => Some("replaced by itself"),
        };
        if let Some(between) = between {
            writeln!(
                f,
                "{between} between each two entries, the final state differs from that of the plain run (-): data that a plugin keeps only in memory is lost with its instance"
            )?;
        }
        match (self.place.as_str(), self.reason.as_str()) {
            ("", "") => {}
            ("", reason) => writeln!(f, "{reason}")?,
            (place, "") => writeln!(f, "{place}:")?,
            (place, reason) => writeln!(f, "{place}: {reason}")?,
        }
        for difference in self.differences.iter().take(DIFFERENCES) {
            for line in difference.to_string().lines() {
                writeln!(f, "  {line}")?;
            }
        }
        if let Some(more) = self.differences.len().checked_sub(DIFFERENCES).filter(|more| *more > 0) {
            writeln!(f, "  and {more} more differences")?;
        }
        Ok(())
    }
}

impl Failure {
    /// Creates a failure of the whole scenario with a reason.
    pub fn because(reason: String) -> Self {
        Self { why: Why::Step, place: String::new(), reason, differences: Vec::new() }
    }
}

impl Report {
    /// Creates the report of a scenario that cannot run.
    pub fn broken(name: String, reason: String) -> Self {
        let (plain, took) = (Duration::ZERO, Duration::ZERO);
        let failures = vec![Failure::because(reason)];
        Self {
            name,
            failures,
            entries: 0,
            crashes: None,
            replacements: None,
            plain,
            took,
            happened: Vec::new(),
        }
    }

    /// Whether the scenario passed.
    pub fn is_well(&self) -> bool {
        self.failures.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_well() { "ok" } else { "FAILED" };
        write!(f, "{verdict} {} ({} entries", self.name, self.entries)?;
        if let Some(count) = self.crashes {
            write!(f, ", {count} crashes")?;
        }
        if let Some(count) = self.replacements {
            write!(f, ", {count} replacements")?;
        }
        writeln!(f, ", {:.0?})", self.took)?;
        for failure in &self.failures {
            for line in failure.to_string().lines() {
                writeln!(f, "    {line}")?;
            }
        }
        Ok(())
    }
}
