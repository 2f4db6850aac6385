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
    /// Records a failure of a name.
    pub fn note(&self, key: &KeyName, why: String, lasts: Lasting) {
        let mut failures = self.lock();
        let since = failures.get(key).map_or_else(Timestamp::wall, |failure| failure.since);
        failures.insert(key.clone(), Failure { why, lasts, since });
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
