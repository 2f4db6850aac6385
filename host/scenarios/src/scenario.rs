//! Owns the format of scenarios: files with the initial data of a plugin, the steps, and the expected results. Receives
//! YAML; returns a checked scenario.

mod step;
mod vars;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dim_model::error_chain::in_yaml;
use dim_model::time::Timestamp;
use dim_store::grants::Grants;
use dim_store::plugin_limits::SomeLimits;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;
use thiserror::Error;

use crate::identity::Identity;
use crate::notation::bytes_of;
use crate::test_bench::Given;

pub use step::{Action, MessageSender, Step, Time};
pub use vars::Vars;

/// The reason why a scenario cannot be used.
#[derive(Debug, Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The content is not a valid scenario.
    #[error("{name}: {why}")]
    Wrong {
        /// The name of the scenario.
        name: String,
        /// The defect, with its place.
        why: String,
    },
}

/// Maximum size of a scenario file, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// A scenario: initial data, steps, and the expected results.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The name: that of the file, without its extension.
    pub name: String,
    /// The directory to which paths in the scenario are relative.
    pub(super) dir: PathBuf,
    /// The initial data of the plugin.
    pub(super) given: Given,
    /// The names of other owners that have a document at the beginning.
    pub(super) names: BTreeMap<String, Value>,
    /// The steps, with variables that are not filled in yet.
    pub(super) steps: Vec<Spanned<Value>>,
    /// The expected results at the end.
    pub(super) end: Expectation,
}

/// The expected results of a step or of the scenario, by sections.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Expectation {
    /// Sections that must match exactly.
    #[serde(default)]
    pub expect: Map<String, Value>,
    /// Sections that must contain at least these values.
    #[serde(default)]
    pub include: Map<String, Value>,
}

impl Expectation {
    /// Whether there is an expectation for a section.
    pub fn tells_of(&self, section: &str) -> bool {
        // An empty list in `include` expects nothing.
        let is_told =
            |value: &Value| !value.is_null() && value.as_array().is_none_or(|items| !items.is_empty());
        self.expect.contains_key(section) || self.include.get(section).is_some_and(is_told)
    }

    /// Whether there is no expectation.
    pub fn is_empty(&self) -> bool {
        self.expect.is_empty() && self.include.is_empty()
    }

    /// Returns the expectation with its variables filled in.
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

/// The sections of expected results.
pub const SECTIONS: [&str; 11] =
    ["reply", "error", "publishes", "names", "state", "timers", "dead", "retries", "log", "hears", "follows"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default, rename = "note")]
    _note: String,
    #[serde(default, deserialize_with = "or_nothing")]
    given: RawGiven,
    steps: Vec<Spanned<Value>>,
    #[serde(default, deserialize_with = "or_nothing")]
    expect: Map<String, Value>,
    #[serde(default, deserialize_with = "or_nothing")]
    include: Map<String, Value>,
}

/// Deserializes a member without a value as if it were absent.
pub fn or_nothing<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawGiven {
    config: Map<String, Value>,
    state: Map<String, Value>,
    timers: BTreeMap<String, Value>,
    /// The name as in the manifest. No other member has an alias.
    #[serde(rename = "state-version", alias = "state_version")]
    state_version: Option<u32>,
    denied: Grants,
    limits: SomeLimits,
    time: Option<Timestamp>,
    seed: u64,
    names: BTreeMap<String, Value>,
}

impl RawGiven {
    fn only_known(&self) -> Result<(), String> {
        let Self { config, state, timers, names, .. } = self;
        let within = |section: &'static str| move |why: String| format!("given.{section}.{why}");
        Vars::only_known(config.iter()).map_err(within("config"))?;
        Vars::only_known(state.iter()).map_err(within("state"))?;
        Vars::only_known(timers.iter()).map_err(within("timers"))?;
        Vars::only_known(names.iter()).map_err(within("names"))
    }
}

impl Scenario {
    /// Reads a scenario from a file of at most 16 MiB.
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

    /// The number of top-level steps.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Parses a scenario. `name` is its name in reports and errors. Fails if the YAML is malformed, or if a member, a
    /// variable or a step is invalid.
    pub fn parse(name: &str, text: &str) -> Result<Self, ScenarioError> {
        let wrong = |why: String| ScenarioError::Wrong { name: name.to_owned(), why };
        let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
        let raw: RawFile =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| wrong(in_yaml(&error)))?;
        raw.given.only_known().map_err(wrong)?;
        let given = given(&raw.given).map_err(wrong)?;
        let vars = Vars { seed: given.host.seed, now: given.time, round: 0 };
        let RawFile { steps, expect, include, .. } = raw;
        let end = Expectation { expect, include };
        end.check().map_err(wrong)?;
        for sections in [&end.expect, &end.include] {
            Vars::only_known(sections.iter()).map_err(|why| wrong(format!("in the end: {why}")))?;
        }
        for (number, step) in (1..).zip(&steps) {
            let place = place_of(number, step);
            Vars::only_known(step.value.as_object().into_iter().flatten())
                .map_err(|why| wrong(format!("{place}: {why}")))?;
            check(&step.value, &vars, &place).map_err(wrong)?;
        }
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

/// The place of a top-level step: its number and its line.
pub fn place_of(number: u64, step: &Spanned<Value>) -> String {
    format!("step {number} (line {})", step.defined.line())
}

/// Checks a step before the scenario runs. Errors that depend on the values of variables appear only in the run.
fn check(step: &Value, vars: &Vars, place: &str) -> Result<(), String> {
    let step = Step::parse(step, vars).map_err(|why| format!("{place}: {why}"))?;
    if let Action::Repeat { steps, .. } = &step.action {
        let vars = Vars { round: 1, ..*vars };
        for (number, step) in (1..).zip(steps) {
            check(step, &vars, &format!("{place}, step {number}"))?;
        }
    }
    Ok(())
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
            wrong("steps:\n- message: t\n- { wait: 3 }"),
            "it: step 2 (line 3): wait: write it like 30s, 5m, 1h30m or 2d"
        );
        let soon = wrong("steps: [{ wait: soon }]");
        assert_eq!(soon, "it: step 1 (line 1): wait: write it like 30s, 5m, 1h30m or 2d");
        let stray = wrong("steps: [{ wait: 3s, data: 1 }]");
        assert_eq!(stray, "it: step 1 (line 1): \"data\" does not belong to this step");
        let both = wrong("steps: [{ wait: 3s, down: 3s }]");
        assert!(both.starts_with("it: step 1 (line 1): a step is one of message, missing, wait"), "{both}");
        let nested = wrong("steps: [{ repeat: 2, steps: [{ message: t, expect: { published: [] } }] }]");
        assert!(nested.starts_with("it: step 1 (line 1), step 1: there is no \"published\""), "{nested}");
        assert!(wrong("given: { state: { k: { $base64: '?' } } }\nsteps: []").contains("given.state.k"));
        let unknown = wrong("steps: [{ message: t, expect: { state: { 'count/${nwo}': 1 } } }]");
        assert!(unknown.starts_with("it: step 1 (line 1): expect: ${nwo} is no variable"), "{unknown}");
        assert!(wrong("given: { config: { a: ['${x.y}'] } }\nsteps: []").starts_with("it: given.config.a"));
        assert!(wrong("steps: []\nexpect: { state: { a: '${now+soon}' } }").starts_with("it: in the end: "));
        let late = wrong("given: { time: 9999-01-01T00:00:00Z }\nsteps: []");
        assert!(late.contains("between 1970 and 2554"), "{late}");
        for (text, word) in [
            ("steps: []\nsteps: []", "duplicate"),
            ("steps: []\n---\nsteps: []", "multiple"),
            ("note: ~\nsteps: []", "null"),
        ] {
            let why = wrong(text);
            assert!(why.contains(word) && !why.contains("Option") && !why.contains("from_str"), "{why}");
        }
        assert!(
            Scenario::parse("it", "given:\nsteps: []\nexpect:\n").is_ok(),
            "nothing is given or expected"
        );
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
        assert_eq!(vars.fill(&json!("$${now} ${i}")), json!("${now} 2"));
        let written = json!({ "${i}": ["a $${b} ${now}", 3] });
        assert_eq!(vars.fill(&Vars::escaped(&written)), written, "what happened is no variable");
        let alice = vars.fill(&json!("${peer.alice}"));
        assert_eq!(alice.as_str().unwrap(), vars.peer("alice").as_str());
        assert_eq!(vars.peer(alice.as_str().unwrap()), vars.peer("alice"), "an id stands for itself");
    }
}
