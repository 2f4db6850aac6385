//! The tests of the host, in one program. Where a test needs a daemon it says so and starts one.

mod agent;
mod backends;
mod backup;
mod calls;
mod cli;
mod client;
mod clock;
mod contract;
mod crash;
mod disk;
mod failures;
mod faults;
mod fleet;
mod formats;
mod hostile;
mod migration;
mod openapi;
mod plugins;
mod promises;
mod records;
mod replacement;
mod replay;
mod retention;
mod seen;
mod takeback;
mod traps;
