//! `dim plugin`.

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
pub use install::Waits;
pub use signing::NotSigned;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use crate::ident::Digest;
use crate::plugin;

use super::Global;
use super::client::Client;
use super::output::{Column, Output, Watch, line, note, raw_line};

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

/// Of what a plugin logs.
const LINE: [Column; 4] = [
    Column::time("TIME", "/time"),
    Column::state("LEVEL", "/level"),
    Column::word("VERSION", "/version"),
    Column::text("TEXT", "/text"),
];

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Lists plugins
    Ls {
        #[command(flatten)]
        watch: Watch,
    },
    /// Shows a plugin's manifest: of a running one, or of a file without running it
    Inspect {
        /// A plugin's name, or a component file
        #[arg(value_name = "FILE_OR_NAME")]
        subject: String,
    },
    /// Installs a component: as a new plugin, or in place of what runs under its name
    ///
    /// What it asks for and is not granted is shown, and granted if you agree. What runs is replaced between two
    /// entries, with all that it has. The new code is on probation; if it fails there, the old code goes on as if
    /// it had never come.
    Install {
        /// The component: a file, http(s)://…, /ipfs/CID, or /ipns/NAME, which is followed from then on
        #[arg(value_name = "FILE|URL|/ipfs/CID|/ipns/NAME")]
        from: install::From,
        /// The plugin whose code it is [default: the name in its manifest]
        #[arg(long)]
        name: Option<String>,
        /// The SHA-256 that the component must have, in hex: you vouch for what nobody whom the host trusts has signed
        #[arg(long, value_name = "DIGEST")]
        trust: Option<Digest>,
        /// Grant it all that it asks for, without being asked
        #[arg(long)]
        grant: bool,
        /// Wait until its probation is over
        #[arg(long)]
        wait: bool,
    },
    #[command(flatten)]
    Signing(signing::Command),
    /// Goes back to the component that the config names, or that comes with the host
    Restore {
        /// The plugin
        name: String,
    },
    /// Unloads a plugin once it has handled what has come; its state is kept
    #[command(visible_alias = "rm")]
    Remove {
        /// The plugin
        name: String,
        /// Its state goes too
        #[arg(long)]
        purge: bool,
    },
    /// Has a plugin handle nothing until it is resumed; what comes meanwhile waits
    Pause {
        /// The plugin
        name: String,
    },
    /// Has a plugin go on that was paused
    Resume {
        /// The plugin
        name: String,
    },
    /// Shows what a plugin asks for and may, or changes that
    Grants {
        /// The plugin
        name: String,
        #[command(subcommand)]
        command: Option<grants::Command>,
    },
    /// Shows what has become of the components that were to run as a plugin
    History {
        /// The plugin
        name: String,
        /// How many changes to show, newest first
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Goes back to the code that ran before, with the state from then
    ///
    /// What came since is handled again. What the code that is taken back had sent stays sent.
    Rollback {
        /// The plugin
        name: String,
        /// The version to go back to [default: the one that was confirmed last before what runs]
        #[arg(long, value_name = "VERSION")]
        to: Option<String>,
    },
    /// Shows what a plugin logs from now on
    Log {
        /// The plugin
        name: String,
    },
    #[command(flatten)]
    Author(Author),
    /// Builds a plugin whenever its source changes, replaces it, and shows what becomes of it
    Dev(dev::Dev),
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

/// What an author does, for which no host need run.
#[derive(Debug, Subcommand)]
pub enum Author {
    /// Makes a directory with a plugin that builds
    New(new::New),
    /// Builds a plugin with the tool of its language
    Build(build::Build),
    /// Judges a component without running it
    Check(check::Check),
    /// Runs a plugin's scenarios, or has it handle recorded events, in virtual time
    Test(test::Test),
    /// Runs two versions of a plugin over the same events and shows where what they do differs
    Compare(compare::Compare),
}

impl Author {
    /// Does it.
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

/// Does something and says what, to whom waits at a terminal or reads a log, when it takes longer than a moment.
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

/// Whether a subject names a file rather than a running plugin.
pub fn is_file(subject: &str) -> bool {
    subject.contains(['/', '.'])
}

/// Looks at a file without running it.
pub fn inspect_file(file: &str, out: &Output) -> anyhow::Result<()> {
    let bytes = plugin::read(file.as_ref()).with_context(|| format!("cannot read {file}"))?;
    let inspection = plugin::inspect(&bytes).with_context(|| format!("{file} is not a plugin"))?;
    // One that is not signed well can be looked at all the same.
    let inspection = inspection.clone().signed(&bytes, []).unwrap_or(inspection);
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
                install::install(client, out, install::Wish { from, name, trust, grant, wait }).await
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
                client.events(&["plugins", &name, "log"], |line| rows.row(&serde_json::from_str(line)?)).await
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

/// A plugin's answer has a form of its own: JSON for people too.
fn answer(out: &Output, answer: &Value) -> anyhow::Result<()> {
    match answer {
        Value::Object(_) => out.object(answer),
        other => {
            let text = serde_json::to_string_pretty(other)?;
            // A program may read it all the same.
            let is_for_people = !out.is_json() && std::io::stdout().is_terminal();
            if is_for_people { text.lines().try_for_each(line) } else { raw_line(&text) }
        }
    }
}
