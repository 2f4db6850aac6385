//! Owns the last failure of each name. It receives failures, and keeps each until the backend accepts the name or the
//! host need not publish it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use dim_model::ident::KeyName;
use dim_model::time::Timestamp;

/// The last failures to publish, by key.
#[derive(Debug, Default)]
pub struct Failures(Mutex<BTreeMap<KeyName, Failure>>);

/// The last failure to publish a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason, and what the operator can do.
    pub why: String,
    /// Whether a later attempt can succeed by itself.
    pub lasts: Lasting,
    /// The time of the first failure since the last success, for any reason.
    pub since: Timestamp,
}

/// The duration of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// The failure may end by itself, such as a daemon that is away or slow.
    ForNow,
    /// The failure ends only by an action of the operator.
    UntilMended,
}

impl Failures {
    /// Records a failure of a name. Returns whether its reason is new.
    pub fn note(&self, key: &KeyName, why: String, lasts: Lasting) -> bool {
        let mut failures = self.lock();
        let before = failures.get(key);
        let since = before.map_or_else(Timestamp::wall, |failure| failure.since);
        let is_new = before.is_none_or(|failure| failure.why != why);
        failures.insert(key.clone(), Failure { why, lasts, since });
        is_new
    }

    /// Removes the failure of a name that was published or need not be published.
    pub fn clear(&self, key: &KeyName) {
        self.lock().remove(key);
    }

    /// Returns the last failure of a name.
    pub fn of(&self, key: &KeyName) -> Option<Failure> {
        self.lock().get(key).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<KeyName, Failure>> {
        self.0.lock().expect("no thread panics while it holds the failures")
    }
}
