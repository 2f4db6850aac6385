//! Owns the host functions: the conversion of their arguments and results between the types of WIT and those of the
//! host. There is one file for each interface in `wit/`, which implements it for each version of the contract. `session`
//! does the work.

mod ipns;
mod log;
mod pubsub;
mod state;
mod timers;
