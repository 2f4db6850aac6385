//! Mutable names: publishing under own keys, following the names of others.

pub use crate::bindings::dim::coordination::ipns::{
    Document, Error, Resolution, follow, get_state, key_id, publish, resolve, unfollow, update_state,
};
use crate::{Failure, Refusal};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("ipns: {error:?}"))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("ipns: {error:?}"))
    }
}
