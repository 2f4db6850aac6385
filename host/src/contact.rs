//! Whether calls and messages get through, and since when.

use std::sync::{Mutex, MutexGuard};

use serde::Serialize;

use crate::time::Timestamp;

/// How one kind of calls or messages gets through.
#[derive(Debug)]
pub struct Contact {
    what: &'static str,
    state: Mutex<State>,
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum State {
    /// Nothing was tried yet.
    Untried,
    /// It gets through.
    Online {
        /// Since when.
        since: Timestamp,
    },
    /// It does not.
    Offline {
        /// Since when.
        since: Timestamp,
        /// Why, the last time.
        why: String,
    },
}

impl Contact {
    /// A contact for `what`, which is told in the log.
    pub fn new(what: &'static str) -> Self {
        Self { what, state: Mutex::new(State::Untried) }
    }

    /// It got through.
    pub fn made(&self) {
        let mut state = self.lock();
        if let State::Offline { since, .. } = &*state {
            tracing::info!("{} get through again; they did not since {since}", self.what);
        }
        if !matches!(*state, State::Online { .. }) {
            *state = State::Online { since: Timestamp::wall() };
        }
    }

    /// It did not.
    pub fn failed(&self, why: &impl ToString) {
        let mut state = self.lock();
        let why = why.to_string();
        let since = match &*state {
            State::Offline { since, .. } => *since,
            State::Untried | State::Online { .. } => {
                tracing::warn!("{} do not get through: {why}", self.what);
                Timestamp::wall()
            }
        };
        *state = State::Offline { since, why };
    }

    /// How it stands.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no one panics while holding the contact")
    }
}
