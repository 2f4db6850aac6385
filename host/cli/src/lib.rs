//! Owns the command line: the arguments of the program `dim` and the dispatch of its commands. Receives arguments and
//! environment variables; returns an exit code.

mod agent;
mod backup;
mod client;
mod config;
mod dead_letters;
mod demo;
mod directories;
mod events;
mod fleet;
mod human;
mod input;
mod ipns;
mod job;
mod logging;
mod node;
mod output;
mod plugin;
mod run;
mod signals;
mod status;
mod table;
mod topic;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anstream::ColorChoice;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use dim_client::{Address, ClientError};
use dim_model::time::{Clock, MachineClock};
use dim_runtime::compiler::{self, Allotment};
use dim_server::secret::{Secret, SecretError};
use secrecy::SecretString;

use client::Client;
use directories::{NoStateDir, default_state_dir};
use output::Output;

/// The environment variable with the token of an API over TCP.
const TOKEN: &str = "DIM_TOKEN";

/// Exit code: success.
const OK: u8 = 0;
/// Exit code: a failure that no other code describes.
const FAILED: u8 = 1;
/// Exit code: wrong usage. Equals the exit code of clap.
const USAGE: u8 = 2;
/// Exit code: the requested item does not exist.
const NOT_FOUND: u8 = 3;
/// Exit code: the host cannot be reached.
const UNREACHABLE: u8 = 4;
/// Exit code: the host refused the request. The request is invalid or conflicts with the current state.
const REFUSED: u8 = 5;
/// Exit code: a component waits for a grant.
const WAITS: u8 = 6;

/// Coordinate a fleet with sandboxed plugins, over IPFS or with the embedded backend.
#[derive(Debug, Parser)]
#[command(name = "dim", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 success, 1 failure, 2 wrong usage, 3 not found, 4 the host cannot be reached, 5 refused, 6 a component waits for a grant";

/// The options that every command accepts.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Output format
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// When to use colours; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    color: Color,
    /// Address of the host's API: unix:PATH or http://127.0.0.1:PORT [default: the socket in the state directory]
    #[arg(long, global = true, env = "DIM_API", value_name = "ADDR")]
    api: Option<String>,
    /// File with the token for an API at http:// [default: the value of DIM_TOKEN, or api-token in the state directory]
    #[arg(long, global = true, env = "DIM_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// State directory of the host [default: STATE_DIRECTORY of systemd, else dim in XDG_STATE_HOME or
    /// ~/.local/state]
    #[arg(long, global = true, env = "DIM_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Tables and text for people
    Table,
    /// JSON for programs
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Color {
    /// Use colours on a terminal
    Auto,
    /// Always use colours
    Always,
    /// Never use colours
    Never,
}

impl Color {
    /// Applies the choice to all output of the process from now on.
    fn apply(self) {
        let choice = match self {
            Self::Auto => ColorChoice::Auto,
            Self::Always => ColorChoice::Always,
            Self::Never => ColorChoice::Never,
        };
        choice.write_global();
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a host in the foreground
    Run(run::Run),
    /// Run the agent of a node in the foreground, or report job events to a running agent
    Agent(agent::Agent),
    /// Show the status of the host
    Status(status::Status),
    /// Write an encrypted backup of the running host, with its keys
    Backup(backup::Backup),
    /// Restore a backup into an empty state directory
    Restore(backup::Restore),
    /// Check or reload the config file
    #[command(subcommand)]
    Config(config::Command),
    /// Manage jobs
    #[command(subcommand)]
    Job(job::Command),
    /// Manage nodes
    #[command(subcommand)]
    Node(node::Command),
    /// Use pubsub topics
    #[command(subcommand)]
    Topic(topic::Command),
    /// Manage the members of a fleet
    #[command(subcommand)]
    Fleet(fleet::Command),
    /// Manage IPNS names and keys
    #[command(subcommand)]
    Ipns(ipns::Command),
    /// Manage and develop plugins
    #[command(subcommand)]
    Plugin(plugin::PluginCommand),
    /// Manage dead letters: events that a plugin could not handle
    #[command(subcommand)]
    Dead(dead_letters::Command),
    /// Export recorded events from the log
    #[command(subcommand)]
    Events(events::Command),
    /// Print the OpenAPI document of the HTTP API
    Openapi,
    /// Compile the component on standard input; the host starts this in a separate process
    #[command(hide = true, name = compiler::SUBCOMMAND)]
    CompileComponent {
        /// CPU time limit in seconds
        seconds: u64,
        /// Memory limit in bytes
        memory: u64,
    },
    /// Print the completion script for a shell
    Completions {
        /// Shell
        shell: Shell,
    },
}

impl Global {
    fn state_dir(&self) -> Result<PathBuf, NoStateDir> {
        self.state_dir.clone().map_or_else(|| default_state_dir("dim", "--state-dir or DIM_STATE_DIR"), Ok)
    }

    fn client(&self) -> anyhow::Result<Client> {
        let address = match &self.api {
            Some(api) => api.parse()?,
            None => Address::in_state_dir(&self.state_dir()?),
        };
        let token = self.token(&address)?;
        Ok(Client::new(address, token.as_ref())?)
    }

    /// The token for an address, or none for a Unix socket. The token file in the local state directory is used for a
    /// loopback address only: the token must not be sent to another machine.
    fn token(&self, address: &Address) -> Result<Option<SecretString>, SecretError> {
        if matches!(address, Address::Unix(_)) {
            return Ok(None);
        }
        let is_here = address.is_loopback();
        let beside = self.state_dir().ok().map(|dir| dir.join(dim_client::TOKEN));
        let secret = match &self.token_file {
            Some(file) => Some(Secret::File(file.clone())),
            None if std::env::var_os(TOKEN).is_some() => Some(Secret::Env(TOKEN.to_owned())),
            None => beside.filter(|beside| is_here && beside.exists()).map(Secret::File),
        };
        secret.map(|secret| secret.read()).transpose()
    }

    fn out(&self) -> Output {
        Output::new(self.output)
    }
}

/// Parses the command line and runs the command. Returns the exit code of the process.
pub fn main() -> ExitCode {
    main_by(Arc::new(MachineClock))
}

/// Does the same as [`main`]; hosts and agents measure time by `clock`.
pub fn main_by(clock: Arc<dyn Clock>) -> ExitCode {
    without_empty_variables();
    let cli = Cli::parse();
    cli.global.color.apply();
    match dispatch(cli, clock) {
        Ok(()) => ExitCode::from(OK),
        Err(error) => {
            report(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Treats empty `DIM_…` variables as unset, as the XDG base directory specification does. A process with threads cannot
/// safely change its environment, so the program executes itself again without these variables.
fn without_empty_variables() {
    let is_ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with("DIM_"));
    let empty: Vec<OsString> = std::env::vars_os()
        .filter(|(name, value)| is_ours(name) && value.is_empty())
        .map(|(name, _)| name)
        .collect();
    let (false, Ok(program)) = (empty.is_empty(), std::env::current_exe()) else { return };
    let mut args = std::env::args_os();
    let mut again = std::process::Command::new(program);
    again.arg0(args.next().unwrap_or_default()).args(args);
    for name in empty {
        again.env_remove(name);
    }
    // `exec` returns only on failure. Then the empty variables stay set.
    let _ = again.exec();
}

fn dispatch(Cli { global, command }: Cli, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
    if matches!(command, Command::Run(_) | Command::Agent(_) | Command::Restore(_)) {
        // Only the owner may access the files of these commands, including files that a library creates.
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    }
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match command {
        Command::Run(run) => run.execute(&global, clock),
        Command::Restore(restore) => {
            let runtime = runtime()?;
            let ended = runtime.block_on(restore.execute(global.state_dir()?, &global.out()));
            runtime.shutdown_background();
            ended
        }
        Command::Agent(agent) => agent.execute(&global, clock),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dim", &mut script);
            output::bytes(&script)
        }
        Command::Openapi => output::raw_line(dim_api::document()),
        Command::Config(config::Command::Check { file }) => config::check(file.as_deref(), &global.out()),
        Command::CompileComponent { seconds, memory } => {
            Ok(compiler::compile_apart(Allotment { seconds, memory })?)
        }
        Command::Plugin(plugin::PluginCommand::Inspect { subject }) if plugin::is_file(&subject) => {
            plugin::inspect_file(&subject, &global.out())
        }
        Command::Plugin(plugin::PluginCommand::Signing(command)) => command.execute(&global.out()),
        Command::Plugin(plugin::PluginCommand::Author(command)) => command.execute(&global),
        command => runtime()?.block_on(over_the_api(command, &global)),
    }
}

async fn over_the_api(command: Command, global: &Global) -> anyhow::Result<()> {
    let (client, out) = (global.client()?, global.out());
    match command {
        Command::Status(status) => status.execute(&client, &out).await,
        Command::Config(command) => command.execute(&client, &out).await,
        Command::Job(command) => command.execute(&client, &out).await,
        Command::Node(command) => command.execute(&client, &out).await,
        Command::Topic(command) => command.execute(&client, &out).await,
        Command::Fleet(command) => command.execute(&client, &out).await,
        Command::Ipns(command) => command.execute(&client, &out).await,
        Command::Plugin(command) => command.execute(&client, &out).await,
        Command::Dead(command) => command.execute(&client, &out).await,
        Command::Events(command) => command.execute(&client, &out).await,
        Command::Backup(backup) => backup.execute(&client, &out).await,
        Command::Run(_)
        | Command::Agent(_)
        | Command::Restore(_)
        | Command::Openapi
        | Command::CompileComponent { .. }
        | Command::Completions { .. } => {
            unreachable!("handled without a client")
        }
    }
}

/// Ends the process with the usage error of clap for a missing argument; `hint` names the argument.
fn lacking(hint: &str) -> ! {
    Cli::command().error(ErrorKind::MissingRequiredArgument, hint).exit()
}

/// Writes an error to standard error: one line with the message, then its causes, then a hint if there is one.
fn report(error: &anyhow::Error) {
    // The message may contain text of a plugin, so each line is escaped. Line breaks of the program itself remain.
    output::marked_notes(output::BAD, "error: ", &error.to_string());
    let causes: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
    if !causes.is_empty() {
        output::notes("\nCaused by:");
        for cause in causes.iter().flat_map(|cause| cause.lines()) {
            output::note(&format!("    {cause}"));
        }
    }
    if let Some(agent::NoAgent { .. }) = error.downcast_ref() {
        output::notes(
            "\nIs an agent running? Start one with `dim agent --node-id ID`, or name its directory with --agent-dir.",
        );
    } else if let Some(ClientError::Unreachable { .. }) = error.downcast_ref() {
        output::notes(
            "\nIs a host running? Start one with `dim run`, or name its address with --api or --state-dir.",
        );
    }
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<agent::NoAgent>() {
        return UNREACHABLE;
    }
    if error.is::<plugin::Waits>() {
        return WAITS;
    }
    if error.is::<plugin::NotSigned>() || error.is::<plugin::Unfit>() {
        return REFUSED;
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. }) => UNREACHABLE,
        Some(ClientError::Address(_)) => USAGE,
        Some(ClientError::Problem(problem)) => match problem.status {
            404 => NOT_FOUND,
            400 | 401 | 403 | 409 | 413 | 422 => REFUSED,
            _ => FAILED,
        },
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
