// Builds the components of this workspace with a separate cargo and target directory, so that profile and target are
// independent of the build of the host.

#[path = "workspace.rs"]
mod workspace;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use workspace::workspace;

pub const TARGET: &str = "wasm32-wasip2";

/// Returns a cargo command that builds for WebAssembly; the caller adds the packages.
pub fn cargo(workspace: &Path, target_dir: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.current_dir(workspace).args(["build", "--locked", "--profile", "plugin", "--target", TARGET]);
    cargo.arg("--target-dir").arg(target_dir);
    // Settings of the host's build must not affect this one.
    for (name, _) in env::vars_os().filter(|(name, _)| concerns_the_host(&name.to_string_lossy())) {
        cargo.env_remove(name);
    }
    // The same source must give the same component on every machine, and panic messages contain paths.
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut remaps = vec![remap(workspace, "dim")];
    // The name of a registry's directory must not matter.
    for registry in std::fs::read_dir(cargo_home().join("registry/src")).into_iter().flatten().flatten() {
        remaps.push(remap(&registry.path(), "crates"));
    }
    remaps.sort();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", remaps.join("\x1f"));
    cargo
}

/// Returns the directory of the built components below the target directory `target_dir`.
pub fn built(target_dir: &Path) -> PathBuf {
    target_dir.join(TARGET).join("plugin")
}

/// Returns the target directory of the components, which all profiles of the host share.
pub fn target_dir(out: &Path) -> PathBuf {
    // OUT_DIR is TARGET_DIR/PROFILE/build/PACKAGE-HASH/out.
    out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("plugins")
}

fn concerns_the_host(name: &str) -> bool {
    let is_machines =
        ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&name) || name.starts_with("CARGO_REGISTR");
    (name.starts_with("CARGO_") && !is_machines)
        || ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"].contains(&name)
}

fn cargo_home() -> PathBuf {
    let home = || env::home_dir().expect("a home directory, or CARGO_HOME").join(".cargo");
    env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from)
}
