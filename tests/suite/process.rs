//! What the system allows a process of `dim`, and what it leaves to others.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use dim_tests::{PROBE, Program, soon};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dim-under-test");

/// Runs `dim` with at most so much address space, in KiB.
fn dim_within(kib: u64, args: &str) -> Output {
    let script = format!("ulimit -v {kib}; exec {PROGRAM} {args}");
    Command::new("sh").args(["-c", &script]).env("RUST_BACKTRACE", "0").output().unwrap()
}

#[test]
fn a_limit_of_the_address_space_makes_the_pool_smaller() {
    let limit = 64 << 20;
    let checked = dim_within(limit, &format!("plugin check {PROBE}"));
    assert!(checked.status.success(), "{checked:?}");
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let program = dir.path().join("dim");
    std::fs::write(&program, format!("#!/bin/sh\nulimit -v {limit}\nexec {PROGRAM} \"$@\"\n")).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, executable).unwrap();
    let host = Program::start(Path::new(&program), &state, &["--embedded"]);
    let plugins = host.json(&["plugin", "ls"]);
    let running = plugins.as_array().unwrap().iter().filter(|plugin| plugin["state"] == "running").count();
    assert_eq!(running, 3, "{plugins}");
    assert!(host.log().contains("ulimit -v"), "it is told: {}", host.log());
}

#[test]
fn an_address_space_that_is_too_small_is_named_with_what_to_set() {
    let state = tempfile::tempdir().unwrap();
    let run = format!("run --embedded --state-dir {}", state.path().join("state").display());
    for args in [run, format!("plugin check {PROBE}")] {
        let refused = dim_within(3 << 20, &args);
        let why = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && why.contains("ulimit -v"), "{args}: {why}");
        assert!(why.contains("limited to 3221225472 bytes"), "{args}: {why}");
    }
}

/// The niceness of a process, as Linux shows it.
fn niceness(pid: &str) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may hold anything but ends with the last parenthesis.
    stat.rsplit_once(')')?.1.split_whitespace().nth(16)?.parse().ok()
}

#[test]
#[cfg(target_os = "linux")]
fn compiling_leaves_the_processor_to_the_host() {
    let mut compiler = Command::new(PROGRAM);
    compiler.args(["compile-component", "60", "1000000000"]).stdin(Stdio::piped());
    let mut compiler = compiler.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let own = niceness("self").unwrap();
    // It waits for the component.
    soon(|| niceness(&compiler.id().to_string()) == Some((own + 5).min(19)));
    compiler.kill().unwrap();
    compiler.wait().unwrap();
}
