//! Owns `dim plugin`: the subcommands for plugins, and their requests to the API.

mod build;
mod check;
mod compare;
mod dev;
mod fingerprint;
mod grants;
mod install;
mod new;
mod signing;
mod test;
mod watch;

pub use check::Unfit;
pub use grants::asks;
pub use install::Waits;
pub use signing::NotSigned;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Subcommand;
use dim_model::ident::Digest;
use reqwest::Method;
use serde_json::{Value, json};

use crate::Global;
use crate::client::Client;
use crate::output::{Column, Output, Watch, line, note, raw_line};

const COLUMNS: [Column; 13] = [
    Column::word("PLUGIN", "/name"),
    Column::word("VERSION", "/version"),
    Column::state("STATE", "/state"),
    Column::state("CHANGE", "/change/state"),
    Column::ago("SINCE", "/change_since"),
    Column::word("WAITS", "/pending/version"),
    Column::word("TAKEN BACK", "/taken_back/after/version"),
    Column::word("HANDLED", "/handled"),
    Column::word("FAILURES", "/failures"),
    Column::word("DEAD", "/dead_letters"),
    Column::word("BEHIND", "/behind"),
    Column::word("LIMITS MET", "/met"),
    Column::text("REASON", "/reason"),
];

const CHANGES: [Column; 7] = [
    Column::time("TIME", "/steps/0/at"),
    Column::word("FROM", "/before/version"),
    Column::word("TO", "/after/version"),
    Column::state("STATE", "/state"),
    Column::word("BY", "/by"),
    Column::word("SOURCE", "/source"),
    Column::text("REASON", "/reason"),
];

/// The columns of a plugin's log lines.
const LINE: [Column; 4] = [
    Column::time("TIME", "/time"),
    Column::state("LEVEL", "/level"),
    Column::word("VERSION", "/version"),
    Column::text("TEXT", "/text"),
];

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// List plugins
    Ls {
        #[command(flatten)]
        watch: Watch,
    },
    /// Show the manifest of a running plugin, or of a component file without running it
    Inspect {
        /// Plugin name, or component file
        #[arg(value_name = "FILE_OR_NAME")]
        subject: String,
    },
    /// Install a component as a new plugin, or replace the running plugin of its name
    ///
    /// The command shows the requested permissions that are not granted yet, and grants them if you agree. The host
    /// replaces a running plugin between two entries and keeps its state. The new code starts on probation. If it fails
    /// on probation, the host rolls back to the old code and its state.
    Install {
        /// Component: a file, http(s)://…, /ipfs/CID, or /ipns/NAME, which the host follows from then on
        #[arg(value_name = "FILE|URL|/ipfs/CID|/ipns/NAME")]
        from: install::ComponentLocation,
        /// Plugin name [default: the name in the manifest]
        #[arg(long)]
        name: Option<String>,
        /// Required SHA-256 of the component, in hex; trusts a component without a trusted signature
        #[arg(long, value_name = "DIGEST")]
        trust: Option<Digest>,
        /// Grant all requested permissions without a prompt
        #[arg(long)]
        grant: bool,
        /// Wait until the probation ends
        #[arg(long)]
        wait: bool,
    },
    #[command(flatten)]
    Signing(signing::Command),
    /// Restore the component that the config names or that is bundled with the host
    Restore {
        /// Plugin name
        name: String,
    },
    /// Remove a plugin after it has handled its queue; keep its state
    #[command(visible_alias = "rm")]
    Remove {
        /// Plugin name
        name: String,
        /// Delete the state of the plugin
        #[arg(long)]
        purge: bool,
    },
    /// Pause a plugin; its events wait until it is resumed
    Pause {
        /// Plugin name
        name: String,
    },
    /// Resume a paused or quarantined plugin
    Resume {
        /// Plugin name
        name: String,
    },
    /// Show or change requested and granted permissions
    Grants {
        /// Plugin name
        name: String,
        #[command(subcommand)]
        command: Option<grants::Command>,
    },
    /// Show the installations, replacements and rollbacks of a plugin
    History {
        /// Plugin name
        name: String,
        /// Maximum number of changes, newest first
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Roll back to an earlier version with the state from then
    ///
    /// The earlier version handles the events since then again. Messages that the newer version has sent remain sent.
    Rollback {
        /// Plugin name
        name: String,
        /// Target version [default: the last confirmed version before the running one]
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
    },
    /// Follow the log of a plugin
    Log {
        /// Plugin name
        name: String,
    },
    #[command(flatten)]
    Author(Author),
    /// Rebuild and replace a plugin whenever its source changes, and show the result
    Dev(dev::Dev),
    /// Send a command to a plugin
    Command {
        /// Plugin name
        name: String,
        /// Method
        method: String,
        /// Body
        #[arg(default_value = "{}")]
        json: String,
    },
    /// Send a query to a plugin
    Query {
        /// Plugin name
        name: String,
        /// Method
        method: String,
        /// Body
        #[arg(default_value = "{}")]
        json: String,
    },
}

/// The commands for authors of plugins. They need no running host.
#[derive(Debug, Subcommand)]
pub enum Author {
    /// Create a plugin from a template
    New(new::New),
    /// Build a plugin with the tool of its language
    Build(build::Build),
    /// Check a component without running it
    Check(check::Check),
    /// Run the scenarios of a plugin, or replay recorded events, in virtual time
    Test(test::Test),
    /// Run two versions of a plugin on the same events and show the differences
    Compare(compare::Compare),
}

impl Author {
    /// Runs the command.
    pub fn execute(self, global: &Global) -> anyhow::Result<()> {
        let out = &global.out();
        match self {
            Self::New(new) => new.execute(out),
            Self::Build(build) => build.execute(out),
            Self::Check(check) => check.execute(out),
            Self::Test(test) => test.execute(out),
            Self::Compare(compare) => compare.execute(global),
        }
    }
}

/// Calls `does` on a separate thread and returns its result. After one second it writes `what` to standard error, and
/// at the end the duration. A panic of `does` continues on the calling thread.
fn told_if_slow<R: Send>(what: &str, does: impl FnOnce() -> R + Send) -> R {
    let begun = Instant::now();
    let result = std::thread::scope(|scope| {
        let doing = scope.spawn(does);
        let mut is_told = false;
        while !doing.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
            if !is_told && begun.elapsed() > Duration::from_secs(1) {
                note(&format!("{what} …"));
                is_told = true;
            }
        }
        doing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    if begun.elapsed() > Duration::from_secs(1) {
        note(&format!("{what}: {:.1} s", begun.elapsed().as_secs_f64()));
    }
    result
}

/// Whether a subject is the path of a file and not the name of a running plugin.
pub fn is_file(subject: &str) -> bool {
    subject.contains(['/', '.'])
}

/// Shows the manifest of a component file without running it.
pub fn inspect_file(file: &str, out: &Output) -> anyhow::Result<()> {
    let bytes = dim_runtime::read(file.as_ref()).with_context(|| format!("cannot read {file}"))?;
    let inspection = dim_runtime::inspect(&bytes).with_context(|| format!("{file} is not a plugin"))?;
    // A component with an invalid signature is shown without its signer.
    let inspection = inspection.clone().signed(&bytes, []).unwrap_or(inspection);
    out.object(&flat(&json!(inspection)))
}

/// Moves the members of the manifest to the top level of the inspection.
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
            Self::Ls { watch } => {
                out.list(watch, &COLUMNS, async || Ok(client.get(&["plugins"], &[]).await?)).await
            }
            Self::Inspect { subject } => {
                let plugin = client.get(&["plugins", &subject], &[]).await?;
                out.object(&flat(&plugin["inspection"]))
            }
            Self::Signing(command) => command.execute(out),
            Self::Author(_) => unreachable!("handled without a client"),
            Self::Install { from, name, trust, grant, wait } => {
                install::install(client, out, install::InstallRequest { from, name, trust, grant, wait })
                    .await
            }
            Self::Restore { name } => {
                let path = ["plugins", name.as_str(), "restore"];
                install::show(out, install::told(client, out, Some(&name), client.post(&path)).await?)
            }
            Self::Remove { name, purge } => {
                let query = [("purge", purge.to_string())];
                let path = ["plugins", name.as_str()];
                install::show(out, client.send_bytes(Method::DELETE, &path, &query, Vec::new()).await?)
            }
            Self::Pause { name } => install::show(out, client.post(&["plugins", &name, "pause"]).await?),
            Self::Resume { name } => install::show(out, client.post(&["plugins", &name, "resume"]).await?),
            Self::Grants { name, command } => {
                command.unwrap_or(grants::Command::Show).execute(&name, client, out).await
            }
            Self::History { name, limit } => {
                let query = [("limit", limit.to_string())];
                out.rows(&client.get(&["plugins", &name, "history"], &query).await?, &CHANGES)
            }
            Self::Rollback { name, to } => {
                let query: Vec<_> = to.into_iter().map(|to| ("to", to)).collect();
                let path = ["plugins", name.as_str(), "rollback"];
                out.object(&client.send_bytes(Method::POST, &path, &query, Vec::new()).await?)
            }
            Self::Log { name } => {
                let mut rows = out.stream(&LINE);
                client
                    .events(&["plugins", &name, "log"], &[], |line| rows.row(&serde_json::from_str(line)?))
                    .await
            }
            Self::Dev(dev) => dev.execute(client, out).await,
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

/// Writes the answer of a plugin. Only an object is shown as a table; any other value is JSON for people too.
fn answer(out: &Output, answer: &Value) -> anyhow::Result<()> {
    match answer {
        Value::Object(_) => out.object(answer),
        other => {
            let text = serde_json::to_string_pretty(other)?;
            // Outside a terminal a program may read the output, so it stays unescaped.
            let is_for_people = !out.is_json() && std::io::stdout().is_terminal();
            if is_for_people { text.lines().try_for_each(line) } else { raw_line(&text) }
        }
    }
}
