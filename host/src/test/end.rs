//! Owns what has come of a run in the end: what must be the same whatever came between the entries.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::TestError;
use super::matching::{Difference, Match, differences};
use super::report::{Failure, Why};
use super::shown::{self, shown, shown_key};
use super::trial::{Cause, Happened, Trial};
use crate::ident::{ContentPath, IpnsName, KeyName, Topic};
use crate::time::Timestamp;

/// What has come of a run.
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

/// Takes bytes into a digest, with their length.
pub fn take_in(digest: &mut Sha256, bytes: &[u8]) {
    digest.update((bytes.len() as u64).to_be_bytes());
    digest.update(bytes);
}

/// How many items of a series are kept to be shown.
const SHOWN: usize = 1_000;

/// Items that came one after the other: how many, the digest of them all, and the first of them.
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
            shown.push(json!(format!("and more, {} in all", self.count)));
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
    /// Takes in the replies that were asked for.
    pub fn replied(&mut self, replies: impl IntoIterator<Item = Value>) {
        for reply in replies {
            self.replies.push(&[reply.to_string().as_bytes()], || reply);
        }
    }

    /// Takes in what has happened on the way.
    pub fn happened(&mut self, happened: &[Happened]) {
        for letter in happened.iter().flat_map(|it| &it.dead) {
            let mut letter = shown::dead_letter(letter);
            // What was logged before a restart is with the instance that is gone.
            if let Some(members) = letter.as_object_mut() {
                members.remove("log");
            }
            self.dead.push(&[letter.to_string().as_bytes()], || letter);
        }
        // A plugin that publishes when it starts does so with each start.
        let entries = happened.iter().filter(|it| it.cause != Cause::Start);
        for publish in entries.flat_map(|it| &it.asked.publishes) {
            let bytes = [publish.topic.as_str().as_bytes(), &publish.data];
            self.publishes.push(&bytes, || shown::publish(publish));
        }
    }

    /// Takes in what has happened last, and how things stand with a trial that is over.
    pub fn stands(&mut self, trial: &mut Trial) -> Result<(), TestError> {
        trial.settle()?;
        self.happened(trial.happened());
        (self.hears, self.follows) = trial.hears_and_follows();
        (self.state, self.timers, self.names) = (trial.state()?, trial.timers()?, trial.own_names()?);
        Ok(())
    }

    /// What is not as in the end of another run.
    pub fn unlike(&self, other: &Self, why: Why) -> Option<Failure> {
        if self == other {
            return None;
        }
        let mut found = differences("", &self.shown(), Some(&other.shown()), Match::Same);
        if found.is_empty() {
            let place =
                format!("the bytes of the state, or what came after the first {SHOWN} publishes or replies");
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
