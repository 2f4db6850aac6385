//! Topics: publishing, subscribing, and what the host can vouch for having heard.

pub use crate::bindings::dim::coordination::pubsub::{
    Error, Hearing, heard, list_peers, list_topics, publish, subscribe, unsubscribe,
};
use crate::{Failure, Refusal};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("pubsub: {error:?}"))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("pubsub: {error:?}"))
    }
}
