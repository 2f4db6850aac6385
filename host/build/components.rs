// How the components of this workspace are built: by a cargo of their own, in a target directory of
// their own, so that neither their profile nor their target concerns the host's build.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TARGET: &str = "wasm32-wasip2";

/// The workspace that the package lies in. Asked for when it runs: a checkout may be moved after its
/// build script was built.
pub fn workspace() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    package.parent().expect("the package lies in the workspace").to_owned()
}

/// A build of some of the workspace's packages; the caller says which.
pub fn cargo(workspace: &Path, target_dir: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.current_dir(workspace).args(["build", "--locked", "--profile", "plugin", "--target", TARGET]);
    cargo.arg("--target-dir").arg(target_dir);
    // What concerns the host's own build must not reach into this one.
    for (name, _) in env::vars_os().filter(|(name, _)| concerns_the_host(&name.to_string_lossy())) {
        cargo.env_remove(name);
    }
    // The same source gives the same component on every machine: panics name their place in it.
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut remaps = vec![remap(workspace, "dim")];
    // One directory for each registry; which one a crate came from does not matter.
    for registry in std::fs::read_dir(cargo_home().join("registry/src")).into_iter().flatten().flatten() {
        remaps.push(remap(&registry.path(), "crates"));
    }
    remaps.sort();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", remaps.join("\x1f"));
    cargo
}

/// Where a build with target directory `target_dir` leaves its components.
pub fn built(target_dir: &Path) -> PathBuf {
    target_dir.join(TARGET).join("plugin")
}

/// The directory for the components, shared by all profiles of the host.
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
