//! Pubsub topics: publishes, subscribes, and reports when the host could receive messages.

use serde::Serialize;

pub use crate::bindings::dim::coordination::pubsub::{Beginning, Error, Hearing};
use crate::failure::{A_WHILE, is_met_for_a_while};
use crate::host::pubsub;
pub use crate::host::pubsub::{heard, list_peers, list_topics, publish, unsubscribe};
use crate::{Failure, Refusal};

/// Subscribes to `topic`, from the next event on.
pub fn subscribe(topic: &str) -> Result<(), Error> {
    subscribe_from(topic, Beginning::Head)
}

/// Subscribes to `topic`, from `beginning` on. Writers keep their events only on reliable topics; on a plain topic every
/// subscription begins with the next event.
pub fn subscribe_from(topic: &str, beginning: Beginning) -> Result<(), Error> {
    pubsub::subscribe(topic, beginning)
}

/// Publishes a value as JSON on `topic`.
pub fn publish_json<T: Serialize + ?Sized>(topic: &str, value: &T) -> Result<(), Error> {
    let data = serde_json::to_vec(value).map_err(|error| Error::Other(error.to_string()))?;
    publish(topic, &data)
}

impl From<Error> for Failure {
    /// Retries the event after a temporary limit, and rejects it after any other error.
    fn from(error: Error) -> Self {
        match error {
            Error::LimitExceeded(limit) if is_met_for_a_while(&limit) => Failure::retry_after(A_WHILE),
            error => Failure::Reject(format!("pubsub: {}", words(&error))),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("pubsub: {}", words(&error)))
    }
}

/// Returns an error as a text for the operator.
fn words(error: &Error) -> String {
    match error {
        Error::NotGranted(topic) => format!("topic {topic} is not granted"),
        Error::InvalidArgument(why) => why.clone(),
        Error::TooLarge(limit) => format!("a message has at most {limit} bytes"),
        Error::LimitExceeded(limit) => format!("the call exceeds the limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}
