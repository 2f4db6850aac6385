//! Owns scenarios: files that say what a plugin is given, what happens, and what must come of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libp2p_identity::PeerId;
use serde::Deserialize;
use serde_json::{Map, Value};
use thiserror::Error;

use super::bench::{Given, Identity};
use super::shown::bytes_of;
use super::trial::{key_for, name_for, peer_of};
use crate::ident::{PeerName, Topic};
use crate::plugin::{Grants, SomeLimits};
use crate::time::{Timestamp, duration_of};

/// What is wrong with a scenario.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no scenario.
    #[error("{name}: {why}")]
    Wrong {
        /// Which.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// Largest scenario, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// Most often that steps are repeated.
const MAX_REPEAT: u64 = 10_000_000;

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called: the name of its file.
    pub name: String,
    /// The directory that files in it are relative to.
    pub(super) dir: PathBuf,
    /// What the plugin starts with.
    pub(super) given: Given,
    /// Names of others that have a value at the beginning, with the document.
    pub(super) names: BTreeMap<String, Value>,
    /// What happens, with variables in it.
    pub(super) steps: Vec<Value>,
    /// What must have come of it in the end.
    pub(super) end: Expectation,
}

/// What must come of something.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Expectation {
    /// These sections are exactly so.
    #[serde(default)]
    pub expect: Map<String, Value>,
    /// These sections hold so much.
    #[serde(default)]
    pub include: Map<String, Value>,
}

impl Expectation {
    /// Whether a section is told of.
    pub fn tells_of(&self, section: &str) -> bool {
        self.expect.contains_key(section) || self.include.contains_key(section)
    }

    /// Whether nothing is expected.
    pub fn is_empty(&self) -> bool {
        self.expect.is_empty() && self.include.is_empty()
    }

    /// With the variables filled in.
    pub fn filled(&self, vars: &Vars) -> Self {
        let fill = |sections: &Map<String, Value>| match vars.fill(&Value::Object(sections.clone())) {
            Value::Object(sections) => sections,
            _ => Map::new(),
        };
        Self { expect: fill(&self.expect), include: fill(&self.include) }
    }

    fn check(&self) -> Result<(), String> {
        for section in self.expect.keys().chain(self.include.keys()) {
            if !SECTIONS.contains(&section.as_str()) {
                return Err(format!("there is no {section:?} to expect; there are {}", SECTIONS.join(", ")));
            }
        }
        Ok(())
    }
}

/// What can be expected.
pub const SECTIONS: [&str; 11] =
    ["reply", "error", "publishes", "names", "state", "timers", "dead", "retries", "log", "hears", "follows"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default, rename = "note")]
    _note: String,
    #[serde(default)]
    given: RawGiven,
    steps: Vec<Value>,
    #[serde(default)]
    expect: Map<String, Value>,
    #[serde(default)]
    include: Map<String, Value>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawGiven {
    config: Map<String, Value>,
    state: Map<String, Value>,
    timers: BTreeMap<String, Value>,
    state_version: Option<u32>,
    denied: Grants,
    limits: SomeLimits,
    time: Option<Timestamp>,
    seed: u64,
    names: BTreeMap<String, Value>,
}

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
    wait: Option<String>,
    until: Option<Timestamp>,
    deaf: Option<String>,
    topic: Option<Topic>,
    down: Option<String>,
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
    every: Option<String>,
    steps: Option<Vec<Value>>,
    expect: Map<String, Value>,
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

impl Scenario {
    /// Reads a scenario from a file.
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let file = |source| ScenarioError::File { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(file)?.len() > MAX_FILE {
            return Err(file(std::io::Error::other(format!("a scenario has at most {MAX_FILE} bytes"))));
        }
        let text = std::fs::read_to_string(path).map_err(file)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let scenario = Self::parse(&name, &text)?;
        Ok(Self { dir: path.parent().unwrap_or(Path::new("")).to_owned(), ..scenario })
    }

    /// Reads a scenario called `name`.
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let wrong = |why: String| ScenarioError::Wrong { name: name.to_owned(), why };
        let options = serde_saphyr::options! { with_snippet: false };
        let raw: RawFile = serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| wrong(error.to_string().trim_start_matches("error: ").to_owned()))?;
        let given = given(&raw.given).map_err(wrong)?;
        let vars = Vars { seed: given.host.seed, now: given.time, round: 0 };
        let RawFile { steps, expect, include, .. } = raw;
        let end = Expectation { expect, include };
        end.check().map_err(wrong)?;
        check_steps(&steps, &vars, "").map_err(wrong)?;
        let names = raw.given.names;
        Ok(Self { name: name.to_owned(), dir: PathBuf::new(), given, names, steps, end })
    }
}

fn given(raw: &RawGiven) -> Result<Given, String> {
    let default = Given::default();
    let time = raw.time.unwrap_or(default.time);
    let vars = Vars { seed: raw.seed, now: time, round: 0 };
    let mut state = BTreeMap::new();
    for (key, value) in &raw.state {
        let value = bytes_of(&vars.fill(value)).map_err(|why| format!("given.state.{key}: {why}"))?;
        state.insert(vars.fill_text(key).into_bytes(), value);
    }
    let mut timers = BTreeMap::new();
    for (key, at) in &raw.timers {
        let at = serde_json::from_value(vars.fill(at));
        timers.insert(vars.fill_text(key), at.map_err(|why| format!("given.timers.{key}: {why}"))?);
    }
    let has_state = !state.is_empty() || !timers.is_empty();
    let state_version = raw.state_version.or(has_state.then_some(1));
    let config = match vars.fill(&Value::Object(raw.config.clone())) {
        Value::Object(config) => config,
        _ => Map::new(),
    };
    let (denied, limits, host) = (raw.denied.clone(), raw.limits.clone(), Identity::of(raw.seed));
    Ok(Given { config, state, timers, state_version, denied, limits, time, host })
}

/// What is wrong is told before anything runs, as far as it does not hang on variables.
fn check_steps(steps: &[Value], vars: &Vars, place: &str) -> Result<(), String> {
    for (number, step) in (1..).zip(steps) {
        let place = format!("{place}step {number}");
        let step = Step::parse(step, vars).map_err(|why| format!("{place}: {why}"))?;
        if let Action::Repeat { steps, .. } = &step.action {
            check_steps(steps, &Vars { round: 1, ..*vars }, &format!("{place}, "))?;
        }
    }
    Ok(())
}

impl Step {
    /// Reads a step; variables have the values that they have by now, but for what is expected: that is compared when
    /// the step is over.
    pub fn parse(step: &Value, vars: &Vars) -> Result<Self, String> {
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
        let duration = |text: String| duration_of(&text).map_err(|why| format!("{text:?}: {why}"));
        if let Some(topic) = self.message {
            goes_with.extend(["data", "from"]);
            let from = From::parse(self.from.clone());
            actions.push(Action::Message { topic, data: data.clone().unwrap_or_default(), from });
        }
        if let Some(wait) = self.wait {
            actions.push(Action::Wait(Time::For(duration(wait)?)));
        }
        if let Some(until) = self.until {
            actions.push(Action::Wait(Time::Until(until)));
        }
        if let Some(deaf) = self.deaf {
            goes_with.push("topic");
            actions.push(Action::Deaf(duration(deaf)?, self.topic.clone()));
        }
        if let Some(down) = self.down {
            actions.push(Action::Down(duration(down)?));
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
            let every = self.every.clone().map(duration).transpose()?.unwrap_or_default();
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

/// What `${…}` stands for.
#[derive(Clone, Copy, Debug)]
pub struct Vars {
    /// What peers and names follow from.
    pub seed: u64,
    /// The time.
    pub now: Timestamp,
    /// Which round of what is repeated, from 1.
    pub round: u64,
}

impl Vars {
    /// A value with the variables filled in, those of its members' names, too.
    pub fn fill(&self, value: &Value) -> Value {
        match value {
            Value::String(text) if text == "${i}" => self.round.into(),
            Value::String(text) => Value::String(self.fill_text(text)),
            Value::Array(items) => items.iter().map(|item| self.fill(item)).collect(),
            Value::Object(members) => {
                let filled = members.iter().map(|(name, value)| (self.fill_text(name), self.fill(value)));
                Value::Object(filled.collect())
            }
            other => other.clone(),
        }
    }

    fn fill_text(&self, text: &str) -> String {
        let (mut filled, mut rest) = (String::new(), text);
        while let Some((before, after)) = rest.split_once("${") {
            filled.push_str(before);
            let value = after.split_once('}').and_then(|(name, after)| Some((self.value(name)?, after)));
            rest = match value {
                Some((value, after)) => {
                    filled.push_str(&value);
                    after
                }
                None => {
                    filled.push_str("${");
                    after
                }
            };
        }
        filled.push_str(rest);
        filled
    }

    /// What a variable stands for, if it is one.
    fn value(&self, name: &str) -> Option<String> {
        if let Some((sort, word)) = name.split_once('.') {
            return match sort {
                "peer" => Some(peer_of(self.seed, word).to_string()),
                "name" => Some(name_for(self.seed, word).to_string()),
                "key" => Some(key_for(self.seed, word).to_string()),
                "host" if word == "id" => Some(peer_of(self.seed, "host").to_string()),
                _ => None,
            };
        }
        match name.strip_prefix("now") {
            Some("") => Some(self.now.to_string()),
            Some(by) if by.starts_with('+') => Some(self.now.after(duration_of(&by[1..]).ok()?).to_string()),
            Some(by) if by.starts_with('-') => {
                let by = crate::time::nanoseconds(duration_of(&by[1..]).ok()?);
                Some(Timestamp(self.now.0.saturating_sub(by)).to_string())
            }
            Some(_) => None,
            None => (name == "i").then(|| self.round.to_string()),
        }
    }

    /// The peer that a word stands for; a peer id stands for itself.
    pub fn peer(&self, word: &str) -> PeerName {
        let is_id = word.parse::<PeerId>().is_ok();
        word.parse().ok().filter(|_| is_id).unwrap_or_else(|| peer_of(self.seed, word))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wrong(text: &str) -> String {
        Scenario::parse("it", text).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_with_a_scenario_is_told() {
        assert!(wrong("step: []").contains("step"), "{}", wrong("step: []"));
        assert_eq!(
            wrong("steps: [{ message: t }, { wait: 3 }]"),
            "it: step 2: invalid type: integer `3`, expected a string"
        );
        assert_eq!(
            wrong("steps: [{ wait: soon }]"),
            "it: step 1: \"soon\": write it like 30s, 5m, 1h30m or 2d"
        );
        assert_eq!(wrong("steps: [{ wait: 3s, data: 1 }]"), "it: step 1: \"data\" does not go with this");
        let both = wrong("steps: [{ wait: 3s, down: 3s }]");
        assert!(both.starts_with("it: step 1: a step is one of message, wait"), "{both}");
        let nested = wrong("steps: [{ repeat: 2, steps: [{ message: t, expect: { published: [] } }] }]");
        assert!(nested.starts_with("it: step 1, step 1: there is no \"published\""), "{nested}");
        assert!(wrong("given: { state: { k: { $base64: '?' } } }\nsteps: []").contains("given.state.k"));
    }

    #[test]
    fn variables_stand_for_peers_names_and_times() {
        let vars = Vars { seed: 3, now: Timestamp(90_000_000_000), round: 2 };
        let filled =
            vars.fill(&json!({ "${i}": ["${i}", "n-${i}", "${now-30s}", "${now+1m}", "${config.x}", "${"] }));
        assert_eq!(
            filled,
            json!({ "2": [2, "n-2", "1970-01-01T00:01:00Z", "1970-01-01T00:02:30Z", "${config.x}", "${"] })
        );
        let alice = vars.fill(&json!("${peer.alice}"));
        assert_eq!(alice.as_str().unwrap(), vars.peer("alice").as_str());
        assert_eq!(vars.peer(alice.as_str().unwrap()), vars.peer("alice"), "an id stands for itself");
    }
}
