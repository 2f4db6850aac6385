//! `dim plugin`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use crate::plugin;

use super::client::Client;
use super::output::{Column, Output};

const COLUMNS: [Column; 8] = [
    ("PLUGIN", "/name"),
    ("VERSION", "/version"),
    ("STATE", "/state"),
    ("HANDLED", "/handled"),
    ("FAILURES", "/failures"),
    ("DEAD", "/dead_letters"),
    ("BEHIND", "/behind"),
    ("REASON", "/reason"),
];

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Lists plugins
    Ls,
    /// Shows a plugin's manifest: of a running one, or of a file without running it
    Inspect {
        /// A plugin's name, or a component file
        #[arg(value_name = "FILE_OR_NAME")]
        subject: String,
    },
    /// Replaces a running plugin's code by a component
    Install {
        /// The component
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The plugin whose code it is [default: the name in its manifest]
        #[arg(long)]
        name: Option<String>,
    },
    /// Gives an order to a plugin
    Command {
        /// The plugin
        name: String,
        /// Which order
        method: String,
        /// Its body
        #[arg(default_value = "{}")]
        json: String,
    },
    /// Asks a plugin a question
    Query {
        /// The plugin
        name: String,
        /// Which question
        method: String,
        /// Its body
        #[arg(default_value = "{}")]
        json: String,
    },
}

/// Whether a subject names a file rather than a running plugin.
pub fn is_file(subject: &str) -> bool {
    subject.contains(['/', '.'])
}

/// Looks at a file without running it.
pub fn inspect_file(file: &str, out: &Output) -> anyhow::Result<()> {
    let bytes = plugin::read(file.as_ref()).with_context(|| format!("cannot read {file}"))?;
    let inspection = plugin::inspect(&bytes).with_context(|| format!("{file} is not a plugin"))?;
    out.object(&flat(&json!(inspection)))
}

/// The manifest's members beside the file's.
fn flat(inspection: &Value) -> Value {
    let mut flat = inspection.clone();
    if let Some(members) = flat.as_object_mut()
        && let Some(Value::Object(manifest)) = members.remove("manifest")
    {
        members.extend(manifest);
    }
    flat
}

impl PluginCommand {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Ls => out.rows(&client.get(&["plugins"], &[]).await?, &COLUMNS),
            Self::Inspect { subject } => {
                let plugin = client.get(&["plugins", &subject], &[]).await?;
                out.object(&flat(&plugin["inspection"]))
            }
            Self::Install { file, name } => install(client, out, &file, name).await,
            Self::Command { name, method, json } => {
                let path = ["plugins", name.as_str(), "commands", method.as_str()];
                answer(out, &client.send_bytes(Method::POST, &path, &[], json.into_bytes()).await?)
            }
            Self::Query { name, method, json } => {
                let path = ["plugins", name.as_str(), "queries", method.as_str()];
                answer(out, &client.send_bytes(Method::POST, &path, &[], json.into_bytes()).await?)
            }
        }
    }
}

/// Sends a component; the host judges, compiles and rehearses it before it takes over.
async fn install(client: &Client, out: &Output, file: &Path, name: Option<String>) -> anyhow::Result<()> {
    let shown = file.display();
    let component = plugin::read(file).with_context(|| format!("cannot read {shown}"))?;
    let inspection = plugin::inspect(&component).with_context(|| format!("{shown} is not a plugin"))?;
    let name = name.unwrap_or_else(|| inspection.manifest.name.to_string());
    if std::io::stderr().is_terminal() {
        let kib = component.len() >> 10;
        eprintln!("{kib} KiB of {name} {}: compiling and trying it out …", inspection.manifest.version);
    }
    let query = [("source", shown.to_string())];
    let path = ["plugins", name.as_str(), "component"];
    out.object(&client.send_bytes(Method::PUT, &path, &query, component).await?)
}

/// A plugin's answer has a form of its own: JSON for people too.
fn answer(out: &Output, answer: &Value) -> anyhow::Result<()> {
    match answer {
        Value::Object(_) => out.object(answer),
        other => super::output::line(&serde_json::to_string_pretty(other)?),
    }
}
