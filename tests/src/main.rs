//! The program under test. Its hosts and agents measure time by a clock that runs `DIM_TEST_CLOCK_RATE` times as fast as
//! the machine's, if that is set.

use std::sync::Arc;

use dim_tests::FastClock;

fn main() -> std::process::ExitCode {
    // `tests/runner` sets it for the test harness. What the program builds must not see it: build scripts look at it.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::remove_var("RUSTC_BOOTSTRAP") };
    match std::env::var("DIM_TEST_CLOCK_RATE") {
        Ok(rate) => dim::main_by(Arc::new(FastClock::new(rate.parse().expect("a whole number")))),
        Err(_) => dim::main(),
    }
}
