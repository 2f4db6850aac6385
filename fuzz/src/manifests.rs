//! Fuzzes the parser of plugin manifests.

use dim_runtime::Manifest;
use serde_json::{Map, Value, json};

/// Parses a manifest and resolves its config with the declared defaults.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let manifest = match Manifest::parse(text) {
        Ok(manifest) => manifest,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let values: [Map<String, Value>; 3] = [
        Map::new(),
        manifest.config.keys().map(|key| (key.clone(), json!("a.b"))).collect(),
        manifest.config.keys().map(|key| (key.clone(), json!(["a", "b.*", ""]))).collect(),
    ];
    for values in values {
        if let Ok(resolved) = manifest.resolve(&values, &[("id", "12D3KooWhost")]) {
            let config: Value = serde_json::from_str(&resolved.config).expect("a config is JSON");
            assert!(config.is_object(), "{config}");
        }
    }
    serde_json::to_string(&manifest).expect("a manifest can be shown");
}

/// Returns the manifests of the bundled plugins and of the probe, and one with optional values.
pub fn seeds() -> Vec<Vec<u8>> {
    super::texts([
        include_str!("../../plugins/job-tracker/plugin.toml"),
        include_str!("../../plugins/node-registry/plugin.toml"),
        include_str!("../../plugins/heartbeat-watchdog/plugin.toml"),
        include_str!("../../tests/guests/examples/probe.toml"),
        "name = \"a\"\nversion = \"1\"\ndescription = \"\"\nstate-version = 1\n[limits]\nmemory = 1\n\
         [topics]\npublish = [\"${config.x}\", \"${config.x}.*\"]\n[config.x]\ntype = \"strings\"\noptional = true\n",
    ])
}
