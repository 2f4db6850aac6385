//! The errors of the client.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The body of an error of the API: problem details, <https://www.rfc-editor.org/rfc/rfc9457>.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The stable identifier of the kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// The title of the kind of error.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The description of this occurrence.
    pub detail: String,
    /// The requests of a component that are not granted, as texts for the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// The digest of the component with these requests, or of an untrusted component.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Problem {
    /// Creates the error that a host would return, without a request to it.
    pub(crate) fn refused(status: u16, kind: &str, detail: String) -> Box<Self> {
        let (kind, title) = (kind.to_owned(), "Refused".to_owned());
        Box::new(Self { kind, title, status, detail, missing: Vec::new(), digest: None })
    }
}

/// The error of a call to a host.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The host does not run, or the connection failed.
    #[error("cannot reach the host at {address}")]
    Unreachable {
        /// The address of the host.
        address: String,
        /// The cause.
        source: reqwest::Error,
    },
    /// The connection failed after the start of the response.
    #[error("the response of {address} was interrupted")]
    BrokenOff {
        /// The address of the host.
        address: String,
        /// The cause.
        source: reqwest::Error,
    },
    /// The host returned an error.
    #[error("{}", .0.detail)]
    Problem(Box<Problem>),
    /// The text is not an address of a host's API.
    #[error("{0:?} is not the address of a host's API: write unix:PATH or http://127.0.0.1:PORT")]
    Address(String),
    /// The token cannot be sent in a header.
    #[error("the API's token contains characters that are invalid in a header")]
    Token,
    /// The response is not one of a host's API.
    #[error("the response of {address} is not from a dim host: {why}")]
    Strange {
        /// The address that responded.
        address: String,
        /// The part of the response that is wrong.
        why: String,
    },
    /// The subscription missed this number of entries of the host's log, or 0 if the number is unknown. The
    /// subscription continues.
    #[error("{} were missed", entries(*.0))]
    Lagged(u64),
}

/// Returns a number of entries as text; 0 is an unknown number.
fn entries(count: u64) -> String {
    if count == 0 { "entries".to_owned() } else { format!("{count} entries") }
}

impl ClientError {
    /// Returns whether the host answered that the requested object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Problem(problem) if problem.status == 404)
    }
}
