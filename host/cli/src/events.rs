//! Owns `dim events`: the export of recorded events from the log of a host.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::pin;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use serde_json::json;
use tempfile::NamedTempFile;

use crate::client::{self, Client};
use crate::input;
use crate::output::{self, Output};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Export the recorded input events of the log as lines of JSON
    ///
    /// `dim plugin test --events FILE` runs a plugin on the export; `dim plugin compare OLD NEW --events FILE` compares two
    /// versions of a plugin. The export contains the seed of the random numbers instead of the host's secret.
    Export(Export),
}

#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    wanted: Wanted,
    /// Output file, or - for standard output
    #[arg(short, long = "to", value_name = "FILE")]
    out: PathBuf,
    /// Overwrite the file if it exists
    #[arg(long)]
    force: bool,
}

/// A selection of entries.
#[derive(Debug, Default, Args)]
pub struct Wanted {
    /// Select the input of this plugin: its topics, names and commands
    #[arg(long)]
    pub plugin: Option<String>,
    /// Select the events of this topic
    #[arg(long)]
    pub topic: Option<String>,
    /// Select events since this time (RFC 3339, such as 2026-01-31T12:00:00Z, or seconds since 1970) or within this
    /// duration (10m, 2h, 1d)
    #[arg(long, value_name = "TIME", value_parser = input::since)]
    pub since: Option<String>,
}

impl Wanted {
    fn query(&self) -> Vec<(&'static str, String)> {
        let pairs = [("plugin", &self.plugin), ("topic", &self.topic), ("since", &self.since)];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect()
    }

    /// Writes the selected entries into a temporary file in `directory`. Returns the file and the number of bytes.
    /// Dropping the file deletes it.
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
        // The temporary file is moved to its path at the end, so the export is either complete or absent.
        let written = self.wanted.fetch(client, directory).await;
        let (half, bytes) = written.with_context(|| format!("nothing was written to {}", path.display()))?;
        let put = if self.force { half.persist(&path) } else { half.persist_noclobber(&path) };
        put.map_err(|error| error.error)?;
        out.object(&json!({ "file": self.out, "bytes": bytes }))
    }
}
