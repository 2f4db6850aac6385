//! `dim dead`.

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use super::client::Client;
use super::output::{Column, Output};

const COLUMNS: [Column; 6] = [
    ("ID", "/id"),
    ("PLUGIN", "/plugin"),
    ("TIME", "/time"),
    ("KIND", "/kind"),
    ("ATTEMPTS", "/attempts"),
    ("REASON", "/reason"),
];

/// Letters that the API gives at a time.
const PAGE: usize = 1_000;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists dead letters
    Ls {
        /// Only those of this plugin
        #[arg(long)]
        plugin: Option<String>,
        /// Only those after this number, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<u64>,
        /// At most so many, 1,000 at a time
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Shows one, with the event and the plugin's log
    Show {
        /// Its number
        id: u64,
    },
    /// Gives the event to its plugin again
    Replay {
        /// Its number
        id: u64,
    },
    /// Forgets one
    Drop {
        /// Its number
        id: u64,
    },
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Ls { plugin, after, limit } => {
                let mut query = vec![("limit", limit.to_string())];
                query.extend(plugin.map(|plugin| ("plugin", plugin)));
                query.extend(after.map(|after| ("after", after.to_string())));
                let letters = client.get(&["dead-letters"], &query).await?;
                out.rows(&letters, &COLUMNS)?;
                let page = letters.as_array().map_or(&[][..], Vec::as_slice);
                if let Some(last) = page.last().filter(|_| page.len() >= limit.min(PAGE)) {
                    eprintln!("There may be more: --after {}", last["id"]);
                }
                Ok(())
            }
            Self::Show { id } => out.object(&client.get(&["dead-letters", &id.to_string()], &[]).await?),
            Self::Replay { id } => {
                let path = ["dead-letters", &id.to_string(), "replay"];
                client.send_json(Method::POST, &path, &[], &Value::Null).await?;
                Ok(())
            }
            Self::Drop { id } => {
                client.delete(&["dead-letters", &id.to_string()]).await.map(drop).map_err(Into::into)
            }
        }
    }
}
