//! Owns what a reload changes: the keys whose values differ, which of them take effect while the host runs, and the
//! config that is in effect then.

use serde_json::{Map, Value};

use super::Config;
use crate::ident::PluginName;

/// A key with another value than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change(Vec<String>);

impl Change {
    /// The key, as in `topics.jobs.*.peers`.
    pub fn path(&self) -> String {
        self.0.join(".")
    }

    /// Whether it takes effect without a restart.
    pub fn is_live(&self) -> bool {
        let path: Vec<&str> = self.0.iter().map(String::as_str).collect();
        matches!(
            path.as_slice(),
            ["topics" | "signing", ..]
                | ["replacement", "trusted"]
                | ["ipfs", "follow_every"]
                | ["limits", "default" | "ceiling" | "plugins" | "component-bytes", ..]
                | ["plugins", _, "config" | "grants" | "limits", ..]
        )
    }

    /// The plugin whose section it is in, if it is in one.
    pub fn plugin(&self) -> Option<&str> {
        match self.0.as_slice() {
            [section, plugin, ..] if section == "plugins" => Some(plugin),
            _ => None,
        }
    }
}

/// The keys whose values differ, in the order of their names.
pub fn changes(before: &Config, after: &Config) -> Vec<Change> {
    let (before, after) = (with_all_plugins(before, after), with_all_plugins(after, before));
    let mut found = Vec::new();
    compare(&mut Vec::new(), &before, &after, &mut found);
    found
}

/// A config as JSON; a plugin without a section has an empty one.
fn with_all_plugins(config: &Config, other: &Config) -> Value {
    let mut config = config.clone();
    for name in other.plugins.keys() {
        config.plugins.entry(name.clone()).or_default();
    }
    serde_json::to_value(&config).expect("a config is JSON")
}

fn compare(path: &mut Vec<String>, before: &Value, after: &Value, found: &mut Vec<Change>) {
    let none = Map::new();
    let (one, other) = match (before, after) {
        _ if before == after => return,
        (Value::Object(before), Value::Object(after)) => (before, after),
        // A list of topics or names is one value; what is granted and what is not said differ in more.
        (Value::Null, Value::Object(after)) if !after.is_empty() => (&none, after),
        (Value::Object(before), Value::Null) if !before.is_empty() => (before, &none),
        _ => return found.push(Change(path.clone())),
    };
    let keys: std::collections::BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    for key in keys {
        path.push(key.clone());
        compare(path, one.get(key).unwrap_or(&Value::Null), other.get(key).unwrap_or(&Value::Null), found);
        path.pop();
    }
}

impl Config {
    /// The config in effect once `after` was taken over: its values where they take effect at once, and those of this
    /// one elsewhere. `runs` says which plugins run: any other needs a restart.
    pub fn taking_over(&self, after: &Self, runs: impl Fn(&PluginName) -> bool) -> Self {
        let mut config = self.clone();
        config.topics.clone_from(&after.topics);
        config.signing.clone_from(&after.signing);
        config.replacement.trusted.clone_from(&after.replacement.trusted);
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
        let left: Vec<String> = changes(&now, &after).iter().map(Change::path).collect();
        assert_eq!(left, ["outbox.expire_after", "plugins.a.file", "plugins.b.config.x"]);
    }
}
