//! The plugin's durable key-value store, with typed maps, counters and values.

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use crate::bindings::dim::coordination::state::{Error, Pair};
pub use crate::host::state::{delete, get, scan, set};
use crate::time::Time;
use crate::{Failure, Refusal};

/// Number of pairs that one page of [`Map::iter`] requests.
const PAGE: u32 = 256;

/// A typed key, encoded in the state as bytes in the order of the keys.
pub trait Key {
    /// The type of a decoded key.
    type Owned;

    /// Encodes the key, without the prefix of the map.
    fn encode(&self) -> Cow<'_, [u8]>;

    /// Decodes a key. Returns none if the bytes are not a key of this type.
    fn decode(bytes: &[u8]) -> Option<Self::Owned>;
}

impl Key for str {
    type Owned = String;

    fn encode(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.as_bytes())
    }

    fn decode(bytes: &[u8]) -> Option<String> {
        String::from_utf8(bytes.to_vec()).ok()
    }
}

/// Encodes a number as twenty digits, which are readable and sort like the number.
impl Key for u64 {
    type Owned = u64;

    fn encode(&self) -> Cow<'_, [u8]> {
        Cow::Owned(format!("{self:020}").into_bytes())
    }

    fn decode(bytes: &[u8]) -> Option<u64> {
        std::str::from_utf8(bytes).ok()?.parse().ok()
    }
}

/// Encodes a time as its milliseconds since 1970-01-01T00:00:00Z. A time before 1970 becomes 0.
impl Key for Time {
    type Owned = Time;

    fn encode(&self) -> Cow<'_, [u8]> {
        Cow::Owned(u64::try_from(self.millis()).unwrap_or(0).encode().into_owned())
    }

    fn decode(bytes: &[u8]) -> Option<Time> {
        Some(Time::of_millis(i64::try_from(u64::decode(bytes)?).ok()?))
    }
}

/// A map of JSON values whose keys share a prefix, sorted by key.
///
/// ```
/// use dim_guest::state::Map;
///
/// const NODES: Map<str, u64> = Map::new("node/");
///
/// let _host = dim_guest::fake::Host::new();
/// NODES.set("n1", &3)?;
/// NODES.update("n1", |seen| Some(seen.unwrap_or(0) + 1))?;
/// assert_eq!(NODES.get("n1")?, Some(4));
/// # Ok::<(), dim_guest::state::Error>(())
/// ```
#[derive(Debug)]
pub struct Map<K: ?Sized, V> {
    prefix: &'static str,
    value: PhantomData<fn(&K) -> V>,
}

impl<K: Key + ?Sized, V: Serialize + DeserializeOwned> Map<K, V> {
    /// Creates the map under `prefix`. No map's prefix may be the start of another map's prefix.
    pub const fn new(prefix: &'static str) -> Self {
        Self { prefix, value: PhantomData }
    }

    /// Returns the value of `key`, or none if it has no value. A value that cannot be read is an error.
    pub fn get(&self, key: &K) -> Result<Option<V>, Error> {
        get_json(&self.key(key))
    }

    /// Returns the stored bytes of the value of `key`, for callers that read only a part of it.
    pub fn get_raw(&self, key: &K) -> Result<Option<Vec<u8>>, Error> {
        get(&self.key(key))
    }

    /// Sets the value of `key`.
    pub fn set(&self, key: &K, value: &V) -> Result<(), Error> {
        set_json(&self.key(key), value)
    }

    /// Sets the value of `key` and returns its size in the state, in bytes.
    pub fn put(&self, key: &K, value: &V) -> Result<usize, Error> {
        let value = encode(value)?;
        set(&self.key(key), &value).map(|()| value.len())
    }

    /// Replaces the value of `key` by the result of `change`. If the result is none, removes it.
    pub fn update(&self, key: &K, change: impl FnOnce(Option<V>) -> Option<V>) -> Result<(), Error> {
        match change(self.get(key)?) {
            Some(value) => self.set(key, &value),
            None => self.delete(key),
        }
    }

    /// Removes the value of `key`.
    pub fn delete(&self, key: &K) -> Result<(), Error> {
        delete(&self.key(key))
    }

    /// Iterates over the keys after `after`, or all keys, with the stored bytes of their values.
    pub fn iter_raw(&self, after: Option<&K>) -> Pages {
        Pages {
            prefix: self.prefix.as_bytes().to_vec(),
            after: after.map(|key| self.key(key)),
            page: Vec::new().into_iter(),
        }
    }

    /// Iterates over the keys after `after`, or all keys, with their values.
    pub fn iter(&self, after: Option<&K>) -> impl Iterator<Item = Result<(K::Owned, V), Error>> {
        self.iter_raw(after).map(|pair| {
            let (key, value) = pair?;
            let owned = K::decode(key.as_bytes());
            let owned = owned.ok_or_else(|| Error::Other(format!("a stored key cannot be read: {key}")))?;
            Ok((owned, decode(&value)?))
        })
    }

    fn key(&self, key: &K) -> Vec<u8> {
        [self.prefix.as_bytes(), &key.encode()].concat()
    }
}

/// A map of counters.
pub type Counters<K> = Map<K, u64>;

impl<K: Key + ?Sized> Counters<K> {
    /// Adds `more` to the counter of `key` and returns the new count. A new counter starts at 0; a counter saturates at
    /// the maximum of `u64`.
    pub fn add(&self, key: &K, more: u64) -> Result<u64, Error> {
        let count = self.get(key)?.unwrap_or(0).saturating_add(more);
        self.set(key, &count)?;
        Ok(count)
    }
}

/// A single JSON value under a fixed key.
#[derive(Debug)]
pub struct Value<T> {
    key: &'static str,
    value: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Value<T> {
    /// Creates the value under `key`. No map's prefix may be the start of `key`.
    pub const fn new(key: &'static str) -> Self {
        Self { key, value: PhantomData }
    }

    /// Returns the value, or none if it is not set.
    pub fn get(&self) -> Result<Option<T>, Error> {
        get_json(self.key.as_bytes())
    }

    /// Sets the value.
    pub fn set(&self, value: &T) -> Result<(), Error> {
        set_json(self.key.as_bytes(), value)
    }

    /// Removes the value.
    pub fn delete(&self) -> Result<(), Error> {
        delete(self.key.as_bytes())
    }
}

/// An iterator over a prefix that reads page by page.
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

/// Reads the JSON value of `key`. Returns none if it has no value.
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

/// Reads the stored bytes of a record.
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

/// Returns an error as a text for the operator.
fn words(error: &Error) -> String {
    match error {
        Error::KeyLength(limit) => format!("a key has 1 to {limit} bytes"),
        Error::ValueTooLarge(limit) => format!("a value has at most {limit} bytes"),
        Error::QuotaExceeded(limit) => format!("the state has at most {limit} bytes"),
        Error::LimitExceeded(limit) => format!("the call exceeds the limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Host;

    #[test]
    fn typed_keys_sort_as_they_do() {
        const BY_NUMBER: Map<u64, String> = Map::new("number/");
        const BY_TIME: Counters<Time> = Counters::new("time/");
        const LAST: Value<u64> = Value::new("last");
        let _host = Host::new();
        for number in [10, 9, u64::MAX, 0] {
            BY_NUMBER.set(&number, &number.to_string()).unwrap();
            BY_TIME.add(&Time::of_millis(i64::try_from(number % 100).unwrap()), 2).unwrap();
        }
        let keys: Vec<u64> = BY_NUMBER.iter(None).map(|pair| pair.unwrap().0).collect();
        assert_eq!(keys, [0, 9, 10, u64::MAX]);
        let after: Vec<u64> = BY_NUMBER.iter(Some(&9)).map(|pair| pair.unwrap().0).collect();
        assert_eq!(after, [10, u64::MAX]);
        assert_eq!(BY_TIME.add(&Time::of_millis(9), 1).unwrap(), 3);
        BY_NUMBER.update(&9, |_| None).unwrap();
        assert_eq!(BY_NUMBER.get(&9).unwrap(), None);
        assert_eq!(LAST.get().unwrap(), None);
        LAST.set(&3).unwrap();
        assert_eq!(LAST.get().unwrap(), Some(3));
        LAST.delete().unwrap();
        assert_eq!(LAST.get().unwrap(), None);
    }
}
