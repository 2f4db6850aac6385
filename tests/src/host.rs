//! Runs a host in the process of the test.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use dim_api::{Listener, Token};
use dim_ipfs::embedded::new_peer;
use dim_model::entry::{Entry, Offset};
use dim_model::ident::PeerName;
use dim_model::time::Clock;
use dim_runtime::Handle;
use dim_server::config::Config;
use dim_server::host::{ConfigFile, Host, HostError, Options, Standing, Supervised};
use dim_store::batch::{Reply, ReplyError};
use dim_store::dead_letters;
use dim_store::{Medium, StoreError};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// The token of APIs over TCP.
pub const TOKEN: &str = "the-token-of-the-tests";

/// Maximum number of connections of these APIs.
const CONNECTIONS: usize = 8;

/// Returns an HTTP client that sends [`TOKEN`].
pub fn with_token() -> reqwest::Client {
    dim_client::install_tls();
    let shown = format!("Bearer {TOKEN}").parse().expect("a header");
    let headers = [(reqwest::header::AUTHORIZATION, shown)].into_iter().collect();
    reqwest::Client::builder().no_proxy().default_headers(headers).build().expect("a client")
}

/// Maximum time of a wait before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// The setup of a host. It has no bundled plugins unless a test requests them.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    yaml: String,
    probes: Vec<(String, Value)>,
    bundled: bool,
    kubo: Option<String>,
    medium: Option<Arc<dyn Medium>>,
    clock: Option<Arc<dyn Clock>>,
    file: Option<PathBuf>,
}

impl Setup {
    /// Creates a setup with a probe named `probe`, which has all grants that it requests.
    pub fn probe() -> Self {
        Self::default().and_probe("probe", json!({}))
    }

    /// Creates a setup with the bundled plugins.
    pub fn bundled() -> Self {
        Self { bundled: true, ..Self::default() }
    }

    /// Adds a probe. `setup` is its config section.
    pub fn and_probe(mut self, name: &str, setup: Value) -> Self {
        self.probes.push((name.to_owned(), setup));
        self
    }

    /// Appends YAML to the config file.
    pub fn yaml(mut self, yaml: &str) -> Self {
        self.yaml.push_str(yaml);
        self
    }

    /// Uses the Kubo daemon with the API `api`.
    pub fn on_kubo(mut self, api: &str) -> Self {
        self.kubo = Some(api.to_owned());
        self
    }

    /// Uses a fake disk.
    pub fn on_disk(mut self, medium: impl Medium) -> Self {
        self.medium = Some(Arc::new(medium));
        self
    }

    /// Uses a fake clock.
    pub fn by_clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// Sets the file that the host reads on a reload of the config.
    pub fn from_file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }

    /// Returns the options of a host in `dir`.
    fn options(&self, dir: &Path) -> Options {
        let mut options = Options::new(self.config(), dir);
        options.medium = self.medium.clone().unwrap_or(options.medium);
        options.clock = self.clock.clone().unwrap_or(options.clock);
        let file = self.file.clone().map(|file| Arc::new(ConfigFile::new(file, |_| {})));
        options.config_file = file;
        options
    }

    /// Returns the config of the setup.
    pub fn config(&self) -> Config {
        let mut config = Config::parse(&self.yaml).expect("the test's config is right");
        config.ipfs.api_url = self.kubo.clone().or(config.ipfs.api_url);
        let keys = ["probe-key", "probe-other"];
        for (name, setup) in &self.probes {
            let plugin = config.plugins.entry(name.parse().expect("a plugin name")).or_default();
            let mut section = json!({
                "file": super::PROBE,
                "grants": {
                    "publish": ["probe.*"], "subscribe": ["probe.*"],
                    "write": keys, "read": keys, "share": keys,
                },
            });
            for (key, value) in setup.as_object().into_iter().flatten() {
                section[key] = value.clone();
            }
            *plugin = serde_json::from_value(section).expect("the test's plugin section is right");
        }
        if !self.bundled {
            for name in ["job-tracker", "node-registry", "heartbeat-watchdog"] {
                config.plugins.entry(name.parse().expect("a plugin name")).or_default().disabled = true;
            }
        }
        config
    }

    /// Starts the host.
    pub async fn start(&self) -> TestHost {
        self.start_in(tempfile::tempdir().expect("a temporary directory")).await
    }

    /// Starts the host on the state directory of an earlier host.
    pub async fn start_in(&self, dir: TempDir) -> TestHost {
        warm(dir.path());
        let host = once_free(async || Host::start(self.options(dir.path())).await).await;
        save_warmth(dir.path());
        TestHost { host, dir, peer: new_peer(), sent: AtomicU64::new(0) }
    }
}

/// Starts a host. Retries while a host that has just ended still locks the store.
async fn once_free<T>(start: impl AsyncFn() -> Result<T, HostError>) -> T {
    for _ in 0..100 {
        match start().await {
            Err(HostError::Store(StoreError::Locked(_))) => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            started => return started.expect("the host starts"),
        }
    }
    start().await.expect("the host starts")
}

/// A host that restarts when it fails.
pub struct SupervisedHost {
    supervised: Arc<Supervised>,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
    dir: TempDir,
}

impl SupervisedHost {
    /// Starts the host of `setup`.
    pub async fn start(setup: &Setup) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary directory"), setup).await
    }

    /// Starts the host of `setup` on the state directory of an earlier host.
    pub async fn start_in(dir: TempDir, setup: &Setup) -> Self {
        warm(dir.path());
        let this = Self::begin_in(dir, setup).await;
        if let Some(host) = this.host() {
            host.all_loaded().await;
        }
        this
    }

    /// Starts the host like [`start_in`](Self::start_in), but does not wait until all plugins are loaded.
    pub async fn begin_in(dir: TempDir, setup: &Setup) -> Self {
        let supervised = once_free(async || Supervised::start(setup.options(dir.path())).await).await;
        let stop = CancellationToken::new();
        let running = tokio::spawn({
            let (supervised, stop) = (supervised.clone(), stop.clone());
            async move { supervised.run(stop).await }
        });
        Self { supervised, stop, running, dir }
    }

    /// Sends a command. Returns none if it is not acknowledged.
    pub async fn try_command(&self, plugin: &str, method: &str, body: Value) -> Option<Value> {
        let reply = within(self.handle(plugin)?.command(method.to_owned(), body.to_string())).await.ok()?;
        Some(serde_json::from_str(&reply).expect("a reply is JSON"))
    }

    /// Sends a query. Returns none if it is not answered.
    pub async fn try_query(&self, plugin: &str, method: &str, body: Value) -> Option<Value> {
        let reply = within(self.handle(plugin)?.query(method.to_owned(), body.to_string())).await.ok()?;
        Some(serde_json::from_str(&reply).expect("a reply is JSON"))
    }

    fn handle(&self, plugin: &str) -> Option<Handle> {
        let Standing::Running(host) = self.supervised.standing() else { return None };
        Some(host.plugins.get(plugin)?.handle.clone())
    }

    /// Returns the host while it runs. Callers must drop it soon, because it delays a restart.
    pub fn host(&self) -> Option<Arc<Host>> {
        match self.supervised.standing() {
            Standing::Running(host) => Some(host),
            Standing::Down { .. } => None,
        }
    }

    /// Runs a script on a probe. Returns none if the command is not acknowledged.
    pub async fn try_run(&self, plugin: &str, steps: Value) -> Option<Vec<Value>> {
        let answers = self.try_command(plugin, "run", script(steps)).await?;
        Some(answers.as_array().expect("a list of answers").clone())
    }

    /// Serves the API over TCP with [`TOKEN`] until the host stops. Returns the address.
    pub async fn serve(&self) -> String {
        let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let token = Token::new(&TOKEN.into()).expect("a token");
        let listener = Listener::tcp(loopback, token).await.expect("a free port");
        let address = listener.address();
        tokio::spawn(listener.serve(self.supervised.clone(), CONNECTIONS, self.stop.clone()));
        address
    }

    /// Serves the API on the owner's socket until the host stops. Returns the path of the socket.
    pub async fn serve_owner(&self) -> PathBuf {
        let listener = Listener::unix(self.dir.path()).expect("a free place");
        tokio::spawn(listener.serve(self.supervised.clone(), CONNECTIONS, self.stop.clone()));
        self.dir.path().join(dim_client::SOCKET)
    }

    /// Waits until the host acknowledges commands.
    pub async fn works(&self, plugin: &str) {
        eventually("the host works", async || self.try_run(plugin, json!([])).await.is_some()).await;
    }

    /// Stops the host.
    pub async fn stop(self) {
        self.stop.cancel();
        self.running.await.expect("the host ends");
    }
}

/// Returns the directory of compiled components that tests share, so that each component is compiled once.
fn warmth() -> &'static Path {
    static WARMTH: OnceLock<PathBuf> = OnceLock::new();
    WARMTH.get_or_init(|| {
        let dir = Path::new(super::PROBE).with_file_name("compiled");
        std::fs::create_dir_all(&dir).expect("a directory for compiled components");
        // Compiled components are only valid under the key that authenticates them.
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        if let Ok(mut key) = options.open(dir.join(CACHE_KEY)) {
            key.write_all(&rand::random::<[u8; 32]>()).expect("a key can be written");
        }
        dir
    })
}

/// The file name of the key that authenticates compiled components.
const CACHE_KEY: &str = "key";

/// Copies the shared compiled components into a new state directory.
pub fn warm(state_dir: &Path) {
    copy_missing(warmth(), &state_dir.join("compiled"));
}

fn save_warmth(state_dir: &Path) {
    copy_missing(&state_dir.join("compiled"), warmth());
}

fn copy_missing(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory for compiled components");
    let key = |dir: &Path| std::fs::read(dir.join(CACHE_KEY)).ok();
    if key(to).is_none() {
        let _ = std::fs::copy(from.join(CACHE_KEY), to.join(CACHE_KEY));
    }
    if key(to) != key(from) {
        return;
    }
    for file in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let target = to.join(file.file_name());
        let whole = file.path().extension().is_some_and(|kind| kind == "cwasm" || kind == "mac");
        if whole && !target.exists() {
            let half = target.with_extension(format!("half{:?}", std::thread::current().id()));
            if std::fs::copy(file.path(), &half).is_ok() {
                // A file of an earlier version may have another mode.
                let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(&half, private).expect("the mode can be set");
                let _ = std::fs::rename(&half, &target);
            }
        }
    }
}

/// A running host, with a peer on its embedded bus.
pub struct TestHost {
    /// The host.
    pub host: Arc<Host>,
    dir: TempDir,
    peer: PeerName,
    /// The number of messages that [`TestHost::from_peer`] has published.
    sent: AtomicU64,
}

impl TestHost {
    /// Stops the host and returns its state directory, once nothing holds the lock of the directory: a task that
    /// reads the store may end after the host.
    pub async fn stop(self) -> TempDir {
        let Self { host, dir, .. } = self;
        host.shutdown().await;
        drop(host);
        let lock = File::open(dir.path().join(dim_store::LOCK)).expect("a lock file");
        eventually("the lock of the state directory is free", async || lock.try_lock().is_ok()).await;
        dir
    }

    /// Sends a command.
    pub async fn command(&self, plugin: &str, method: &str, body: Value) -> Result<Value, ReplyError> {
        let handle = &self.plugin(plugin).handle;
        parsed(within(handle.command(method.to_owned(), body.to_string())).await)
    }

    /// Sends a query.
    pub async fn query(&self, plugin: &str, method: &str, body: Value) -> Result<Value, ReplyError> {
        let handle = &self.plugin(plugin).handle;
        parsed(within(handle.query(method.to_owned(), body.to_string())).await)
    }

    /// Runs a script on the probe as a command. Returns the results of the steps.
    pub async fn run(&self, steps: Value) -> Vec<Value> {
        let answers = self.command("probe", "run", script(steps)).await.expect("the probe runs a script");
        answers.as_array().expect("a list of answers").clone()
    }

    /// Returns a value of a probe's state.
    pub async fn state_of(&self, plugin: &str, key: &str) -> Value {
        let steps = script(json!([{ "do": "get", "key": key }]));
        let answers = self.query(plugin, "run", steps).await.expect("the probe answers");
        let text = answers[0]["ok"].as_str().unwrap_or("null").to_owned();
        serde_json::from_str(&text).unwrap_or(Value::String(text))
    }

    /// Publishes a message as a peer of the network.
    pub async fn from_peer(&self, topic: &str, data: impl Into<Bytes>) {
        let topic = topic.parse().expect("a topic");
        self.listening(&topic).await;
        self.host
            .exchange
            .bus
            .as_ref()
            .expect("the embedded backend")
            .publish_as(&self.peer, &topic, data.into())
            .await;
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until the host has taken in what [`TestHost::from_peer`] has published, or for two seconds: some tests stop
    /// the intake.
    async fn taken_in(&self) {
        let counters = &self.host.exchange.received;
        let dropped = [&counters.copies, &counters.repeated, &counters.oversized, &counters.refused];
        let is_done = || {
            let all = dropped.into_iter().chain([&counters.received]);
            all.map(|it| it.load(Ordering::Relaxed)).sum::<u64>() >= self.sent.load(Ordering::Relaxed)
        };
        let deadline = tokio::time::Instant::now() + Duration::from_secs(2);
        while !is_done() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the host is subscribed to a topic.
    pub async fn listening(&self, topic: &dim_model::ident::Topic) {
        let connected = async || {
            self.host
                .exchange
                .links
                .listening_records
                .all()
                .get(topic)
                .is_some_and(|hearing| hearing.connected_since.is_some())
        };
        eventually(&format!("the host listens to {topic}"), connected).await;
    }

    /// All entries of the log. One read of a store returns some megabytes at most.
    pub fn entries(&self) -> VecDeque<Arc<Entry>> {
        let (mut all, mut next) = (VecDeque::new(), Offset(0));
        loop {
            let mut entries = VecDeque::new();
            self.host.storage.log.read(next, usize::MAX, &mut entries).expect("the log can be read");
            let Some(last) = entries.back() else { return all };
            next = Offset(last.offset.0 + 1);
            all.append(&mut entries);
        }
    }

    /// Waits until all plugins have handled what peers have published and all entries of the log.
    pub async fn settled(&self) {
        self.settled_but("").await;
    }

    /// Waits until all plugins except `other` have handled what peers have published and all entries of the log.
    pub async fn settled_but(&self, other: &str) {
        self.taken_in().await;
        let head = self.host.storage.log.head().0;
        for (name, plugin) in self.host.plugins.all() {
            if name.as_str() == other {
                continue;
            }
            // A plugin does not wake up for entries of other plugins.
            plugin.handle.wake();
            eventually(&format!("{name} has read up to {head}"), async || {
                plugin.handle.status().cursor >= head
            })
            .await;
        }
        // The last batch may not be committed yet.
        self.host.storage.commit.write(|_| Ok(())).await.expect("the host commits");
        self.host.storage.commit.write(|_| Ok(())).await.expect("the host commits");
    }

    /// Returns the reasons of all dead letters, oldest first.
    pub fn dead_letters(&self) -> Vec<String> {
        let letters =
            dead_letters::list(&self.host.storage.store, &dead_letters::Filter::default(), None, 10_000)
                .expect("the store can be read");
        letters.into_iter().map(|(_, letter)| letter.reason).collect()
    }

    /// Returns a loaded plugin.
    pub fn plugin(&self, name: &str) -> Arc<dim_server::host::Loaded> {
        let found = self.host.plugins.get(name);
        found.unwrap_or_else(|| panic!("{name} is not loaded: {:?}", self.host.not_loaded()))
    }
}

fn parsed(reply: Reply) -> Result<Value, ReplyError> {
    reply.map(|reply| serde_json::from_str(&reply).expect("a reply is JSON"))
}

async fn within<R>(work: impl Future<Output = R>) -> R {
    tokio::time::timeout(PATIENCE, work).await.expect("an answer within 30 seconds")
}

/// Returns a script for the probe.
pub fn script(steps: Value) -> Value {
    json!({ "script": steps })
}

/// Waits until a condition holds. Panics after 30 s.
pub async fn eventually(what: &str, holds: impl AsyncFnMut() -> bool) {
    eventually_within(PATIENCE, what, holds).await;
}

/// Waits until a condition holds. Panics after `patience`.
pub async fn eventually_within(patience: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + patience;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until a condition holds, in a test without async code. Panics after 20 s.
pub fn soon(mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sleeps while no host runs, for tests of downtime.
pub async fn downtime(length: Duration) {
    tokio::time::sleep(length).await;
}
