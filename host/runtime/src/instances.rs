//! Owns the count of instances that a component makes. A few hundred bytes of nested components can request
//! billions of instances, which a compiler would process one by one.

use wasmparser::{
    BinaryReaderError, ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind,
    ComponentTypeRef, Instance, Parser, Payload,
};

/// Most instances of modules and components together that a component may make. The engine also limits the
/// instances of modules to 100, which it checks later.
pub const MOST: u64 = 1_000;

/// The counts of a component during parsing.
#[derive(Default)]
struct Level {
    /// The number of instances that an instance of each component in its index space makes.
    components: Vec<u64>,
    /// The number of instances that the component itself makes.
    made: u64,
}

/// An enclosing module or component during parsing.
enum Open {
    Module,
    Component(Level),
}

/// Counts the instances that an instance of `component` makes, without itself. If there are too many, the result is
/// more than [`MOST`].
pub fn count(component: &[u8]) -> Result<u64, BinaryReaderError> {
    let mut open = vec![Open::Component(Level::default())];
    let mut largest = 0;
    for payload in Parser::new(0).parse_all(component) {
        let payload = payload?;
        match &payload {
            Payload::ModuleSection { .. } => open.push(Open::Module),
            Payload::ComponentSection { .. } => open.push(Open::Component(Level::default())),
            Payload::End(_) if open.len() > 1 => {
                if let Some(Open::Component(inner)) = open.pop() {
                    let made = inner.made;
                    largest = largest.max(made);
                    if let Some(Open::Component(outer)) = open.last_mut() {
                        outer.components.push(made);
                    }
                }
            }
            Payload::ComponentAliasSection(aliases) => {
                for alias in aliases.clone() {
                    let made = match alias? {
                        ComponentAlias::Outer { kind: ComponentOuterAliasKind::Component, count, index } => {
                            outer(&open, count, index)
                        }
                        // A component that an instance exports was declared before.
                        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Component, .. } => {
                            largest
                        }
                        _ => continue,
                    };
                    level(&mut open).components.push(made);
                }
            }
            Payload::ComponentImportSection(imports) => {
                for import in imports.clone() {
                    if matches!(import?.ty, ComponentTypeRef::Component(_)) {
                        level(&mut open).components.push(largest);
                    }
                }
            }
            Payload::ComponentExportSection(exports) => {
                for export in exports.clone() {
                    let export = export?;
                    if export.kind == ComponentExternalKind::Component {
                        let made = outer(&open, 0, export.index);
                        level(&mut open).components.push(made);
                    }
                }
            }
            Payload::ComponentInstanceSection(instances) => {
                for instance in instances.clone() {
                    if let ComponentInstance::Instantiate { component_index, .. } = instance? {
                        let made = outer(&open, 0, component_index);
                        let level = level(&mut open);
                        level.made = level.made.saturating_add(made).saturating_add(1);
                    }
                }
            }
            Payload::InstanceSection(instances) => {
                for instance in instances.clone() {
                    if let Instance::Instantiate { .. } = instance? {
                        let level = level(&mut open);
                        level.made = level.made.saturating_add(1);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(level(&mut open).made)
}

/// The innermost open component.
fn level(open: &mut [Open]) -> &mut Level {
    let mut levels = open.iter_mut().rev();
    let level = levels.find_map(|open| if let Open::Component(level) = open { Some(level) } else { None });
    level.expect("the outermost is one")
}

/// The number of instances that an instance of the component `index` makes, in the component `count` levels
/// further out. The validation refuses an index that does not exist.
fn outer(open: &[Open], count: u32, index: u32) -> u64 {
    let mut levels = open
        .iter()
        .rev()
        .filter_map(|open| if let Open::Component(level) = open { Some(level) } else { None });
    let level = levels.nth(count as usize);
    level.and_then(|level| level.components.get(index as usize)).copied().unwrap_or(0)
}
