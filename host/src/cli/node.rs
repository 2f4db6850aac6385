//! `dim node`.

use std::path::PathBuf;

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use super::client::Client;
use super::input;
use super::output::{Column, Output, cell, note};

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
        /// Only those with this status: online, suspect, dead, unknown, or a word that a node gives itself
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
    /// Remove a node; the watchdog forgets it, too
    ///
    /// A node that still sends heartbeats comes back with the next one. A node that only a merged registry lists is
    /// removed on the host that publishes that registry. Exit code 3: there is no such node.
    Rm {
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
                let nodes = client.rows(&["nodes"], query, "node_id", limit).await?;
                out.rows(&nodes, &COLUMNS)?;
                if !out.is_json() {
                    notes(&nodes, client).await;
                }
                Ok(())
            }
            Self::Rm { id } => {
                let removed = client.delete(&["nodes", &id]).await?;
                out.object(&removed)?;
                if removed["still_in"].is_string() {
                    note(&format!(
                        "The merged registry {} still lists the node.",
                        cell(removed.get("still_in"))
                    ));
                }
                Ok(())
            }
            Self::Get { id } => out.object(&client.get(&["nodes", &id], &[]).await?),
            Self::Put { file } => {
                let nodes = input::file(&file)?;
                out.object(&client.send_bytes(Method::PUT, &["nodes"], &[], nodes).await?)
            }
        }
    }
}

/// Writes what is wrong with nodes, and with the registry that is merged, below their list.
async fn notes(nodes: &Value, client: &Client) {
    for node in nodes.as_array().into_iter().flatten() {
        let id = cell(node.get("node_id"));
        if let Some(conflict) = node.get("conflict") {
            let (instances, since) = (cell(conflict.get("instances")), cell(conflict.get("since")));
            note(&format!(
                "{id}: several agents have this id since {since} ({instances}); give each its own --node-id"
            ));
        }
        if node.get("ignored").is_some() {
            note(&format!("{id}: ignored in its last heartbeat: {}", cell(node.get("ignored"))));
        }
        if node.get("hint").is_some() {
            note(&format!("{id}: {}", cell(node.get("hint"))));
        }
    }
    // A host before this one does not know the question.
    let Ok(report) = client.get(&["merged-registry"], &[]).await else { return };
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    let (set_aside, incomplete) = (count("set_aside"), count("incomplete"));
    if set_aside + incomplete > 0 {
        let (registry, why) = (cell(report.get("registry")), cell(report.get("reasons")));
        note(&format!(
            "merged registry {registry}: {set_aside} rows set aside, {incomplete} incomplete: {why}"
        ));
    }
}
