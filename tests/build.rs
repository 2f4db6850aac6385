//! Builds the guests for WebAssembly, in a target directory of their own, and says where they are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const GUESTS: [&str; 1] = ["probe"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = tests.parent().expect("the tests lie in the workspace");
    for source in ["tests/guests", "guest", "wit", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("plugins");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.current_dir(workspace).args([
        "build",
        "--locked",
        "--profile",
        "plugin",
        "--target",
        "wasm32-wasip2",
    ]);
    cargo.args(["--package", "dim-test-guests", "--examples", "--target-dir"]).arg(&target);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let kept =
            ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&text.as_ref()) || text.starts_with("CARGO_REGISTR");
        let concerns_host = text.starts_with("CARGO_") && !kept;
        if concerns_host || ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"].contains(&text.as_ref())
        {
            cargo.env_remove(&name);
        }
    }
    assert!(cargo.status().expect("cargo can be run").success(), "the guests do not build");
    for guest in GUESTS {
        let built = target.join("wasm32-wasip2/plugin/examples").join(format!("{guest}.wasm"));
        println!("cargo::rustc-env=GUEST_{}={}", guest.to_uppercase(), built.display());
    }
}
