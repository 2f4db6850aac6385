//! Builds the bundled plugins for WebAssembly and says where they are.

#[path = "build/components.rs"]
mod components;

use std::env;
use std::path::PathBuf;

const PLUGINS: [&str; 3] = ["job-tracker", "node-registry", "heartbeat-watchdog"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = &components::workspace();
    for source in ["plugins", "guest", "wit", "Cargo.lock", "Cargo.toml", "host/build.rs", "host/build"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let target = components::target_dir(&out);
    let mut cargo = components::cargo(workspace, &target);
    for plugin in PLUGINS {
        cargo.args(["--package", plugin]);
    }
    assert!(
        cargo.status().expect("cargo can be run").success(),
        "the bundled plugins do not build; if the target is missing: rustup target add {}",
        components::TARGET
    );
    for plugin in PLUGINS {
        let file = format!("{}.wasm", plugin.replace('-', "_"));
        let built = components::built(&target).join(&file);
        std::fs::copy(&built, out.join(&file))
            .unwrap_or_else(|error| panic!("cannot copy {}: {error}", built.display()));
    }
}
