//! Owns the composition of a host: opens the store, wires the stages, starts them and ends them in order. It receives
//! [`Options`] and returns a running [`Host`].

mod adopt_name;
mod candidate;
mod key_claims;
mod config_check;
mod fleet;
mod updates;
mod forget_name;
mod grants;
mod installation;
mod assessment;
mod loader;
mod plugins;
mod reload;
mod removal;
mod replacement;
mod running;
mod start;
mod supervisor;

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use dim_ipfs::embedded::Bus;
use dim_ipfs::keys::{KeyError, Keyring};
use dim_ipfs::kubo::{AddressError, ClientError};
use dim_model::connectivity;
use dim_model::feed::Feed;
use dim_model::health::{Acknowledged, HealthFinding};
use dim_model::ident::{InvalidWord, PluginName};
use dim_model::live::Live;
use dim_model::time::{Clock, MachineClock, Timestamp};
use dim_network::name_publisher::CheckedNames;
use dim_network::outbox::Sent;
use dim_network::own_messages::Echoes;
use dim_network::reliable_topics::IdentityError;
use dim_network::subscription::{self};
use dim_runtime::{EngineError, Handle, Line};
use dim_store::change::Changes;
use dim_store::commit::Commit;
use dim_store::disk_monitor::DiskMonitor;
use dim_store::event_log::EventLog;
use dim_store::retention::Awaited;
use dim_store::{Absent, Disk, Medium, Store, StoreError};
use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::secret::SecretError;
use adopt_name::LeftOut;
pub use adopt_name::{AdoptError, Adopted, Adoption};
pub use candidate::{Candidate, CandidateError, Ready, Terms, candidates};
pub use config_check::check as check_config;
pub use fleet::{JoinFleetError, JoinedFleet};
pub use forget_name::{ForgetError, Forgotten, PrivateKey};
pub use grants::{GrantChange, Granted};
pub use installation::Grant;
pub use loader::{HostIdentity, Links, Loader, ToRun, Wired};
pub use reload::{ConfigFile, ReloadError, Reloaded};
pub use replacement::{Proposal, ReplaceError, RolledBack};
pub use start::with_bundled;
pub(crate) use start::{compiled, identity, secret};
pub use supervisor::{Standing, Supervised};

use key_claims::KeyClaims;
use running::{Fail, Running};
use start::Start;

/// An error that prevents the start of a host or ends it.
#[derive(Debug, Error)]
pub enum HostError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key cannot be read or made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The host cannot write reliable topics.
    #[error(transparent)]
    Writer(#[from] IdentityError),
    /// The address of the daemon is invalid.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The client of the daemon cannot be built.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A secret of the config cannot be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The engine cannot start.
    #[error("the WebAssembly engine cannot start")]
    Engine(#[source] EngineError),
    /// The system refused a thread.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// The writer takes no more writes; the text says why.
    #[error("{0}")]
    Closed(String),
    /// An identifier that the host forms itself is invalid.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

/// The parameters of a host.
#[derive(Clone, Debug)]
pub struct Options {
    /// The config.
    pub config: Config,
    /// The config file, which a reload reads again. Absent: a reload fails.
    pub config_file: Option<Arc<ConfigFile>>,
    /// The state directory.
    pub state_dir: PathBuf,
    /// The storage under the database: a file in the state directory, except in tests of the disk.
    pub medium: Arc<dyn Medium>,
    /// The behaviour when the database is missing although a host has run in the state directory. The start fails,
    /// unless the operator requested a new database.
    pub absent: Absent,
    /// The source of the time of day and of the monotonic time: the machine, except in tests of time.
    pub clock: Arc<dyn Clock>,
    /// The program `dim`, which compiles components in a separate process with limits. Absent: the host compiles in
    /// its own process, without limits.
    pub compiler: Option<PathBuf>,
    /// A directory in which the programs of one user share compiled components, in addition to those in the state
    /// directory: [`Cache::of_user`](dim_runtime::Cache::of_user). Absent: none are shared.
    pub shared_cache: Option<PathBuf>,
    /// The disk monitor of the previous host of this process, if this one is a restart. Absent: a new one.
    pub disk: Option<Arc<DiskMonitor>>,
}

impl Options {
    /// Returns the options of a host whose database is a file in `state_dir`.
    pub fn new(config: Config, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            config,
            config_file: None,
            state_dir: state_dir.into(),
            medium: Arc::new(Disk),
            absent: Absent::Refused,
            clock: Arc::new(MachineClock),
            compiler: None,
            shared_cache: None,
            disk: None,
        }
    }
}

/// A plugin that was not loaded, and the reason.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NotLoaded {
    /// Its name.
    pub name: PluginName,
    /// The reason, for the operator.
    pub reason: String,
}

/// A plugin that was loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The handle of its actor, which also shows the running code.
    pub handle: Handle,
    /// Ends its thread when it is cancelled.
    pub(crate) stop: CancellationToken,
}

/// The plugins of a host, by name. The set and the component of each plugin change while the host runs.
#[derive(Debug, Default)]
pub struct Plugins(RwLock<BTreeMap<PluginName, Arc<Loaded>>>);

impl Plugins {
    /// Returns a plugin in its current state.
    pub fn get<Name: Ord + ?Sized>(&self, name: &Name) -> Option<Arc<Loaded>>
    where
        PluginName: Borrow<Name>,
    {
        self.0.read().expect(UNHURT).get(name).cloned()
    }

    /// Returns all plugins in their current state, by name.
    pub fn all(&self) -> BTreeMap<PluginName, Arc<Loaded>> {
        self.0.read().expect(UNHURT).clone()
    }

    pub(crate) fn put(&self, name: PluginName, plugin: Arc<Loaded>) {
        self.0.write().expect(UNHURT).insert(name, plugin);
    }

    pub(crate) fn take(&self, name: &PluginName) {
        self.0.write().expect(UNHURT).remove(name);
    }
}

/// The locks that serialize the changes of one plugin. Changes of different plugins do not wait for each other.
#[derive(Debug, Default)]
struct Turns(Mutex<BTreeMap<PluginName, Arc<Turn>>>);

/// The locks of one plugin.
#[derive(Debug, Default)]
struct Turn {
    /// Queues components in the order of their arrival, also while they are judged and compiled.
    line: tokio::sync::Mutex<()>,
    /// Held while the running code changes. It is locked after `line`, so that a change without a component does not
    /// wait for one that is being compiled.
    change: tokio::sync::Mutex<()>,
}

impl Turns {
    /// Returns the locks of a plugin.
    fn of(&self, plugin: &PluginName) -> Arc<Turn> {
        let mut turns = self.0.lock().expect(UNHURT);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(plugin.clone()).or_default().clone()
    }
}

const UNHURT: &str = "no one panics while holding the plugins";

/// A running host.
#[derive(Debug)]
pub struct Host {
    /// The identity of the host, which is its identity as an observer.
    pub id: String,
    /// Its config.
    pub config: Live<Config>,
    /// The settings of the exchange with the network. They change with a reload.
    pub network: Live<dim_network::Settings>,
    /// The file that the config came from.
    config_file: Option<Arc<ConfigFile>>,
    /// Its plugins.
    pub plugins: Plugins,
    /// The durable state of a host.
    pub storage: Storage,
    /// The connections of a host to the network.
    pub exchange: Exchange,
    /// The deployment of plugins: what is to be loaded, what is under way, and what failed.
    pub(crate) deployment: Deployment,
    /// The facts that the health of a host depends on beside its parts.
    pub notes: HealthNotes,
    /// The limits on parallel requests that hold resources for long.
    pub permits: Permits,
    /// The life of a host: its start, its end, and its threads and tasks.
    pub life: Life,
}

/// The durable state of a host.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Its store.
    pub store: Arc<Store>,
    /// Its log.
    pub log: Arc<EventLog>,
    /// Its writer.
    pub commit: Arc<Commit>,
    /// Its keys.
    pub keys: Arc<Keyring>,
    /// The disk monitor, which decides whether the intake is stopped.
    pub disk: Arc<DiskMonitor>,
}

/// The connections of a host to the network.
#[derive(Debug)]
pub struct Exchange {
    /// The connections that plugins use, too.
    pub links: Links,
    /// The bus of the embedded backend.
    pub bus: Option<Arc<Bus>>,
    /// The counters of received messages.
    pub received: Arc<subscription::Counters>,
    /// The counters of sent messages.
    pub sent: Arc<Sent>,
    /// The expected echoes, and those that did not arrive.
    pub echoes: Arc<Echoes>,
    /// Serializes changes of the fleet.
    joins: tokio::sync::Mutex<()>,
}

/// The deployment of plugins: what is to be loaded, what is under way, and what failed.
#[derive(Debug)]
pub(crate) struct Deployment {
    /// The parts that a plugin is wired to.
    pub(crate) loader: Arc<Loader>,
    /// The plugins of the config that are loaded next.
    pub(crate) candidates: Mutex<Vec<Candidate>>,
    /// The plugins that are not loaded yet.
    pub(crate) loading: watch::Sender<BTreeSet<PluginName>>,
    /// The time from the start until all plugins were loaded.
    pub(crate) loaded_after: OnceLock<Duration>,
    /// The reasons why plugins are not loaded.
    pub(crate) not_loaded: Mutex<BTreeMap<PluginName, String>>,
    /// The health finding about the folder of plugins.
    pub(crate) folder_trouble: Mutex<Option<HealthFinding>>,
    /// The plugins for which retention keeps the log.
    pub(crate) awaited: Awaited,
    /// The order of operations on the same plugin.
    turns: Turns,
    /// The keys of code that does not run yet.
    pub(crate) claims: KeyClaims,
    /// Limits parallel compilations to the number of cores.
    pub(crate) compiling: Semaphore,
}

/// The facts that the health of a host depends on beside its parts.
#[derive(Debug)]
pub struct HealthNotes {
    /// The past events that the operator has acknowledged.
    pub acknowledged: Acknowledged,
    /// The rows that imports left out.
    pub left_out: LeftOut,
    /// The number of dead letters that were dropped before this start.
    pub letters_dropped_before: u64,
}

/// The limits on parallel requests that hold resources for long.
#[derive(Debug)]
pub struct Permits {
    /// Limits backups to one at a time.
    pub backups: Arc<Semaphore>,
    /// Limits parallel exports of the log.
    pub exports: Arc<Semaphore>,
}

/// The life of a host: its start, its end, and its threads and tasks.
#[derive(Debug)]
pub struct Life {
    /// The time of its start.
    pub started: Timestamp,
    /// The moment at which the start began.
    pub(crate) begun: Instant,
    /// Cancelled when the host ends. Every wait for a result of the host ends with it.
    pub ended: CancellationToken,
    /// Reports a failure that ends the host.
    pub(crate) fail: Fail,
    /// The failure that ended the host.
    pub(crate) failed: watch::Receiver<Option<String>>,
    /// The threads and tasks, until the shutdown takes them.
    pub(crate) running: Mutex<Option<Running>>,
}

impl Host {
    /// Starts a host and returns once its plugins are loaded. Must be called within a tokio runtime.
    pub async fn start(options: Options) -> Result<Arc<Self>, HostError> {
        let host = Self::begin(options).await?;
        host.load().await?;
        Ok(host)
    }

    /// Starts a host without its plugins. The intake already runs; [`Host::load`] loads the plugins.
    pub async fn begin(options: Options) -> Result<Arc<Self>, HostError> {
        let begun = Instant::now();
        let path = Store::file(&options.state_dir);
        // The database panics on a damaged file.
        let opened = tokio::task::spawn_blocking(move || Start::new(options)).await;
        let start = opened.unwrap_or_else(|_| Err(StoreError::Damaged { path }.into()))?;
        Ok(Arc::new(start.run(begun)?))
    }

    /// Returns the time that the start took until all plugins were loaded; `None` before.
    pub fn start_took(&self) -> Option<Duration> {
        self.deployment.loaded_after.get().copied()
    }

    /// Returns whether the host still waits for the daemon's records of its own names after the start. It does not
    /// wait for a daemon that is offline or slow.
    pub fn is_looking(&self) -> bool {
        let Some(took) = self.start_took().filter(|_| self.exchange.links.backend.network) else {
            return false;
        };
        let is_away =
            matches!(self.exchange.links.backend.connectivity.state(), connectivity::State::Offline { .. });
        !is_away
            && self.life.begun.elapsed() < took + CheckedNames::PATIENCE
            && self.storage.keys.all().iter().any(|(key, _)| !self.exchange.links.checked_names.has(key))
    }

    /// Returns the plugins that could not be loaded.
    pub fn not_loaded(&self) -> Vec<NotLoaded> {
        let refused = self.deployment.not_loaded.lock().expect(UNHURT).clone();
        refused.into_iter().map(|(name, reason)| NotLoaded { name, reason }).collect()
    }

    /// Returns messages for the operator about keys whose files are gone.
    pub fn lost(&self) -> Vec<String> {
        self.deployment.loader.lost.lock().expect(UNHURT).clone()
    }

    /// Returns the health finding about the folder of plugins, if there is one.
    pub fn folder_trouble(&self) -> Option<HealthFinding> {
        self.deployment.folder_trouble.lock().expect(UNHURT).clone()
    }

    /// Returns the changes of the plugins' code.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.storage.commit.changes
    }

    /// Returns the feed of the plugins' log lines, with the newest ones buffered.
    pub fn lines(&self) -> &Arc<Feed<Line>> {
        self.deployment.loader.lines.feed()
    }

    /// Reports that the host cannot continue, with the reason.
    fn give_up(&self, reason: String) {
        self.life.fail.send_replace(Some(reason));
    }

    /// Waits until the host cannot continue, or must restart to pack its store. Returns the reason. Never returns
    /// after a regular shutdown.
    pub async fn failure(&self) -> String {
        let mut failed = self.life.failed.clone();
        let reason = failed.wait_for(Option::is_some).await.map(|reason| reason.clone());
        match reason {
            Ok(reason) => reason.unwrap_or_default(),
            // The host has been shut down.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ends the host: it stops the intake, lets each plugin finish its current entry, drains the outbox within the
    /// grace period, and commits everything that was handled. A second call does nothing.
    pub async fn shutdown(&self) {
        let running = self.life.running.lock().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        self.life.ended.cancel();
        running.end(self).await;
    }
}

impl Drop for Host {
    /// Ends the threads and tasks without waiting for them, if nobody called [`Host::shutdown`].
    fn drop(&mut self) {
        let running = self.life.running.get_mut().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        self.life.ended.cancel();
        running.abandon(self);
    }
}
