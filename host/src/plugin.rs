//! Owns plugins: sandboxed components, each an actor that handles one entry at a time.
//!
//! It receives entries from the log and hands batches of effects to the commit. A call never
//! waits; nothing that a plugin asks for has happened before the commit.

mod actor;
mod bindings;
mod cache;
pub mod compiler;
mod effects;
mod engine;
mod exception;
mod grants;
mod imports;
mod instance;
mod instances;
mod limits;
mod lines;
mod manifest;
pub mod mark;
mod pool;
mod probation;
pub mod roster;
mod runnable;
mod session;
mod wasi;
mod world;

// The host functions and the words of the exports, one file for each interface of `wit/`.
mod event;
mod ipns;
mod log;
mod pubsub;
mod state;
mod timers;

pub use actor::{
    Actor, ActorError, Done, EffectCounts, Fallback, Handle, Handover, Order, OtherReach, Parts,
    PluginStatus, Started, Step, Successor, TakeBack, TakenOver, WayBack, rehearse,
};
pub use cache::Cache;
pub use compiler::{Allotment, Compiler};
pub use effects::{Batch, Effects, PendingReply, Reply, ReplyError, Timers};
pub use engine::{Engine, EngineError, Prepared, judge};
pub use grants::{Grants, NameOrKey, Reach, TopicPattern};
pub use imports::{lacking, ways_to_wait};
pub use limits::{
    DOCUMENT_BYTES, KEY_BYTES, LIMITS, LimitPolicy, Limits, MESSAGE_BYTES, REASON_BYTES, SomeLimits,
};
pub use lines::{Line, Lines};
pub use manifest::{
    Inspection, MAX_COMPONENT, Manifest, ManifestError, Resolved, inspect, leb128, read, section,
    with_sections,
};
pub use pool::Capacity;
pub use probation::{Probation, Rates, Rules, Verdict};
pub use runnable::Runnable;
pub use session::{Mode, Session, SessionParts, check_key};
pub use wasi::Numbers;
pub use world::{Change, Void, World};
