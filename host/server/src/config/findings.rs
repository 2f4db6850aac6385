//! Owns the findings about a config file: errors, suspicious keys, and keys of other programs.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::tree::Place;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ConfigSeverity)]
pub enum Severity {
    /// The host does not start with this file, or a plugin is not loaded
    Error,
    /// The host starts, but perhaps not as the file intends
    Warning,
    /// Nothing is wrong; the key belongs to another program
    Note,
}

/// A finding about a config file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = ConfigFinding)]
pub struct Finding {
    /// The severity
    pub severity: Severity,
    /// The key, as in `topics.jobs.*.peers[0]`; empty for a finding about the whole file
    pub path: String,
    /// The line, counted from 1, if it is known
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub line: Option<u64>,
    /// The column in characters, counted from 1, if it is known
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub column: Option<u64>,
    /// The description of the finding
    pub message: String,
}

impl Finding {
    /// Makes a finding about a path, and about a place if it is known.
    pub(super) fn new(severity: Severity, path: String, at: Option<Place>, message: String) -> Self {
        let (line, column) = (at.map(|at| at.line), at.map(|at| at.column));
        Self { severity, path, line, column, message }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The message of a syntax error contains its place already.
        if let (Some(line), Some(column), false) = (self.line, self.column, self.path.is_empty()) {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}
