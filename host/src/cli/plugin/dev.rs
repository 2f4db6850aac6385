//! `dim plugin dev`: builds a plugin whenever its source changes, replaces it in a running host, and shows what
//! becomes of it and what it logs.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use futures::StreamExt as _;

use crate::cause::chain;
use crate::change::Change;
use crate::plugin;

use super::super::client::Client;
use super::super::output::{BAD, Output, marked_notes, note};
use super::build::{self, Again};
use super::install::tell;
use super::watch::{LOOK_EVERY, Source};

#[derive(Debug, Args)]
pub struct Dev {
    /// Directory of the plugin
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Build command for the shell [default: the build of `dim plugin build`]
    #[arg(long, value_name = "COMMAND", requires = "component")]
    build: Option<String>,
    /// File that the build command writes
    #[arg(long, value_name = "FILE", requires = "build")]
    component: Option<PathBuf>,
    /// Grant a new plugin all requested permissions
    #[arg(long)]
    grant: bool,
    /// Plugin name [default: the name in the manifest]
    #[arg(long)]
    name: Option<String>,
}

impl Dev {
    /// Goes on until it is interrupted.
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        let (mut source, mut shown) = (Source::new(vec![self.dir.clone()]), None);
        loop {
            if source.has_changed()? {
                match self.round(client, out).await {
                    Ok(name) if shown.as_ref() != Some(&name) => {
                        tokio::spawn(show_log(client.clone(), *out, name.clone()));
                        tokio::spawn(show_changes(client.clone(), *out, name.clone()));
                        shown = Some(name);
                    }
                    Ok(_) => {}
                    // What runs goes on.
                    Err(error) => marked_notes(BAD, "error: ", &format!("{error:#}")),
                }
                note(&format!("waiting for a change in {}; stop with Ctrl-C", self.dir.display()));
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
        note(&format!(
            "built {name} {} in {:.1} s",
            inspection.manifest.version,
            begun.elapsed().as_secs_f64()
        ));
        let query = [("source", shown), ("grant", self.grant.to_string())];
        let change = client.send_component(&name, &query, component).await?;
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
            _ => {
                let dir = self.dir.clone();
                let built = tokio::task::spawn_blocking(move || build::build(&dir, Again::IfChanged)).await?;
                Ok(built.map_err(|error| anyhow::anyhow!("{error:#}; what runs goes on"))?.component)
            }
        }
    }
}

/// How long a host that does not answer is left alone.
const AGAIN: Duration = Duration::from_secs(1);

/// Shows what a plugin logs, also after a restart of the host.
async fn show_log(client: Client, out: Output, name: String) {
    let mut rows = out.stream(&super::LINE);
    loop {
        if let Ok(lines) = client.event_stream(&["plugins", &name, "log"]).await {
            let mut lines = std::pin::pin!(lines);
            while let Some(Ok(line)) = lines.next().await {
                if let Ok(line) = serde_json::from_str(&line.data)
                    && rows.row(&line).is_err()
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
