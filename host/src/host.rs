//! Owns the composition: opens the store, wires the stages, starts and ends them in order.

mod adoption;
mod candidate;
mod claims;
mod config_check;
mod following;
mod forgetting;
mod granting;
mod installation;
mod judging;
mod loader;
mod plugins;
mod reload;
mod removal;
mod replacement;
mod running;
mod start;
mod supervised;

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::backend::embedded::Bus;
use crate::backend::kubo::{AddressError, ClientError};
use crate::change::Changes;
use crate::commit::Commit;
use crate::config::{Config, Live};
use crate::contact;
use crate::echo::Echoes;
use crate::feed::Feed;
use crate::followed::Unresolved;
use crate::ident::{InvalidWord, PluginName};
use crate::interest::Interest;
use crate::keys::{KeyError, Keyring};
use crate::log::EventLog;
use crate::names::{Failures, Looks};
use crate::outbox::Sent;
use crate::plugin::{EngineError, Handle, Line};
use crate::retention::Awaited;
use crate::room::Room;
use crate::secret::SecretError;
use crate::store::outbox::Backlog;
use crate::store::{Absent, Disk, Medium, Store, StoreError};
use crate::subscription::{self, Hearings};
use crate::time::{Clock, MachineClock, Timestamp};
use crate::trouble::{Acknowledged, Trouble};

use adoption::LeftOut;
pub use adoption::{AdoptError, Adopted, Adoption};
pub(crate) use candidate::{Candidate, Ready, Terms, candidates};
pub use config_check::check as check_config;
pub use forgetting::{ForgetError, Forgotten, PrivateKey};
pub use granting::{GrantChange, Granted};
pub use installation::Grant;
pub(crate) use loader::{Loader, ToRun, Wired};
pub use reload::{ConfigFile, ReloadError, Reloaded};
pub use replacement::{Proposal, ReplaceError, RolledBack};
pub(crate) use start::{compiled, identity, secret};
pub use supervised::{Standing, Supervised};

use claims::Claims;
use running::{Fail, Running};
use start::Start;

/// Why a host does not start or cannot go on.
#[derive(Debug, Error)]
pub enum HostError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The daemon's address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The daemon's client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The engine.
    #[error("the WebAssembly engine cannot start")]
    Engine(#[source] EngineError),
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// It ends already.
    #[error("{0}")]
    Closed(String),
    /// A word of the host's own is none.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

/// What a host is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The config.
    pub config: Config,
    /// The file that it came from, to be read again while the host runs. Absent: there is none.
    pub config_file: Option<Arc<ConfigFile>>,
    /// The state directory.
    pub state_dir: PathBuf,
    /// What the database is written to; a file in the state directory, unless a test is about the
    /// disk.
    pub medium: Arc<dyn Medium>,
    /// What happens where the database is missing although a host has run in the state directory: refused, unless the
    /// operator has said that a new one is to be made.
    pub absent: Absent,
    /// What shows the time of day; the machine, unless a test is about time.
    pub clock: Arc<dyn Clock>,
    /// The program that compiles components, in a process of its own with limits: `dim`. Absent: they are compiled in
    /// this process, and nothing limits that.
    pub compiler: Option<PathBuf>,
    /// A directory in which this and other programs of the same user share compiled components, beside those in the
    /// state directory: [`Cache::of_user`](crate::plugin::Cache::of_user). Absent: none is shared.
    pub shared_cache: Option<PathBuf>,
    /// What is known from the hosts that ran here before this one, if it is one that is started again.
    pub(crate) room: Option<Arc<Room>>,
}

impl Options {
    /// A host whose database is a file in `state_dir`.
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
            room: None,
        }
    }
}

/// A plugin that was not loaded, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NotLoaded {
    /// Its name.
    pub name: PluginName,
    /// Why.
    pub reason: String,
}

/// A plugin that was loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How to talk to it, and what it runs.
    pub handle: Handle,
    /// Ends its thread.
    pub(crate) stop: CancellationToken,
}

/// The plugins of a host. Which there are, and which component each runs, changes while it runs.
#[derive(Debug, Default)]
pub struct Plugins(RwLock<BTreeMap<PluginName, Arc<Loaded>>>);

impl Plugins {
    /// A plugin as it is now.
    pub fn get<Name: Ord + ?Sized>(&self, name: &Name) -> Option<Arc<Loaded>>
    where
        PluginName: Borrow<Name>,
    {
        self.0.read().expect(UNHURT).get(name).cloned()
    }

    /// All of them as they are now, by name.
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

/// Who changes a plugin: changes of one wait for each other, and for those of no other.
#[derive(Debug, Default)]
struct Turns(Mutex<BTreeMap<PluginName, Arc<Turn>>>);

/// Whose turn it is at one plugin.
#[derive(Debug, Default)]
struct Turn {
    /// Where components stand in the order in which they came, also while they are judged and compiled.
    line: tokio::sync::Mutex<()>,
    /// Held by whoever changes what runs. It is taken after the place in the line: what brings no component
    /// does not wait for one that is compiled.
    change: tokio::sync::Mutex<()>,
}

impl Turns {
    /// Whose turn it is at a plugin.
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
    /// Its identity: who it is as an observer.
    pub id: String,
    /// When it started.
    pub started: Timestamp,
    begun: Instant,
    /// Its config.
    pub config: Live,
    /// The file that it came from.
    config_file: Option<Arc<ConfigFile>>,
    /// Its store.
    pub store: Arc<Store>,
    /// Its log.
    pub log: Arc<EventLog>,
    /// Its writer.
    pub commit: Arc<Commit>,
    /// Its keys.
    pub keys: Arc<Keyring>,
    /// What stands behind it.
    pub backend: Backend,
    /// The bus of the embedded backend.
    pub bus: Option<Arc<Bus>>,
    /// What is wanted from outside.
    pub interest: Arc<Interest>,
    /// What is listened to.
    pub hearings: Arc<Hearings>,
    /// The names of others that cannot be resolved.
    pub(crate) unresolved: Arc<Unresolved>,
    /// Why names could not be published.
    pub(crate) failures: Arc<Failures>,
    /// Which names the daemon was asked about.
    looks: Arc<Looks>,
    /// Counts of what came in.
    pub received: Arc<subscription::Tally>,
    /// Counts of what went out.
    pub sent: Arc<Sent>,
    /// Whether there is room for more.
    pub room: Arc<Room>,
    /// How many publishes wait.
    pub backlog: Arc<Backlog>,
    /// Its plugins.
    pub plugins: Plugins,
    /// The echoes that are expected, and those that stayed away.
    pub(crate) echoes: Arc<Echoes>,
    not_loaded: Mutex<BTreeMap<PluginName, String>>,
    /// The past events that the operator has acknowledged.
    pub(crate) acknowledged: Acknowledged,
    /// What imports have left out.
    pub(crate) left_out: LeftOut,
    /// How many dead letters were dropped before this start.
    pub(crate) letters_dropped_before: u64,
    /// What is wrong with the folder of plugins.
    pub(crate) folder_trouble: Mutex<Option<Trouble>>,
    candidates: Mutex<Vec<Candidate>>,
    /// The plugins that are not loaded yet.
    loading: watch::Sender<BTreeSet<PluginName>>,
    /// How long it took until all were loaded.
    loaded_after: OnceLock<Duration>,
    /// The plugins that the log waits for.
    awaited: Awaited,
    loader: Arc<Loader>,
    turns: Turns,
    /// The keys of what does not run yet.
    claims: Claims,
    /// Who compiles: no more at a time than there are cores.
    compiling: Semaphore,
    /// Whose turn it is to make a backup.
    pub backups: Arc<Semaphore>,
    /// Who reads the log for an export.
    pub exports: Arc<Semaphore>,
    /// Cancelled when the host ends: what waits for something of it gives up.
    pub ended: CancellationToken,
    fail: Fail,
    failed: watch::Receiver<Option<String>>,
    running: Mutex<Option<Running>>,
}

impl Host {
    /// Starts a host; returns once its plugins are loaded. Must be called within a tokio runtime.
    pub async fn start(options: Options) -> Result<Arc<Self>, HostError> {
        let host = Self::begin(options).await?;
        host.load().await?;
        Ok(host)
    }

    /// Starts a host without its plugins, for which it takes in already what comes; [`Host::load`] loads them.
    pub async fn begin(options: Options) -> Result<Arc<Self>, HostError> {
        let begun = Instant::now();
        let path = Store::file(&options.state_dir);
        // The database panics at what it cannot make sense of.
        let opened = tokio::task::spawn_blocking(move || Start::new(options)).await;
        let start = opened.unwrap_or_else(|_| Err(StoreError::Damaged { path }.into()))?;
        Ok(Arc::new(start.run(begun)?))
    }

    /// How long it took until all plugins were loaded; none before.
    pub fn start_took(&self) -> Option<Duration> {
        self.loaded_after.get().copied()
    }

    /// Whether the host, which has just started, does not know yet what is published under each of its names. A daemon
    /// that is away or slow is not waited for.
    pub fn is_looking(&self) -> bool {
        let Some(took) = self.start_took().filter(|_| self.backend.network) else { return false };
        let is_away = matches!(self.backend.contact.state(), contact::State::Offline { .. });
        !is_away
            && self.begun.elapsed() < took + Looks::PATIENCE
            && self.keys.all().iter().any(|(key, _)| !self.looks.has(key))
    }

    /// The plugins that could not be loaded.
    pub fn not_loaded(&self) -> Vec<NotLoaded> {
        let refused = self.not_loaded.lock().expect(UNHURT).clone();
        refused.into_iter().map(|(name, reason)| NotLoaded { name, reason }).collect()
    }

    /// What was there once and is gone, for the operator.
    pub fn lost(&self) -> Vec<String> {
        self.loader.lost.lock().expect(UNHURT).clone()
    }

    /// What is wrong with the folder of plugins, if anything is.
    pub fn folder_trouble(&self) -> Option<Trouble> {
        self.folder_trouble.lock().expect(UNHURT).clone()
    }

    /// The changes of its plugins' code.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.commit.changes
    }

    /// The newest lines that plugins have logged, and those to come.
    pub fn lines(&self) -> &Arc<Feed<Line>> {
        self.loader.lines.feed()
    }

    /// Says that the host cannot go on, and why.
    fn give_up(&self, reason: String) {
        self.fail.send_replace(Some(reason));
    }

    /// Resolves with the reason when the host cannot go on, or has to start again for its store to be packed.
    pub async fn failure(&self) -> String {
        let mut failed = self.failed.clone();
        let reason = failed.wait_for(Option::is_some).await.map(|reason| reason.clone());
        match reason {
            Ok(reason) => reason.unwrap_or_default(),
            // The host has been shut down.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ends the host: no more intake, plugins finish their entry, the outbox drains within a
    /// grace, everything handled is committed. A second call does nothing.
    pub async fn shutdown(&self) {
        let running = self.running.lock().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        self.ended.cancel();
        running.end(self).await;
    }
}

impl Drop for Host {
    /// Lets everything end by itself where no one called [`Host::shutdown`].
    fn drop(&mut self) {
        let running = self.running.get_mut().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        self.ended.cancel();
        running.abandon(self);
    }
}
