//! Owns the final state of a run: everything that must be the same with and without interruptions. Receives the effects
//! of a trial; returns the differences between two runs.

use std::collections::BTreeMap;

use dim_model::ident::{ContentPath, IpnsName, KeyName, Topic};
use dim_model::time::Timestamp;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::TrialError;
use crate::matching::{Difference, Match, differences};
use crate::notation::{self, shown, shown_key};
use crate::report::{Failure, Why};
use crate::trial::{Cause, Happened, Trial};

/// The final state of a run, and the series of its publishes, dead letters and replies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    state: BTreeMap<Vec<u8>, Vec<u8>>,
    timers: BTreeMap<String, Timestamp>,
    hears: Vec<Topic>,
    follows: Vec<IpnsName>,
    names: BTreeMap<KeyName, ContentPath>,
    publishes: Series,
    dead: Series,
    replies: Series,
}

/// Adds bytes to a digest, with their length first.
pub fn take_in(digest: &mut Sha256, bytes: &[u8]) {
    digest.update((bytes.len() as u64).to_be_bytes());
    digest.update(bytes);
}

/// Maximum number of items that a series keeps for reports.
const SHOWN: usize = 1_000;

/// A series of items: their number, the digest of all of them, and the first [`SHOWN`].
#[derive(Clone, Debug, Default)]
struct Series {
    count: u64,
    digest: Sha256,
    first: Vec<Value>,
}

impl Series {
    fn push(&mut self, bytes: &[&[u8]], shown: impl FnOnce() -> Value) {
        self.count += 1;
        bytes.iter().for_each(|bytes| take_in(&mut self.digest, bytes));
        if self.first.len() < SHOWN {
            self.first.push(shown());
        }
    }

    fn shown(&self) -> Value {
        let mut shown = self.first.clone();
        if self.count > SHOWN as u64 {
            shown.push(json!(format!("and more, {} in total", self.count)));
        }
        Value::Array(shown)
    }
}

impl PartialEq for Series {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.digest.clone().finalize() == other.digest.clone().finalize()
    }
}

impl End {
    /// Adds the replies of commands and queries.
    pub fn replied(&mut self, replies: impl IntoIterator<Item = Value>) {
        for reply in replies {
            self.replies.push(&[reply.to_string().as_bytes()], || reply);
        }
    }

    /// Adds the dead letters and the publishes of these calls.
    pub fn happened(&mut self, happened: &[Happened]) {
        for letter in happened.iter().flat_map(|it| &it.dead) {
            let mut letter = notation::dead_letter(letter);
            // Log lines from before a restart are lost with the instance, so they may differ.
            if let Some(members) = letter.as_object_mut() {
                members.remove("log");
            }
            self.dead.push(&[letter.to_string().as_bytes()], || letter);
        }
        // A plugin may publish at each start, and interrupted runs start more often.
        let entries = happened.iter().filter(|it| it.cause != Cause::Start);
        for publish in entries.flat_map(|it| &it.asked.publishes) {
            let bytes = [publish.topic.as_str().as_bytes(), &publish.data];
            self.publishes.push(&bytes, || notation::publish(publish));
        }
    }

    /// Commits the trial, and adds its last effects and its final state.
    pub fn stands(&mut self, trial: &mut Trial) -> Result<(), TrialError> {
        trial.settle()?;
        self.happened(trial.happened());
        (self.hears, self.follows) = trial.hears_and_follows();
        (self.state, self.timers, self.names) = (trial.state()?, trial.timers()?, trial.own_names()?);
        Ok(())
    }

    /// Compares with the final state of another run. Returns a failure with the differences, or none.
    pub fn unlike(&self, other: &Self, why: Why) -> Option<Failure> {
        if self == other {
            return None;
        }
        let mut found = differences("", &self.shown(), Some(&other.shown()), Match::Same);
        if found.is_empty() {
            let place =
                format!("the bytes of the state, or an item after the first {SHOWN} publishes or replies");
            found.push(Difference { place, expected: None, actual: None });
        }
        Some(Failure { why, place: String::new(), reason: String::new(), differences: found })
    }

    fn shown(&self) -> Value {
        let state = self.state.iter().map(|(key, value)| (shown_key(key), shown(value)));
        let names = self.names.iter().map(|(key, path)| (key.to_string(), json!(path)));
        json!({
            "state": state.collect::<Map<_, _>>(),
            "timers": self.timers,
            "hears": self.hears,
            "follows": self.follows,
            "names": names.collect::<Map<_, _>>(),
            "publishes": self.publishes.shown(),
            "dead": self.dead.shown(),
            "replies": self.replies.shown(),
        })
    }
}
