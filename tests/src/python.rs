//! Installs Python programs: componentize-py, which builds plugins, and programs that tests request.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::component::with_manifest;

/// The package and version that build the plugin.
const COMPONENTIZE_PY: &str = "componentize-py==0.25.1";

/// Builds the component of `guests/python`, with its manifest. If that fails it prints a notice and returns none, or
/// panics if `DIM_REQUIRE_PYTHON=1`.
pub fn component(dir: &Path) -> Option<PathBuf> {
    or_loudly(build(dir))
}

/// Returns the directory of programs of a virtual environment `name` with these packages. If it cannot be created this
/// prints a notice and returns none, or panics if `DIM_REQUIRE_PYTHON=1`.
pub fn environment(name: &str, packages: &[&str]) -> Option<PathBuf> {
    or_loudly(made(name, packages))
}

/// Returns the program that builds plugins in Python. If it is missing this prints a notice and returns none, or panics
/// if `DIM_REQUIRE_PYTHON=1`.
pub fn tool() -> Option<PathBuf> {
    or_loudly(componentize_py())
}

fn or_loudly<T>(had: Result<T, String>) -> Option<T> {
    crate::or_loudly("Python", "DIM_REQUIRE_PYTHON", had)
}

fn build(dir: &Path) -> Result<PathBuf, String> {
    let program = componentize_py()?;
    let source = crate::data("guests/python");
    let component = dir.join("in-python.wasm");
    run(Command::new(program)
        .arg("-d")
        .arg(crate::data("../wit"))
        .args(["-w", "plugin", "componentize", "app", "-p"])
        .arg(&source)
        .arg("-o")
        .arg(&component))?;
    let manifest = std::fs::read_to_string(source.join("plugin.toml")).map_err(|error| error.to_string())?;
    let bytes = std::fs::read(&component).map_err(|error| error.to_string())?;
    std::fs::write(&component, with_manifest(&bytes, &manifest)).map_err(|error| error.to_string())?;
    Ok(component)
}

/// Returns componentize-py from the path, else from a virtual environment that is created with Python and pip.
pub fn componentize_py() -> Result<PathBuf, String> {
    if run(Command::new("componentize-py").arg("--version")).is_ok() {
        return Ok("componentize-py".into());
    }
    Ok(made("python", &[COMPONENTIZE_PY])?.join("componentize-py"))
}

fn made(name: &str, packages: &[&str]) -> Result<PathBuf, String> {
    // Tests run in parallel.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().map_err(|error| error.to_string())?;
    let venv = crate::target_dir().join(name);
    let (programs, record) = (venv.join("bin"), venv.join("packages"));
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&record).is_ok_and(|had| had == wanted) {
        return Ok(programs);
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    run(Command::new(programs.join("pip")).args(["install", "--quiet"]).args(packages))?;
    std::fs::write(&record, wanted).map_err(|error| error.to_string())?;
    Ok(programs)
}

pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
