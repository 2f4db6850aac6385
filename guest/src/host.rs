//! The functions of the host: those of WIT in a component, those of [`fake`](crate::fake) in a native build.

#[cfg(target_family = "wasm")]
pub use crate::bindings::dim::coordination::{ipns, log, pubsub, state, timers};
#[cfg(not(target_family = "wasm"))]
pub use crate::fake::functions::{ipns, log, pubsub, state, timers};
