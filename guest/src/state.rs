//! The plugin's own durable key-value space, and typed records in it.

use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use crate::bindings::dim::coordination::state::{Error, Pair};
pub use crate::host::state::{delete, get, scan, set};
use crate::{Failure, Refusal};

/// How many pairs one page of [`Records::iter`] asks for.
const PAGE: u32 = 256;

/// A collection of JSON records whose keys share a prefix, in the order of their keys.
#[derive(Debug)]
pub struct Records<T> {
    prefix: &'static str,
    record: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// The records under `prefix`. No prefix of one collection may begin another's.
    pub const fn new(prefix: &'static str) -> Self {
        Self { prefix, record: PhantomData }
    }

    /// The record of `id`. One that cannot be read is an error, not an absence.
    pub fn get(&self, id: &str) -> Result<Option<T>, Error> {
        get_json(&self.key(id))
    }

    /// The record of `id` as it stands in the state, for who reads only a part of it.
    pub fn get_raw(&self, id: &str) -> Result<Option<Vec<u8>>, Error> {
        get(&self.key(id))
    }

    /// Sets the record of `id`.
    pub fn set(&self, id: &str, record: &T) -> Result<(), Error> {
        set_json(&self.key(id), record)
    }

    /// Sets the record of `id` and tells how many bytes it has in the state.
    pub fn put(&self, id: &str, record: &T) -> Result<usize, Error> {
        let value = encode(record)?;
        set(&self.key(id), &value).map(|()| value.len())
    }

    /// Removes the record of `id`.
    pub fn delete(&self, id: &str) -> Result<(), Error> {
        delete(&self.key(id))
    }

    /// All ids with their records as they stand in the state, from `after` on.
    pub fn iter_raw(&self, after: Option<&str>) -> Pages {
        Pages {
            prefix: self.prefix.as_bytes().to_vec(),
            after: after.map(|id| self.key(id)),
            page: Vec::new().into_iter(),
        }
    }

    /// All ids with their records, from `after` on.
    pub fn iter(&self, after: Option<&str>) -> impl Iterator<Item = Result<(String, T), Error>> {
        self.iter_raw(after).map(|pair| {
            let (id, value) = pair?;
            Ok((id, decode(&value)?))
        })
    }

    fn key(&self, id: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), id.as_bytes()].concat()
    }
}

/// Walks through a prefix page by page.
#[derive(Debug)]
pub struct Pages {
    prefix: Vec<u8>,
    after: Option<Vec<u8>>,
    page: std::vec::IntoIter<Pair>,
}

impl Iterator for Pages {
    type Item = Result<(String, Vec<u8>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.as_slice().is_empty() {
            match scan(&self.prefix, self.after.as_deref(), PAGE) {
                Ok(page) => self.page = page.into_iter(),
                Err(error) => return Some(Err(error)),
            }
            if let Some(last) = self.page.as_slice().last() {
                self.after = Some(last.key.clone());
            }
        }
        let pair = self.page.next()?;
        let id = String::from_utf8_lossy(&pair.key[self.prefix.len()..]).into_owned();
        Some(Ok((id, pair.value)))
    }
}

/// The JSON value of `key`.
pub fn get_json<T: DeserializeOwned>(key: &[u8]) -> Result<Option<T>, Error> {
    get(key)?.map(|value| decode(&value)).transpose()
}

/// Sets `key` to `value` as JSON.
pub fn set_json<T: Serialize>(key: &[u8], value: &T) -> Result<(), Error> {
    set(key, &encode(value)?)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::Other(error.to_string()))
}

/// Reads a record as it stands in the state.
pub fn decode<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(value)
        .map_err(|error| Error::Other(format!("a stored record cannot be read: {error}")))
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Reject(format!("state: {}", words(&error)))
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Other(format!("state: {}", words(&error)))
    }
}

/// A refusal in the words of the operator.
fn words(error: &Error) -> String {
    match error {
        Error::KeyLength(limit) => format!("a key has 1 to {limit} bytes"),
        Error::ValueTooLarge(limit) => format!("a value has at most {limit} bytes"),
        Error::QuotaExceeded(limit) => format!("the state has at most {limit} bytes"),
        Error::LimitExceeded(limit) => format!("the call has used up its limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}
