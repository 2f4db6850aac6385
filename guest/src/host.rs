//! Selects the host functions: the WIT imports in a component, the [`fake`](crate::fake) host in a native build.

#[cfg(target_family = "wasm")]
pub use crate::bindings::dim::coordination::{ipns, log, pubsub, state, timers};
#[cfg(not(target_family = "wasm"))]
pub use crate::fake::functions::{ipns, log, pubsub, state, timers};
