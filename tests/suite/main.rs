//! The tests of the host, in one program. Where a test needs a daemon it says so and starts one.

mod agent;
mod backends;
mod calls;
mod cli;
mod client;
mod contract;
mod crash;
mod failures;
mod fleet;
mod hostile;
mod promises;
mod records;
mod replay;
mod retention;
mod traps;
