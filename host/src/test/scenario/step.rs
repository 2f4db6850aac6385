//! Owns the steps of a scenario: as they are written, and what happens in each.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Expectation, Vars, or_nothing};
use crate::ident::Topic;
use crate::test::shown::bytes_of;
use crate::time::{Timestamp, duration_of};

/// Most often that steps are repeated.
const MAX_REPEAT: u64 = 10_000_000;

/// A step of a scenario, as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawStep {
    note: Option<String>,
    message: Option<Topic>,
    #[serde(deserialize_with = "present")]
    data: Option<Value>,
    text: Option<String>,
    from: Option<String>,
    wait: Option<Value>,
    until: Option<Timestamp>,
    deaf: Option<Value>,
    topic: Option<Topic>,
    down: Option<Value>,
    command: Option<String>,
    query: Option<String>,
    #[serde(deserialize_with = "present")]
    body: Option<Value>,
    name: Option<String>,
    #[serde(deserialize_with = "present")]
    document: Option<Value>,
    peers: Option<Topic>,
    are: Option<Vec<String>>,
    replace: Option<PathBuf>,
    repeat: Option<u64>,
    every: Option<Value>,
    steps: Option<Vec<Value>>,
    #[serde(deserialize_with = "or_nothing")]
    expect: Map<String, Value>,
    #[serde(deserialize_with = "or_nothing")]
    include: Map<String, Value>,
}

/// A value that is there, if it is `null`, too.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// A step.
#[derive(Debug)]
pub struct Step {
    /// What happens.
    pub action: Action,
    /// What must come of it.
    pub expectation: Expectation,
}

/// What happens in a step.
#[derive(Debug)]
pub enum Action {
    /// A message comes.
    Message {
        /// On which topic.
        topic: Topic,
        /// What it says.
        data: Vec<u8>,
        /// From whom.
        from: From,
    },
    /// Time passes.
    Wait(Time),
    /// Time passes in which the host does not hear a topic, or nothing at all.
    Deaf(Duration, Option<Topic>),
    /// Time passes in which the host is down.
    Down(Duration),
    /// An order is given.
    Command(String, String),
    /// A question is asked.
    Query(String, String),
    /// A name of someone else has another value.
    Name(String, Vec<u8>),
    /// The peers of a topic are others.
    Peers(Topic, Vec<String>),
    /// Other code takes over.
    Replace(PathBuf),
    /// Steps are made over and over.
    Repeat {
        /// How often.
        times: u64,
        /// How long one round takes, at least.
        every: Duration,
        /// The steps.
        steps: Vec<Value>,
    },
}

/// How long time passes.
#[derive(Debug)]
pub enum Time {
    /// For so long.
    For(Duration),
    /// Until then.
    Until(Timestamp),
}

/// Who sends a message.
#[derive(Debug)]
pub enum From {
    /// This host.
    Host,
    /// A plugin of this host.
    Plugin(String),
    /// A peer, by its id or by a word that stands for one.
    Peer(String),
}

impl From {
    fn parse(text: Option<String>) -> Self {
        match text.as_deref() {
            None => Self::Peer("peer".to_owned()),
            Some("host") => Self::Host,
            Some(text) => match text.strip_prefix("plugin ") {
                Some(plugin) => Self::Plugin(plugin.to_owned()),
                None => Self::Peer(text.to_owned()),
            },
        }
    }
}

impl Step {
    /// Reads a step; variables have the values that they have by now, but for what is expected: that is compared when
    /// the step is over.
    pub fn parse(step: &Value, vars: &Vars) -> Result<Self, String> {
        if !step.is_object() {
            return Err(format!("a step is one of {ACTIONS}, and what goes with it"));
        }
        // The steps that are repeated have variables of their own.
        let mut filled = match step.get("repeat") {
            Some(_) => step.clone(),
            None => vars.fill(step),
        };
        for expected in ["expect", "include"] {
            if let Some(as_written) = step.get(expected) {
                filled[expected] = as_written.clone();
            }
        }
        let raw: RawStep = serde_json::from_value(filled).map_err(|error| error.to_string())?;
        let expectation = Expectation { expect: raw.expect.clone(), include: raw.include.clone() };
        expectation.check()?;
        Ok(Self { action: raw.action()?, expectation })
    }
}

impl RawStep {
    fn action(self) -> Result<Action, String> {
        let data = match (self.data, self.text) {
            (Some(_), Some(_)) => return Err("a message has data or text, not both".to_owned()),
            (Some(data), None) => Some(bytes_of(&data)?),
            (None, Some(text)) => Some(text.into_bytes()),
            (None, None) => None,
        };
        let body = self.body;
        let document = self.document;
        let mut actions = Vec::new();
        // What goes with an action, and is wrong with any other.
        let mut goes_with = Vec::new();
        let duration = |member: &str, value: Value| {
            duration_of(value.as_str().unwrap_or_default()).map_err(|why| format!("{member}: {why}"))
        };
        if let Some(topic) = self.message {
            goes_with.extend(["data", "from"]);
            let from = From::parse(self.from.clone());
            actions.push(Action::Message { topic, data: data.clone().unwrap_or_default(), from });
        }
        if let Some(wait) = self.wait {
            actions.push(Action::Wait(Time::For(duration("wait", wait)?)));
        }
        if let Some(until) = self.until {
            actions.push(Action::Wait(Time::Until(until)));
        }
        if let Some(deaf) = self.deaf {
            goes_with.push("topic");
            actions.push(Action::Deaf(duration("deaf", deaf)?, self.topic.clone()));
        }
        if let Some(down) = self.down {
            actions.push(Action::Down(duration("down", down)?));
        }
        let body_text = || body.as_ref().map_or_else(|| "{}".to_owned(), Value::to_string);
        if let Some(method) = self.command {
            goes_with.push("body");
            actions.push(Action::Command(method, body_text()));
        }
        if let Some(method) = self.query {
            goes_with.push("body");
            actions.push(Action::Query(method, body_text()));
        }
        if let Some(name) = self.name {
            goes_with.push("document");
            let document = document.as_ref().ok_or("a name needs a document")?;
            actions.push(Action::Name(name, bytes_of(document)?));
        }
        if let Some(topic) = self.peers {
            goes_with.push("are");
            actions.push(Action::Peers(topic, self.are.clone().ok_or("say which peers there are")?));
        }
        if let Some(file) = self.replace {
            actions.push(Action::Replace(file));
        }
        if let Some(times) = self.repeat {
            goes_with.extend(["every", "steps"]);
            if times > MAX_REPEAT {
                return Err(format!("steps are repeated {MAX_REPEAT} times at most"));
            }
            let every =
                self.every.clone().map(|every| duration("every", every)).transpose()?.unwrap_or_default();
            let steps = self.steps.clone().ok_or("say which steps are repeated")?;
            actions.push(Action::Repeat { times, every, steps });
        }
        let given = [
            ("data", data.is_some()),
            ("from", self.from.is_some()),
            ("topic", self.topic.is_some()),
            ("body", body.is_some()),
            ("document", document.is_some()),
            ("are", self.are.is_some()),
            ("every", self.every.is_some()),
            ("steps", self.steps.is_some()),
        ];
        if let Some((stray, _)) =
            given.iter().find(|(member, is_given)| *is_given && !goes_with.contains(member))
        {
            return Err(format!("{stray:?} does not go with this"));
        }
        match actions.len() {
            1 => Ok(actions.remove(0)),
            0 if self.note.is_some() => Ok(Action::Wait(Time::For(Duration::ZERO))),
            _ => Err(format!("a step is one of {ACTIONS}")),
        }
    }
}

const ACTIONS: &str = "message, wait, until, deaf, down, command, query, name, peers, replace, repeat";
