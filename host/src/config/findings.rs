//! Owns what is found in a config file: what is wrong, what is suspicious, and what belongs to other programs.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::tree::Place;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = ConfigSeverity)]
pub enum Severity {
    /// The host does not start with it, or a plugin is not loaded.
    Error,
    /// The host starts, and perhaps not as the file means it.
    Warning,
    /// Nothing is wrong: it belongs to another program.
    Note,
}

/// One thing that was found in a config file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = ConfigFinding)]
pub struct Finding {
    /// How much it matters
    pub severity: Severity,
    /// The key, as in `topics.jobs.*.peers[0]`; empty if it is about the whole file
    pub path: String,
    /// The line where it is, counted from 1, if that is known
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub line: Option<u64>,
    /// The column, counted from 1 in characters
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub column: Option<u64>,
    /// What was found
    pub message: String,
}

impl Finding {
    /// What was found at a path, and at a place if that is known.
    pub(super) fn new(severity: Severity, path: String, at: Option<Place>, message: String) -> Self {
        let (line, column) = (at.map(|at| at.line), at.map(|at| at.column));
        Self { severity, path, line, column, message }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An error of the syntax names its place itself.
        if let (Some(line), Some(column), false) = (self.line, self.column, self.path.is_empty()) {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Least likeness of two words of which one may be meant for the other.
const ALIKE: f64 = 0.84;

/// The word that was probably meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    let likeness = |known: &str| {
        let known = known.to_lowercase().replace('-', "_");
        let moved = strsim::damerau_levenshtein(&word, &known);
        // Of a short word one letter is much.
        let is_near = moved <= 2 && word.len().max(known.len()) > 3 * moved;
        if is_near { 1.0 } else { strsim::jaro_winkler(&word, &known) }
    };
    let known = known.into_iter().map(|known| (likeness(known), known));
    known.filter(|(alike, _)| *alike >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}

/// The question whether a known word was meant, after a comma; nothing if none is near.
pub fn meant<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, known).map(|known| format!("; did you mean `{known}`?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_is_told_from_a_word_of_another_program() {
        let known = ["ipfs", "topics", "signing", "plugins", "limits", "api", "store"];
        for (word, meant) in [
            ("topic", "topics"),
            ("signings", "signing"),
            ("plugin", "plugins"),
            ("Topics", "topics"),
            ("limit", "limits"),
            ("tpoics", "topics"),
            ("singing", "signing"),
        ] {
            assert_eq!(nearest(word, known), Some(meant), "{word}");
        }
        for foreign in ["orchestrator", "registry", "logging", "state_dir", "app", "rest", "tools", "grpc"] {
            assert_eq!(nearest(foreign, known), None, "{foreign}");
        }
    }
}
