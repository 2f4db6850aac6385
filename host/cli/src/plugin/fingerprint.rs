//! Owns the decision whether a plugin must be built again: a fingerprint of its source, of the tool and of this
//! program. Receives a directory and a tool; stores the fingerprint beside the component.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use dim_model::ident::Digest;
use serde::{Deserialize, Serialize};

use super::watch::files_in;

/// The file with the fingerprint, in the plugin's directory.
const FILE: &str = ".built.json";

/// A digest of everything that a component is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint(String);

/// The content of the fingerprint file: the last build.
#[derive(Serialize, Deserialize)]
struct Built {
    fingerprint: String,
    component: PathBuf,
    digest: String,
}

impl Fingerprint {
    /// The fingerprint of the plugin in `dir`, built by `tool`. None if the source or the tool cannot be read: the
    /// build then reports the error.
    pub fn of(dir: &Path, tool: &Tool) -> Option<Self> {
        let mut inputs = format!("dim {}\n{}\n", env!("CARGO_PKG_VERSION"), tool.identity()?);
        // The scenarios are no part of the component.
        let scenarios = dir.join(super::test::SCENARIOS);
        for (path, digest) in
            files_in(dir).ok()?.into_iter().filter(|(path, _)| !path.starts_with(&scenarios))
        {
            let _ = writeln!(inputs, "{:?} {digest}", path.strip_prefix(dir).unwrap_or(&path));
        }
        Some(Self(Digest::of(inputs.as_bytes()).to_string()))
    }

    /// The component of an earlier build with the same fingerprint, if the file has not changed since.
    pub fn component(&self, dir: &Path) -> Option<PathBuf> {
        let built: Built = serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()?;
        let component = dir.join(built.component.file_name()?);
        let is_same = built.fingerprint == self.0
            && Digest::of(&std::fs::read(&component).ok()?).to_string() == built.digest;
        is_same.then_some(component)
    }

    /// Records the build. A failure is only logged: without the record the next build is slow, but correct.
    pub fn note(&self, dir: &Path, component: &Path, bytes: &[u8]) {
        let Some(name) = component.file_name() else { return };
        let digest = Digest::of(bytes).to_string();
        let built = Built { fingerprint: self.0.clone(), component: name.into(), digest };
        let text = serde_json::to_vec(&built).expect("it is plain data");
        if let Err(error) = std::fs::write(dir.join(FILE), text) {
            tracing::debug!("cannot write the fingerprint of the build: {error}");
        }
    }
}

/// A program that builds components, and the files that identify its version.
#[derive(Debug)]
pub struct Tool {
    /// The program: a path, or a name that is looked up in `PATH`.
    pub program: PathBuf,
    /// Files whose content names the versions of the program's dependencies. Missing files count as empty.
    pub versions: Vec<PathBuf>,
}

impl Tool {
    /// A text that changes when another version of the tool is installed. None if the program is not found.
    fn identity(&self) -> Option<String> {
        let program = found(&self.program)?;
        let known = std::fs::metadata(&program).ok()?;
        let mut identity = format!("{} {} {}\n", program.display(), known.len(), known.mtime());
        for package in packages_beside(&program) {
            let _ = writeln!(identity, "{package}");
        }
        for file in &self.versions {
            let _ = writeln!(identity, "{}", Digest::of(&std::fs::read(file).unwrap_or_default()));
        }
        Some(identity)
    }
}

/// The file of a program: the path itself, or the first match in `PATH`.
fn found(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The Python packages in the environment of a program. Each directory name contains the version of the package.
fn packages_beside(program: &Path) -> Vec<String> {
    let entries = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let libraries = program.parent().and_then(Path::parent).map(|environment| environment.join("lib"));
    let versions = libraries.into_iter().flat_map(|lib| entries(lib).map(|version| version.path()));
    let mut packages: Vec<String> = versions
        .flat_map(|version| entries(version.join("site-packages")))
        .map(|package| package.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".dist-info"))
        .collect();
    packages.sort();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_is_built_again_when_its_source_its_tool_or_itself_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let tool = Tool { program: at("tool"), versions: vec![at("versions")] };
        let fingerprint = || Fingerprint::of(&at("plugin"), &tool).unwrap();
        std::fs::create_dir_all(at("plugin/scenarios")).unwrap();
        std::fs::write(at("plugin/plugin.py"), "one").unwrap();
        assert_eq!(Fingerprint::of(&at("plugin"), &tool), None, "without a tool");
        std::fs::write(at("tool"), "tool").unwrap();
        let component = at("plugin/p.wasm");
        std::fs::write(&component, "component").unwrap();
        let first = fingerprint();
        assert_eq!(first.component(&at("plugin")), None);
        first.note(&at("plugin"), &component, b"component");
        std::fs::write(at("plugin/scenarios/s.yaml"), "steps: []").unwrap();
        assert_eq!(fingerprint().component(&at("plugin")), Some(component.clone()));
        std::fs::write(&component, "another").unwrap();
        assert_eq!(fingerprint().component(&at("plugin")), None);
        std::fs::write(&component, "component").unwrap();
        for changed in ["plugin/plugin.py", "tool", "versions"] {
            let before = std::fs::read(at(changed)).ok();
            std::fs::write(at(changed), "changed").unwrap();
            assert_eq!(fingerprint().component(&at("plugin")), None, "{changed}");
            match before {
                Some(before) => std::fs::write(at(changed), before).unwrap(),
                None => std::fs::remove_file(at(changed)).unwrap(),
            }
        }
    }
}
