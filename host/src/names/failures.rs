//! Owns why names could not be published: the last failure of each, until the backend accepts the name or nothing is
//! to be published under it any more.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use crate::ident::KeyName;
use crate::time::Timestamp;

/// The last failures to publish, by key.
#[derive(Debug, Default)]
pub struct Failures(Mutex<BTreeMap<KeyName, Failure>>);

/// Why a name could not be published the last time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why, and what the operator can do.
    pub why: String,
    /// Whether another attempt can succeed by itself.
    pub lasts: Lasting,
    /// Since when publishing has failed for one reason after another.
    pub since: Timestamp,
}

/// Whether a failure ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// It may: the daemon is away, or slow.
    ForNow,
    /// Only the operator can end it.
    UntilMended,
}

impl Failures {
    /// Notes that a name could not be published.
    pub fn note(&self, key: &KeyName, why: String, lasts: Lasting) {
        let mut failures = self.lock();
        let since = failures.get(key).map_or_else(Timestamp::wall, |failure| failure.since);
        failures.insert(key.clone(), Failure { why, lasts, since });
    }

    /// Notes that a name was published, or is not to be.
    pub fn clear(&self, key: &KeyName) {
        self.lock().remove(key);
    }

    /// The last failure of a name.
    pub fn of(&self, key: &KeyName) -> Option<Failure> {
        self.lock().get(key).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<KeyName, Failure>> {
        self.0.lock().expect("no one panics while holding the failures")
    }
}
