//! Builds the test guests for WebAssembly and passes their paths to the tests.

#[path = "../host/bundled/build/components.rs"]
mod components;

use std::env;
use std::path::PathBuf;

const GUESTS: [&str; 5] = ["forgetful", "hostile", "probe", "stamper", "tracker_2"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = &components::workspace();
    for source in [
        "tests/build.rs",
        "host/bundled/build",
        "tests/guests",
        "plugins",
        "guest",
        "wit",
        "Cargo.lock",
        "Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let target = components::target_dir(&out);
    let mut cargo = components::cargo(workspace, &target);
    cargo.args(["--package", "dim-test-guests", "--examples"]);
    assert!(cargo.status().expect("cargo can be run").success(), "the guests do not build");
    for guest in GUESTS {
        let built = components::built(&target).join("examples").join(format!("{guest}.wasm"));
        println!("cargo::rustc-env=GUEST_{}={}", guest.to_uppercase(), built.display());
    }
}
