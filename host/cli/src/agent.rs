//! Owns `dim agent`: runs the agent of a node in the foreground, and sends notices and status requests to a running
//! agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, Subcommand};
use dim_agent::{Agent as Running, Options, SOCKET, To, ToKubo};
use dim_client::{Address, Client, ClientError, Http};
use dim_ipfs::kubo;
use dim_model::ident::{CidText, JobId, NodeId};
use dim_model::time::{Clock, duration_of};
use dim_server::config::Config;
use dim_server::secret::Secret;
use dim_store::Absent;
use reqwest::Method;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use thiserror::Error;

use crate::directories::default_state_dir;
use crate::logging::{LogFormat, Logging};
use crate::output::{BAD, Column, GOOD, Output, cell, line, styled, styled_line};
use crate::run::parse_kubo;
use crate::signals::Signals;
use crate::{Global, human, input};

/// Default interval between heartbeats.
const EVERY: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
#[command(subcommand_negates_reqs = true)]
pub struct Agent {
    #[command(flatten)]
    run: Run,
    /// Directory of the agent: its socket and the waiting notices [default: dim-agent in the user's state directory]
    #[arg(long, global = true, env = "DIM_AGENT_DIR", value_name = "DIR")]
    agent_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Run {
    /// Id of this node
    #[arg(long, value_name = "ID", required = true)]
    node_id: Option<NodeId>,
    /// Interval between heartbeats, 1s to 1h [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_every)]
    every: Option<Duration>,
    /// Publish through a Kubo daemon instead of a host; address of its API: /ip4/127.0.0.1/tcp/5001, /unix/PATH or
    /// http://HOST:5001
    #[arg(long, value_name = "ADDR", value_parser = parse_kubo)]
    kubo: Option<String>,
    /// Config file of the fleet, YAML, for the names and kinds of its topics and the `api_authorization` of the daemon
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Model that the node has cached; repeat for more
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// Start with an empty store if the store of an earlier agent is missing; its waiting notices are lost
    #[arg(long)]
    new_store: bool,
    /// Log format [default: text]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Report that a job is running
    Running {
        /// Job id
        job: JobId,
        /// Data of the event, as JSON; @FILE reads a file
        #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Box<RawValue>>)]
        data: Option<Box<RawValue>>,
    },
    /// Report that a job is completed
    Completed {
        /// Job id
        job: JobId,
        /// Result of the job, as JSON; @FILE reads a file
        #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Box<RawValue>>)]
        result: Option<Box<RawValue>>,
        /// Data of the event, as JSON; @FILE reads a file
        #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Box<RawValue>>)]
        data: Option<Box<RawValue>>,
    },
    /// Report that a job has failed
    Failed {
        /// Job id
        job: JobId,
        /// Reason
        #[arg(long, value_name = "TEXT", conflicts_with = "data")]
        reason: Option<String>,
        /// Data of the event, as JSON; @FILE reads a file
        #[arg(long, value_name = "JSON", value_parser = input::json_or_file::<Box<RawValue>>)]
        data: Option<Box<RawValue>>,
    },
    /// Report the CID of the result of a job
    Result {
        /// Job id
        job: JobId,
        /// CID of the result
        cid: CidText,
    },
    /// Show the status of the agent; exit code 1 if notices or heartbeats are not delivered
    Status,
}

fn parse_every(text: &str) -> Result<Duration, String> {
    let every = duration_of(text)?;
    let range = Duration::from_secs(1)..=Duration::from_secs(3_600);
    if range.contains(&every) { Ok(every) } else { Err("the interval must be between 1s and 1h".to_owned()) }
}

/// The error for an agent that cannot be reached.
#[derive(Debug, Error)]
#[error("cannot reach the agent at {}", .socket.display())]
pub struct NoAgent {
    socket: PathBuf,
    source: reqwest::Error,
}

impl Agent {
    pub fn execute(self, global: &Global, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
        let by_default = || default_state_dir("dim-agent", "--agent-dir or DIM_AGENT_DIR");
        let dir = self.agent_dir.map_or_else(by_default, Ok)?;
        match self.command {
            None => self.run.execute(dir, global, clock),
            Some(_) if self.run.is_given() => {
                let why = "the options that start an agent cannot be used with a subcommand for a running agent, except --agent-dir";
                super::Cli::command().error(clap::error::ErrorKind::ArgumentConflict, why).exit()
            }
            Some(command) => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(command.execute(&dir, &global.out()))
            }
        }
    }
}

impl Command {
    async fn execute(self, dir: &Path, out: &Output) -> anyhow::Result<()> {
        match self {
            Self::Status => {
                let status = ask(dir, Method::GET, "status", None).await?;
                show(&status, out)?;
                if offline(&status).next().is_some() { Err(NotWell.into()) } else { Ok(()) }
            }
            command => out.object(&ask(dir, Method::POST, "notices", Some(command.notice())).await?),
        }
    }

    /// The notice of a reporting command. Panics for `Status`.
    fn notice(self) -> Notice {
        let (job_id, event_type, data, result, result_cid) = match self {
            Self::Running { job, data } => (job, Some("running"), data, None, None),
            Self::Completed { job, result, data } => (job, Some("completed"), data, result, None),
            Self::Failed { job, reason, data } => {
                let because = |reason| to_raw_value(&json!({ "reason": reason })).expect("it is JSON");
                (job, Some("failed"), data.or_else(|| reason.map(because)), None, None)
            }
            Self::Result { job, cid } => (job, None, None, None, Some(cid)),
            Self::Status => unreachable!("status is no notice"),
        };
        Notice { job_id, event_type, data, result, result_cid }
    }
}

/// A report about a job, as the agent receives it.
#[derive(Serialize)]
struct Notice {
    job_id: JobId,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result_cid: Option<CidText>,
}

/// Sends a request to the agent whose directory is `dir`; returns the answer.
async fn ask(dir: &Path, method: Method, what: &str, body: Option<Notice>) -> anyhow::Result<Value> {
    let socket = dir.join(SOCKET);
    let http = Http::new(Address::Unix(socket.clone()))?;
    let request = http.request(method, &[what])?;
    let answer = match body {
        Some(body) => http.json(request.json(&body)).await,
        None => http.json(request).await,
    };
    answer.map_err(|error| match error {
        ClientError::Unreachable { source, .. } => NoAgent { socket, source }.into(),
        other => other.into(),
    })
}

impl Run {
    /// Whether the command line sets any of these options.
    fn is_given(&self) -> bool {
        let Self { node_id, every, kubo, config, models, new_store, log_format } = self;
        node_id.is_some()
            || every.is_some()
            || kubo.is_some()
            || config.is_some()
            || !models.is_empty()
            || *new_store
            || log_format.is_some()
    }

    fn execute(self, dir: PathBuf, global: &Global, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
        let config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let _logging = Logging::start(
            self.log_format.unwrap_or(LogFormat::Text),
            "info",
            &config.telemetry,
            runtime.handle(),
        )?;
        runtime.block_on(self.live(config, dir, global, clock))
    }

    async fn live(
        self,
        config: Config,
        dir: PathBuf,
        global: &Global,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<()> {
        let options = Options {
            dir,
            absent: if self.new_store { Absent::Created } else { Absent::Refused },
            to: self.to(&config, global)?,
            node: self.node_id.context("--node-id is missing")?,
            every: self.every.unwrap_or(EVERY),
            models: self.models,
            topics: config.ipfs.pubsub,
            clock,
        };
        let mut signals = Signals::new()?;
        let mut agent = Running::start(options).await?;
        tracing::info!(socket = %agent.socket.display(), to = agent.to, "ready");
        let ended = tokio::select! {
            biased;
            () = signals.next() => Ok(()),
            error = agent.ended() => Err(error),
        };
        let waiting = tokio::select! {
            waiting = agent.shutdown() => waiting?,
            () = signals.next() => anyhow::bail!("stopped immediately on a second signal"),
        };
        tracing::info!(waiting, "ended; the next agent in this directory sends the waiting notices");
        Ok(ended?)
    }

    /// The receiver of notices and heartbeats: the daemon of `--kubo`, else a host.
    fn to(&self, config: &Config, global: &Global) -> anyhow::Result<To> {
        let Some(address) = &self.kubo else {
            let address = match &global.api {
                Some(api) => api.parse()?,
                None => Address::in_state_dir(&global.state_dir()?),
            };
            let token = global.token(&address)?;
            return Ok(To::Host(Client::with_token(address, token.as_ref())?));
        };
        let authorization = config.ipfs.api_authorization.as_ref().map(Secret::read).transpose()?;
        let settings = kubo::Settings { address: address.parse()?, authorization };
        Ok(To::Kubo(ToKubo {
            settings,
            fleet: config.fleet.name.to_string(),
            deliveries: config.deliveries(),
        }))
    }
}

const REFUSED: [Column; 5] = [
    Column::word("JOB", "/job_id"),
    Column::word("NOTICE", "/notice"),
    Column::ago("GIVEN", "/given"),
    Column::ago("REFUSED", "/refused"),
    Column::text("REASON", "/reason"),
];

/// The members of the status that report a connectivity.
const CONTACTS: [&str; 2] = ["notices", "heartbeats"];

/// The members of [`CONTACTS`] that are offline.
fn offline(status: &Value) -> impl Iterator<Item = &'static str> {
    CONTACTS.into_iter().filter(|what| status[what]["contact"]["state"] == "offline")
}

/// The error for an agent that answers but cannot deliver its notices or heartbeats.
#[derive(Debug, Error)]
#[error("the agent cannot deliver its notices or heartbeats")]
pub struct NotWell;

fn show(status: &Value, out: &Output) -> anyhow::Result<()> {
    if out.is_json() {
        return out.object(status);
    }
    let text = |pointer: &str| cell(status.pointer(pointer));
    let time = |pointer: &str| {
        let time = status.pointer(pointer).and_then(Value::as_str).and_then(human::read);
        time.map_or_else(|| text(pointer), |time| human::ago(time, jiff::Timestamp::now()))
    };
    let troubles: Vec<String> = offline(status)
        .map(|what| {
            let contact = |member: &str| text(&format!("/{what}/contact/{member}"));
            let (since, why) = (time(&format!("/{what}/contact/since")), contact("why"));
            format!("  {} {what} are not delivered since {since}: {why}", styled(BAD, "!"))
        })
        .collect();
    let verdict =
        if troubles.is_empty() { styled(GOOD, "all is well") } else { styled(BAD, "not all is well:") };
    styled_line(&format!("dim agent {} of {}, {verdict}", text("/version"), text("/node_id")))?;
    troubles.iter().try_for_each(|trouble| styled_line(trouble))?;
    let waiting = match text("/notices/waiting").as_str() {
        "0" => "0 notices".to_owned(),
        waiting => format!("{waiting} notices, the oldest of {}", time("/notices/oldest")),
    };
    for (label, value) in [
        ("sends to", text("/to")),
        ("started", time("/started")),
        ("waiting", waiting),
        ("delivered", text("/notices/taken")),
        ("refused", text("/notices/refused")),
        (
            "heartbeat",
            format!(
                "every {} s, the last {}",
                text("/heartbeats/every_seconds"),
                time("/heartbeats/last/sent")
            ),
        ),
    ] {
        line(&format!("{label:<14}{value}"))?;
    }
    if let Some(resources) = status.pointer("/heartbeats/last/resources") {
        let of = |name: &str| {
            let figure = |which: &str| cell(resources.get(format!("{name}_{which}")));
            format!("{} of {}", figure("available"), figure("total"))
        };
        let spare = format!("{} cores, {} GiB, {} GPUs", of("cpu"), of("memory"), of("gpu"));
        line(&format!("{:<14}{spare}", "available"))?;
    }
    match status["refused"].as_array() {
        Some(refused) if !refused.is_empty() => out.rows(&status["refused"], &REFUSED),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_beats_once_a_second_to_once_an_hour() {
        for (text, seconds) in [("1s", 1), ("30s", 30), ("2m", 120), ("1h", 3_600)] {
            assert_eq!(parse_every(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "30", "0s", "999ms", "3601s", "-30s", "s", "1d"] {
            assert!(parse_every(text).is_err(), "{text}");
        }
    }
}
