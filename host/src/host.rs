//! Owns the composition: opens the store, wires the stages, starts and ends them in order.

mod candidate;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::Rng as _;
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::embedded::Bus;
use crate::backend::kubo::{self, AddressError, ClientError, Settings};
use crate::backend::{Backend, embedded};
use crate::commit::Commit;
use crate::config::Config;
use crate::echo::Echoes;
use crate::followed::Follower;
use crate::ident::{InvalidWord, IpnsName, KeyName, PluginName, Topic};
use crate::interest::Interest;
use crate::keys::{KeyError, Keyring};
use crate::log::{EventLog, Kind};
use crate::names::{self, Publisher};
use crate::outbox::{self, Outbox};
use crate::plugin::{
    Actor, Engine, EngineError, Grants, Handle, NameOrKey, Parts, Prepared, SessionParts, World, roster,
};
use crate::retention::Retention;
use crate::retries::Retries;
use crate::store::{Store, StoreError};
use crate::subscription::{self, Hearings, Prober, Subscriptions};
use crate::time::Timestamp;

pub(crate) use candidate::{Allowance, candidates};

use candidate::Candidate;

/// How long the daemon may take to say which keys it has, when the host makes its first ones.
const KEYS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the outbox may go on sending when the host ends.
const GRACE: Duration = Duration::from_secs(5);

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
    /// `bundled`, or the file that it came from.
    pub source: String,
}

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
    pub sent: Arc<outbox::Tally>,
    /// Its plugins.
    pub plugins: BTreeMap<PluginName, Loaded>,
    /// Those that could not be loaded.
    pub not_loaded: Vec<NotLoaded>,
    failed: watch::Receiver<Option<String>>,
    running: Mutex<Option<Running>>,
}

/// What must be ended, in this order.
#[derive(Debug)]
struct Running {
    intake: CancellationToken,
    plugins: CancellationToken,
    tasks: CancellationToken,
    writer: CancellationToken,
    intake_tasks: TaskTracker,
    other_tasks: TaskTracker,
    plugin_threads: Vec<JoinHandle<()>>,
    writer_thread: JoinHandle<()>,
    epoch_thread: JoinHandle<()>,
}

impl Host {
    /// Starts a host; returns once its plugins are ready to start. Must be called within a tokio
    /// runtime.
    pub async fn start(options: Options) -> Result<Arc<Self>, HostError> {
        let begun = Instant::now();
        let Options { config, state_dir } = options;
        let store = tokio::task::spawn_blocking(move || Store::open(&state_dir))
            .await
            .expect("opening a store does not panic")?;
        let mut start = Start::new(config, Arc::new(store))?;
        start.load_plugins().await?;
        let host = start.run(begun)?;
        Ok(Arc::new(host))
    }

    /// Resolves with the reason when the host cannot go on.
    pub async fn failure(&self) -> String {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // The host has been shut down.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ends the host: no more intake, plugins finish their entry, the outbox drains within a
    /// grace, everything handled is committed.
    pub async fn shutdown(&self) {
        let running = self.running.lock().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        running.intake.cancel();
        running.intake_tasks.close();
        running.intake_tasks.wait().await;
        running.plugins.cancel();
        self.plugins.values().for_each(|plugin| plugin.handle.wake());
        join(running.plugin_threads).await;
        self.drain_outbox().await;
        running.tasks.cancel();
        running.other_tasks.close();
        running.other_tasks.wait().await;
        running.writer.cancel();
        running.writer_thread.thread().unpark();
        join(vec![running.writer_thread, running.epoch_thread]).await;
    }

    async fn drain_outbox(&self) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            match outbox::waiting(&self.store) {
                Ok((0, _)) | Err(_) => return,
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        if let Ok((left, _)) = outbox::waiting(&self.store) {
            tracing::info!(left, "publishes are left in the outbox and go out after the next start");
        }
    }
}

impl Drop for Host {
    /// Lets everything end by itself where no one called [`Host::shutdown`].
    fn drop(&mut self) {
        let running = self.running.get_mut().expect("no one panics while holding the running").take();
        let Some(running) = running else { return };
        for stop in [running.intake, running.plugins, running.tasks, running.writer] {
            stop.cancel();
        }
        self.plugins.values().for_each(|plugin| plugin.handle.wake());
        running.writer_thread.thread().unpark();
    }
}

async fn join(threads: Vec<JoinHandle<()>>) {
    let joined = tokio::task::spawn_blocking(move || {
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the host panicked");
            }
        }
    });
    if joined.await.is_err() {
        tracing::error!("joining the threads failed");
    }
}

/// A host on its way.
struct Start {
    config: Config,
    id: String,
    secret: [u8; 32],
    store: Arc<Store>,
    keys: Arc<Keyring>,
    backend: Backend,
    bus: Option<Arc<Bus>>,
    interest: Arc<Interest>,
    sent: Arc<outbox::Tally>,
    hearings: Arc<Hearings>,
    commit: Arc<Commit>,
    log: Arc<EventLog>,
    engine: Arc<Engine>,
    plugins: BTreeMap<PluginName, Loaded>,
    actors: Vec<(PluginName, Actor)>,
    not_loaded: Vec<NotLoaded>,
}

impl Start {
    fn new(config: Config, store: Arc<Store>) -> Result<Self, HostError> {
        let keys = Arc::new(Keyring::open(&store)?);
        let (backend, bus) = choose_backend(&config, &store, &keys)?;
        let interest = Arc::new(Interest::default());
        let sent = Arc::new(outbox::Tally::default());
        sent.restore(&store)?;
        let commit = Arc::new(Commit::new(config.store.durability, interest.clone(), sent.clone()));
        let (next, last) = store.log_end()?;
        let log = Arc::new(EventLog::new(store.clone(), next, last));
        let engine = Arc::new(Engine::new(store.clone()).map_err(HostError::Engine)?);
        Ok(Self {
            id: identity(&store)?,
            secret: secret(&store)?,
            config,
            store,
            keys,
            backend,
            bus,
            interest,
            sent,
            hearings: Arc::default(),
            commit,
            log,
            engine,
            plugins: BTreeMap::new(),
            actors: Vec::new(),
            not_loaded: Vec::new(),
        })
    }

    /// Loads the plugins; one that cannot be loaded stops no other.
    async fn load_plugins(&mut self) -> Result<(), HostError> {
        let candidates = candidates(&self.config);
        let engine = self.engine.clone();
        // Compiling takes a core for a second: all cores at once, off the async threads.
        let prepared = tokio::task::spawn_blocking(move || prepare_all(&engine, candidates))
            .await
            .expect("preparing does not panic");
        let mut existing = None;
        for (candidate, prepared) in prepared {
            let name = candidate.name.clone();
            let loaded = match prepared {
                Ok(prepared) => self.load(candidate, prepared, &mut existing).await,
                Err(reason) => Err(LoadError::Refused(reason)),
            };
            match loaded {
                Ok(()) => {}
                Err(LoadError::Refused(reason)) => {
                    tracing::error!(plugin = %name, "not loaded: {reason}");
                    self.not_loaded.push(NotLoaded { name, reason });
                }
                Err(LoadError::Host(error)) => return Err(error),
            }
        }
        Ok(())
    }

    async fn load(
        &mut self,
        candidate: Candidate,
        prepared: Prepared,
        existing: &mut Option<Vec<(KeyName, IpnsName)>>,
    ) -> Result<(), LoadError> {
        let (resolved, Allowance { grants, limits }) =
            candidate.resolve(&self.config, &prepared, &self.id).map_err(LoadError::Refused)?;
        let Candidate { name, source, .. } = candidate;
        let manifest = &prepared.inspection.manifest;
        if !grants.cover(&resolved.asks) {
            tracing::warn!(plugin = %name, "asks for more than it is granted; what is missing is refused when it is used");
        }
        for key in grants.keys() {
            self.ensure_key(key, existing).await?;
        }
        let stored = roster::enter(
            &self.store,
            &name,
            &manifest.version,
            &prepared.inspection.digest,
            self.log.head(),
        )
        .map_err(HostError::from)?;
        let mut stored = stored;
        self.take_back(&name, &grants, &mut stored.world);
        self.add_own_names(&grants, &mut stored.world)?;
        self.interest.restore(&name, &stored.world);
        self.subscribe_as_asked(&name, &resolved.asks, &grants, &stored.world);
        let grants = Arc::new(grants);
        let session = SessionParts {
            plugin: name.clone(),
            id: stored.row.id,
            grants: grants.clone(),
            limits,
            world: stored.world,
            effects: stored.effects,
            store: self.store.clone(),
            keys: self.keys.clone(),
            outbox_len: self.sent.length(&name),
        };
        let parts = Parts {
            prepared: prepared.clone(),
            config: resolved.config,
            state_version: stored.row.state_version,
            session,
            secret: self.secret,
            log: self.log.clone(),
            commit: self.commit.clone(),
        };
        let (actor, handle) = Actor::new(parts).map_err(HostError::from)?;
        self.actors.push((name.clone(), actor));
        self.plugins.insert(name, Loaded { handle, prepared, grants, source });
        Ok(())
    }

    /// What the operator or another plugin published under the plugin's keys before it was there.
    fn add_own_names(&self, grants: &Grants, world: &mut World) -> Result<(), HostError> {
        let snapshot = self.store.snapshot()?;
        for key in &grants.write {
            let Some(name) = self.keys.name(key) else { continue };
            let known = names::known(&snapshot, key)?.map(|known| known.resolution(name.clone()));
            world.add_own(name, known);
        }
        Ok(())
    }

    /// Ends what the plugin had and is not granted any more.
    fn take_back(&self, name: &PluginName, grants: &Grants, world: &mut World) {
        let names = grants.read.iter().filter_map(|either| match either {
            NameOrKey::Name(name) => Some(name.clone()),
            NameOrKey::Key(key) => self.keys.name(key),
        });
        let names: BTreeSet<IpnsName> = names.collect();
        for gone in world.follows().keys().filter(|name| !names.contains(*name)).cloned().collect::<Vec<_>>()
        {
            world.unfollow(&gone);
        }
        let revoked = |topic: &&Topic| !grants.may_subscribe(topic);
        for topic in world.subscriptions().iter().filter(revoked).cloned().collect::<Vec<_>>() {
            world.unsubscribe(&topic);
            self.log.append_now([Kind::Subscription { plugin: name.clone(), topic, subscribed: false }]);
        }
    }

    /// Subscribes to the exact topics of the manifest that are granted, from the head of the log.
    fn subscribe_as_asked(&self, name: &PluginName, asks: &Grants, grants: &Grants, world: &World) {
        for (topic, until) in world.last_heard() {
            self.hearings.restore(topic, until, !world.peers(topic).is_empty());
        }
        for topic in asks.subscribe.iter().filter_map(|pattern| pattern.exact()) {
            if grants.may_subscribe(topic) && !world.subscriptions().contains(topic) {
                let party = crate::interest::Party::Plugin(name.clone());
                self.interest.want_topic(topic, party, true);
                let kind =
                    Kind::Subscription { plugin: name.clone(), topic: topic.clone(), subscribed: true };
                self.log.append_now([kind]);
            }
        }
    }

    /// Makes a key, or adopts the one that the daemon has under that name.
    async fn ensure_key(
        &self,
        key: &KeyName,
        existing: &mut Option<Vec<(KeyName, IpnsName)>>,
    ) -> Result<(), HostError> {
        if self.keys.get(key).is_some() {
            return Ok(());
        }
        if existing.is_none() {
            *existing = Some(self.daemon_keys().await);
        }
        let there = existing.iter().flatten().find(|(name, _)| name == key);
        match there {
            Some((_, name)) => {
                tracing::info!(%key, %name, "adopted the key that the daemon has under this name");
                self.keys.adopt(key, name)?;
            }
            None => {
                self.keys.get_or_create(key)?;
            }
        }
        Ok(())
    }

    async fn daemon_keys(&self) -> Vec<(KeyName, IpnsName)> {
        match tokio::time::timeout(KEYS_TIMEOUT, self.backend.names.keys()).await {
            Ok(Ok(keys)) => keys,
            Ok(Err(error)) => {
                tracing::warn!("making new keys without knowing those of the daemon: {error}");
                Vec::new()
            }
            Err(_) => {
                tracing::warn!("making new keys without knowing those of the daemon: it does not answer");
                Vec::new()
            }
        }
    }

    fn run(self, begun: Instant) -> Result<Host, HostError> {
        let (fail, failed) = watch::channel(None);
        let fail = Arc::new(fail);
        let (intake, plugins) = (CancellationToken::new(), CancellationToken::new());
        let (tasks, writer) = (CancellationToken::new(), CancellationToken::new());
        let writer_thread = self.spawn_writer(writer.clone(), fail.clone())?;
        let epoch_thread = spawn_epochs(self.engine.clone(), writer.clone())?;
        let received = Arc::new(subscription::Tally::default());
        let echoes = Arc::new(Echoes::default());
        let intake_tasks = self.spawn_intake(&intake, &echoes, &received)?;
        let other_tasks = self.spawn_tasks(&tasks, &echoes);
        let mut plugin_threads = Vec::new();
        for (name, actor) in self.actors {
            let (stop, fail) = (plugins.clone(), fail.clone());
            let thread = std::thread::Builder::new().name(format!("plugin {name}")).spawn(move || {
                report(&fail, || actor.run(&stop));
            });
            plugin_threads.push(thread.map_err(HostError::Thread)?);
        }
        let running = Running {
            intake,
            plugins,
            tasks,
            writer,
            intake_tasks,
            other_tasks,
            plugin_threads,
            writer_thread,
            epoch_thread,
        };
        Ok(Host {
            id: self.id,
            started: Timestamp::wall(),
            start_took: begun.elapsed(),
            config: self.config,
            store: self.store,
            log: self.log,
            commit: self.commit,
            keys: self.keys,
            backend: self.backend,
            bus: self.bus,
            interest: self.interest,
            hearings: self.hearings,
            received,
            sent: self.sent,
            plugins: self.plugins,
            not_loaded: self.not_loaded,
            failed,
            running: Mutex::new(Some(running)),
        })
    }

    fn spawn_writer(
        &self,
        stop: CancellationToken,
        fail: Arc<watch::Sender<Option<String>>>,
    ) -> Result<JoinHandle<()>, HostError> {
        let (commit, store, log) = (self.commit.clone(), self.store.clone(), self.log.clone());
        let thread = std::thread::Builder::new().name("commit".to_owned()).spawn(move || {
            report(&fail, || commit.run(&store, &log, &stop));
        });
        let thread = thread.map_err(HostError::Thread)?;
        self.commit.attach(thread.thread().clone());
        self.log.attach(thread.thread().clone());
        Ok(thread)
    }

    fn spawn_intake(
        &self,
        stop: &CancellationToken,
        echoes: &Arc<Echoes>,
        tally: &Arc<subscription::Tally>,
    ) -> Result<TaskTracker, HostError> {
        let tasks = TaskTracker::new();
        let subscriptions = Subscriptions {
            backend: self.backend.clone(),
            log: self.log.clone(),
            interest: self.interest.clone(),
            echoes: echoes.clone(),
            hearings: self.hearings.clone(),
            tally: tally.clone(),
        };
        tasks.spawn(subscriptions.run(stop.clone()));
        let prober = Prober {
            backend: self.backend.clone(),
            log: self.log.clone(),
            interest: self.interest.clone(),
            hearings: self.hearings.clone(),
            topic: format!("dim.probe.{}", self.id).parse::<Topic>()?,
        };
        tasks.spawn(prober.run(stop.clone()));
        let follower = Follower {
            store: self.store.clone(),
            commit: self.commit.clone(),
            backend: self.backend.clone(),
            interest: self.interest.clone(),
            keys: self.keys.clone(),
            every: self.config.follow_every(),
        };
        tasks.spawn(follower.run(stop.clone()));
        Ok(tasks)
    }

    fn spawn_tasks(&self, stop: &CancellationToken, echoes: &Arc<Echoes>) -> TaskTracker {
        let tasks = TaskTracker::new();
        let (store, commit, backend) = (&self.store, &self.commit, &self.backend);
        let outbox = Outbox {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            echoes: echoes.clone(),
            tally: self.sent.clone(),
            expiry: self.config.outbox_expiry(),
        };
        tasks.spawn(outbox.run(stop.clone()));
        let publisher = Publisher {
            store: store.clone(),
            commit: commit.clone(),
            backend: backend.clone(),
            keys: self.keys.clone(),
        };
        tasks.spawn(publisher.run(stop.clone()));
        let retries = Retries { store: store.clone(), commit: commit.clone(), log: self.log.clone() };
        tasks.spawn(retries.run(stop.clone()));
        let retention =
            Retention { store: store.clone(), commit: commit.clone(), log: self.config.store.log.clone() };
        tasks.spawn(retention.run(stop.clone()));
        tasks
    }
}

/// Runs the work of a thread; without it the host cannot go on.
fn report<E: std::error::Error>(fail: &watch::Sender<Option<String>>, work: impl FnOnce() -> Result<(), E>) {
    let reason = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&error),
        Err(_) => format!("thread {:?} panicked", std::thread::current().name().unwrap_or_default()),
    };
    fail.send_replace(Some(reason));
}

enum LoadError {
    /// The plugin is refused; the host goes on.
    Refused(String),
    /// The host cannot go on.
    Host(HostError),
}

impl From<HostError> for LoadError {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

fn prepare_all(engine: &Engine, candidates: Vec<Candidate>) -> Vec<(Candidate, Result<Prepared, String>)> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = candidates
            .into_iter()
            .map(|candidate| {
                scope.spawn(|| {
                    let prepared = candidate.prepare(engine);
                    (candidate, prepared)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("preparing does not panic")).collect()
    })
}

fn choose_backend(
    config: &Config,
    store: &Arc<Store>,
    keys: &Arc<Keyring>,
) -> Result<(Backend, Option<Arc<Bus>>), HostError> {
    match &config.ipfs.api_url {
        Some(address) => {
            let settings =
                Settings { address: address.parse()?, authorization: config.ipfs.api_authorization.clone() };
            Ok((kubo::backend(&settings)?, None))
        }
        None => {
            let (backend, bus) = embedded::backend(store.clone(), keys.clone());
            Ok((backend, Some(bus)))
        }
    }
}

fn spawn_epochs(engine: Arc<Engine>, stop: CancellationToken) -> Result<JoinHandle<()>, HostError> {
    let thread = std::thread::Builder::new().name("epochs".to_owned()).spawn(move || {
        while !stop.is_cancelled() {
            std::thread::sleep(Engine::EPOCH);
            engine.tick();
        }
    });
    thread.map_err(HostError::Thread)
}

/// The host's identity: made once, kept in the store.
pub(crate) fn identity(store: &Store) -> Result<String, StoreError> {
    if let Some(id) = store.meta("id")? {
        return String::from_utf8(id).map_err(|error| StoreError::corrupt("meta", error));
    }
    let id = embedded::new_peer().to_string();
    store.set_meta("id", id.as_bytes())?;
    Ok(id)
}

/// The secret that random follows from: made once, kept in the store.
pub(crate) fn secret(store: &Store) -> Result<[u8; 32], StoreError> {
    if let Some(secret) = store.meta("secret")? {
        return secret.try_into().map_err(|_| StoreError::corrupt("meta", "the secret has not 32 bytes"));
    }
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    store.set_meta("secret", &secret)?;
    Ok(secret)
}

/// An error with its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
