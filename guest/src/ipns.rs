//! Mutable names: publishing under own keys, following the names of others.

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use crate::bindings::dim::coordination::ipns::{Document, Error, Resolution};
use crate::failure::{A_WHILE, is_met_for_a_while};
pub use crate::host::ipns::{follow, get_state, key_id, publish, resolve, unfollow, update_state};
use crate::{Failure, Refusal};

/// Publishes a value as a JSON document under an own key, for the usual time.
pub fn update_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<(), Error> {
    let data = serde_json::to_vec(value).map_err(|error| Error::Other(error.to_string()))?;
    update_state(key, &data, None)
}

/// The JSON document behind a name of someone else, or behind an own key. One that is followed is read at once from what
/// the host knows.
#[derive(Clone, Debug)]
pub struct Followed {
    name: String,
}

impl Followed {
    /// A name, `/ipns/…` or not, or a key of the host.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Follows it: its value, and each that it has later, comes as [`Event::NameChanged`](crate::Event::NameChanged).
    pub fn follow(&self) -> Result<(), Error> {
        follow(&self.name)
    }

    /// Stops following it.
    pub fn unfollow(&self) -> Result<(), Error> {
        unfollow(&self.name)
    }

    /// The document, none if it is not known yet. One that cannot be read is an error, not an absence.
    pub fn get<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        match get_state(&self.name) {
            Ok(document) => {
                let value = serde_json::from_slice(&document.data);
                value.map(Some).map_err(|error| Error::NotADocument(error.to_string()))
            }
            Err(Error::NotYetKnown) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl From<Error> for Failure {
    /// An event for whose document there is no room comes again; the others are wrong and stay so.
    fn from(error: Error) -> Self {
        match error {
            Error::LimitExceeded(limit) if is_met_for_a_while(&limit) => Failure::retry_after(A_WHILE),
            error => Failure::Reject(format!("ipns: {}", words(&error))),
        }
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
