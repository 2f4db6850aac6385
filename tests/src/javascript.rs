//! Packages of npm: the tools that build plugins in JavaScript, and others that tests ask for.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use crate::python::run;

/// A directory below which plugins in JavaScript can be built. None, and a loud word, where Node.js and npm cannot be had;
/// a failure where `DIM_REQUIRE_NODE=1`.
pub fn place() -> Option<PathBuf> {
    let package = include_str!("../../host/templates/package.json").replace("NAME", "tools");
    directory("javascript", &package)
}

/// A directory named `name` with the packages that `package` asks for, as `package.json` does. None, and a loud word,
/// where they cannot be had; a failure where `DIM_REQUIRE_NODE=1`.
pub fn directory(name: &str, package: &str) -> Option<PathBuf> {
    crate::or_loudly("JavaScript", "DIM_REQUIRE_NODE", made(name, package))
}

fn made(name: &str, package: &str) -> Result<PathBuf, String> {
    // Two tests may ask for it at once.
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
