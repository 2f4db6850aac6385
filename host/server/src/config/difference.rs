//! Owns the comparison of two configs. It receives the config in effect and the one that was read, and returns the
//! keys whose values differ, and the config that is in effect after a reload.

use std::collections::{BTreeMap, BTreeSet};

use dim_model::ident::PluginName;
use dim_store::grants::TopicPattern;
use serde_json::{Map, Value};

use super::{Config, TopicConfig};

/// A key whose value changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigChange(Vec<String>);

impl ConfigChange {
    /// Returns the key, as in `topics.jobs.*.peers`.
    pub fn path(&self) -> String {
        self.0.join(".")
    }

    /// Returns whether the change takes effect without a restart.
    pub fn is_live(&self) -> bool {
        let path: Vec<&str> = self.0.iter().map(String::as_str).collect();
        matches!(
            path.as_slice(),
            ["signing", ..]
                | ["topics", _, "peers"]
                | ["names", ..]
                | ["replacement", "trusted"]
                | ["ipfs", "follow_every"]
                | ["limits", "default" | "ceiling" | "plugins" | "component-bytes", ..]
                | ["plugins", _, "config" | "grants" | "limits", ..]
        )
    }

    /// Returns the plugin that the key belongs to, if it is in a section of a plugin.
    pub fn plugin(&self) -> Option<&str> {
        match self.0.as_slice() {
            [section, plugin, ..] if section == "plugins" => Some(plugin),
            _ => None,
        }
    }
}

/// Returns the keys whose values differ, in alphabetical order.
pub fn changes(before: &Config, after: &Config) -> Vec<ConfigChange> {
    let (before, after) = (with_all_plugins(before, after), with_all_plugins(after, before));
    let mut comparison = Comparison::default();
    comparison.compare(&before, &after);
    comparison.found
}

/// A comparison of two configs that has come to a key.
#[derive(Default)]
struct Comparison {
    /// The path of the key.
    path: Vec<String>,
    /// The differences so far.
    found: Vec<ConfigChange>,
}

/// Converts a config to JSON; a plugin without a section gets an empty one.
fn with_all_plugins(config: &Config, other: &Config) -> Value {
    let mut config = config.clone();
    for name in other.plugins.keys() {
        config.plugins.entry(name.clone()).or_default();
    }
    serde_json::to_value(&config).expect("a config is JSON")
}

impl Comparison {
    fn compare(&mut self, before: &Value, after: &Value) {
        let none = Map::new();
        let (one, other) = match (before, after) {
            _ if before == after => return,
            (Value::Object(before), Value::Object(after)) => (before, after),
            // A list of topics or names is one value. Grants that are absent and grants that are set differ in several
            // keys.
            (Value::Null, Value::Object(after)) if !after.is_empty() => (&none, after),
            (Value::Object(before), Value::Null) if !before.is_empty() => (before, &none),
            _ => return self.found.push(ConfigChange(self.path.clone())),
        };
        let keys: std::collections::BTreeSet<&String> = one.keys().chain(other.keys()).collect();
        for key in keys {
            self.path.push(key.clone());
            self.compare(one.get(key).unwrap_or(&Value::Null), other.get(key).unwrap_or(&Value::Null));
            self.path.pop();
        }
    }
}

impl Config {
    /// Returns the settings of topics after `after` was read. Only the peers change before a restart.
    fn topics_after(&self, after: &Self) -> BTreeMap<TopicPattern, TopicConfig> {
        let patterns: BTreeSet<_> = self.topics.keys().chain(after.topics.keys()).collect();
        let topic = |pattern: &TopicPattern| TopicConfig {
            peers: after.topics.get(pattern).and_then(|topic| topic.peers.clone()),
            ..self.topics.get(pattern).cloned().unwrap_or_default()
        };
        patterns.into_iter().map(|pattern| (pattern.clone(), topic(pattern))).collect()
    }

    /// Returns the config in effect after `after` was read: the new values of keys that take effect at once, and the
    /// values of this config for all others. `runs` returns whether a plugin runs; the others need a restart.
    pub fn taking_over(&self, after: &Self, runs: impl Fn(&PluginName) -> bool) -> Self {
        let mut config = self.clone();
        config.topics = self.topics_after(after);
        config.signing.clone_from(&after.signing);
        config.replacement.trusted.clone_from(&after.replacement.trusted);
        config.names.clone_from(&after.names);
        config.ipfs.follow_every = after.ipfs.follow_every;
        config.limits.default.clone_from(&after.limits.default);
        config.limits.ceiling.clone_from(&after.limits.ceiling);
        config.limits.plugins = after.limits.plugins;
        config.limits.component_bytes = after.limits.component_bytes;
        let names: std::collections::BTreeSet<&PluginName> =
            self.plugins.keys().chain(after.plugins.keys()).collect();
        for name in names.into_iter().filter(|name| runs(name)) {
            let section = after.plugins.get(name).cloned().unwrap_or_default();
            let own = config.plugins.entry(name.clone()).or_default();
            (own.config, own.grants, own.limits) = (section.config, section.grants, section.limits);
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(before: &str, after: &str) -> Vec<(String, bool)> {
        let read = |text| Config::parse(text).unwrap();
        let found = changes(&read(before), &read(after));
        found.iter().map(|change| (change.path(), change.is_live())).collect()
    }

    #[test]
    fn what_changes_is_named_key_by_key_with_what_needs_a_restart() {
        let peer = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5";
        let after = format!(
            "topics: {{ jobs.*: {{ peers: [{peer}] }} }}\nstore: {{ max_bytes: 1073741824, log: {{ max_age_hours: 168 }} }}\n\
             signing: {{ unsigned: refuse }}\nplugins: {{ heartbeat-watchdog: {{ config: {{ bind_nodes: first }} }} }}\n"
        );
        let found = paths("", &after);
        let found: Vec<_> = found.iter().map(|(path, is_live)| (path.as_str(), *is_live)).collect();
        assert_eq!(
            found,
            [
                ("plugins.heartbeat-watchdog.config.bind_nodes", true),
                ("signing.unsigned.files", true),
                ("signing.unsigned.network", true),
                ("store.max_bytes", false),
                ("topics.jobs.*.peers", true),
            ]
        );
        assert_eq!(paths(&after, &after), []);
    }

    #[test]
    fn what_needs_a_restart_stays_as_it_was() {
        let before = Config::parse("plugins: { a: { file: a.wasm } }\n").unwrap();
        let after = Config::parse(
            "outbox: { expire_after: 5 }\nipfs: { follow_every: 3 }\n\
             plugins: { a: { file: b.wasm, config: { x: 1 } }, b: { config: { x: 1 } } }\n",
        )
        .unwrap();
        let now = before.taking_over(&after, |name| name.as_str() == "a");
        let left: Vec<String> = changes(&now, &after).iter().map(ConfigChange::path).collect();
        assert_eq!(left, ["outbox.expire_after", "plugins.a.file", "plugins.b.config.x"]);
    }
}
