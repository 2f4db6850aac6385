//! Owns `dim config`: checks a config file, and asks a running host to reload its config file.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use dim_server::config::findings::{Finding, Severity};
use dim_server::host::check_config;
use serde_json::json;

use crate::client::Client;
use crate::output::{Column, Output, line, note};

/// The environment variable with the config file of `dim run`.
pub const CONFIG: &str = "DIM_CONFIG";

const COLUMNS: [Column; 5] = [
    Column::state("SEVERITY", "/severity"),
    Column::word("LINE", "/line"),
    Column::word("COLUMN", "/column"),
    Column::text("KEY", "/path"),
    Column::text("FINDING", "/message"),
];

/// The placeholder for the host's id, because `dim config check` has no host.
const NO_HOST: &str = "host";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a config file without starting anything
    ///
    /// The command shows all errors and warnings at once, with their lines. It reads the secrets, components and
    /// folders that the file names, and does not use the network. Exit code 0: no errors and no warnings. Exit code 1:
    /// at least one. Sections of other programs are notes. Example: dim config check /etc/dim/config.yaml
    Check {
        /// Config file, YAML [default: the file that DIM_CONFIG names, as for `dim run` without --config]
        #[arg(value_name = "FILE", env = CONFIG)]
        file: Option<PathBuf>,
    },
    /// Reload the config file of the running host
    ///
    /// The command shows the changed keys that are in effect, and those that need a restart. If the file has an error,
    /// nothing changes and the exit code is 5. SIGHUP does the same. Example: dim config reload
    Reload,
}

/// The error for a config file with errors or warnings.
#[derive(Debug, thiserror::Error)]
#[error("{file}: errors: {errors}, warnings: {warnings}")]
struct Suspicious {
    file: String,
    errors: usize,
    warnings: usize,
}

/// Checks a config file, or the defaults if there is none, and shows the findings. Fails if there is an error or a
/// warning.
pub fn check(file: Option<&Path>, out: &Output) -> anyhow::Result<()> {
    let text = file.map(dim_server::config::read_text).transpose()?.unwrap_or_default();
    let findings = check_config(&text, NO_HOST).findings;
    let count = |severity| findings.iter().filter(|it: &&Finding| it.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let shown = file.map(|file| file.display().to_string());
    if out.is_json() {
        out.object(&json!({ "file": shown, "errors": errors, "warnings": warnings, "findings": findings }))?;
    } else if !findings.is_empty() {
        out.rows(&json!(findings), &COLUMNS)?;
    } else if shown.is_none() {
        line("there is no config file: `dim run` uses the defaults")?;
    }
    let file = shown.unwrap_or_else(|| "the defaults".to_owned());
    if errors + warnings > 0 {
        return Err(Suspicious { file, errors, warnings }.into());
    }
    if !out.is_json() && findings.iter().all(|it| it.severity == Severity::Note) {
        note(&format!("{file}: no errors and no warnings"));
    }
    Ok(())
}

impl Command {
    pub async fn execute(self, client: &Client, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Reload => out.object(&client.post(&["config", "reload"]).await?),
            Self::Check { .. } => unreachable!("handled without a client"),
        }
    }
}
