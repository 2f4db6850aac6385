//! `dim plugin build`: has a plugin's own language make a component of it, and shows what it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::output::{Output, note};
use super::fingerprint::{Fingerprint, Tool};
use super::told_if_slow;
use crate::cause::chain;
use crate::plugin::{self, Grants, Inspection, Manifest, Reach, with_sections};

/// The version of componentize-py that `dim plugin new` asks for.
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

/// Whether what was built before is built again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// If its source or the tool has changed.
    IfChanged,
    /// In any case.
    Always,
}

/// In which language a plugin is written.
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
    /// Where it lies.
    pub component: PathBuf,
    /// What it is.
    pub inspection: Inspection,
    /// How long it took; none if it was built before.
    pub took: Option<Duration>,
}

impl Build {
    /// Builds, and shows what was built.
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

/// What is told of a component by who has made it.
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

/// Imports for people: those of a package together.
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

/// A file or a directory within another, which is not told of if it is this one.
pub fn within(dir: &Path, name: &str) -> PathBuf {
    if dir == Path::new(".") { PathBuf::from(name) } else { dir.join(name) }
}

/// What a plugin asks for with these values of its config and the defaults of the others, in words; the error is why
/// that cannot be told.
pub fn asks(manifest: &Manifest, set: &Map<String, Value>) -> Result<Vec<String>, String> {
    let host = [("id", "HOST")];
    let resolved = manifest.resolve(set, &host).map_err(|error| error.to_string())?;
    let limits = plugin::LimitPolicy::default().asked(&manifest.limits, &plugin::SomeLimits::default());
    Ok(Reach::default().missing(&Grants { limits, ..resolved.asks }))
}

impl Language {
    /// The language of a plugin, by the files of its directory.
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
                "there is no plugin in {}: it has no Cargo.toml, plugin.py or plugin.js; `dim plugin new NAME` makes one",
                dir.display()
            ),
        }
    }

    /// What builds a plugin, if it does not know by itself what has changed.
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

/// Builds the plugin in a directory, unless that was done before and nothing has changed since. Takes seconds; who
/// waits is told.
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
    let bytes = plugin::read(&component).with_context(|| format!("cannot read {}", component.display()))?;
    let inspection = inspected(&component, &bytes)?;
    let kept = within(dir, &format!("{}.wasm", inspection.manifest.name));
    std::fs::write(&kept, &bytes).with_context(|| format!("cannot write {}", kept.display()))?;
    if let Some(fingerprint) = fingerprint {
        fingerprint.note(dir, &kept, &bytes);
    }
    if language != Language::Rust {
        // What the tool has made is not whole without the manifest.
        let _ = std::fs::remove_file(&component);
    }
    Ok(Built { component: kept, inspection, took: Some(begun.elapsed()) })
}

fn inspected(component: &Path, bytes: &[u8]) -> anyhow::Result<Inspection> {
    plugin::inspect(bytes).map_err(|error| anyhow::anyhow!("{}: {}", component.display(), chain(&error)))
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
    component.context("the build made no component: the crate needs crate-type = [\"cdylib\"]")
}

/// The user's flags, and those by which the same source gives the same component in every directory: panics name
/// their place.
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
    // One directory for each registry; which one a crate came from does not matter.
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

/// What cargo says that it has made.
#[derive(Deserialize)]
struct Artifact {
    target: Target,
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

/// The program that builds plugins in Python.
fn componentize_py(dir: &Path) -> PathBuf {
    let own = dir.join(".venv/bin/componentize-py");
    // The tool runs in the plugin's directory.
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

/// Calls componentize-js through its API: its command line does not take all that is needed in every version.
const COMPONENTIZE_JS: &str = r#"
import { componentize } from '@bytecodealliance/componentize-js';
import { writeFile } from 'node:fs/promises';
const { component } = await componentize({
  sourcePath: 'dim_component.js', witPath: 'wit', worldName: 'plugin', disableFeatures: ['http', 'fetch-event'],
});
await writeFile('.made.wasm', component);
"#;

/// Where componentize-js is installed for a plugin.
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

/// Runs a tool and keeps what it says, unless it fails.
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

/// Has a tool make a component, and embeds the manifest and the standard metadata in it; the manifest is read before
/// the tool takes its time.
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
