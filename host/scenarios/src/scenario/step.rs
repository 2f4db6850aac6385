//! Owns the steps of a scenario. Receives a step as JSON and the variables; returns its action and its expectation.

use std::path::PathBuf;
use std::time::Duration;

use dim_model::ident::Topic;
use dim_model::time::{Timestamp, duration_of};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Expectation, Vars, or_nothing};
use crate::notation::bytes_of;

/// Maximum number of rounds of a repetition.
const MAX_REPEAT: u64 = 10_000_000;

/// A step as it is written in the file.
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
    missing: Option<Topic>,
    count: Option<u64>,
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

/// Deserializes a present value, including `null`.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// A checked step.
#[derive(Debug)]
pub struct Step {
    /// The action.
    pub action: Action,
    /// The expected results.
    pub expectation: Expectation,
}

/// The action of a step.
#[derive(Debug)]
pub enum Action {
    /// A message arrives.
    Message {
        /// The topic.
        topic: Topic,
        /// The data.
        data: Vec<u8>,
        /// The sender.
        from: MessageSender,
    },
    /// Events of a member cannot be had: the topic, the member, and their number.
    Missing(Topic, String, u64),
    /// Time passes.
    Wait(Time),
    /// Time passes while the host does not hear one topic, or any topic.
    Deaf(Duration, Option<Topic>),
    /// Time passes while the host is down.
    Down(Duration),
    /// The plugin receives a command: the method and the body.
    Command(String, String),
    /// The plugin receives a query: the method and the body.
    Query(String, String),
    /// A name of another owner gets a new document.
    Name(String, Vec<u8>),
    /// The peers of a topic change.
    Peers(Topic, Vec<String>),
    /// The component in this file takes over.
    Replace(PathBuf),
    /// Steps are repeated.
    Repeat {
        /// The number of rounds.
        times: u64,
        /// The minimum duration of a round.
        every: Duration,
        /// The steps of a round.
        steps: Vec<Value>,
    },
}

/// The span of time that passes.
#[derive(Debug)]
pub enum Time {
    /// For a duration.
    For(Duration),
    /// Until a time.
    Until(Timestamp),
}

/// The sender of a message.
#[derive(Debug)]
pub enum MessageSender {
    /// This host.
    Host,
    /// A plugin of this host.
    Plugin(String),
    /// A peer, by its id or by a word.
    Peer(String),
    /// A member of the fleet, by a word. It keeps its events: a plugin that subscribes later can begin with them.
    Member(String),
}

impl MessageSender {
    fn parse(text: Option<String>) -> Self {
        match text.as_deref() {
            None => Self::Peer("peer".to_owned()),
            Some("host") => Self::Host,
            Some(text) => match text.split_once(' ') {
                Some(("plugin", plugin)) => Self::Plugin(plugin.to_owned()),
                Some(("member", member)) => Self::Member(member.to_owned()),
                _ => Self::Peer(text.to_owned()),
            },
        }
    }
}

impl Step {
    /// Parses a step with the current values of the variables. The expectation keeps its variables, because they are
    /// filled in after the step.
    pub fn parse(step: &Value, vars: &Vars) -> Result<Self, String> {
        if !step.is_object() {
            return Err(format!("a step is one of {ACTIONS}, with its members"));
        }
        // The variables of repeated steps are filled in for each round.
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
        // The members that belong to the action. Any other member is an error.
        let mut goes_with = Vec::new();
        let duration = |member: &str, value: Value| {
            duration_of(value.as_str().unwrap_or_default()).map_err(|why| format!("{member}: {why}"))
        };
        if let Some(topic) = self.message {
            goes_with.extend(["data", "from"]);
            let from = MessageSender::parse(self.from.clone());
            actions.push(Action::Message { topic, data: data.clone().unwrap_or_default(), from });
        }
        if let Some(topic) = self.missing {
            goes_with.extend(["from", "count"]);
            let MessageSender::Member(member) = MessageSender::parse(self.from.clone()) else {
                return Err("`missing` needs `from: member NAME`".to_owned());
            };
            actions.push(Action::Missing(topic, member, self.count.unwrap_or(1)));
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
            let document = document.as_ref().ok_or("`name` needs `document`")?;
            actions.push(Action::Name(name, bytes_of(document)?));
        }
        if let Some(topic) = self.peers {
            goes_with.push("are");
            actions.push(Action::Peers(
                topic,
                self.are.clone().ok_or("`peers` needs `are`, the list of peers")?,
            ));
        }
        if let Some(file) = self.replace {
            actions.push(Action::Replace(file));
        }
        if let Some(times) = self.repeat {
            goes_with.extend(["every", "steps"]);
            if times > MAX_REPEAT {
                return Err(format!("`repeat` is at most {MAX_REPEAT}"));
            }
            let every =
                self.every.clone().map(|every| duration("every", every)).transpose()?.unwrap_or_default();
            let steps = self.steps.clone().ok_or("`repeat` needs `steps`")?;
            actions.push(Action::Repeat { times, every, steps });
        }
        let given = [
            ("data", data.is_some()),
            ("from", self.from.is_some()),
            ("topic", self.topic.is_some()),
            ("count", self.count.is_some()),
            ("body", body.is_some()),
            ("document", document.is_some()),
            ("are", self.are.is_some()),
            ("every", self.every.is_some()),
            ("steps", self.steps.is_some()),
        ];
        if let Some((stray, _)) =
            given.iter().find(|(member, is_given)| *is_given && !goes_with.contains(member))
        {
            return Err(format!("{stray:?} does not belong to this step"));
        }
        match actions.len() {
            1 => Ok(actions.remove(0)),
            0 if self.note.is_some() => Ok(Action::Wait(Time::For(Duration::ZERO))),
            _ => Err(format!("a step is one of {ACTIONS}")),
        }
    }
}

const ACTIONS: &str =
    "message, missing, wait, until, deaf, down, command, query, name, peers, replace, repeat";
