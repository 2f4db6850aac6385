//! The plugin runtime. It owns the wasmtime engine, the sandbox, the host functions and one actor for each
//! plugin, which handles one entry at a time.
//!
//! It receives entries of the event log (`dim-store`) and returns batches of effects to the commit. A host
//! function answers from local state and never waits. No effect takes place before the commit.
//!
//! Only `bindings.rs` contains generated bindings.

mod plugin_actor;
mod bindings;
mod compiled_cache;
mod compile_settings;
mod contract;
pub mod compiler;
mod engine;
mod exception;
mod imports;
mod instance;
mod instances;
mod plugin_log;
mod manifest;
mod pool;
mod runnable;
mod session;
pub mod signing;
mod wasi;

// The conversions between the types of WIT and those of the host.
mod event_conversion;
mod host_functions;

pub use compiled_cache::Cache;
pub use compiler::{Allotment, Compiler};
pub use contract::version_of;
pub use engine::{Engine, EngineError, Prepared, judge};
pub use imports::{lacking, ways_to_wait};
pub use manifest::{
    Inspection, MAX_COMPONENT, Manifest, ManifestError, Resolved, inspect, leb128, read, section,
    with_sections,
};
pub use plugin_actor::{
    Actor, ActorError, Done, EffectCounts, Fallback, Handle, Order, OtherReach, Parts, PluginStatus,
    ProbationParts, Reached, Rollback, Started, Step, Successor, rehearse,
};
pub use plugin_log::{Line, Lines};
pub use pool::Capacity;
pub use runnable::Runnable;
pub use session::{Mode, Session, SessionParts, check_key};
pub use wasi::Numbers;
