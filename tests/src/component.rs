//! Components of which a test needs one that differs a little from another.

use dim::plugin::{leb128, section, with_sections};
use wasmparser::{Parser, Payload};

/// A component with `manifest` in the place of its own: the outer one of two is what counts.
pub fn with_manifest(component: &[u8], manifest: &str) -> Vec<u8> {
    with_sections(component, &[("dim-manifest", manifest.as_bytes())])
}

/// The probe as another version, which does `steps` when it starts.
pub fn probe(version: &str, steps: &serde_json::Value) -> Vec<u8> {
    probe_with(version, &[("default = \"[]\"", &format!("default = {:?}", steps.to_string()))])
}

/// The probe as another version, which does `step` with each call from the one numbered `from` on, beside
/// what it is told.
pub fn probe_that(version: &str, from: u64, step: &serde_json::Value) -> Vec<u8> {
    let mut step = step.clone();
    step["from"] = from.into();
    probe_with(version, &[("default = \"null\"", &format!("default = {:?}", step.to_string()))])
}

/// The probe as another version, with other words in its manifest.
pub fn probe_with(version: &str, changes: &[(&str, &str)]) -> Vec<u8> {
    let mut manifest = include_str!("../guests/examples/probe.toml").replace("0.1.0", version);
    for (old, new) in changes {
        assert!(manifest.contains(old), "the probe's manifest has {old}");
        manifest = manifest.replace(old, new);
    }
    with_manifest(&std::fs::read(super::PROBE).expect("the probe is built"), &manifest)
}

/// A component that makes so many core instances more, of an empty module: in a component of its own within it.
pub fn with_core_instances(component: &[u8], count: usize) -> Vec<u8> {
    let empty = "(core instance (instantiate $e))".repeat(count);
    let crowd = wat::parse_str(format!("(component (core module $e) {empty})")).expect("it is a component");
    let mut inner = 0;
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(component) {
        match payload.expect("a component") {
            Payload::ComponentSection { .. } => {
                inner += usize::from(depth == 0);
                depth += 1;
            }
            Payload::ModuleSection { .. } => depth += 1,
            Payload::End(_) => depth -= 1,
            _ => {}
        }
    }
    // The crowd, and one instance of it, without arguments.
    let instance = [vec![1, 0], leb128(inner), vec![0]].concat();
    [component.to_vec(), section(4, &crowd), section(5, &instance)].concat()
}
