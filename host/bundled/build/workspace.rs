// Finds the workspace, for build scripts.

use std::env;
use std::path::PathBuf;

/// Returns the workspace of the package. The environment is read at run time, because a checkout can be moved after
/// its build script was built.
pub fn workspace() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let mut above = package.ancestors();
    above.find(|dir| dir.join("Cargo.lock").is_file()).expect("the package is in the workspace").to_owned()
}
