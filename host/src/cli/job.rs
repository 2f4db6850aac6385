//! `dim job`.

use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use crate::api::JobStatus;

use super::client::Client;
use super::input;
use super::output::{Column, Output};

const COLUMNS: [Column; 5] = [
    ("JOB", "/job_id"),
    ("STATUS", "/status"),
    ("NODE", "/node_id"),
    ("NODE DEAD SINCE", "/node_dead/since"),
    ("UPDATED", "/updated_at"),
];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Changes a job and publishes the event
    Update {
        /// The job
        id: String,
        /// What happened: queued, running, completed, failed or cancelled
        event: String,
        /// JSON that goes with the event; a "node_id" in it names the node
        #[arg(long, value_name = "JSON", value_parser = input::json)]
        data: Option<Value>,
        /// The job's result
        #[arg(long, value_name = "JSON", value_parser = input::json)]
        result: Option<Value>,
    },
    /// Shows one job
    Get {
        /// The job
        id: String,
    },
    /// Lists jobs
    Ls {
        /// Only those with this status
        #[arg(long, value_enum)]
        status: Option<JobStatus>,
        /// Only those of this node
        #[arg(long, value_name = "ID")]
        node: Option<String>,
        /// Only those after this one, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// At most so many
        #[arg(long)]
        limit: Option<usize>,
    },
    /// Removes a job
    Rm {
        /// The job
        id: String,
    },
    /// Shows jobs as they change, until interrupted
    Watch,
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Update { id, event, data, result } => {
                let mut body = json!({ "event_type": event });
                for (name, value) in [("data", data), ("result", result)] {
                    if let Some(value) = value {
                        body[name] = value;
                    }
                }
                out.object(&client.send_json(Method::POST, &["jobs", &id, "events"], &[], &body).await?)
            }
            Self::Get { id } => out.object(&client.get(&["jobs", &id], &[]).await?),
            Self::Ls { status, node, after, limit } => {
                let asked = [("status", status.map(input::word)), ("node_id", node), ("after", after)];
                let query = asked.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                out.rows(&client.rows(&["jobs"], query, "job_id", limit).await?, &COLUMNS)
            }
            Self::Rm { id } => out.object(&client.delete(&["jobs", &id]).await?),
            Self::Watch => {
                client
                    .events(&["watch", "jobs"], |data| out.streamed(&serde_json::from_str(data)?, &COLUMNS))
                    .await
            }
        }
    }
}
