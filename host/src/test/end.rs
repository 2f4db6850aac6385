//! Owns what has come of a run in the end: what must be the same whatever came between the entries.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::TestError;
use super::matching::{Difference, Match, differences};
use super::report::{Failure, Why};
use super::shown::{self, shown, shown_key};
use super::trial::{Cause, Trial};
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
    /// What a trial has come to; `replies` are those that were asked for.
    pub fn of(trial: &mut Trial, replies: Vec<Value>) -> Result<Self, TestError> {
        trial.settle()?;
        let happened = trial.happened();
        let dead = happened.iter().flat_map(|it| &it.dead).map(shown::dead_letter);
        let without_log = dead.map(|mut letter| {
            // What was logged before a restart is with the instance that is gone.
            if let Some(members) = letter.as_object_mut() {
                members.remove("log");
            }
            letter
        });
        let dead = without_log.collect();
        // A plugin that publishes when it starts does so with each start.
        let entries = happened.iter().filter(|it| it.cause != Cause::Start);
        let publishes = entries.flat_map(|it| it.asked.publishes.clone()).collect();
        let (hears, follows) = trial.hears_and_follows();
        let (state, timers, names) = (trial.state()?, trial.timers()?, trial.own_names()?);
        Ok(Self { state, timers, hears, follows, names, publishes, dead, replies })
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
