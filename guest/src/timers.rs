//! Durable timers in log time, with typed keys.

use std::marker::PhantomData;
use std::time::Duration;

pub use crate::bindings::dim::coordination::timers::Error;
pub use crate::host::timers::{clear, get, set};
use crate::state::Key;
use crate::time::Time;
use crate::{DueTimer, Failure, Refusal};

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

/// Returns an error as a text for the operator.
fn words(error: &Error) -> String {
    match error {
        Error::KeyLength(limit) => format!("a key has 1 to {limit} bytes"),
        Error::TooMany(limit) => format!("there are at most {limit} timers"),
        Error::LimitExceeded(limit) => format!("the call exceeds the limit `{limit}`"),
        Error::ReadOnly => "a query has no effects".to_owned(),
        Error::Other(why) => why.clone(),
    }
}

/// Timers whose typed keys share a prefix.
///
/// ```
/// use std::time::Duration;
/// use dim_guest::timers::Timers;
///
/// const SILENCE: Timers<str> = Timers::new("silence/");
///
/// let _host = dim_guest::fake::Host::new();
/// SILENCE.set_in("n1", Duration::from_secs(60))?;
/// assert!(SILENCE.get("n1")?.is_some());
/// # Ok::<(), dim_guest::timers::Error>(())
/// ```
#[derive(Debug)]
pub struct Timers<K: ?Sized> {
    prefix: &'static str,
    key: PhantomData<fn(&K)>,
}

impl<K: Key + ?Sized> Timers<K> {
    /// Creates the timers under `prefix`. No prefix may be the start of another prefix.
    pub const fn new(prefix: &'static str) -> Self {
        Self { prefix, key: PhantomData }
    }

    /// Sets the timer of `key` to `at`.
    pub fn set(&self, key: &K, at: Time) -> Result<(), Error> {
        set(&self.key(key), at.timestamp())
    }

    /// Sets the timer of `key` to `after` from now.
    pub fn set_in(&self, key: &K, after: Duration) -> Result<(), Error> {
        self.set(key, Time::now().after(after))
    }

    /// Clears the timer of `key`.
    pub fn clear(&self, key: &K) -> Result<(), Error> {
        clear(&self.key(key))
    }

    /// Returns the time at which the timer of `key` is due, or none if it is not set.
    pub fn get(&self, key: &K) -> Result<Option<Time>, Error> {
        Ok(get(&self.key(key))?.map(Time::from_timestamp))
    }

    /// Returns the key of a due timer if it has this prefix.
    pub fn fired(&self, timer: &DueTimer) -> Option<K::Owned> {
        K::decode(timer.key.strip_prefix(self.prefix)?.as_bytes())
    }

    fn key(&self, key: &K) -> String {
        format!("{}{}", self.prefix, String::from_utf8_lossy(&key.encode()))
    }
}
