//! Reliable topics: the protocol between the writers and the readers of a fleet.
//!
//! ```text
//! events ──► own_log ──► bundle ──► block ──► the network: a message and a block
//!                                                │
//!            actions ◄── reader ◄── bundle ◄── block
//!               │          ▲
//!               │          └── head: what the writer has published, and what others have received
//!               └── deliveries, requests to fetch blocks, heads to send, alarms
//! ```
//!
//! [`member::Member`] composes these. It has no I/O, no clock and no randomness: a driver passes bytes, results and the
//! time, and carries out the actions. The drivers are the host over Kubo, the host over the embedded bus, and the
//! simulator of the tests.
//!
//! The protocol promises:
//! - Each event that a writer has made durable is delivered once, or is part of a gap that names the writer and the
//!   range. Events are identified by topic, writer, incarnation and sequence.
//! - The events of a writer are delivered in the writer's order, over restarts of the writer and of the reader.
//! - Two different events under one identity, and two successors of one incarnation, are reported and never merged
//!   silently.

pub mod identity;
pub mod malformed;
pub mod time;
pub mod hybrid_clock;
mod compression;
pub mod block;
pub mod bundle;
pub mod head;
pub mod index;
pub mod membership;
pub mod own_log;
pub mod reader;
pub mod head_schedule;
pub mod action;
pub mod alarm;
pub mod member;
