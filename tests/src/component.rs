//! Creates variants of a component: another manifest, more core instances, or early effects.

use dim_runtime::{leb128, section, with_sections};
use wasmparser::{CanonicalFunction, ComponentAlias, ComponentExternalKind, ComponentTypeRef, ExternalKind};
use wasmparser::{Parser, Payload};

/// Returns a component with `manifest` instead of its own. The manifest is appended to the outer component, where it
/// has priority over the one of a nested module.
pub fn with_manifest(component: &[u8], manifest: &str) -> Vec<u8> {
    with_sections(component, &[("dim-manifest", manifest.as_bytes())])
}

/// Returns the probe as another version, whose `start` runs `steps`.
pub fn probe(version: &str, steps: &serde_json::Value) -> Vec<u8> {
    probe_with(version, &[("default = \"[]\"", &format!("default = {:?}", steps.to_string()))])
}

/// Returns the probe as another version. In addition to its scripts it runs `step` in each call, starting with call
/// number `from`.
pub fn probe_that(version: &str, from: u64, step: &serde_json::Value) -> Vec<u8> {
    let mut step = step.clone();
    step["from"] = from.into();
    probe_with(version, &[("default = \"null\"", &format!("default = {:?}", step.to_string()))])
}

/// Returns the probe as another version, with replacements in its manifest.
pub fn probe_with(version: &str, changes: &[(&str, &str)]) -> Vec<u8> {
    let mut manifest = include_str!("../guests/examples/probe.toml").replace("0.1.0", version);
    for (old, new) in changes {
        assert!(manifest.contains(old), "the probe's manifest has {old}");
        manifest = manifest.replace(old, new);
    }
    with_manifest(&std::fs::read(super::PROBE).expect("the probe is built"), &manifest)
}

/// Returns a component with `count` more core instances of an empty module, in a nested component.
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
    // The nested component, and one instance of it, without arguments.
    let instance = [vec![1, 0], leb128(inner), vec![0]].concat();
    [component.to_vec(), section(4, &crowd), section(5, &instance)].concat()
}

/// The number of items of each kind in a component. Appended items are numbered from there.
#[derive(Default)]
struct Counts {
    modules: usize,
    core_instances: usize,
    core_functions: usize,
    core_memories: usize,
    instances: usize,
    functions: usize,
    /// The index of the instance of the imported interface `state`.
    state: Option<usize>,
}

impl Counts {
    fn of(component: &[u8]) -> Self {
        let (mut counts, mut depth) = (Self::default(), 0_usize);
        for payload in Parser::new(0).parse_all(component) {
            let payload = payload.expect("a component");
            match &payload {
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                    let is_module = matches!(payload, Payload::ModuleSection { .. });
                    counts.modules += usize::from(depth == 0 && is_module);
                    depth += 1;
                }
                Payload::End(_) => depth = depth.saturating_sub(1),
                _ if depth == 0 => counts.add(payload),
                _ => {}
            }
        }
        counts
    }

    fn add(&mut self, payload: Payload<'_>) {
        match payload {
            Payload::InstanceSection(all) => self.core_instances += all.count() as usize,
            Payload::ComponentInstanceSection(all) => self.instances += all.count() as usize,
            Payload::ComponentImportSection(all) => {
                for import in all.into_iter().map(|import| import.expect("an import")) {
                    match import.ty {
                        ComponentTypeRef::Instance(_) => {
                            if import.name.name.starts_with("dim:coordination/state@") {
                                self.state = Some(self.instances);
                            }
                            self.instances += 1;
                        }
                        ComponentTypeRef::Func(_) => self.functions += 1,
                        _ => {}
                    }
                }
            }
            Payload::ComponentAliasSection(all) => {
                for alias in all {
                    match alias.expect("an alias") {
                        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Instance, .. } => {
                            self.instances += 1;
                        }
                        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Func, .. } => {
                            self.functions += 1;
                        }
                        ComponentAlias::CoreInstanceExport { kind: ExternalKind::Func, .. } => {
                            self.core_functions += 1;
                        }
                        ComponentAlias::CoreInstanceExport { kind: ExternalKind::Memory, .. } => {
                            self.core_memories += 1;
                        }
                        _ => {}
                    }
                }
            }
            Payload::ComponentCanonicalSection(all) => {
                for function in all {
                    match function.expect("a function") {
                        CanonicalFunction::Lift { .. } => self.functions += 1,
                        _ => self.core_functions += 1,
                    }
                }
            }
            Payload::ComponentExportSection(all) => {
                for export in all {
                    match export.expect("an export").kind {
                        ComponentExternalKind::Instance => self.instances += 1,
                        ComponentExternalKind::Func => self.functions += 1,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

/// Returns a component with one more core module. Its `start` function sets the key `early` of the state during the
/// instantiation, and then traps.
pub fn with_early_effects(component: &[u8]) -> Vec<u8> {
    let counts = Counts::of(component);
    let memory = r#"(module (memory (export "m") 1) (data (i32.const 0) "earlytoo early")
        (func (export "r") (param i32 i32 i32 i32) (result i32) (i32.const 4096)))"#;
    let early = r#"(module (import "h" "set" (func $set (param i32 i32 i32 i32 i32)))
        (func $go (call $set (i32.const 0) (i32.const 5) (i32.const 5) (i32.const 9) (i32.const 2048)) unreachable)
        (start $go))"#;
    let module = |text: &str| section(1, &wat::parse_str(text).expect("it is a module"));
    let index = |index: usize| leb128(index);
    let name = |name: &str| [leb128(name.len()), name.as_bytes().to_vec()].concat();
    let state = index(counts.state.expect("the component imports its state"));
    // The instance of the memory, without arguments; then the aliases that lowering needs, and the lowered function.
    let with_memory = [vec![1, 0], index(counts.modules), vec![0]].concat();
    let core = index(counts.core_instances);
    let aliases = [
        vec![3],
        [vec![1, 0], state, name("set")].concat(),
        [vec![0, 2, 1], core.clone(), name("m")].concat(),
        [vec![0, 0, 1], core, name("r")].concat(),
    ]
    .concat();
    let options =
        [vec![3, 0, 3], index(counts.core_memories), vec![4], index(counts.core_functions)].concat();
    let lowered = [vec![1, 1, 0], index(counts.functions), options].concat();
    let set = index(counts.core_functions + 1);
    let instances = [
        vec![2, 1, 1],
        name("set"),
        vec![0],
        set,
        vec![0],
        index(counts.modules + 1),
        vec![1],
        name("h"),
        vec![0x12],
        index(counts.core_instances + 1),
    ]
    .concat();
    [
        component.to_vec(),
        module(memory),
        section(2, &with_memory),
        section(6, &aliases),
        section(8, &lowered),
        module(early),
        section(2, &instances),
    ]
    .concat()
}
