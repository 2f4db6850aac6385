//! Durable timers, in log time.

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

/// Timers with typed keys, which share a prefix.
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
    /// The timers under `prefix`. No prefix of some may begin another's.
    pub const fn new(prefix: &'static str) -> Self {
        Self { prefix, key: PhantomData }
    }

    /// Sets the timer of `key` to fall due at `at`.
    pub fn set(&self, key: &K, at: Time) -> Result<(), Error> {
        set(&self.key(key), at.timestamp())
    }

    /// Sets the timer of `key` to fall due after `after`.
    pub fn set_in(&self, key: &K, after: Duration) -> Result<(), Error> {
        self.set(key, Time::now().after(after))
    }

    /// Clears the timer of `key`.
    pub fn clear(&self, key: &K) -> Result<(), Error> {
        clear(&self.key(key))
    }

    /// When the timer of `key` falls due, if it is set.
    pub fn get(&self, key: &K) -> Result<Option<Time>, Error> {
        Ok(get(&self.key(key))?.map(Time::from_timestamp))
    }

    /// The key of a timer that fell due, if it is one of these.
    pub fn fired(&self, timer: &DueTimer) -> Option<K::Owned> {
        K::decode(timer.key.strip_prefix(self.prefix)?.as_bytes())
    }

    fn key(&self, key: &K) -> String {
        format!("{}{}", self.prefix, String::from_utf8_lossy(&key.encode()))
    }
}
