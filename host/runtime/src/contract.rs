//! Owns the versions of the contract: the one that a component was built against, and the exports of all of them behind
//! one interface. It receives events of the host and returns failures and refusals as types of the newest version.

use dim_model::entry::Event;
use wasmtime::component::{HasSelf, InstancePre, Linker};

use crate::bindings::v0_2::dim::coordination::event::{Failure, Refusal};
use crate::bindings::{v0_1, v0_2};
use crate::event_conversion::{event_v0_1, event_v0_2};
use crate::instance::Guest;

/// The versions of the contract that the host serves, the newest first.
pub const VERSIONS: [&str; 2] = ["0.2.0", "0.1.0"];

/// The prefix of the interfaces of the contract.
const PACKAGE: &str = "dim:coordination/";

/// Adds the imports of all versions to a linker.
pub fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    v0_1::Plugin::add_to_linker::<_, HasSelf<_>>(linker, |guest| guest)?;
    v0_2::Plugin::add_to_linker::<_, HasSelf<_>>(linker, |guest| guest)
}

/// The version of the contract of a component, from its imports. Each plugin imports the types of events.
pub fn version_of<'a>(imports: impl IntoIterator<Item = &'a String>) -> &'static str {
    let mut imports = imports.into_iter().filter_map(|import| import.strip_prefix(PACKAGE)?.split_once('@'));
    let is_earlier = imports.any(|(_, version)| version.starts_with("0.1."));
    VERSIONS[usize::from(is_earlier)]
}

/// A component whose exports are known.
#[derive(Clone)]
pub enum Linked {
    /// Contract 0.1.0.
    V0_1(v0_1::PluginPre<Guest>),
    /// Contract 0.2.0.
    V0_2(v0_2::PluginPre<Guest>),
}

/// The exports of an instance.
pub enum Exports {
    /// Contract 0.1.0.
    V0_1(v0_1::Plugin),
    /// Contract 0.2.0.
    V0_2(v0_2::Plugin),
}

/// The store of an instance.
type Store = wasmtime::Store<Guest>;

impl Linked {
    /// Finds the exports of a component of a version of the contract.
    pub fn new(pre: InstancePre<Guest>, version: &str) -> wasmtime::Result<Self> {
        if version == VERSIONS[1] {
            v0_1::PluginPre::new(pre).map(Self::V0_1)
        } else {
            v0_2::PluginPre::new(pre).map(Self::V0_2)
        }
    }

    /// The engine that has compiled the component.
    pub fn engine(&self) -> &wasmtime::Engine {
        match self {
            Self::V0_1(pre) => pre.engine(),
            Self::V0_2(pre) => pre.engine(),
        }
    }

    /// Makes an instance.
    pub fn instantiate(&self, store: &mut Store) -> wasmtime::Result<Exports> {
        match self {
            Self::V0_1(pre) => pre.instantiate(store).map(Exports::V0_1),
            Self::V0_2(pre) => pre.instantiate(store).map(Exports::V0_2),
        }
    }
}

impl Exports {
    /// Calls `start`.
    pub fn start(
        &self,
        store: &mut Store,
        config: &str,
        from: Option<u32>,
    ) -> wasmtime::Result<Result<(), String>> {
        match self {
            Self::V0_1(plugin) => plugin.call_start(store, config, from),
            Self::V0_2(plugin) => plugin.call_start(store, config, from),
        }
    }

    /// Calls `handle`.
    pub fn handle(&self, store: &mut Store, event: &Event) -> wasmtime::Result<Result<(), Failure>> {
        match self {
            Self::V0_1(plugin) => Ok(plugin.call_handle(store, &event_v0_1(event))?.map_err(Failure::from)),
            Self::V0_2(plugin) => plugin.call_handle(store, &event_v0_2(event)),
        }
    }

    /// Calls `command`.
    pub fn command(
        &self,
        store: &mut Store,
        method: &str,
        body: &str,
    ) -> wasmtime::Result<Result<String, Refusal>> {
        match self {
            Self::V0_1(plugin) => Ok(plugin.call_command(store, method, body)?.map_err(Refusal::from)),
            Self::V0_2(plugin) => plugin.call_command(store, method, body),
        }
    }

    /// Calls `query`.
    pub fn query(
        &self,
        store: &mut Store,
        method: &str,
        body: &str,
    ) -> wasmtime::Result<Result<String, Refusal>> {
        match self {
            Self::V0_1(plugin) => Ok(plugin.call_query(store, method, body)?.map_err(Refusal::from)),
            Self::V0_2(plugin) => plugin.call_query(store, method, body),
        }
    }
}

impl From<v0_1::Failure> for Failure {
    fn from(failure: v0_1::Failure) -> Self {
        match failure {
            v0_1::Failure::Reject(why) => Self::Reject(why),
            v0_1::Failure::Retry(after) => Self::Retry(after),
        }
    }
}

impl From<v0_1::Refusal> for Refusal {
    fn from(refusal: v0_1::Refusal) -> Self {
        match refusal {
            v0_1::Refusal::UnknownMethod => Self::UnknownMethod,
            v0_1::Refusal::Invalid(why) => Self::Invalid(why),
            v0_1::Refusal::NotFound(what) => Self::NotFound(what),
            v0_1::Refusal::Conflict(why) => Self::Conflict(why),
            v0_1::Refusal::Other(why) => Self::Other(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_imports_of_a_component_tell_its_contract() {
        let version =
            |imports: &[&str]| version_of(&imports.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(version(&["wasi:io/poll@0.2.0", "dim:coordination/event@0.1.0"]), "0.1.0");
        assert_eq!(version(&["wasi:io/poll@0.1.0", "dim:coordination/event@0.2.0"]), "0.2.0");
        assert_eq!(version(&[]), "0.2.0");
    }
}
