//! Owns `dim plugin grants`: shows and changes the requested, granted and denied permissions of a plugin.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, IsTerminal as _};

use anyhow::bail;
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::install;
use crate::client::Client;
use crate::human;
use crate::lacking;
use crate::output::{Output, cell, line, note_piece, notes};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show requested, granted and pending permissions
    Show,
    /// Grant permissions, including denied ones
    Allow {
        /// Grant all requested permissions, including those of a pending component, after a prompt
        #[arg(long)]
        all: bool,
        /// Skip the prompt
        #[arg(long, requires = "all")]
        yes: bool,
        #[command(flatten)]
        what: What,
    },
    /// Deny permissions, even if the config grants them
    Deny {
        /// Discard the pending component
        #[arg(long)]
        pending: bool,
        #[command(flatten)]
        what: What,
    },
    /// Reset grants and denials to those of the config
    Reset,
}

/// Permissions to grant or to deny.
#[derive(Debug, Args)]
pub struct What {
    /// Topic to publish on, or a prefix such as jobs.*
    #[arg(long, value_name = "TOPIC")]
    publish: Vec<String>,
    /// Topic to subscribe to, or a prefix such as jobs.*
    #[arg(long, value_name = "TOPIC")]
    subscribe: Vec<String>,
    /// IPNS key to publish under
    #[arg(long, value_name = "KEY")]
    write: Vec<String>,
    /// IPNS name to read, or a key of this host
    #[arg(long, value_name = "NAME")]
    read: Vec<String>,
    /// IPNS key to share with another publishing plugin; both plugins need this grant
    #[arg(long, value_name = "KEY")]
    share: Vec<String>,
    /// Limit above the default, such as timers=500000
    #[arg(long, value_name = "NAME=VALUE", value_parser = limit)]
    limit: Vec<(String, u64)>,
}

fn limit(text: &str) -> Result<(String, u64), String> {
    let (name, value) = text.split_once('=').ok_or("write it like timers=500000")?;
    Ok((name.to_owned(), value.parse().map_err(|error| format!("{value:?}: {error}"))?))
}

impl What {
    fn as_json(&self) -> Value {
        let Self { publish, subscribe, write, read, share, limit } = self;
        let limits: BTreeMap<_, _> = limit.iter().cloned().collect();
        json!({
            "publish": publish, "subscribe": subscribe, "write": write, "read": read, "share": share,
            "limits": limits,
        })
    }

    fn is_empty(&self) -> bool {
        let Self { publish, subscribe, write, read, share, limit } = self;
        [publish, subscribe, write, read, share].iter().all(|list| list.is_empty()) && limit.is_empty()
    }
}

impl Command {
    pub async fn execute(self, name: &str, client: &Client, out: &Output) -> anyhow::Result<()> {
        let path = ["plugins", name, "grants"];
        let change = match self {
            Self::Show => return show(out, &client.get(&path, &[]).await?),
            Self::Allow { all: false, ref what, .. } if what.is_empty() => {
                lacking("name the permissions to grant, or use --all for all requested ones")
            }
            Self::Deny { pending: false, ref what } if what.is_empty() => {
                lacking("name the permissions to deny, or use --pending to discard the pending component")
            }
            Self::Allow { all: true, yes, what } => {
                // The digest binds the consent to the component that is pending now, and not to a later one.
                let seen = client.get(&path, &[]).await?;
                let pending = &seen["pending"]["digest"];
                let missing = [&seen["unanswered"], &seen["pending"]["missing"]];
                let missing: Vec<&Value> =
                    missing.into_iter().filter_map(Value::as_array).flatten().collect();
                if !missing.is_empty() && !yes {
                    match agrees(name, &json!(missing))? {
                        Some(true) => {}
                        Some(false) => bail!("nothing is granted"),
                        None => lacking(
                            "there is no terminal for a prompt: read `show` first, then use --all --yes",
                        ),
                    }
                }
                json!({ "all": true, "allow": what.as_json(), "pending": pending })
            }
            Self::Allow { all: false, what, .. } => json!({ "allow": what.as_json() }),
            Self::Deny { pending, what } => json!({ "refuse-pending": pending, "deny": what.as_json() }),
            Self::Reset => json!({ "reset": true }),
        };
        let changed = client.send_json(Method::POST, &path, &[], &change);
        show(out, &install::told(client, out, Some(name), changed).await?)
    }
}

fn show(out: &Output, granted: &Value) -> anyhow::Result<()> {
    if out.is_json() {
        return out.object(granted);
    }
    let lists = ["publish", "subscribe", "write", "read", "share"];
    for (title, of) in [("asks to", "/asks"), ("may", "/granted"), ("may not", "/denied")] {
        for verb in lists {
            let words = granted.pointer(&format!("{of}/{verb}"));
            if words.and_then(Value::as_array).is_some_and(|words| !words.is_empty()) {
                line(&format!("{:<9}{verb:<11}{}", title, cell(words)))?;
            }
        }
        let limits = granted.pointer(&format!("{of}/limits")).and_then(Value::as_object);
        for (limit, value) in limits.into_iter().flatten() {
            line(&format!("{:<9}{:<11}{limit} = {value}", title, "have"))?;
        }
    }
    for missing in granted["missing"].as_array().into_iter().flatten() {
        line(&format!("{:<9}{}", "missing", cell(Some(missing))))?;
    }
    if let Some(pending) = granted.get("pending") {
        let part = |name: &str| cell(pending.get(name));
        let since =
            pending["since"].as_str().and_then(human::read).map_or_else(|| part("since"), human::time);
        line(&format!(
            "{:<9}{} from {}, since {}: it asks to {}",
            "waits",
            part("version"),
            part("source"),
            since,
            part("missing")
        ))?;
    }
    if let Some(change) = granted.get("change") {
        line(&format!("{:<9}{}", "change", cell(change.get("state"))))?;
    }
    Ok(())
}

/// Asks the user whether to grant the missing permissions to a plugin. Returns none if there is no terminal.
pub fn agrees(plugin: &str, missing: &Value) -> io::Result<Option<bool>> {
    let words = missing.as_array().into_iter().flatten().map(|words| format!("\n  - {}", cell(Some(words))));
    asks(&format!("{} asks to{}", cell(Some(&json!(plugin))), words.collect::<String>()), "Grant it?")
}

/// Writes `about`, then asks the user a question. Returns none if there is no terminal.
pub fn asks(about: &str, question: &str) -> io::Result<Option<bool>> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(None);
    }
    notes(about);
    note_piece(&format!("{question} [y/N] "));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(Some(["y", "yes"].contains(&answer.trim().to_lowercase().as_str())))
}
