//! The test harness: hosts in the process, hosts as separate processes, Kubo daemons, and faults.

mod agent;
pub mod alone;
mod child;
mod clock;
pub mod component;
mod disk;
pub mod endurance;
pub mod fleet;
mod host;
pub mod javascript;
mod kubo;
mod link;
pub mod measurement;
mod program;
mod proxy;
pub mod python;
pub mod tier;
mod witness;

pub use agent::Agent;
pub use clock::{FastClock, SetClock};
pub use disk::{FailingDisk, SmallDisk, TearingDisk};
pub use host::{
    Setup, SupervisedHost, TOKEN, TestHost, downtime, eventually, eventually_within, script, soon, warm,
    with_token,
};
pub use kubo::Kubo;
pub use link::Link;
pub use program::{Program, begin_request};
pub use proxy::{Fault, FaultProxy};
pub use witness::{Witness, directly};

/// The component of the guest that counts messages in its state or memory.
pub const FORGETFUL: &str = env!("GUEST_FORGETFUL");

/// The component of the guest that runs scripts.
pub const PROBE: &str = env!("GUEST_PROBE");

/// The component of the guest that attacks its host.
pub const HOSTILE: &str = env!("GUEST_HOSTILE");

/// The component of the guest that stamps its version on each event.
pub const STAMPER: &str = env!("GUEST_STAMPER");

/// The component of the job tracker with another layout of its state.
pub const TRACKER_2: &str = env!("GUEST_TRACKER_2");

/// Returns the path of a file in `tests/`.
pub fn data(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Prints a notice, also from a test that succeeds. The test runner captures the output of `println!` and `eprintln!`.
fn say(words: &str) {
    use std::io::Write as _;
    // Without standard error the notice is dropped.
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// Returns a tool of another language. If it is missing this prints a notice and returns none, or panics if the
/// environment variable `variable` is 1.
fn or_loudly<T>(language: &str, variable: &str, had: Result<T, String>) -> Option<T> {
    match had {
        Ok(had) => Some(had),
        Err(why) => {
            must_be_there(variable, &why);
            say(&format!("\n!!! A TEST OF {language} IS SKIPPED: {why}\n"));
            None
        }
    }
}

/// Returns the target directory, in which files of the tests persist.
pub fn target_dir() -> &'static std::path::Path {
    std::path::Path::new(PROBE).ancestors().nth(4).expect("the target directory")
}

/// Panics if the environment variable `variable` requires the missing tool.
fn must_be_there(variable: &str, why: &str) {
    let required = std::env::var(variable).is_ok_and(|value| value == "1");
    assert!(!required, "{variable}=1, but it cannot be had: {why}");
}
