//! Builds the bundled plugins for WebAssembly and says where they are, and lists what new plugins are made of.

#[path = "build/components.rs"]
mod components;

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const PLUGINS: [&str; 3] = ["job-tracker", "node-registry", "heartbeat-watchdog"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = &components::workspace();
    for source in ["plugins", "guest", "wit", "Cargo.lock", "Cargo.toml", "host/build.rs", "host/build"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    std::fs::write(out.join("sdk.rs"), sdk(workspace)).expect("the output directory can be written to");
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

/// The files that new plugins get, by their names there: the SDKs and the WIT.
fn sdk(workspace: &Path) -> String {
    let mut list = String::new();
    for (name, dir, files) in [
        ("RUST_SDK", "guest", files_below(&workspace.join("guest/src"))),
        ("PYTHON_SDK", "sdk/python", files_below(&workspace.join("sdk/python"))),
        ("JAVASCRIPT_SDK", "sdk/javascript", files_below(&workspace.join("sdk/javascript"))),
        ("WIT", "", files_below(&workspace.join("wit"))),
    ] {
        let root = workspace.join(dir);
        let _ = writeln!(list, "const {name}: &[(&str, &str)] = &[");
        for file in files {
            let path = file.strip_prefix(&root).expect("it lies below");
            let _ = writeln!(list, "    ({path:?}, include_str!({file:?})),");
        }
        list.push_str("];\n");
    }
    list
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", dir.display());
    let listed =
        std::fs::read_dir(dir).unwrap_or_else(|error| panic!("cannot read {}: {error}", dir.display()));
    let mut files = Vec::new();
    for file in listed {
        let path = file.expect("a file").path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() && name != "__pycache__" {
            files.extend(files_below(&path));
        } else if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    files
}
