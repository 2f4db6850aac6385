//! Owns what is told of a scenario that was run.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use super::matching::Difference;

/// What came of a scenario.
#[derive(Clone, Debug)]
pub struct Report {
    /// The scenario.
    pub name: String,
    /// What went otherwise than it was expected; nothing if all is well.
    pub failures: Vec<Failure>,
    /// How many entries there were for the plugin to react to.
    pub entries: u64,
    /// Around how many entries the host crashed, if that was run.
    pub crashes: Option<u64>,
    /// After how many entries the plugin was replaced by itself, if that was run.
    pub replacements: Option<u64>,
    /// How long it took as it is written.
    pub plain: Duration,
    /// How long all of it took.
    pub took: Duration,
    /// What each step has brought about, if that was asked and is not as it was expected.
    pub happened: Vec<Option<Map<String, Value>>>,
}

/// Something that went otherwise than it was expected.
#[derive(Clone, Debug)]
pub struct Failure {
    /// In which run.
    pub why: Why,
    /// Where.
    pub place: String,
    /// Why, if it is no difference.
    pub reason: String,
    /// What is different.
    pub differences: Vec<Difference>,
}

/// In which run something went otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// As the scenario is written.
    Step,
    /// With crashes.
    Crash,
    /// With replacements.
    Replacement,
}

impl Why {
    /// A word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Step => "as-written",
            Self::Crash => "crash",
            Self::Replacement => "replacement",
        }
    }
}

/// Differences that are shown of one failure.
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
                "{between} between each two entries, it does not end as without (-): what a plugin keeps in memory alone is gone with its instance"
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
            writeln!(f, "  and {more} differences more")?;
        }
        Ok(())
    }
}

impl Failure {
    /// One that is no difference, of a whole scenario.
    pub fn because(reason: String) -> Self {
        Self { why: Why::Step, place: String::new(), reason, differences: Vec::new() }
    }
}

impl Report {
    /// One of a scenario that cannot be run, and why.
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

    /// Whether all went as it was expected.
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
