//! Durable timers, in log time.

pub use crate::bindings::dim::coordination::timers::Error;
pub use crate::host::timers::{clear, get, set};
use crate::{Failure, Refusal};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("timers: {}", words(&error)))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("timers: {}", words(&error)))
    }
}

/// A refusal in the words of the operator.
fn words(error: &Error) -> String {
    match error {
        Error::KeyLength(limit) => format!("a key has 1 to {limit} bytes"),
        Error::TooMany(limit) => format!("there are at most {limit} timers"),
        Error::LimitExceeded(limit) => format!("the call has used up its limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}
