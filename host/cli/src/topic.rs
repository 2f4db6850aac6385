//! Owns `dim topic`: the subcommands for pubsub topics, and their requests to the API.

use clap::Subcommand;
use dim_model::beginning::ReadFrom;
use reqwest::Method;
use serde_json::Value;

use crate::client::Client;
use crate::input;
use crate::output::{Column, Output, Watch, line};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish a message
    Pub {
        /// Topic
        topic: String,
        /// Message; @FILE reads a file, - reads standard input
        data: String,
    },
    /// Show messages as they arrive, until interrupted
    Sub {
        /// Topic
        topic: String,
        /// First message: head (the next one), earliest (all in the host's log), a time or a duration before now
        ///
        /// On a reliable topic that nobody else listens to, the host reads what the writers keep. Examples: 2h,
        /// 2026-01-31T12:00:00Z
        #[arg(long, value_name = "FROM", default_value = "head")]
        from: ReadFrom,
    },
    /// List the topics that the host is subscribed to
    Ls {
        #[command(flatten)]
        watch: Watch,
    },
    /// List the writers of a reliable topic, and how far they were received
    ///
    /// Each line is one incarnation of a writer: one start of its process. LAG is the number of published events that
    /// this host does not have yet. REPAIRED is the number of bundles that were fetched because their message was lost.
    /// `--output json` also has the positions of the other hosts. Example: dim topic writers dim.jobs.updates
    Writers {
        /// Topic
        topic: String,
        #[command(flatten)]
        watch: Watch,
    },
    /// List the alarms about writers of reliable topics, the newest first
    ///
    /// An alarm says that a writer was copied, was restored from a backup, has lost events, or misbehaves. `dim status`
    /// shows those that the operator has not acknowledged. Example: dim topic alarms dim.jobs.updates
    Alarms {
        /// Topic; without it the alarms of all topics are listed
        topic: Option<String>,
        #[command(flatten)]
        watch: Watch,
    },
    /// List the peers of a topic
    Peers {
        /// Topic
        topic: String,
    },
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Pub { topic, data } => {
                let data = read(&data)?;
                client.send_bytes(Method::POST, &["topics", &topic, "messages"], &[], data).await?;
                Ok(())
            }
            Self::Sub { topic, from } => {
                const COLUMNS: [Column; 4] = [
                    Column::time("TIME", "/time"),
                    Column::word("ORIGIN", "/origin"),
                    Column::word("FROM", "/from"),
                    Column::text("DATA", "/data"),
                ];
                let mut rows = out.stream(&COLUMNS);
                let path = ["topics", topic.as_str(), "messages"];
                let query = [("from", from.text())];
                let told = client.events(&path, &query, |data| {
                    let mut message: Value = serde_json::from_str(data)?;
                    // Data that is not UTF-8 arrives as multibase. The table has one column for both.
                    if let Some(data) = message.get("data_multibase").filter(|_| !out.is_json()).cloned() {
                        message["data"] = data;
                    }
                    rows.row(&message)
                });
                told.await
            }
            Self::Ls { watch } => {
                const COLUMNS: [Column; 6] = [
                    Column::word("TOPIC", "/topic"),
                    Column::word("DELIVERY", "/delivery"),
                    Column::word("PEERS", "/peers"),
                    Column::word("REFUSED", "/refused"),
                    Column::ago("CONNECTED SINCE", "/connected_since"),
                    Column::ago("LISTENING PROVEN UNTIL", "/listening_proven_until"),
                ];
                out.list(watch, &COLUMNS, async || Ok(client.get(&["topics"], &[]).await?)).await
            }
            Self::Writers { topic, watch } => {
                const COLUMNS: [Column; 10] = [
                    Column::word("WRITER", "/writer"),
                    Column::word("OWN", "/is_own"),
                    Column::word("MIRRORED", "/is_mirrored"),
                    Column::word("INCARNATION", "/incarnation"),
                    Column::word("PUBLISHED", "/published"),
                    Column::word("RECEIVED", "/received"),
                    Column::word("LAG", "/lag"),
                    Column::word("REPAIRED", "/repaired"),
                    Column::word("GAPS", "/gaps"),
                    Column::text("LAG OF READERS", "/reader_lags"),
                ];
                let path = ["topics", topic.as_str(), "writers"];
                out.list(watch, &COLUMNS, async || {
                    let mut writers = client.get(&path, &[]).await?;
                    if !out.is_json() {
                        writers.as_array_mut().into_iter().flatten().for_each(name_lags);
                    }
                    Ok(writers)
                })
                .await
            }
            Self::Alarms { topic, watch } => {
                const COLUMNS: [Column; 6] = [
                    Column::ago("RAISED", "/at"),
                    Column::word("TOPIC", "/topic"),
                    Column::word("WRITER", "/writer"),
                    Column::word("OWN", "/is_own"),
                    Column::word("ACKNOWLEDGED", "/is_acknowledged"),
                    Column::text("FINDING", "/finding"),
                ];
                let query: Vec<_> = topic.map(|topic| ("topic", topic)).into_iter().collect();
                out.list(watch, &COLUMNS, async || Ok(client.get(&["alarms"], &query).await?)).await
            }
            Self::Peers { topic } => {
                let peers = client.get(&["topics", &topic, "peers"], &[]).await?;
                match peers.as_array() {
                    Some(list) if !out.is_json() => list.iter().filter_map(Value::as_str).try_for_each(line),
                    _ => out.rows(&peers, &[]),
                }
            }
        }
    }
}

/// Adds the lag of each reader of a writer, for a table. The end of an id distinguishes members.
fn name_lags(writer: &mut Value) {
    let readers = writer["readers"].as_array().into_iter().flatten();
    let lag = |reader: &Value| {
        let member = reader["member"].as_str().unwrap_or_default();
        let end = member.char_indices().rev().nth(7).map_or(0, |(at, _)| at);
        format!("…{} {}", &member[end..], reader["lag"])
    };
    writer["reader_lags"] = readers.map(lag).collect::<Vec<_>>().join(", ").into();
}

/// Reads the data of a message: the argument itself, the file after an `@`, or standard input for `-`.
fn read(data: &str) -> anyhow::Result<Vec<u8>> {
    match data.strip_prefix('@') {
        Some(file) => input::file(file.as_ref()),
        None if data == "-" => input::standard_input(),
        None => Ok(data.as_bytes().to_vec()),
    }
}
