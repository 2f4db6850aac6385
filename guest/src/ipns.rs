//! Mutable names: publishing under own keys, following the names of others.

pub use crate::bindings::dim::coordination::ipns::{Document, Error, Resolution};
pub use crate::host::ipns::{follow, get_state, key_id, publish, resolve, unfollow, update_state};
use crate::{Failure, Refusal};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("ipns: {}", words(&error)))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("ipns: {}", words(&error)))
    }
}

/// A refusal in the words of the operator.
fn words(error: &Error) -> String {
    match error {
        Error::NotGranted(name) => format!("{name} is not granted"),
        Error::InvalidArgument(why) | Error::NotADocument(why) => why.clone(),
        Error::NotYetKnown => "the name is not known yet".to_owned(),
        Error::TooLarge(limit) => format!("a document has at most {limit} bytes"),
        Error::LimitExceeded(limit) => format!("the call has used up its limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}
