//! Owns which own names the daemon was asked about since the host began: before that it is not known whether one points
//! to what the host has not published.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::ident::KeyName;

/// The names that were looked at.
#[derive(Debug, Default)]
pub struct Looks {
    done: watch::Sender<BTreeSet<KeyName>>,
    wanted: Notify,
}

impl Looks {
    /// How long a name may be waited for.
    pub const PATIENCE: Duration = Duration::from_secs(5);

    /// Has the names that were not looked at yet looked at now.
    pub fn want(&self) {
        self.wanted.notify_one();
    }

    /// Resolves when somebody wants a look.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Notes that a name was looked at, whatever came of it.
    pub fn note(&self, key: &KeyName) {
        self.done.send_if_modified(|done| done.insert(key.clone()));
    }

    /// Whether a name was looked at.
    pub fn has(&self, key: &KeyName) -> bool {
        self.done.borrow().contains(key)
    }

    /// Waits until a name was looked at, for [`Looks::PATIENCE`] at most.
    pub async fn at(&self, key: &KeyName) {
        if self.has(key) {
            return;
        }
        self.want();
        let mut done = self.done.subscribe();
        let _ = tokio::time::timeout(Self::PATIENCE, done.wait_for(|done| done.contains(key))).await;
    }
}
