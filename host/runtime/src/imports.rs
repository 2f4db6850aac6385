//! Owns the list of interfaces that the host offers, and the explanation of an import that it does not offer.

use std::collections::BTreeSet;

use crate::contract;

use wasmparser::{ComponentType, InstanceTypeDeclaration, Parser, Payload};

/// The version of WASI that wasmtime offers.
const WASI: &str = "0.2.12";

/// The interfaces that the host offers, without their versions.
const OFFERED: [&str; 34] = [
    "dim:coordination/event",
    "dim:coordination/ipns",
    "dim:coordination/log",
    "dim:coordination/pubsub",
    "dim:coordination/state",
    "dim:coordination/time",
    "dim:coordination/timers",
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stderr",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stderr",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:filesystem/preopens",
    "wasi:filesystem/types",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
    "wasi:random/random",
    "wasi:sockets/instance-network",
    "wasi:sockets/ip-name-lookup",
    "wasi:sockets/network",
    "wasi:sockets/tcp",
    "wasi:sockets/tcp-create-socket",
    "wasi:sockets/udp",
    "wasi:sockets/udp-create-socket",
];

/// The offered interfaces with their versions, the newest version first.
fn offered() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    let versions = |interface: &str| -> &'static [&'static str] {
        if interface.starts_with("dim:") { &contract::VERSIONS } else { &[WASI] }
    };
    OFFERED.into_iter().map(move |interface| (interface, versions(interface)))
}

/// Explains the first import that the host does not offer: its name, its version, and the most similar offered
/// interface.
pub fn lacking<'a>(imports: impl IntoIterator<Item = &'a String>) -> Option<String> {
    imports.into_iter().find_map(|import| {
        let (interface, version) = import.split_once('@').unwrap_or((import, ""));
        match offered().find(|(offered, _)| *offered == interface) {
            Some((_, offered)) if offered.iter().any(|offered| is_compatible(version, offered)) => None,
            Some((_, offered)) => Some(format!(
                "it imports {interface} in version {version}, this host offers {}: build it with such a version, or use another dim",
                offered.join(" and ")
            )),
            None => {
                let distance = |offered: &str| strsim::levenshtein(offered, interface);
                let (nearest, offered) = offered().min_by_key(|(offered, _)| distance(offered))?;
                Some(format!(
                    "it imports {import}, which this host does not offer; the most similar is {nearest}@{}",
                    offered[0]
                ))
            }
        }
    })
}

/// The functions of WASI that wait, each with its interface. (A standard library polls its output, which never
/// waits.)
const WAITS: [(&str, &str); 2] = [
    ("subscribe-duration", "wasi:clocks/monotonic-clock"),
    ("subscribe-instant", "wasi:clocks/monotonic-clock"),
];

/// The functions by which a component could wait, from its imports. A call of one traps.
pub fn ways_to_wait(component: &[u8]) -> Vec<String> {
    let mut names = BTreeSet::new();
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(component).map_while(Result::ok) {
        match payload {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) if depth > 0 => depth -= 1,
            Payload::ComponentTypeSection(types) if depth == 0 => {
                for declared in types.into_iter().map_while(Result::ok) {
                    let ComponentType::Instance(declared) = declared else { continue };
                    names.extend(declared.iter().filter_map(|declared| match declared {
                        InstanceTypeDeclaration::Export { name, .. } => Some(name.name.to_owned()),
                        _ => None,
                    }));
                }
            }
            _ => {}
        }
    }
    let found = WAITS.iter().filter(|(function, _)| names.contains(*function));
    found.map(|(function, interface)| format!("{function} of {interface}")).collect()
}

/// Whether two versions of an interface are compatible, by the rules of semantic versions.
fn is_compatible(version: &str, offered: &str) -> bool {
    let significant = |version: &str| {
        let mut numbers = version.split(['.', '-', '+']);
        match (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default()) {
            ("0", minor) => format!("0.{minor}"),
            (major, _) => major.to_owned(),
        }
    };
    significant(version) == significant(offered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_lacks_is_told_with_the_nearest_that_it_has() {
        let told = |import: &str| lacking(&[import.to_owned()]);
        assert_eq!(told("dim:coordination/state@0.1.0"), None);
        assert_eq!(told("dim:coordination/state@0.2.0"), None);
        assert_eq!(told("wasi:cli/stdout@0.2.3"), None);
        let why = told("dim:coordination/states@0.1.0").unwrap();
        assert!(why.ends_with("the most similar is dim:coordination/state@0.2.0"), "{why}");
        let why = told("dim:coordination/state@0.9.0").unwrap();
        assert!(why.contains("in version 0.9.0, this host offers 0.2.0 and 0.1.0"), "{why}");
        assert!(told("wasi:http/outgoing-handler@0.2.0").is_some());
    }
}
