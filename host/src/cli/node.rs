//! `dim node`.

use std::path::PathBuf;

use clap::Subcommand;
use reqwest::Method;

use super::client::Client;
use super::input;
use super::output::{Column, Output};

const COLUMNS: [Column; 7] = [
    ("NODE", "/node_id"),
    ("STATUS", "/status"),
    ("LAST SEEN", "/last_seen"),
    ("CPU", "/resources/cpu_available"),
    ("MEMORY", "/resources/memory_available"),
    ("GPU", "/resources/gpu_available"),
    ("MODELS", "/cached_models"),
];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lists nodes
    Ls {
        /// Only those with this status
        #[arg(long)]
        status: Option<String>,
        /// Only those that hold this model
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// Only those with this much memory to spare
        #[arg(long, value_name = "AMOUNT")]
        min_memory: Option<f64>,
        /// Only those with a GPU to spare
        #[arg(long)]
        gpu: bool,
        /// Only those after this one, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// At most this many
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// Shows one node
    Get {
        /// The node
        id: String,
    },
    /// Replaces the registry by the nodes in a file, a JSON array
    Put {
        /// The file
        file: PathBuf,
    },
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Ls { status, model, min_memory, gpu, after, limit } => {
                let min_memory = min_memory.map(|least| least.to_string());
                let gpu = gpu.then(|| "true".to_owned());
                let asked = [
                    ("status", status),
                    ("cached_model", model),
                    ("min_memory", min_memory),
                    ("gpu", gpu),
                    ("after", after),
                ];
                let query = asked.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                out.rows(&client.rows(&["nodes"], query, "node_id", limit).await?, &COLUMNS)
            }
            Self::Get { id } => out.object(&client.get(&["nodes", &id], &[]).await?),
            Self::Put { file } => {
                let nodes = input::file(&file)?;
                out.object(&client.send_bytes(Method::PUT, &["nodes"], &[], nodes).await?)
            }
        }
    }
}
