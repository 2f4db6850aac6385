//! Owns the state of a connection: whether calls or messages succeed, and since when. It receives their results and
//! logs each change.

use std::sync::{Mutex, MutexGuard};

use serde::Serialize;

use crate::time::Timestamp;

/// The state of one kind of calls or messages.
#[derive(Debug)]
pub struct Connectivity {
    what: &'static str,
    state: Mutex<State>,
}

/// The result of the last call or message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum State {
    /// There was none yet.
    Untried,
    /// It succeeded.
    Online {
        /// The time of the first success.
        since: Timestamp,
    },
    /// It failed.
    Offline {
        /// The time of the first failure.
        since: Timestamp,
        /// The reason of the last failure.
        why: String,
    },
}

impl Connectivity {
    /// Makes a connection state. `what` is the plural noun that log lines use.
    pub fn new(what: &'static str) -> Self {
        Self { what, state: Mutex::new(State::Untried) }
    }

    /// Records a success.
    pub fn made(&self) {
        let mut state = self.lock();
        if let State::Offline { since, .. } = &*state {
            tracing::info!("{} get through again; they failed since {since}", self.what);
        }
        if !matches!(*state, State::Online { .. }) {
            *state = State::Online { since: Timestamp::wall() };
        }
    }

    /// Records a failure.
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

    /// Returns the current state.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the state")
    }
}
