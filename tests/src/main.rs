//! The program under test.

fn main() -> std::process::ExitCode {
    // `tests/runner` sets it for the test harness. What the program builds must not see it: build scripts look at it.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::remove_var("RUSTC_BOOTSTRAP") };
    dim::main()
}
