//! Installs npm packages: the tools that build plugins in JavaScript, and packages that tests request.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use crate::python::run;

/// Returns a directory in which plugins in JavaScript can be built. If Node.js or npm is missing it prints a notice and
/// returns none, or panics if `DIM_REQUIRE_NODE=1`.
pub fn place() -> Option<PathBuf> {
    let package = include_str!("../../host/cli/templates/package.json").replace("NAME", "tools");
    directory("javascript", &package)
}

/// Returns a directory named `name` with the packages of `package`, the content of a `package.json`. If they cannot be
/// installed it prints a notice and returns none, or panics if `DIM_REQUIRE_NODE=1`.
pub fn directory(name: &str, package: &str) -> Option<PathBuf> {
    crate::or_loudly("JavaScript", "DIM_REQUIRE_NODE", made(name, package))
}

fn made(name: &str, package: &str) -> Result<PathBuf, String> {
    // Tests run in parallel.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().map_err(|error| error.to_string())?;
    let place = crate::target_dir().join(name);
    let record = place.join("node_modules/installed.json");
    if std::fs::read_to_string(&record).is_ok_and(|had| had == package) {
        return Ok(place);
    }
    std::fs::create_dir_all(&place).map_err(|error| error.to_string())?;
    std::fs::write(place.join("package.json"), package).map_err(|error| error.to_string())?;
    run(Command::new("npm").args(["install", "--no-audit", "--no-fund"]).current_dir(&place))?;
    std::fs::write(&record, package).map_err(|error| error.to_string())?;
    Ok(place)
}
