//! Owns `dim plugin build`: builds a component with the tool of the plugin's language. Receives the directory of a
//! plugin; returns the component file and its inspection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use dim_model::error_chain::chain;
use dim_runtime::{Inspection, Manifest, with_sections};
use dim_store::grants::{Grants, Reach};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::fingerprint::{Fingerprint, Tool};
use super::told_if_slow;
use crate::output::{Output, note};

/// The version of componentize-py that `dim plugin new` requires.
pub const COMPONENTIZE_PY: &str = "componentize-py==0.25.1";

#[derive(Debug, Args)]
pub struct Build {
    /// Directory of the plugin
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Build even if neither the source nor the tool has changed
    #[arg(long)]
    force: bool,
}

/// The condition for building a component again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// Builds if the source or the tool has changed.
    IfChanged,
    /// Builds in any case.
    Always,
}

/// The language of a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    /// Built by cargo
    Rust,
    /// Built by componentize-py
    Python,
    /// Built by componentize-js
    #[value(alias = "js")]
    Javascript,
}

/// A component that was built.
pub struct Built {
    /// The path of the component file.
    pub component: PathBuf,
    /// The inspection of the component.
    pub inspection: Inspection,
    /// The duration of the build; none if an earlier build was reused.
    pub took: Option<Duration>,
}

impl Build {
    /// Builds the plugin, and shows the component.
    pub fn execute(&self, out: &Output) -> anyhow::Result<()> {
        let again = if self.force { Again::Always } else { Again::IfChanged };
        let built = build(&self.dir, again)?;
        let shown_as = built.component.display();
        match built.took {
            Some(took) => note(&format!("built {shown_as} in {:.1} s", took.as_secs_f64())),
            None => note(&format!("{shown_as} is up to date: neither its source nor the tool has changed")),
        }
        let mut shown = shown(&built.inspection);
        shown["component"] = json!(built.component);
        if !out.is_json() {
            shown["imports"] = json!(by_package(&built.inspection.imports));
        }
        out.object(&shown)
    }
}

/// The description of a component that build commands show.
pub fn shown(inspection: &Inspection) -> Value {
    let manifest = &inspection.manifest;
    json!({
        "name": manifest.name,
        "version": manifest.version,
        "size": inspection.size,
        "digest": inspection.digest,
        "imports": inspection.imports,
        "asks": asks(manifest, &Map::new()).unwrap_or_default(),
    })
}

/// The imports for people, grouped by package.
pub fn by_package(imports: &[String]) -> Vec<String> {
    let mut packages: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for import in imports {
        let (path, version) = import.split_once('@').unwrap_or((import, ""));
        let (package, interface) = path.split_once('/').unwrap_or((path, ""));
        packages.entry(format!("{package}@{version}")).or_default().push(interface);
    }
    packages
        .into_iter()
        .map(|(package, interfaces)| format!("{package}/{{{}}}", interfaces.join(" ")))
        .collect()
}

/// The path of `name` in `dir`. The current directory, `.`, is left out of the path.
pub fn within(dir: &Path, name: &str) -> PathBuf {
    if dir == Path::new(".") { PathBuf::from(name) } else { dir.join(name) }
}

/// The requested permissions of a plugin in words, with the config values of `set` and the defaults of the others. The
/// error says why the manifest cannot be resolved with these values.
pub fn asks(manifest: &Manifest, set: &Map<String, Value>) -> Result<Vec<String>, String> {
    let host = [("id", "HOST")];
    let resolved = manifest.resolve(set, &host).map_err(|error| error.to_string())?;
    let limits = dim_store::plugin_limits::LimitPolicy::default()
        .asked(&manifest.limits, &dim_store::plugin_limits::SomeLimits::default());
    Ok(Reach::default().missing(&Grants { limits, ..resolved.asks }))
}

impl Language {
    /// The language of a plugin, from the files of its directory. Fails if there is no plugin, or if both `plugin.py` and
    /// `plugin.js` exist.
    pub fn of(dir: &Path) -> anyhow::Result<Self> {
        let has = |file: &str| dir.join(file).is_file();
        if has("Cargo.toml") {
            return Ok(Self::Rust);
        }
        match (has("plugin.py"), has("plugin.js")) {
            (true, false) => Ok(Self::Python),
            (false, true) => Ok(Self::Javascript),
            (true, true) => bail!("{} has a plugin.py and a plugin.js: keep one", dir.display()),
            (false, false) => bail!(
                "there is no plugin in {}: it has no Cargo.toml, plugin.py or plugin.js; `dim plugin new NAME` creates one",
                dir.display()
            ),
        }
    }

    /// The tool that builds a plugin. None for Rust, because cargo itself detects changes.
    fn tool(self, dir: &Path) -> Option<Tool> {
        match self {
            Self::Rust => None,
            Self::Python => Some(Tool { program: componentize_py(dir), versions: Vec::new() }),
            Self::Javascript => {
                let modules = node_modules(dir)?;
                let package = modules.join("@bytecodealliance/componentize-js/package.json");
                let versions = vec![package, modules.join(".package-lock.json")];
                Some(Tool { program: PathBuf::from("node"), versions })
            }
        }
    }
}

/// Builds the plugin in a directory. With [`Again::IfChanged`] an earlier build is reused if neither the source nor the
/// tool has changed. Blocks for seconds, and shows progress on standard error.
pub fn build(dir: &Path, again: Again) -> anyhow::Result<Built> {
    let begun = Instant::now();
    let language = Language::of(dir)?;
    let fingerprint = language.tool(dir).and_then(|tool| Fingerprint::of(dir, &tool));
    if again == Again::IfChanged
        && let Some(component) = fingerprint.as_ref().and_then(|fingerprint| fingerprint.component(dir))
    {
        let inspection = inspected(&component, &std::fs::read(&component)?)?;
        let component = within(dir, &format!("{}.wasm", inspection.manifest.name));
        return Ok(Built { component, inspection, took: None });
    }
    let component = match language {
        Language::Rust => with_cargo(dir)?,
        Language::Python => with_manifest(dir, with_componentize_py)?,
        Language::Javascript => with_manifest(dir, with_componentize_js)?,
    };
    let bytes =
        dim_runtime::read(&component).with_context(|| format!("cannot read {}", component.display()))?;
    let inspection = inspected(&component, &bytes)?;
    let kept = within(dir, &format!("{}.wasm", inspection.manifest.name));
    std::fs::write(&kept, &bytes).with_context(|| format!("cannot write {}", kept.display()))?;
    if let Some(fingerprint) = fingerprint {
        fingerprint.note(dir, &kept, &bytes);
    }
    if language != Language::Rust {
        // The output of the tool is only an intermediate file; `kept` is the component.
        let _ = std::fs::remove_file(&component);
    }
    Ok(Built { component: kept, inspection, took: Some(begun.elapsed()) })
}

fn inspected(component: &Path, bytes: &[u8]) -> anyhow::Result<Inspection> {
    dim_runtime::inspect(bytes).map_err(|error| anyhow::anyhow!("{}: {}", component.display(), chain(&error)))
}

fn with_cargo(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--target", "wasm32-wasip2"]);
    cargo.args(["--message-format", "json-render-diagnostics"]).current_dir(dir);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rust_flags());
    cargo.stdin(Stdio::null()).stderr(Stdio::inherit());
    let built = cargo.output().context("cannot run cargo: install Rust from https://rustup.rs")?;
    if !built.status.success() {
        bail!("the build failed");
    }
    let artifacts = built.stdout.split(|byte| *byte == b'\n').rev();
    let component =
        artifacts.filter_map(|line| serde_json::from_slice::<Artifact>(line).ok()).find_map(|artifact| {
            let is_own = artifact.target.kind.iter().any(|kind| kind == "cdylib");
            let mut files = artifact.filenames.into_iter();
            files.find(|file| is_own && file.extension().is_some_and(|kind| kind == "wasm"))
        });
    component.context("the build produced no component: the crate needs crate-type = [\"cdylib\"]")
}

/// The Rust flags of the user, and flags that remap the paths of dependencies. Panic messages contain paths; without
/// the remapping the same source would build a different component on each machine.
fn rust_flags() -> String {
    let own = std::env::var("CARGO_ENCODED_RUSTFLAGS").or_else(|_| {
        std::env::var("RUSTFLAGS").map(|flags| flags.split_whitespace().collect::<Vec<_>>().join("\u{1f}"))
    });
    let mut flags: Vec<String> = own.into_iter().filter(|flags| !flags.is_empty()).collect();
    let mut remap = |from: &Path, to: &str| {
        flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    };
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let sources = home.map(|home| std::fs::read_dir(home.join("registry/src")));
    // There is one directory for each registry. All get the same name, so the registry of a crate has no effect.
    let mut registries: Vec<PathBuf> = sources
        .and_then(Result::ok)
        .into_iter()
        .flatten()
        .flatten()
        .map(|registry| registry.path())
        .collect();
    registries.sort();
    registries.iter().for_each(|registry| remap(registry, "crates"));
    flags.join("\u{1f}")
}

/// An artifact in the messages of cargo.
#[derive(Deserialize)]
struct Artifact {
    target: Target,
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

/// The program that builds plugins in Python: the one in `.venv` of the plugin, else the one in `PATH`.
fn componentize_py(dir: &Path) -> PathBuf {
    let own = dir.join(".venv/bin/componentize-py");
    // The tool runs in the plugin's directory, so a relative path would be wrong.
    own.canonicalize().unwrap_or_else(|_| PathBuf::from("componentize-py"))
}

fn with_componentize_py(dir: &Path) -> anyhow::Result<PathBuf> {
    let program = componentize_py(dir);
    let made = dir.join(".made.wasm");
    let mut tool = Command::new(program);
    tool.args(["-d", "wit", "-w", "plugin", "componentize", "dim_component", "-p", ".", "-o", ".made.wasm"]);
    let missing = format!(
        "componentize-py is missing: in {}, run `python3 -m venv .venv && .venv/bin/pip install {COMPONENTIZE_PY}`",
        dir.display()
    );
    run("componentize-py", tool.current_dir(dir), &missing)?;
    Ok(made)
}

/// The script that calls componentize-js through its API. Its command line lacks required options in some versions.
const COMPONENTIZE_JS: &str = r#"
import { componentize } from '@bytecodealliance/componentize-js';
import { writeFile } from 'node:fs/promises';
const { component } = await componentize({
  sourcePath: 'dim_component.js', witPath: 'wit', worldName: 'plugin', disableFeatures: ['http', 'fetch-event'],
});
await writeFile('.made.wasm', component);
"#;

/// The `node_modules` directory with componentize-js, in the plugin's directory or above it.
fn node_modules(dir: &Path) -> Option<PathBuf> {
    let place = dir.canonicalize().ok()?;
    let places = place.ancestors().map(|dir| dir.join("node_modules"));
    places.into_iter().find(|modules| modules.join("@bytecodealliance/componentize-js").is_dir())
}

fn with_componentize_js(dir: &Path) -> anyhow::Result<PathBuf> {
    if node_modules(dir).is_none() {
        bail!("componentize-js is missing: in {}, run `npm install`", dir.display());
    }
    let mut tool = Command::new("node");
    tool.args(["--input-type=module", "--eval", COMPONENTIZE_JS]).current_dir(dir);
    run(
        "componentize-js",
        &mut tool,
        "node is missing: install Node.js 20 or newer from https://nodejs.org",
    )?;
    Ok(dir.join(".made.wasm"))
}

/// Runs a tool. Its output is shown only if it fails. `missing` is the error if the program does not exist.
fn run(name: &str, tool: &mut Command, missing: &str) -> anyhow::Result<()> {
    tool.stdin(Stdio::null());
    let ended = told_if_slow(name, || tool.output());
    let output = match ended {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!("{missing}"),
        ended => ended.with_context(|| format!("cannot run {name}"))?,
    };
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{name} failed ({}):\n{}", output.status, String::from_utf8_lossy(&said).trim_end());
    }
    Ok(())
}

/// Builds a component with a tool, and embeds the manifest and the version in it. The manifest is read first, so that
/// an error in it appears before the slow build.
fn with_manifest(dir: &Path, tool: impl Fn(&Path) -> anyhow::Result<PathBuf>) -> anyhow::Result<PathBuf> {
    let file = dir.join("plugin.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let manifest = Manifest::parse(&text).with_context(|| file.display().to_string())?;
    let component = tool(dir)?;
    let bytes = std::fs::read(&component).with_context(|| format!("cannot read {}", component.display()))?;
    let sections = [("dim-manifest", text.as_bytes()), ("version", manifest.version.as_bytes())];
    std::fs::write(&component, with_sections(&bytes, &sections))
        .with_context(|| format!("cannot write {}", component.display()))?;
    Ok(component)
}
