//! Owns `dim run`: the start, the run and the shutdown of a host in the foreground, in this order.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use dim_api::{Listener, Token};
use dim_ipfs::kubo;
use dim_model::time::Clock;
use dim_runtime::Cache;
use dim_server::config::findings::Severity;
use dim_server::config::{ApiConfig, Config};
use dim_server::host::{Adoption, ConfigFile, Options, Standing, Supervised};
use dim_server::line_queue::LineQueue;
use dim_store::Absent;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::logging::{LogFormat, Logging};
use crate::signals::{Hangups, Signals};
use crate::{Global, demo};

/// Time limit for the reader of standard output to accept the remaining lines at the end of the program.
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

/// The changes that the command line makes to the config.
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

/// Checks the address of a Kubo daemon. Returns the text unchanged, because the config stores text.
pub fn parse_kubo(text: &str) -> Result<String, kubo::AddressError> {
    text.parse::<kubo::Address>().map(|_| text.to_owned())
}

/// The path of the running program. `/proc/self/exe` stays valid after the file is replaced.
fn this_program() -> Option<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { Some(running) } else { std::env::current_exe().ok() }
}

/// Reloads the config file on each SIGHUP. Never returns.
async fn reload_on(mut hangups: Hangups, supervised: &Supervised) -> Infallible {
    loop {
        hangups.next().await;
        match supervised.standing() {
            // `reload` logs its result.
            Standing::Running(host) => drop(host.reload("SIGHUP").await),
            Standing::Down { .. } => {
                tracing::warn!("SIGHUP: the config file is not read while the host is down")
            }
        }
    }
}

impl Run {
    pub fn execute(self, global: &Global, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        // This comes before any slow step: without a handler a SIGHUP ends the process.
        let hangups = Hangups::new(&runtime)?;
        let config = self.config()?;
        // A demonstration logs the progress of compilation too: the first start takes long.
        let default = if self.demo.is_some() { "warn,dim_runtime::engine=info" } else { "info" };
        let logging = Logging::start(self.log_format, default, &config.telemetry, runtime.handle())?;
        for notice in config.notices() {
            match notice.severity {
                Severity::Note => tracing::debug!("the config file: {notice}"),
                _ => tracing::warn!("the config file: {notice}"),
            }
        }
        let out = LineQueue::start(std::io::stdout(), |_| {})?;
        let ended = runtime.block_on(self.live(config, clock, global, &out, hangups));
        out.flush(FLUSH);
        // The exporter needs the runtime for the last lines. Tasks that still use the store can be aborted at any time.
        drop(logging);
        runtime.shutdown_background();
        ended
    }

    async fn live(
        self,
        config: Config,
        clock: Arc<dyn Clock>,
        global: &Global,
        out: &LineQueue,
        hangups: Hangups,
    ) -> anyhow::Result<()> {
        // A demonstration must not write into the state of a real host.
        let temporary = match (self.demo, &global.state_dir) {
            (Some(_), None) => {
                Some(tempfile::tempdir().context("cannot create a directory for the demonstration")?)
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
            clock,
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
            tracing::error!("a listener of the API ended unexpectedly");
        }
        tracing::info!("shutting down; a second signal stops immediately");
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
                    anyhow::bail!("a listener of the API ended unexpectedly")
                }
            }
        };
        tokio::select! {
            biased;
            ended = ending => ended,
            () = signals.next() => anyhow::bail!("stopped immediately on a second signal"),
        }
    }

    fn demonstrate(
        &self,
        supervised: &Supervised,
        out: &LineQueue,
    ) -> Option<tokio::task::JoinHandle<anyhow::Result<()>>> {
        let Standing::Running(host) = supervised.standing() else { return None };
        let took = host.start_took().map(|took| format!("{took:?}"));
        let took = took.unwrap_or_else(|| format!("{} plugins are still compiling", host.loading().len()));
        tracing::info!(
            id = host.id,
            backend = host.exchange.links.backend.name,
            address = host.exchange.links.backend.address,
            took,
            "ready"
        );
        let nodes = self.demo?;
        let stop = host.life.ended.clone();
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

    /// The config file for reloads, with the changes of the command line. None if the host has no config file.
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
        // The TCP listener comes first because it may fail. Then no socket file is left behind.
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
