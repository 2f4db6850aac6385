//! Owns the host functions: the conversion of their arguments and results between the types of WIT and those of the
//! host. There is one file for each interface in `wit/`. `session` does the work.

pub mod ipns;
mod log;
mod pubsub;
mod state;
mod timers;
