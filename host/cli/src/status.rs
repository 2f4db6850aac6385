//! Owns `dim status`: shows the state of the host, or acknowledges warnings.

use anstyle::Style;
use clap::Args;
use serde_json::Value;

use crate::client::Client;
use crate::human;
use crate::output::{BAD, DOUBTFUL, GOOD, Output, cell, line, styled, styled_line};

#[derive(Debug, Args)]
pub struct Status {
    /// Acknowledge the warnings about past events: hide them until the next such event, and list them
    #[arg(long)]
    acknowledge: bool,
}

impl Status {
    /// Shows the status, or acknowledges the warnings about past events. Fails if the host reports an error.
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        if self.acknowledge {
            return acknowledge(client, out).await;
        }
        let status = client.get(&["status"], &[]).await?;
        match out.is_json() {
            true => out.object(&status)?,
            false => show(&status)?,
        }
        match status["healthy"].as_bool() {
            Some(false) => Err(NotWell.into()),
            _ => Ok(()),
        }
    }
}

async fn acknowledge(client: &Client, out: &Output) -> anyhow::Result<()> {
    let past = client.post(&["status", "acknowledge"]).await?;
    let troubles = past.as_array().map_or(&[][..], Vec::as_slice);
    match troubles {
        _ if out.is_json() => out.object(&past),
        [] => line("there are no past events to acknowledge"),
        troubles => {
            let told =
                troubles.iter().map(|trouble| format!("acknowledged: {}", cell(trouble.get("message"))));
            told.into_iter().try_for_each(|told| line(&told))
        }
    }
}

/// The error for a host that answers and has a health finding of severity error.
#[derive(Debug, thiserror::Error)]
#[error("the host has errors")]
pub struct NotWell;

fn show(status: &Value) -> anyhow::Result<()> {
    let text = |pointer: &str| match status.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => "-".to_owned(),
        Some(other) => other.to_string(),
    };
    let verdict = match (status["healthy"] == true, has_troubles(status)) {
        (true, false) => styled(GOOD, "all is well"),
        (true, true) => styled(DOUBTFUL, "well, with warnings:"),
        (false, _) => styled(BAD, "not all is well:"),
    };
    styled_line(&format!("{}, {verdict}", styled(Style::new(), &format!("dim {}", text("/version")))))?;
    for trouble in status["trouble_details"].as_array().into_iter().flatten() {
        let style = if trouble["severity"] == "error" { BAD } else { DOUBTFUL };
        styled_line(&format!("  {} {}", styled(style, "!"), cell(trouble.get("message"))))?;
    }
    if status["trouble_details"].as_array().is_some_and(|all| all.iter().any(|it| it["past"] == true)) {
        line("  Past events are shown until `dim status --acknowledge`.")?;
    }
    let started = status["started"].as_str().and_then(human::read).map_or_else(
        || text("/started"),
        |started| format!("{} ({})", human::time(started), human::ago(started, jiff::Timestamp::now())),
    );
    for (label, value) in [
        ("host", text("/id")),
        ("started", format!("{started}, in {} ms", text("/start_took_ms"))),
        ("state", text("/state_dir")),
        ("backend", format!("{}, {}", text("/backend/name"), text("/backend/address"))),
        ("log", format!("{} entries, the first held is {}", text("/log/head"), text("/log/first"))),
        ("disk", disk(status)),
        ("outbox", format!("{} waiting", text("/outbox/waiting"))),
        ("dead letters", format!("{}, {} dropped", text("/dead_letters"), text("/dead_letters_dropped"))),
        ("plugins", text("/plugins")),
    ] {
        line(&format!("{label:<14}{value}"))?;
    }
    for name in status["names"].as_array().into_iter().flatten() {
        let member = |key: &str| name[key].as_str().unwrap_or("-").to_owned();
        let state = match () {
            () if !name["hold"].is_null() => "on hold",
            () if name["published"] == true => "published",
            () => "waiting to be published",
        };
        let limit = name["document_limit"].as_u64().map_or("-".to_owned(), human::size);
        let size = name["document_bytes"]
            .as_u64()
            .map_or(String::new(), |bytes| format!(", {} of {limit}", human::size(bytes)));
        line(&format!("{:<14}{} = /ipns/{}, {state}{size}", "name", member("key"), member("name")))?;
    }
    Ok(())
}

/// The size of the store and its maximum, and the free space of the disk and its minimum.
fn disk(status: &Value) -> String {
    let bytes = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let held: u64 = status
        .pointer("/disk/held_bytes")
        .and_then(Value::as_object)
        .map_or(0, |parts| parts.values().filter_map(Value::as_u64).sum());
    let (free, min_free) = (bytes("/disk/free_bytes"), bytes("/disk/min_free_bytes"));
    let most = match status.pointer("/disk/max_held_bytes").and_then(Value::as_u64) {
        Some(most) => format!(" of {}", human::size(most)),
        None => String::new(),
    };
    let [held, free, min_free] = [held, free, min_free].map(human::size);
    format!("the store holds {held}{most}; {free} of the disk are free, the minimum is {min_free}")
}

fn has_troubles(status: &Value) -> bool {
    status["troubles"].as_array().is_some_and(|troubles| !troubles.is_empty())
}
