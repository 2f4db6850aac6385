//! Owns what has come of a run in the end: what must be the same whatever came between the entries.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::TestError;
use super::matching::{Difference, Match, differences};
use super::report::{Failure, Why};
use super::shown::{self, shown, shown_key};
use super::trial::{Cause, Happened, Trial};
use crate::effect::Publish;
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
    publishes: Vec<Publish>,
    dead: Vec<Value>,
    replies: Vec<Value>,
}

impl End {
    /// Takes in the replies that were asked for.
    pub fn replied(&mut self, replies: impl IntoIterator<Item = Value>) {
        self.replies.extend(replies);
    }

    /// Takes in what has happened on the way.
    pub fn happened(&mut self, happened: &[Happened]) {
        let dead = happened.iter().flat_map(|it| &it.dead).map(shown::dead_letter);
        let without_log = dead.map(|mut letter| {
            // What was logged before a restart is with the instance that is gone.
            if let Some(members) = letter.as_object_mut() {
                members.remove("log");
            }
            letter
        });
        self.dead.extend(without_log);
        // A plugin that publishes when it starts does so with each start.
        let entries = happened.iter().filter(|it| it.cause != Cause::Start);
        self.publishes.extend(entries.flat_map(|it| it.asked.publishes.clone()));
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
            let place = "the bytes of the state or of what was published".to_owned();
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
            "publishes": self.publishes.iter().map(shown::publish).collect::<Vec<_>>(),
            "dead": self.dead,
            "replies": self.replies,
        })
    }
}
