//! Owns the composition: opens the store, wires the stages, starts and ends them in order.

mod candidate;
mod replacement;
mod running;
mod start;
mod supervised;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::backend::embedded::Bus;
use crate::backend::kubo::{AddressError, ClientError};
use crate::commit::Commit;
use crate::config::Config;
use crate::echo::Echoes;
use crate::ident::{InvalidWord, PluginName};
use crate::interest::Interest;
use crate::keys::{KeyError, Keyring};
use crate::log::EventLog;
use crate::outbox::Sent;
use crate::plugin::{Engine, EngineError, Grants, Handle, Limits, Prepared};
use crate::room::Room;
use crate::store::outbox::Backlog;
use crate::store::{Disk, Medium, Store, StoreError};
use crate::subscription::{self, Hearings};
use crate::time::{Clock, MachineClock, Timestamp};

pub(crate) use candidate::{Allowance, Ready, candidates};
pub use replacement::{Outcome, ReplaceError, Replacement, Version};
pub(crate) use start::{identity, secret};
pub use supervised::{Standing, Supervised};

use running::Running;
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
    /// The engine.
    #[error("the WebAssembly engine cannot start")]
    Engine(#[source] EngineError),
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// A word of the host's own is none.
    #[error(transparent)]
    Word(#[from] InvalidWord),
}

/// What a host is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The config.
    pub config: Config,
    /// The state directory.
    pub state_dir: PathBuf,
    /// What the database is written to; a file in the state directory, unless a test is about the
    /// disk.
    pub medium: Arc<dyn Medium>,
    /// What shows the time of day; the machine, unless a test is about time.
    pub clock: Arc<dyn Clock>,
    /// What is known from the hosts that ran here before this one, if it is one that is started again.
    pub(crate) room: Option<Arc<Room>>,
}

impl Options {
    /// A host whose database is a file in `state_dir`.
    pub fn new(config: Config, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            config,
            state_dir: state_dir.into(),
            medium: Arc::new(Disk),
            clock: Arc::new(MachineClock),
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
    /// How to talk to it.
    pub handle: Handle,
    /// Its component.
    pub prepared: Prepared,
    /// What it may reach.
    pub grants: Arc<Grants>,
    /// What it may take.
    pub limits: Limits,
    /// `bundled`, or the file that it came from.
    pub source: String,
    /// Whose turn it is to replace it.
    pub(crate) turns: Arc<tokio::sync::Mutex<()>>,
}

/// The plugins of a host. Which there are, and which component each runs, changes while it runs.
#[derive(Debug, Default)]
pub struct Plugins(RwLock<BTreeMap<PluginName, Arc<Loaded>>>);

impl Plugins {
    /// Those that are there when a host starts.
    pub fn new(plugins: BTreeMap<PluginName, Loaded>) -> Self {
        Self(RwLock::new(plugins.into_iter().map(|(name, plugin)| (name, Arc::new(plugin))).collect()))
    }

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

    /// Puts a plugin in the place of the one of its name.
    pub(crate) fn put(&self, name: PluginName, plugin: Loaded) {
        self.0.write().expect(UNHURT).insert(name, Arc::new(plugin));
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
    /// How long the start took.
    pub start_took: Duration,
    /// Its config.
    pub config: Config,
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
    /// Those that could not be loaded.
    pub not_loaded: Vec<NotLoaded>,
    /// What was there once and is gone, for the operator.
    pub lost: Vec<String>,
    /// What compiles components.
    pub(crate) engine: Arc<Engine>,
    /// What random follows from.
    pub(crate) secret: [u8; 32],
    /// Whose turn it is to make a backup.
    pub backups: Arc<Semaphore>,
    /// Cancelled when the host ends: what waits for something of it gives up.
    pub ended: CancellationToken,
    failed: watch::Receiver<Option<String>>,
    running: Mutex<Option<Running>>,
}

impl Host {
    /// Starts a host; returns once its plugins are ready to start. Must be called within a tokio
    /// runtime.
    pub async fn start(options: Options) -> Result<Arc<Self>, HostError> {
        let begun = Instant::now();
        let path = Store::file(&options.state_dir);
        // The database panics at what it cannot make sense of.
        let opened = tokio::task::spawn_blocking(move || Start::new(options)).await;
        let mut start = opened.unwrap_or_else(|_| Err(StoreError::Damaged { path }.into()))?;
        start.load_plugins().await?;
        Ok(Arc::new(start.run(begun)?))
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
