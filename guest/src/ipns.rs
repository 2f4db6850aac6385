//! IPNS names: publishes under the plugin's keys and follows other names.

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use crate::bindings::dim::coordination::ipns::{Document, Error, Resolution};
use crate::failure::{A_WHILE, is_met_for_a_while};
pub use crate::host::ipns::{follow, get_state, key_id, publish, resolve, unfollow, update_state};
use crate::{Failure, Refusal};

/// Publishes a value as a JSON document under `key`, with the default lifetime (24 h).
pub fn update_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<(), Error> {
    let data = serde_json::to_vec(value).map_err(|error| Error::Other(error.to_string()))?;
    update_state(key, &data, None)
}

/// The JSON document of a followed name or of an own key. It is read from the host's local data, without a wait.
#[derive(Clone, Debug)]
pub struct Followed {
    name: String,
}

impl Followed {
    /// Refers to a name, with or without `/ipns/`, or to a key of the host.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Follows the name: its value and each later value arrive as
    /// [`Event::NameChanged`](crate::Event::NameChanged).
    pub fn follow(&self) -> Result<(), Error> {
        follow(&self.name)
    }

    /// Stops following the name.
    pub fn unfollow(&self) -> Result<(), Error> {
        unfollow(&self.name)
    }

    /// Reads the document. Returns none if the host does not know the name yet. A document that is not JSON of the type
    /// `T` is [`Error::NotADocument`].
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
    /// Retries the event after a temporary limit, and rejects it after any other error.
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

/// Returns an error as a text for the operator.
fn words(error: &Error) -> String {
    match error {
        Error::NotGranted(name) => format!("{name} is not granted"),
        Error::InvalidArgument(why) | Error::NotADocument(why) => why.clone(),
        Error::NotYetKnown => "the name is not known yet".to_owned(),
        Error::TooLarge(limit) => format!("a document has at most {limit} bytes"),
        Error::LimitExceeded(limit) => format!("the call exceeds the limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}
