//! Owns `dim job`: the subcommands for jobs, and their requests to the API.

use clap::Subcommand;
use dim_api::JobStatus;
use reqwest::Method;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::client::Client;
use crate::input;
use crate::output::{Column, Output, Watch, cell, note};

const COLUMNS: [Column; 5] = [
    Column::word("JOB", "/job_id"),
    Column::state("STATUS", "/status"),
    Column::word("NODE", "/node_id"),
    Column::ago("NODE DEAD SINCE", "/node_dead/since"),
    Column::ago("UPDATED", "/updated_at"),
];

/// The columns of `dim job watch`.
const CHANGES: [Column; 5] = [
    Column::time("TIME", "/updated_at"),
    Column::state("STATUS", "/status"),
    Column::word("JOB", "/job_id"),
    Column::word("NODE", "/node_id"),
    Column::time("NODE DEAD SINCE", "/node_dead/since"),
];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Update a job and publish the event
    Update {
        /// Job id
        id: String,
        /// Event type: queued, running, completed, failed or cancelled
        event: String,
        /// Data of the event, as JSON; its member "node_id" names the node
        #[arg(long, value_name = "JSON", value_parser = input::json::<Box<RawValue>>)]
        data: Option<Box<RawValue>>,
        /// Result of the job, as JSON
        #[arg(long, value_name = "JSON", value_parser = input::json::<Box<RawValue>>)]
        result: Option<Box<RawValue>>,
    },
    /// Show a job
    Get {
        /// Job id
        id: String,
    },
    /// List jobs
    Ls {
        /// Select jobs with this status
        #[arg(long, value_enum)]
        status: Option<JobStatus>,
        /// Select jobs on this node
        #[arg(long, value_name = "ID")]
        node: Option<String>,
        /// Start after this job id, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// Maximum number of jobs
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        #[command(flatten)]
        watch: Watch,
    },
    /// Remove a job
    Rm {
        /// Job id
        id: String,
    },
    /// Show jobs as they change, until interrupted
    Watch,
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Update { id, event, data, result } => {
                let body = JobEvent { event_type: &event, data, result };
                out.object(&client.send_json(Method::POST, &["jobs", &id, "events"], &[], &body).await?)
            }
            Self::Get { id } => out.object(&client.get(&["jobs", &id], &[]).await?),
            Self::Ls { status, node, after, limit, watch } => {
                let asked = [("status", status.map(input::word)), ("node_id", node), ("after", after)];
                let query: Vec<_> =
                    asked.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
                let list = async || Ok(client.rows(&["jobs"], query.clone(), "job_id", limit).await?);
                let is_alone = watch.is_set() || out.is_json();
                out.list(watch, &COLUMNS, list).await?;
                if !is_alone {
                    notes(client).await;
                }
                Ok(())
            }
            Self::Rm { id } => out.object(&client.delete(&["jobs", &id]).await?),
            Self::Watch => {
                let mut rows = out.stream(&CHANGES);
                client.events(&["watch", "jobs"], &[], |data| rows.row(&serde_json::from_str(data)?)).await
            }
        }
    }
}

/// The body of a job event.
#[derive(Serialize)]
struct JobEvent<'a> {
    event_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<RawValue>>,
}

/// Writes the problems and the differences of merged jobs of other hosts to standard error, below the list.
async fn notes(client: &Client) {
    // An older host does not have this path.
    let Ok(reports) = client.get(&["merged-jobs"], &[]).await else { return };
    for report in reports.as_array().into_iter().flatten() {
        let word = |name: &str| cell(report.get(name));
        if report.get("error").is_some() {
            note(&format!("{}: the jobs cannot be merged: {}", word("name"), word("error")));
        }
        let count = |name: &str| report[name].as_u64().unwrap_or(0);
        if count("refused") + count("incomplete") > 0 {
            note(&format!(
                "{}: {} rows are left out, {} are merged without their unreadable members",
                word("name"),
                count("refused"),
                count("incomplete")
            ));
        }
        if report.get("differs_since").is_some() {
            note(&format!(
                "{}: since {} it misses {} of these jobs, and has an earlier state of {} (such as {})",
                word("name"),
                word("differs_since"),
                word("missing_there"),
                word("behind_there"),
                word("examples")
            ));
        }
    }
}
