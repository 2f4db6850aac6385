//! What the tests stand on: hosts in the process, hosts as programs, and Kubo daemons.

mod child;
mod disk;
mod host;
mod kubo;
mod program;
pub mod python;

pub use disk::{FailingDisk, TearingDisk};
pub use host::{Setup, SupervisedHost, TestHost, downtime, eventually, script, warm};
pub use kubo::Kubo;
pub use program::Program;

/// The component of the guest that does what it is told.
pub const PROBE: &str = env!("GUEST_PROBE");

/// The path of a file that comes with the tests.
pub fn data(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
