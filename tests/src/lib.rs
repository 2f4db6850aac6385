//! What the tests stand on: hosts in the process, hosts as programs, and Kubo daemons.

mod agent;
pub mod alone;
mod child;
mod clock;
pub mod component;
mod disk;
pub mod endurance;
mod host;
pub mod javascript;
mod kubo;
mod link;
mod program;
mod proxy;
pub mod python;
pub mod tier;
mod witness;

pub use agent::Agent;
pub use clock::SetClock;
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

/// The component of the guest that forgets what it keeps in memory.
pub const FORGETFUL: &str = env!("GUEST_FORGETFUL");

/// The component of the guest that does what it is told.
pub const PROBE: &str = env!("GUEST_PROBE");

/// The component of the guest that attacks its host.
pub const HOSTILE: &str = env!("GUEST_HOSTILE");

/// The component of the guest that stamps its version on each event.
pub const STAMPER: &str = env!("GUEST_STAMPER");

/// The component of the job tracker with another layout of its state.
pub const TRACKER_2: &str = env!("GUEST_TRACKER_2");

/// The path of a file that comes with the tests.
pub fn data(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Says something to whoever runs the tests, also from one that goes well: the macros' output of those
/// is kept back.
fn say(words: &str) {
    use std::io::Write as _;
    // Without a standard error there is no one to tell.
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// What a test needs of another language; none, and a loud word, where it cannot be had, and a failure where the
/// environment has `variable` set to 1.
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

/// Where what the tests have made lasts.
pub fn target_dir() -> &'static std::path::Path {
    std::path::Path::new(PROBE).ancestors().nth(4).expect("the target directory")
}

/// Fails where the environment asks for what cannot be had.
fn must_be_there(variable: &str, why: &str) {
    let required = std::env::var(variable).is_ok_and(|value| value == "1");
    assert!(!required, "{variable}=1, but it cannot be had: {why}");
}
