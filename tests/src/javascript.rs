//! The tools that build plugins in JavaScript.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use crate::python::run;

/// A directory below which plugins in JavaScript can be built. None, and a loud word, where Node.js and npm cannot be had;
/// a failure where `DIM_REQUIRE_NODE=1`.
pub fn place() -> Option<PathBuf> {
    crate::or_loudly("JavaScript", "DIM_REQUIRE_NODE", made())
}

fn made() -> Result<PathBuf, String> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().map_err(|error| error.to_string())?;
    let place = crate::target_dir().join("javascript");
    if place.join("node_modules/@bytecodealliance/componentize-js").is_dir() {
        return Ok(place);
    }
    std::fs::create_dir_all(&place).map_err(|error| error.to_string())?;
    let package = include_str!("../../host/templates/package.json").replace("NAME", "tools");
    std::fs::write(place.join("package.json"), package).map_err(|error| error.to_string())?;
    run(Command::new("npm").args(["install", "--no-audit", "--no-fund"]).current_dir(&place))?;
    Ok(place)
}
