//! Errors that become, on purpose, a refusal of the event or another try.

use std::fmt::Display;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::{Failure, Message};

/// The limits that are met for a while only: how many publishes may wait for the backend, and how many of them and how
/// large documents there may be a second.
const FOR_A_WHILE: [&str; 4] =
    ["outbox", "publishes-per-second", "publish-bytes-per-second", "document-bytes-per-second"];

/// How long until there may be room again.
pub(crate) const A_WHILE: Duration = Duration::from_secs(1);

/// Whether the limit that was met leaves room again by itself.
pub(crate) fn is_met_for_a_while(limit: &str) -> bool {
    FOR_A_WHILE.contains(&limit)
}

impl Failure {
    /// The event is wrong and will stay wrong: it is set aside as a dead letter, with the reason.
    pub fn reject(reason: impl Display) -> Self {
        Self::Reject(reason.to_string())
    }

    /// The event may go better after a while: it comes again, a bounded number of times.
    pub fn retry_after(pause: Duration) -> Self {
        Self::Retry(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What becomes of an event when something is not as it should be.
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
    /// The value, or the event is set aside: `what` says what is wrong, and the error follows.
    fn or_reject(self, what: &str) -> Result<T, Failure>;

    /// The value, or the event comes again after `pause`.
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
    /// What it says, as JSON; what cannot be read is set aside.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.data).or_reject("the message cannot be read")
    }
}
