//! Builds the bundled plugins for WebAssembly and compiles them for this machine, so that the first start of a host
//! does not wait for the compiler.

#[path = "build/components.rs"]
mod components;
#[path = "../runtime/src/compile_settings.rs"]
mod compile_settings;

use std::env;
use std::path::PathBuf;

use wasmtime::{Engine, InstanceAllocationStrategy};

/// The level of compression: compiled forms are large, and are compressed once in a build.
const LEVEL: i32 = 19;

const PLUGINS: [&str; 3] = ["job-tracker", "node-registry", "heartbeat-watchdog"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = &components::workspace();
    for source in [
        "plugins",
        "guest",
        "wit",
        "Cargo.lock",
        "Cargo.toml",
        "host/bundled/build.rs",
        "host/bundled/build",
        "host/runtime/src/compile_settings.rs",
    ] {
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
    let config = compile_settings::config(InstanceAllocationStrategy::OnDemand);
    let engine = Engine::new(&config).expect("wasmtime runs on this machine");
    for plugin in PLUGINS {
        let file = out.join(plugin.replace('-', "_"));
        let built = components::built(&target).join(file.with_extension("wasm").file_name().expect("a file"));
        let component =
            std::fs::read(&built).unwrap_or_else(|error| panic!("cannot read {}: {error}", built.display()));
        let compiled = engine.precompile_component(&component).expect("the bundled plugins compile");
        let compressed = zstd::bulk::compress(&compiled, LEVEL).expect("the memory of a context");
        for (extension, bytes) in [("wasm", component), ("cwasm.zst", compressed)] {
            std::fs::write(file.with_extension(extension), bytes)
                .expect("the output directory can be written to");
        }
    }
}
