//! `dim events`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::pin;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use serde_json::json;
use tempfile::NamedTempFile;

use super::client::{self, Client};
use super::input;
use super::output::{self, Output};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Writes what the log holds of what came from outside, as lines of JSON
    ///
    /// A plugin can be tried on it, `dim plugin test --events FILE`, and two versions of one be compared, `dim plugin
    /// compare OLD NEW --events FILE`. What random follows from stands in it in place of the host's secret.
    Export(Export),
}

#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    wanted: Wanted,
    /// The file, or - for standard output
    #[arg(short, long = "to", value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

/// Which entries.
#[derive(Debug, Default, Args)]
pub struct Wanted {
    /// Only what this plugin can react to: its topics, its names and its commands
    #[arg(long)]
    pub plugin: Option<String>,
    /// Only what concerns this topic
    #[arg(long)]
    pub topic: Option<String>,
    /// Only what came at this time or later, as in 2026-01-31T12:00:00Z or in seconds since 1970, or within this time, as
    /// in 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = input::since)]
    pub since: Option<String>,
}

impl Wanted {
    fn query(&self) -> Vec<(&'static str, String)> {
        let pairs = [("plugin", &self.plugin), ("topic", &self.topic), ("since", &self.since)];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect()
    }

    /// Has them written into a file that is gone with the value.
    pub async fn fetch(&self, client: &Client, directory: &Path) -> anyhow::Result<(NamedTempFile, u64)> {
        let mut half = tempfile::Builder::new().prefix(".dim-events-").tempfile_in(directory)?;
        let chunks = client.get_chunks(&["events"], &self.query()).await?;
        let bytes = client::receive(chunks, half.as_file_mut()).await?;
        Ok((half, bytes))
    }
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        let Self::Export(export) = self;
        export.execute(client, out).await
    }
}

impl Export {
    async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        if self.out == Path::new("-") {
            let mut chunks = pin!(client.get_chunks(&["events"], &self.wanted.query()).await?);
            while let Some(chunk) = chunks.next().await.transpose()? {
                output::bytes(&chunk)?;
            }
            return Ok(std::io::stdout().flush()?);
        }
        output::check_replaceable(&self.out, self.force)?;
        let path = std::path::absolute(&self.out)?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        // It appears whole or not at all.
        let written = self.wanted.fetch(client, directory).await;
        let (half, bytes) = written.with_context(|| format!("nothing was written to {}", path.display()))?;
        let put = if self.force { half.persist(&path) } else { half.persist_noclobber(&path) };
        put.map_err(|error| error.error)?;
        out.object(&json!({ "file": self.out, "bytes": bytes }))
    }
}
