//! The SDK for plugins of `dim`: sandboxed WebAssembly components that coordinate a fleet.
//!
//! A plugin is a type that implements [`Plugin`] and is exported with [`export_plugin!`]. The host
//! calls it with one entry of its log at a time. The effects of a call through [`state`], [`pubsub`],
//! [`ipns`] and [`timers`] commit together with the cursor past that entry, or not at all. The
//! memory of a plugin is a cache.
//!
//! A complete plugin that publishes a message when a node has sent no heartbeat for a minute:
//!
//! ```
//! use std::time::Duration;
//!
//! use dim_guest::state::Map;
//! use dim_guest::time::Time;
//! use dim_guest::timers::Timers;
//! use dim_guest::{Event, Failure, Plugin, Refusal, call, json, pubsub};
//! use serde::{Deserialize, Serialize};
//!
//! /// The time of the last heartbeat of each node. Data that must survive a crash belongs in the state.
//! const NODES: Map<str, Time> = Map::new("node/");
//!
//! /// Durable timers, in log time.
//! const SILENCE: Timers<str> = Timers::new("silence/");
//!
//! #[derive(Deserialize)]
//! struct Config {
//!     status_topic: String,
//! }
//!
//! #[derive(Deserialize)]
//! struct Heartbeat {
//!     node_id: String,
//! }
//!
//! #[derive(Serialize)]
//! struct Silent<'a> {
//!     node_id: &'a str,
//! }
//!
//! #[derive(Deserialize)]
//! #[serde(rename_all = "kebab-case")]
//! enum Command {
//!     Forget { node_id: String },
//! }
//!
//! struct Watch {
//!     config: Config,
//! }
//!
//! impl Plugin for Watch {
//!     type Config = Config;
//!
//!     fn start(config: Config, _: Option<u32>) -> Result<Self, String> {
//!         Ok(Watch { config })
//!     }
//!
//!     fn handle(&mut self, event: Event) -> Result<(), Failure> {
//!         match event {
//!             Event::Message(message) => {
//!                 let Heartbeat { node_id } = message.json()?;
//!                 NODES.set(&node_id, &Time::now())?;
//!                 SILENCE.set_in(&node_id, Duration::from_secs(60))?;
//!             }
//!             Event::Timer(timer) => {
//!                 if let Some(node_id) = SILENCE.fired(&timer) {
//!                     pubsub::publish_json(&self.config.status_topic, &Silent { node_id: &node_id })?;
//!                 }
//!             }
//!             Event::NameChanged(_) | Event::Gap(_) => {}
//!         }
//!         Ok(())
//!     }
//!
//!     fn command(&mut self, method: &str, body: &str) -> Result<String, Refusal> {
//!         let Command::Forget { node_id } = call::read(method, body)?;
//!         NODES.delete(&node_id)?;
//!         SILENCE.clear(&node_id)?;
//!         json::write(&node_id)
//!     }
//!
//!     fn query(&self, method: &str, _: &str) -> Result<String, Refusal> {
//!         match method {
//!             "nodes" => json::write(&NODES.iter(None).collect::<Result<Vec<_>, _>>()?),
//!             _ => Err(Refusal::UnknownMethod),
//!         }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A native build uses a fake host.
//! let host = dim_guest::fake::Host::new();
//! let mut watch: Watch = host.start(r#"{"status_topic":"status"}"#, 1)?;
//! let message = dim_guest::Message {
//!     topic: "beats".into(),
//!     data: br#"{"node_id":"n1"}"#.to_vec(),
//!     origin: dim_guest::Origin::Host,
//! };
//! host.handle(&mut watch, Event::Message(message)).expect("it is a heartbeat");
//! host.pass(&mut watch, Duration::from_secs(61)).expect("the timer fires");
//! assert_eq!(host.take_published()[0].data, br#"{"node_id":"n1"}"#);
//! # Ok(())
//! # }
//! ```
//!
//! A component also needs `export_plugin!(Watch, manifest: "../plugin.toml")`.

mod bindings;
mod failure;
mod host;
mod plugin;

pub mod call;
pub mod document;
#[cfg(not(target_family = "wasm"))]
pub mod fake;
pub mod foreign;
pub mod heartbeat;
pub mod id;
pub mod ipns;
pub mod json;
pub mod list;
pub mod log;
pub mod member;
pub mod pubsub;
pub mod speaker;
pub mod state;
pub mod time;
pub mod timers;
pub mod verbatim;

pub use bindings::dim::coordination::event::{
    DueTimer, Event, Failure, Gap, MemberEvent, Message, MissingEvents, Origin, Refusal,
};
pub use failure::OrFail;
pub use plugin::{NoConfig, Plugin};

#[doc(hidden)]
pub mod macro_support {
    pub use crate::bindings::*;
    pub use crate::plugin::Instance;
}
