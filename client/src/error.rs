//! Why a call fails.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The body of an error of the API: problem details, <https://www.rfc-editor.org/rfc/rfc9457>.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A word for the kind of error, stable.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong this time.
    pub detail: String,
    /// What a component asks for and is not granted, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// The digest of the component that asks for it, or that nobody vouches for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Problem {
    /// What a host would answer, found out without asking it.
    pub(crate) fn refused(status: u16, kind: &str, detail: String) -> Box<Self> {
        let (kind, title) = (kind.to_owned(), "Refused".to_owned());
        Box::new(Self { kind, title, status, detail, missing: Vec::new(), digest: None })
    }
}

/// Why a call failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no host, or no way to it.
    #[error("cannot reach the host at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The host began to answer, and did not come to the end.
    #[error("the answer of {address} broke off")]
    BrokenOff {
        /// Who answered.
        address: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The host says no.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// The address is none.
    #[error("{0:?} is not the address of a host's API: write unix:PATH or http://127.0.0.1:PORT")]
    Address(String),
    /// The token is none.
    #[error("the API's token holds characters that a header cannot")]
    Token,
    /// The answer is not what a host answers.
    #[error("the answer of {address} is not that of a host: {why}")]
    Strange {
        /// Who answered.
        address: String,
        /// What is strange.
        why: String,
    },
    /// A subscription has missed so many entries of the host's log, or 0 if their number is not known; it goes on.
    #[error("{} were missed", entries(*.0))]
    Lagged(u64),
}

/// So many entries, in words.
fn entries(count: u64) -> String {
    if count == 0 { "entries".to_owned() } else { format!("{count} entries") }
}

impl ClientError {
    /// Whether what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Problem(problem) if problem.status == 404)
    }
}
