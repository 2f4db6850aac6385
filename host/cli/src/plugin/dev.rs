//! Owns `dim plugin dev`: builds a plugin after each change of its source, replaces it in a running host, and shows its
//! changes and log lines.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use dim_model::error_chain::chain;
use dim_store::change::Change;
use futures::StreamExt as _;

use super::build::{self, Again};
use super::install::tell;
use super::watch::{LOOK_EVERY, Source};
use crate::client::Client;
use crate::output::{BAD, Output, marked_notes, note};

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
    /// Builds and replaces the plugin after each change, until interrupted. Returns only if the source cannot be read.
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
                    // A failed build or installation leaves the running version as it is.
                    Err(error) => marked_notes(BAD, "error: ", &format!("{error:#}")),
                }
                note(&format!("waiting for a change in {}; stop with Ctrl-C", self.dir.display()));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Builds and installs the plugin once; returns its name.
    async fn round(&self, client: &Client, out: &Output) -> anyhow::Result<String> {
        let begun = Instant::now();
        let file = self.build().await?;
        let shown = file.display().to_string();
        let component = tokio::task::spawn_blocking(move || dim_runtime::read(&file)).await??;
        let inspection = dim_runtime::inspect(&component)
            .map_err(|error| anyhow::anyhow!("{shown}: {}", chain(&error)))?;
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
                    bail!("the build failed ({ended}); the running version continues");
                }
                Ok(self.dir.join(component))
            }
            _ => {
                let dir = self.dir.clone();
                let built = tokio::task::spawn_blocking(move || build::build(&dir, Again::IfChanged)).await?;
                Ok(built
                    .map_err(|error| anyhow::anyhow!("{error:#}; the running version continues"))?
                    .component)
            }
        }
    }
}

/// Time between two attempts to open a stream of the host.
const AGAIN: Duration = Duration::from_secs(1);

/// Shows the log lines of a plugin, also after a restart of the host.
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

/// Shows the final states of a plugin's changes, also after a restart of the host.
async fn show_changes(client: Client, out: Output, name: String) {
    loop {
        if let Ok(changes) = client.changes(Some(&name)).await {
            let mut changes = std::pin::pin!(changes);
            while let Some(change) = changes.next().await {
                // The installation itself shows the earlier states.
                if change.state.is_final() {
                    tell(&out, &change);
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}
