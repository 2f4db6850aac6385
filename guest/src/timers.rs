//! Durable timers, in log time.

pub use crate::bindings::dim::coordination::timers::{Error, clear, get, set};
use crate::{Failure, Refusal};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("timers: {error:?}"))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("timers: {error:?}"))
    }
}
