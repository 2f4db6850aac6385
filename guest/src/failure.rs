//! Converts errors into a rejection or a retry of the event.

use std::fmt::Display;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::{Failure, Message};

/// The limits that an event may exceed temporarily: the outbox, and the rates of publishes and documents.
const FOR_A_WHILE: [&str; 4] =
    ["outbox", "publishes-per-second", "publish-bytes-per-second", "document-bytes-per-second"];

/// The delay of a retry after a temporary limit.
pub(crate) const A_WHILE: Duration = Duration::from_secs(1);

/// Returns whether the exceeded limit is temporary, so that a retry can succeed.
pub(crate) fn is_met_for_a_while(limit: &str) -> bool {
    FOR_A_WHILE.contains(&limit)
}

impl Failure {
    /// Creates a failure that rejects the event: the host stores it as a dead letter with the reason.
    pub fn reject(reason: impl Display) -> Self {
        Self::Reject(reason.to_string())
    }

    /// Creates a failure that retries the event after `pause`. The limit `retries` bounds the number of retries.
    pub fn retry_after(pause: Duration) -> Self {
        Self::Retry(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Conversion of an error or a missing value into a [`Failure`] of the event.
///
/// ```
/// use std::time::Duration;
/// use dim_guest::{Failure, OrFail};
///
/// fn parse(text: &str) -> Result<u64, Failure> {
///     text.parse::<u64>().or_reject("not a number")
/// }
///
/// assert!(matches!(parse("x"), Err(Failure::Reject(why)) if why.starts_with("not a number: ")));
/// let nothing: Option<u64> = None;
/// assert!(matches!(nothing.or_retry(Duration::from_secs(1)), Err(Failure::Retry(1_000_000_000))));
/// ```
pub trait OrFail<T> {
    /// Returns the value, or rejects the event with the reason `what`, followed by the error if there is one.
    fn or_reject(self, what: &str) -> Result<T, Failure>;

    /// Returns the value, or retries the event after `pause`.
    fn or_retry(self, pause: Duration) -> Result<T, Failure>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_reject(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::Reject(format!("{what}: {error}")))
    }

    fn or_retry(self, pause: Duration) -> Result<T, Failure> {
        self.map_err(|_| Failure::retry_after(pause))
    }
}

impl<T> OrFail<T> for Option<T> {
    fn or_reject(self, what: &str) -> Result<T, Failure> {
        self.ok_or_else(|| Failure::reject(what))
    }

    fn or_retry(self, pause: Duration) -> Result<T, Failure> {
        self.ok_or_else(|| Failure::retry_after(pause))
    }
}

impl Message {
    /// Reads the data as JSON. Invalid JSON, or JSON of another shape, rejects the event.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.data).or_reject("the message cannot be read")
    }
}
