//! `dim plugin dev`: builds a plugin whenever its source changes, replaces it in a running host, and shows what
//! becomes of it and what it logs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::StreamExt as _;
use reqwest::Method;
use serde::Deserialize;

use crate::cause::chain;
use crate::change::Change;
use crate::ident::Digest;
use crate::plugin;

use super::super::client::Client;
use super::super::output::Output;
use super::install::tell;

/// How often the source is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Directories that a build writes into, or that are no source.
const NO_SOURCE: [&str; 5] = ["target", "node_modules", "__pycache__", "dist", "build"];

#[derive(Debug, Args)]
pub struct Dev {
    /// The plugin's directory
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// The command that builds it, for the shell [default: cargo build --release --target wasm32-wasip2]
    #[arg(long, value_name = "COMMAND", requires = "component")]
    build: Option<String>,
    /// The file that the command makes
    #[arg(long, value_name = "FILE", requires = "build")]
    component: Option<PathBuf>,
    /// Grant a new plugin all that it asks for
    #[arg(long)]
    grant: bool,
    /// The plugin whose code it is [default: the name in its manifest]
    #[arg(long)]
    name: Option<String>,
}

/// The files of a source, each with when it was written and what it holds.
type Source = BTreeMap<PathBuf, (SystemTime, Digest)>;

/// Whether two looks have found the same: a build that writes what was there already changes nothing.
fn is_same(before: &Source, after: &Source) -> bool {
    let mut pairs = before.iter().zip(after);
    before.len() == after.len() && pairs.all(|((one, (_, was)), (other, (_, is)))| one == other && was == is)
}

impl Dev {
    /// Goes on until it is interrupted.
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        let (mut seen, mut shown) = (Source::new(), None);
        loop {
            let found = source(&self.dir, &seen)
                .with_context(|| format!("cannot look into {}", self.dir.display()))?;
            if found.is_empty() {
                bail!("there is nothing in {}", self.dir.display());
            }
            let is_same = is_same(&seen, &found);
            seen = found;
            if !is_same {
                match self.round(client, out).await {
                    Ok(name) if shown.as_ref() != Some(&name) => {
                        tokio::spawn(show_log(client.clone(), *out, name.clone()));
                        tokio::spawn(show_changes(client.clone(), *out, name.clone()));
                        shown = Some(name);
                    }
                    Ok(_) => {}
                    // What runs goes on.
                    Err(error) => eprintln!("error: {error:#}"),
                }
                eprintln!("waiting for a change in {}; stop with Ctrl-C", self.dir.display());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Builds and installs once; returns which plugin it is.
    async fn round(&self, client: &Client, out: &Output) -> anyhow::Result<String> {
        let begun = Instant::now();
        let file = self.build().await?;
        let shown = file.display().to_string();
        let component = tokio::task::spawn_blocking(move || plugin::read(&file)).await??;
        let inspection =
            plugin::inspect(&component).map_err(|error| anyhow::anyhow!("{shown}: {}", chain(&error)))?;
        let name = self.name.clone().unwrap_or_else(|| inspection.manifest.name.to_string());
        eprintln!("built {name} {} in {:.1} s", inspection.manifest.version, begun.elapsed().as_secs_f64());
        let query = [("source", shown), ("grant", self.grant.to_string())];
        let path = ["plugins", name.as_str(), "component"];
        let change = client.send_bytes(Method::PUT, &path, &query, component).await?;
        let change: Change = serde_json::from_value(change).context("the host's answer")?;
        tell(out, &change);
        Ok(name)
    }

    async fn build(&self) -> anyhow::Result<PathBuf> {
        match (&self.build, &self.component) {
            (Some(command), Some(component)) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", command]).current_dir(&self.dir).stdin(Stdio::null());
                let ended =
                    tokio::task::spawn_blocking(move || shell.status()).await?.context("cannot run sh")?;
                if !ended.success() {
                    bail!("the build failed ({ended}); what runs goes on");
                }
                Ok(self.dir.join(component))
            }
            _ => self.build_with_cargo().await,
        }
    }

    async fn build_with_cargo(&self) -> anyhow::Result<PathBuf> {
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--release", "--target", "wasm32-wasip2"]);
        cargo.args(["--message-format", "json-render-diagnostics"]).current_dir(&self.dir);
        cargo.stdin(Stdio::null()).stderr(Stdio::inherit());
        let built = tokio::task::spawn_blocking(move || cargo.output()).await?.context(
            "cannot run cargo: install Rust from https://rustup.rs, or give --build and --component",
        )?;
        if !built.status.success() {
            bail!("the build failed; what runs goes on");
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

/// The files of a source; `before` is what was found last.
fn source(dir: &Path, before: &Source) -> std::io::Result<Source> {
    let mut found = Source::new();
    for file in std::fs::read_dir(dir)? {
        let path = file?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with('.')
            || NO_SOURCE.contains(&name)
            || name.ends_with(".wasm")
            || name == "Cargo.lock"
        {
            continue;
        }
        // One that goes while it is looked at is seen next time.
        let Ok(known) = std::fs::metadata(&path) else { continue };
        if known.is_dir() {
            found.extend(source(&path, before)?);
            continue;
        }
        let modified = known.modified()?;
        let digest = match before.get(&path) {
            Some((at, digest)) if *at == modified => *digest,
            _ => match std::fs::read(&path) {
                Ok(contents) => Digest::of(&contents),
                Err(_) => continue,
            },
        };
        found.insert(path, (modified, digest));
    }
    Ok(found)
}

/// How long a host that does not answer is left alone.
const AGAIN: Duration = Duration::from_secs(1);

/// Shows what a plugin logs, also after a restart of the host.
async fn show_log(client: Client, out: Output, name: String) {
    loop {
        if let Ok(lines) = client.event_stream(&["plugins", &name, "log"]).await {
            let mut lines = std::pin::pin!(lines);
            while let Some(Ok(line)) = lines.next().await {
                if let Ok(line) = serde_json::from_str(&line.data)
                    && super::log_line(&out, &line).is_err()
                {
                    return;
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Shows what becomes of a plugin's changes, also after a restart of the host.
async fn show_changes(client: Client, out: Output, name: String) {
    loop {
        if let Ok(changes) = client.changes(Some(&name)).await {
            let mut changes = std::pin::pin!(changes);
            while let Some(change) = changes.next().await {
                // What comes before is told by whoever installs.
                if change.state.is_final() {
                    tell(&out, &change);
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_as_it_was_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("main.py");
        let look = |before: &Source| source(dir.path(), before).unwrap();
        std::fs::write(&file, "one").unwrap();
        std::fs::write(dir.path().join("made.wasm"), "no source").unwrap();
        let first = look(&Source::new());
        assert_eq!(first.keys().collect::<Vec<_>>(), [&file]);
        let write = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let later = SystemTime::now() + Duration::from_secs(1);
            std::fs::File::open(&file).unwrap().set_modified(later).unwrap();
        };
        write("one");
        let second = look(&first);
        assert!(is_same(&first, &second));
        write("two");
        assert!(!is_same(&second, &look(&first)));
    }
}
