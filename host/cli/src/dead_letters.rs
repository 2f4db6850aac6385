//! Owns `dim dead`: the subcommands for dead letters, and their requests to the API.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::Value;

use crate::client::Client;
use crate::output::{Column, Output, Watch, note};
use crate::{input, lacking};

const COLUMNS: [Column; 7] = [
    Column::word("ID", "/id"),
    Column::word("PLUGIN", "/plugin"),
    Column::word("VERSION", "/version"),
    Column::ago("TIME", "/time"),
    Column::word("KIND", "/kind"),
    Column::word("ATTEMPTS", "/attempts"),
    Column::text("REASON", "/reason"),
];

/// Maximum number of dead letters in one answer of the API.
const PAGE: usize = 1_000;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List dead letters
    Ls {
        #[command(flatten)]
        filter: Filter,
        /// Start after this number, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<u64>,
        /// Maximum number of dead letters; the API returns 1,000 at a time
        #[arg(long, default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        watch: Watch,
    },
    /// Show a dead letter with its event, the log of the plugin, and the stack if the plugin trapped
    Show {
        /// Number of the dead letter
        id: u64,
    },
    /// Replay dead letters: deliver their events to their plugins again
    Replay(Which),
    /// Delete dead letters
    Drop(Which),
}

/// A selection of dead letters.
#[derive(Debug, Args)]
pub struct Filter {
    /// Select dead letters of this plugin
    #[arg(long)]
    plugin: Option<String>,
    /// Select dead letters of events on this topic
    #[arg(long)]
    topic: Option<String>,
    /// Select dead letters since this time (RFC 3339, such as 2026-01-31T12:00:00Z, or seconds since 1970) or within
    /// this duration (10m, 2h, 1d)
    #[arg(long, value_name = "TIME", value_parser = input::since)]
    since: Option<String>,
}

/// One dead letter, or a selection.
#[derive(Debug, Args)]
pub struct Which {
    /// Number of the dead letter
    #[arg(conflicts_with_all = ["plugin", "topic", "since", "all"])]
    id: Option<u64>,
    #[command(flatten)]
    filter: Filter,
    /// Select all dead letters
    #[arg(long, conflicts_with_all = ["plugin", "topic", "since"])]
    all: bool,
}

impl Filter {
    fn query(self) -> Vec<(&'static str, String)> {
        let Self { plugin, topic, since } = self;
        let pairs = [("plugin", plugin), ("topic", topic), ("since", since)];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Ls { filter, after, limit, watch } => {
                let mut query = filter.query();
                query.extend(after.map(|after| ("after", after.to_string())));
                let limit = limit.min(PAGE);
                let letters =
                    async || Ok(client.rows(&["dead-letters"], query.clone(), "id", Some(limit)).await?);
                if watch.is_set() {
                    return out.list(watch, &COLUMNS, letters).await;
                }
                let letters: Value = letters().await?;
                out.rows(&letters, &COLUMNS)?;
                let page = letters.as_array().map_or(&[][..], Vec::as_slice);
                if let Some(last) = page.last().filter(|_| page.len() >= limit) {
                    note(&format!("There may be more: --after {}", last["id"]));
                }
                Ok(())
            }
            Self::Show { id } => {
                let letter = client.get(&["dead-letters", &id.to_string()], &[]).await?;
                out.object_with_lists(&letter, &["stack", "log"])
            }
            Self::Replay(Which { id: Some(id), .. }) => {
                let path = ["dead-letters", &id.to_string(), "replay"];
                client.send_json(Method::POST, &path, &[], &Value::Null).await?;
                Ok(())
            }
            Self::Drop(Which { id: Some(id), .. }) => {
                client.delete(&["dead-letters", &id.to_string()]).await.map(drop).map_err(Into::into)
            }
            Self::Replay(which) => {
                let path = ["dead-letters", "replay"];
                out.object(&client.send_bytes(Method::POST, &path, &which.meant(), Vec::new()).await?)
            }
            Self::Drop(which) => {
                let path = ["dead-letters"];
                out.object(&client.send_bytes(Method::DELETE, &path, &which.meant(), Vec::new()).await?)
            }
        }
    }
}

impl Which {
    fn meant(self) -> Vec<(&'static str, String)> {
        let query = self.filter.query();
        if query.is_empty() && !self.all {
            lacking("select dead letters: a number, --plugin, --topic, --since, or --all");
        }
        query
    }
}
