//! Owns `dim plugin new`: creates a directory with a plugin that builds. Receives a name, a language and a template;
//! writes the source, the manifest, the scenarios, the SDK and the WIT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use dim_model::ident::PluginName;
use serde_json::json;
use toml::{Table, Value};

use super::build::{COMPONENTIZE_PY, Language, within};
use crate::output::Output;

include!(concat!(env!("OUT_DIR"), "/sdk.rs"));

#[derive(Debug, Args)]
pub struct New {
    /// Plugin name, also the name of its directory
    name: PluginName,
    /// Language
    #[arg(long, value_enum, default_value_t = Language::Rust)]
    lang: Language,
    /// Template
    #[arg(long, value_enum, default_value_t = Template::Heartbeats)]
    template: Template,
    /// Parent directory
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

/// The template of a new plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Template {
    /// Log the messages of a topic
    Empty,
    /// Publish the running jobs under an IPNS name
    Jobs,
    /// Count heartbeats and report silent nodes
    Heartbeats,
}

/// The files of a template.
struct Files {
    manifest: &'static str,
    scenarios: &'static [(&'static str, &'static str)],
    rust: &'static str,
    python: &'static str,
    javascript: &'static str,
}

macro_rules! files {
    ($dir:literal, $($scenario:literal: $file:literal),+) => {
        Files {
            manifest: include_str!(concat!("../../templates/", $dir, "/plugin.toml")),
            scenarios: &[$(($scenario, include_str!(concat!("../../templates/", $dir, "/", $file)))),+],
            rust: include_str!(concat!("../../templates/", $dir, "/lib.rs")),
            python: include_str!(concat!("../../templates/", $dir, "/plugin.py")),
            javascript: include_str!(concat!("../../templates/", $dir, "/plugin.js")),
        }
    };
}

impl Template {
    fn files(self) -> Files {
        match self {
            Self::Empty => files!("empty", "scenarios/hello.yaml": "scenario.yaml"),
            Self::Jobs => files!("jobs", "scenarios/running.yaml": "scenario.yaml"),
            Self::Heartbeats => files!(
                "heartbeats",
                "scenarios/counts.yaml": "scenario.yaml",
                "scenarios/week.yaml": "week.yaml"
            ),
        }
    }
}

/// The direct dependencies of a plugin in Rust.
const CRATES: [&str; 2] = ["dim-guest", "serde"];

/// The section of the manifest for a language with an interpreter: it needs more memory, in bytes, than the default.
const INTERPRETER: &str = "\n[limits]\nmemory = 268435456\n";

impl New {
    /// Creates the directory and its files. Fails if the directory exists and is not empty.
    pub fn execute(&self, out: &Output) -> anyhow::Result<()> {
        let root = within(&self.dir, self.name.as_str());
        match std::fs::read_dir(&root) {
            Ok(mut files) => {
                if files.next().is_some() {
                    bail!("{} already exists and is not empty", root.display());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
                bail!("{} already exists and is not a directory", root.display());
            }
            // `create_dir_all` below creates it, or reports the error.
            Err(_) => {}
        }
        let files = self.files()?;
        for (path, text) in &files {
            let path = root.join(path);
            let parent = path.parent().unwrap_or(&root);
            std::fs::create_dir_all(parent)
                .and_then(|()| std::fs::write(&path, text))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        let name = root.display();
        let next = match self.lang {
            Language::Rust => format!("dim plugin test {name}"),
            Language::Python => format!(
                "(cd {name} && python3 -m venv .venv && .venv/bin/pip install {COMPONENTIZE_PY}) && dim plugin test {name}"
            ),
            Language::Javascript => format!("npm install --prefix {name} && dim plugin test {name}"),
        };
        if out.is_json() {
            let written: Vec<_> = files.keys().collect();
            return out.object(&json!({ "directory": root, "files": written, "next": next }));
        }
        out.object(&json!({ "directory": root, "files": files.len(), "next": next }))
    }

    fn files(&self) -> anyhow::Result<BTreeMap<PathBuf, String>> {
        let template = self.template.files();
        let named = |text: &str| text.replace("NAME", self.name.as_str());
        let mut files = BTreeMap::new();
        let mut put = |path: &str, text: String| files.insert(PathBuf::from(path), text);
        let interpreter = if self.lang == Language::Rust { "" } else { INTERPRETER };
        put("plugin.toml", named(template.manifest) + interpreter);
        put("README.md", self.readme());
        put(".gitignore", "*.wasm\n.built.json\ntarget/\nnode_modules/\n.venv/\n__pycache__/\n".to_owned());
        for (path, text) in template.scenarios {
            put(path, (*text).to_owned());
        }
        for (path, text) in WIT {
            put(path, (*text).to_owned());
        }
        match self.lang {
            Language::Rust => {
                put("src/lib.rs", template.rust.to_owned());
                put("Cargo.toml", named(include_str!("../../templates/Cargo.toml")));
                put("Cargo.lock", lock(self.name.as_str())?);
                put("sdk/Cargo.toml", sdk_manifest()?);
                for (path, text) in RUST_SDK {
                    put(&format!("sdk/{path}"), (*text).to_owned());
                }
            }
            Language::Python => {
                put("plugin.py", template.python.to_owned());
                PYTHON_SDK.iter().for_each(|(path, text)| drop(put(path, (*text).to_owned())));
            }
            Language::Javascript => {
                put("plugin.js", template.javascript.to_owned());
                put("package.json", named(include_str!("../../templates/package.json")));
                JAVASCRIPT_SDK.iter().for_each(|(path, text)| drop(put(path, (*text).to_owned())));
            }
        }
        Ok(files)
    }

    fn readme(&self) -> String {
        let (source, needs) = match self.lang {
            Language::Rust => ("src/lib.rs", "rustup target add wasm32-wasip2".to_owned()),
            Language::Python => {
                ("plugin.py", format!("python3 -m venv .venv && .venv/bin/pip install {COMPONENTIZE_PY}"))
            }
            Language::Javascript => ("plugin.js", "npm install".to_owned()),
        };
        let unit = match self.lang {
            Language::Rust => {
                " In a plain unit test (`cargo test`), `dim_guest::fake::Host` replaces the host."
            }
            Language::Python | Language::Javascript => "",
        };
        let text = include_str!("../../templates/README.md")
            .replace("UNIT", unit)
            .replace("NAME", self.name.as_str())
            .replace("SOURCE", source)
            .replace("NEEDS", &needs);
        // The comments of all commands begin in one column, for any length of the name.
        let commands = text.lines().filter_map(|line| Some(line.split_once(" # ")?.0));
        let width = commands.map(str::len).max().unwrap_or_default();
        let align = |line: &str| match line.split_once(" # ") {
            Some((command, does)) => format!("{command:width$} # {does}\n"),
            None => format!("{line}\n"),
        };
        text.lines().map(align).collect()
    }
}

/// The lock file of the workspace of this program.
const LOCK: &str = include_str!("../../../../Cargo.lock");

/// The lock file of a new plugin: the packages that the SDK needs, in the versions of this program. Fails if a needed
/// package has the name of the plugin.
fn lock(name: &str) -> anyhow::Result<String> {
    let lock: Table = toml::from_str(LOCK)?;
    let packages = lock.get("package").and_then(Value::as_array).context("a lock file has packages")?;
    let name_of = |package: &Value| package.get("name").and_then(Value::as_str).map(str::to_owned);
    // A dependency in a lock file has a version only if there are several versions.
    let find = |wanted: &str| {
        let (name, version) =
            wanted.split_once(' ').map_or((wanted, None), |(name, rest)| (name, rest.split(' ').next()));
        packages.iter().find(|package| {
            let is_version = package.get("version").and_then(Value::as_str);
            name_of(package).as_deref() == Some(name) && version.is_none_or(|it| is_version == Some(it))
        })
    };
    let own = CRATES.map(|name| Value::String(name.to_owned()));
    let mut kept: Vec<Value> = vec![Value::Table(Table::from_iter([
        ("name".to_owned(), Value::String(name.to_owned())),
        ("version".to_owned(), Value::String("0.1.0".to_owned())),
        ("dependencies".to_owned(), Value::Array(own.to_vec())),
    ]))];
    let mut wanted: Vec<String> = CRATES.map(str::to_owned).to_vec();
    let mut seen = BTreeSet::new();
    while let Some(next) = wanted.pop() {
        let Some(package) = find(&next) else { continue };
        if !seen.insert(package.to_string()) {
            continue;
        }
        // Two packages of one name would be ambiguous in the lock file.
        if name_of(package).as_deref() == Some(name) {
            bail!("a plugin in Rust cannot be called {name}: that is a crate that it needs");
        }
        let dependencies = package.get("dependencies").and_then(Value::as_array).into_iter().flatten();
        wanted.extend(dependencies.filter_map(Value::as_str).map(str::to_owned));
        kept.push(package.clone());
    }
    kept.sort_by_key(name_of);
    let version = lock.get("version").cloned().unwrap_or(Value::Integer(4));
    let lock =
        Table::from_iter([("version".to_owned(), version), ("package".to_owned(), Value::Array(kept))]);
    Ok(format!("# This file is automatically @generated by Cargo.\n{}", toml::to_string(&lock)?))
}

/// The manifest of the SDK, with the values that it inherits from the workspace filled in.
fn sdk_manifest() -> anyhow::Result<String> {
    let mut manifest: Table = toml::from_str(include_str!("../../../../guest/Cargo.toml"))?;
    let workspace: Table = toml::from_str(include_str!("../../../../Cargo.toml"))?;
    let inherited = |section: &str, name: &str| workspace.get("workspace")?.get(section)?.get(name).cloned();
    manifest.remove("lints");
    for section in ["package", "dependencies"] {
        let Some(members) = manifest.get_mut(section).and_then(Value::as_table_mut) else { continue };
        for (name, value) in members.iter_mut() {
            let is_inherited = value.get("workspace").and_then(Value::as_bool) == Some(true);
            if is_inherited {
                *value = inherited(section, name).with_context(|| format!("the workspace has no {name}"))?;
            }
        }
    }
    Ok(toml::to_string(&manifest)?)
}
