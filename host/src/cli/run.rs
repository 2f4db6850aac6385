//! `dim run`: the life of a host in the foreground, in reading order.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::{Listener, Token};
use crate::backend::kubo;
use crate::config::findings::Severity;
use crate::config::{ApiConfig, Config};
use crate::host::{Adoption, ConfigFile, Options, Standing, Supervised};
use crate::line_queue::LineQueue;
use crate::plugin::Cache;
use crate::store::Absent;

use super::logging::{LogFormat, Logging};
use super::signals::{Hangups, Signals};
use super::{Global, demo};

/// How long the reader of standard output may take for what is left when the program ends.
const FLUSH: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct Run {
    /// Config file, YAML [default: no file, all keys at their defaults]
    #[arg(long, value_name = "FILE", env = super::config::CONFIG)]
    config: Option<PathBuf>,
    /// Address of a Kubo daemon's API: /ip4/127.0.0.1/tcp/5001, /unix/PATH or http://HOST:5001
    #[arg(long, value_name = "ADDR", conflicts_with = "embedded", value_parser = parse_kubo)]
    kubo: Option<String>,
    /// Use the embedded backend, even if the config names a daemon
    #[arg(long)]
    embedded: bool,
    /// Decide about names on hold at the start: import their documents, or replace them. Without this option the host
    /// publishes nothing under such a name until `dim ipns adopt` decides
    #[arg(long, value_enum)]
    adopt: Option<Adoption>,
    /// Simulate N nodes that send heartbeats and run jobs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    demo: Option<u32>,
    /// Also listen on a loopback address, such as 127.0.0.1:7080
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Create an empty store if the database of an earlier host is missing; its jobs, nodes and plugin state are lost
    #[arg(long)]
    new_store: bool,
    /// Log format
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// What the command line changes of the config.
struct Adjustment {
    kubo: Option<String>,
    embedded: bool,
    adopt: Option<Adoption>,
    is_demo: bool,
}

impl Adjustment {
    fn apply(&self, config: &mut Config) {
        if let Some(address) = &self.kubo {
            config.ipfs.api_url = Some(address.clone());
        }
        if self.embedded {
            config.ipfs.api_url = None;
        }
        config.ipfs.adopt = self.adopt.or(config.ipfs.adopt);
        if self.is_demo {
            demo::quicken(config);
        }
    }
}

/// Checked here and kept as it was typed, as the config has it.
pub fn parse_kubo(text: &str) -> Result<String, kubo::AddressError> {
    text.parse::<kubo::Address>().map(|_| text.to_owned())
}

/// This program, also once another one lies in its place.
fn this_program() -> Option<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { Some(running) } else { std::env::current_exe().ok() }
}

/// Has the config file read again on each hangup.
async fn reload_on(mut hangups: Hangups, supervised: &Supervised) -> Infallible {
    loop {
        hangups.next().await;
        match supervised.standing() {
            // What comes of it is in the log.
            Standing::Running(host) => drop(host.reload("SIGHUP").await),
            Standing::Down { .. } => {
                tracing::warn!("SIGHUP: the config file is not read while the host is down")
            }
        }
    }
}

impl Run {
    pub fn execute(self, global: &Global) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        // Before anything that takes time: without it a SIGHUP ends the process.
        let hangups = Hangups::new(&runtime)?;
        let config = self.config()?;
        // What takes long at a first start is told in a demonstration too.
        let default = if self.demo.is_some() { "warn,dim::plugin::engine=info" } else { "info" };
        let logging = Logging::start(self.log_format, default, &config.telemetry, runtime.handle())?;
        for notice in config.notices() {
            match notice.severity {
                Severity::Note => tracing::debug!("the config file: {notice}"),
                _ => tracing::warn!("the config file: {notice}"),
            }
        }
        let out = LineQueue::start(std::io::stdout(), |_| {})?;
        let ended = runtime.block_on(self.live(config, global, &out, hangups));
        out.flush(FLUSH);
        // What was logged last goes out by the runtime; what is still at work with the store can be broken
        // off at any time.
        drop(logging);
        runtime.shutdown_background();
        ended
    }

    async fn live(
        self,
        config: Config,
        global: &Global,
        out: &LineQueue,
        hangups: Hangups,
    ) -> anyhow::Result<()> {
        // A demonstration must not write into the state of a real host.
        let temporary = match (self.demo, &global.state_dir) {
            (Some(_), None) => {
                Some(tempfile::tempdir().context("cannot make a directory for the demonstration")?)
            }
            _ => None,
        };
        let state_dir = match &temporary {
            Some(dir) => dir.path().to_owned(),
            None => global.state_dir()?,
        };
        let absent = if self.new_store { Absent::Created } else { Absent::Refused };
        let options = Options {
            compiler: this_program(),
            shared_cache: Cache::of_user(),
            absent,
            config_file: self.config_file(),
            ..Options::new(config, &state_dir)
        };
        let api = options.config.api.clone();
        let supervised = Supervised::start(options).await?;
        let (stop_serving, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut servers = self.serve(&supervised, &state_dir, &api, out, &stop_serving).await?;
        let running = tokio::spawn({
            let (supervised, stop) = (supervised.clone(), stop.clone());
            async move { supervised.run(stop).await }
        });
        let demo = self.demonstrate(&supervised, out);
        let mut signals = Signals::new()?;
        let unasked = tokio::select! {
            biased;
            () = signals.next() => None,
            ended = servers.join_next() => ended,
            never = reload_on(hangups, &supervised) => match never {},
        };
        if unasked.is_some() {
            tracing::error!("a part of the API has ended by itself");
        }
        tracing::info!("shutting down; a second signal stops at once");
        let ending = async {
            stop_serving.cancel();
            while let Some(server) = servers.join_next().await {
                server??;
            }
            stop.cancel();
            running.await?;
            if let Some(demo) = demo {
                demo.await??;
            }
            match unasked {
                None => Ok(()),
                Some(ended) => {
                    ended??;
                    anyhow::bail!("a part of the API has ended by itself")
                }
            }
        };
        tokio::select! {
            biased;
            ended = ending => ended,
            () = signals.next() => anyhow::bail!("stopped at once, on a second signal"),
        }
    }

    fn demonstrate(
        &self,
        supervised: &Supervised,
        out: &LineQueue,
    ) -> Option<tokio::task::JoinHandle<anyhow::Result<()>>> {
        let Standing::Running(host) = supervised.standing() else { return None };
        let took = host.start_took().map(|took| format!("{took:?}"));
        let took = took.unwrap_or_else(|| format!("{} plugins are compiled still", host.loading().len()));
        tracing::info!(
            id = host.id,
            backend = host.backend.name,
            address = host.backend.address,
            took,
            "ready"
        );
        let nodes = self.demo?;
        let stop = host.ended.clone();
        Some(tokio::spawn(demo::run(host, nodes, out.clone(), stop)))
    }

    fn config(&self) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        self.adjustment().apply(&mut config);
        Ok(config)
    }

    fn adjustment(&self) -> Adjustment {
        let Self { kubo, embedded, adopt, demo, .. } = self;
        Adjustment { kubo: kubo.clone(), embedded: *embedded, adopt: *adopt, is_demo: demo.is_some() }
    }

    /// The config file, to be read again.
    fn config_file(&self) -> Option<Arc<ConfigFile>> {
        let adjustment = self.adjustment();
        let file = ConfigFile::new(self.config.clone()?, move |config| adjustment.apply(config));
        Some(Arc::new(file))
    }

    async fn serve(
        &self,
        host: &Arc<Supervised>,
        state_dir: &std::path::Path,
        api: &ApiConfig,
        out: &LineQueue,
        stop: &CancellationToken,
    ) -> anyhow::Result<JoinSet<std::io::Result<()>>> {
        let mut listeners = Vec::new();
        // First, for it is what may fail: a socket must not be left behind.
        if let Some(address) = self.listen {
            let token = match &api.token {
                Some(secret) => Token::new(&secret.read().context("api.token")?),
                None => Token::in_state_dir(state_dir),
            };
            let token = token.context("the API has no token")?;
            let listener = Listener::tcp(address, token).await;
            listeners.push(listener.with_context(|| format!("cannot listen on {address}"))?);
        }
        listeners.push(Listener::unix(state_dir).context("cannot listen on the API's socket")?);
        for listener in &listeners {
            tracing::info!("the API is at {}", listener.address());
            if self.demo.is_some() && matches!(listener, Listener::Unix(..)) {
                let address = listener.address();
                let line = format!("The API is at {address}; try: dim --api {address} status\n");
                out.push(line.into_bytes());
            }
        }
        let mut servers = JoinSet::new();
        for listener in listeners {
            servers.spawn(listener.serve(host.clone(), api.connections, stop.clone()));
        }
        Ok(servers)
    }
}
