//! The SDK for plugins of `dim`: sandboxed WebAssembly components that coordinate a fleet.
//!
//! A plugin is a type that implements [`Plugin`] and is exported with [`export_plugin!`]. The host
//! calls it with one entry of its log at a time. Whatever the call asks for through [`state`],
//! [`pubsub`], [`ipns`] and [`timers`] becomes real together with the cursor past that entry, or
//! not at all; a plugin's own memory is a cache.
//!
//! ```
//! use dim_guest::{Event, Failure, Plugin, state};
//!
//! struct Counter;
//!
//! impl Plugin for Counter {
//!     type Config = dim_guest::NoConfig;
//!
//!     fn start(_: Self::Config, _: Option<u32>) -> Result<Self, String> {
//!         Ok(Counter)
//!     }
//!
//!     fn handle(&mut self, event: Event) -> Result<(), Failure> {
//!         if let Event::Message(message) = event {
//!             let seen: u64 = state::get_json(message.topic.as_bytes())?.unwrap_or(0);
//!             state::set_json(message.topic.as_bytes(), &(seen + 1))?;
//!         }
//!         Ok(())
//!     }
//! }
//! ```
//!
//! and, in the file that ends up in the component, `export_plugin!(Counter, manifest: "../plugin.toml")`.
//! In a native build [`fake`] takes the place of the host.

mod bindings;
mod host;
mod plugin;

pub mod document;
#[cfg(not(target_family = "wasm"))]
pub mod fake;
pub mod id;
pub mod ipns;
pub mod json;
pub mod list;
pub mod log;
pub mod pubsub;
pub mod speaker;
pub mod state;
pub mod time;
pub mod timers;

pub use bindings::dim::coordination::event::{DueTimer, Event, Failure, Gap, Message, Origin, Refusal};
pub use plugin::{NoConfig, Plugin};

#[doc(hidden)]
pub mod macro_support {
    pub use crate::bindings::*;
    pub use crate::plugin::Instance;
}
