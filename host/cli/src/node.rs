//! Owns `dim node`: the subcommands for nodes, and their requests to the API.

use std::path::PathBuf;

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use crate::client::Client;
use crate::human;
use crate::input;
use crate::output::{Column, Output, Watch, cell, note};

const COLUMNS: [Column; 7] = [
    Column::word("NODE", "/node_id"),
    Column::state("STATUS", "/status"),
    Column::ago("LAST SEEN", "/last_seen"),
    Column::word("CPU", "/resources/cpu_available"),
    Column::word("MEMORY", "/resources/memory_available"),
    Column::word("GPU", "/resources/gpu_available"),
    Column::word("MODELS", "/cached_models"),
];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List nodes
    Ls {
        /// Select nodes with this status: online, suspect, dead, unknown, or a status that a node reports itself
        #[arg(long)]
        status: Option<String>,
        /// Select nodes that have this model cached
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
        /// Select nodes with at least this much available memory
        #[arg(long, value_name = "AMOUNT")]
        min_memory: Option<f64>,
        /// Select nodes with an available GPU; --gpu=false: nodes without
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
        gpu: Option<bool>,
        /// Start after this node id, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// Maximum number of nodes
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        #[command(flatten)]
        watch: Watch,
    },
    /// Show a node
    Get {
        /// Node id
        id: String,
    },
    /// Remove a node from the registry and the watchdog
    ///
    /// A node that still sends heartbeats reappears with the next heartbeat. Remove a node of a merged registry on the
    /// host that publishes that registry. Exit code 3: the node does not exist.
    Rm {
        /// Node id
        id: String,
    },
    /// Replace the registry with the nodes in a file, a JSON array
    Put {
        /// File with a JSON array of nodes
        file: PathBuf,
    },
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Ls { status, model, min_memory, gpu, after, limit, watch } => {
                let min_memory = min_memory.map(|least| least.to_string());
                let gpu = gpu.map(|gpu| gpu.to_string());
                let asked = [
                    ("status", status),
                    ("cached_model", model),
                    ("min_memory", min_memory),
                    ("gpu", gpu),
                    ("after", after),
                ];
                let query: Vec<_> =
                    asked.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                let nodes = async || Ok(client.rows(&["nodes"], query.clone(), "node_id", limit).await?);
                if watch.is_set() || out.is_json() {
                    return out.list(watch, &COLUMNS, nodes).await;
                }
                let nodes: Value = nodes().await?;
                out.rows(&nodes, &COLUMNS)?;
                notes(&nodes, client).await;
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

/// Writes the problems of the listed nodes and of the merged registry to standard error, below the list.
async fn notes(nodes: &Value, client: &Client) {
    for node in nodes.as_array().into_iter().flatten() {
        let id = cell(node.get("node_id"));
        if let Some(conflict) = node.get("conflict") {
            let (instances, since) = (
                cell(conflict.get("instances")),
                conflict["since"]
                    .as_str()
                    .and_then(human::read)
                    .map_or_else(|| cell(conflict.get("since")), human::time),
            );
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
    // An older host does not have this path.
    let Ok(report) = client.get(&["merged-registry"], &[]).await else { return };
    if report.get("error").is_some() {
        let (registry, why) = (cell(report.get("registry")), cell(report.get("error")));
        note(&format!("merged registry {registry}: the last document cannot be merged: {why}"));
    }
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    let (set_aside, incomplete) = (count("set_aside"), count("incomplete"));
    if set_aside + incomplete > 0 {
        let (registry, why) = (cell(report.get("registry")), cell(report.get("reasons")));
        note(&format!(
            "merged registry {registry}: {set_aside} rows set aside, {incomplete} incomplete: {why}"
        ));
    }
}
