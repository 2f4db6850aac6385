//! Builds the bundled plugins for WebAssembly, in a target directory of their own, and says where
//! they are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const PLUGINS: [&str; 3] = ["job-tracker", "node-registry", "heartbeat-watchdog"];

const TARGET: &str = "wasm32-wasip2";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the host lies in the workspace");
    for source in ["plugins", "guest", "wit", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    // OUT_DIR is TARGET_DIR/PROFILE/build/dim-HASH/out: all profiles share the plugins.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("plugins");
    build(workspace, &target);
    for plugin in PLUGINS {
        let file = format!("{}.wasm", plugin.replace('-', "_"));
        let built = target.join(TARGET).join("plugin").join(&file);
        std::fs::copy(&built, out.join(&file))
            .unwrap_or_else(|error| panic!("cannot copy {}: {error}", built.display()));
    }
}

fn build(workspace: &Path, target: &Path) {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.current_dir(workspace).args(["build", "--locked", "--profile", "plugin", "--target", TARGET]);
    cargo.arg("--target-dir").arg(target);
    for plugin in PLUGINS {
        cargo.args(["--package", plugin]);
    }
    // What concerns the host's own build must not reach into this one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let concerns_host = text.starts_with("CARGO_")
            && text != "CARGO_HOME"
            && text != "CARGO_NET_OFFLINE"
            && !text.starts_with("CARGO_REGISTR");
        if concerns_host
            || text == "RUSTFLAGS"
            || text == "RUSTC_WRAPPER"
            || text == "RUSTC_WORKSPACE_WRAPPER"
        {
            cargo.env_remove(&name);
        }
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(
        status.success(),
        "the bundled plugins do not build; if the target is missing: rustup target add {TARGET}"
    );
}
