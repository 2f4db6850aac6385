//! Owns the set of the host's names that were checked against the daemon since the start. Before its check, a name
//! may point to a value that the host has not published. The audit adds names, and callers wait for them.

use std::collections::BTreeSet;
use std::time::Duration;

use dim_model::ident::KeyName;
use tokio::sync::{Notify, watch};

/// The checked names.
#[derive(Debug, Default)]
pub struct CheckedNames {
    done: watch::Sender<BTreeSet<KeyName>>,
    wanted: Notify,
}

impl CheckedNames {
    /// The maximum wait for the check of a name.
    pub const PATIENCE: Duration = Duration::from_secs(5);

    /// Requests a check of the names that were not checked yet.
    pub fn want(&self) {
        self.wanted.notify_one();
    }

    /// Waits until a check is requested.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Records that the check of a name ended, with any result.
    pub fn note(&self, key: &KeyName) {
        self.done.send_if_modified(|done| done.insert(key.clone()));
    }

    /// Returns whether a name was checked.
    pub fn has(&self, key: &KeyName) -> bool {
        self.done.borrow().contains(key)
    }

    /// Waits until a name was checked, at most for [`CheckedNames::PATIENCE`].
    pub async fn at(&self, key: &KeyName) {
        if self.has(key) {
            return;
        }
        self.want();
        let mut done = self.done.subscribe();
        let _ = tokio::time::timeout(Self::PATIENCE, done.wait_for(|done| done.contains(key))).await;
    }
}
