//! Owns the start of a host: opens what it is made of and starts its stages. Plugins are `loader`'s and
//! `plugins`', what runs is `running`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Instant;

use rand::Rng as _;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::adoption::LeftOut;
use super::candidate::{Candidate, Terms, candidates};
use super::claims::Claims;
use super::following::plugins_of;
use super::loader::Loader;
use super::running::Running;
use super::{ConfigFile, Host, HostError, Options, Plugins, Proposal, Turns};
use crate::backend::embedded::Bus;
use crate::backend::kubo::{self, Settings};
use crate::backend::{Backend, embedded};
use crate::cause::chain;
use crate::commit::Commit;
use crate::config::{Config, Live, Policy, StoreConfig};
use crate::ident::PluginName;
use crate::interest::Interest;
use crate::keys::Keyring;
use crate::log::EventLog;
use crate::outbox::Sent;
use crate::plugin::roster::{self, Row, Setup};
use crate::plugin::{Allotment, Cache, Capacity, Compiler, Engine, Lines};
use crate::retention::Awaited;
use crate::room::{Lookout, Quota, Room};
use crate::secret::Secret;
use crate::store::outbox::Backlog;
use crate::store::{Absent, Medium, Store, StoreError, Usage, dead, others};
use crate::time::Timestamp;
use crate::trouble::Acknowledged;

/// A host on its way.
pub struct Start {
    config_file: Option<Arc<ConfigFile>>,
    pub(super) loader: Arc<Loader>,
    pub(super) bus: Option<Arc<Bus>>,
    pub(super) sent: Arc<Sent>,
    /// The plugins that are to be loaded.
    candidates: Vec<Candidate>,
    /// Those that the log waits for.
    pub(super) awaited: Awaited,
}

impl Start {
    /// Opens what the host is made of. May block.
    pub fn new(options: Options) -> Result<Self, HostError> {
        let Options { config, config_file, state_dir, medium, absent, clock, compiler, shared_cache, room } =
            options;
        let room = room.unwrap_or_default();
        let (cache, tail) = config.store.memory();
        let store = Arc::new(open(&state_dir, &medium, cache, absent, &room)?);
        let keys = Arc::new(Keyring::open(&store)?);
        let (backend, bus) = choose_backend(&config, &store, &keys)?;
        let interest = Arc::new(Interest::default());
        let backlog = Arc::new(Backlog::restore(&store)?);
        let commit = Arc::new(Commit::new(
            config.store.durability,
            config.store.dead_letters,
            interest.clone(),
            backlog.clone(),
            room.clone(),
        ));
        let (next, last) = store.log_end()?;
        let log = Arc::new(EventLog::new(store.clone(), next, last, clock, tail));
        let (seconds, memory) = (config.limits.compile_seconds, config.limits.compile_memory);
        let compiler = match compiler {
            Some(program) => Compiler::Apart { program, may: Allotment { seconds, memory } },
            None => Compiler::Here,
        };
        let engine = Engine::new(compiled(&store)?, compiler, Capacity::Host).map_err(HostError::Engine)?;
        let engine = Arc::new(engine.sharing(shared_cache.as_deref().and_then(shared)));
        let loader = Loader {
            id: identity(&store)?,
            secret: secret(&store)?,
            numbers: None,
            config: Live::new(config),
            store,
            keys,
            backend,
            interest,
            backlog,
            hearings: Arc::default(),
            unresolved: Arc::default(),
            failures: Arc::default(),
            looks: Arc::default(),
            commit,
            log,
            room,
            engine,
            lines: Lines::default(),
            from: next,
            announced: Mutex::default(),
            lost: Mutex::default(),
        };
        let candidates = candidates(&loader.config.now(), &loader.store)?;
        loader.restore_interest(candidates.iter().map(|candidate| &candidate.name))?;
        let awaited = candidates.iter().map(|candidate| candidate.name.clone()).collect();
        let start = Self {
            config_file,
            loader: Arc::new(loader),
            bus,
            sent: Arc::default(),
            candidates,
            awaited: Arc::new(RwLock::new(awaited)),
        };
        // Before anything is taken in.
        start.lookout().look()?;
        start.announce_new()?;
        Ok(start)
    }

    pub(super) fn lookout(&self) -> Lookout {
        Lookout {
            store: self.loader.store.clone(),
            log: self.loader.log.clone(),
            room: self.loader.room.clone(),
            quota: quota(&self.loader.config.now().store),
        }
    }

    /// Subscribes the plugins that were never here.
    fn announce_new(&self) -> Result<(), StoreError> {
        let known = roster::rows(&self.loader.store.snapshot()?)?;
        let (config, id) = (&self.loader.config.now(), &self.loader.id);
        for candidate in self.candidates.iter().filter(|it| !known.contains_key(&it.name)) {
            let inspected = candidate.inspect(config);
            // One that cannot be loaded says so when it is.
            if let Ok((_, allowance)) = inspected.and_then(|it| candidate.resolve(config, &it, id)) {
                self.loader.announce(&candidate.name, allowance.topics());
            }
        }
        self.announce_folder(&known);
        Ok(())
    }

    /// Subscribes the plugins of the folder that were never here: they are installed once the host runs.
    fn announce_folder(&self, known: &BTreeMap<PluginName, Row>) {
        let (config, id) = (self.loader.config.now(), &self.loader.id);
        let Some(folder) = &config.plugins_dir else { return };
        // A section of the config may stand for a plugin of the folder: it has no component then.
        let loaded = self.candidates.iter().filter(|candidate| candidate.has_component());
        let mut announced: BTreeSet<PluginName> = loaded.map(|candidate| candidate.name.clone()).collect();
        for (plugin, file, component) in plugins_of(folder) {
            if known.contains_key(&plugin) || !announced.insert(plugin.clone()) {
                continue;
            }
            let section = config.plugins.get(&plugin).cloned().unwrap_or_default();
            let (source, by, follows) = (file.display().to_string(), String::new(), None);
            let proposal = Proposal { plugin, component, source, by, follows, is_named: false, trust: None };
            let terms = Terms { config: section, given: Setup::default() };
            let candidate = Candidate::proposed(proposal, terms);
            let inspected = candidate.inspect(&config).ok();
            let may_run =
                inspected.filter(|inspection| candidate.policy(&config, inspection) == Policy::Allow);
            let resolved = may_run.and_then(|inspection| candidate.resolve(&config, &inspection, id).ok());
            // One that asks for more than it is granted waits for the operator.
            if let Some((_, allowance)) = resolved.filter(|(_, allowance)| allowance.missing().is_empty()) {
                self.loader.announce(&candidate.name, allowance.topics());
            }
        }
    }

    /// Takes in on which topics others were heard before.
    fn restore_others(&self) -> Result<(), StoreError> {
        let wanted = self.loader.interest.topics();
        let others = others::all(&self.loader.store.snapshot()?)?;
        for topic in others.iter().filter(|topic| wanted.contains(topic)) {
            self.loader.hearings.restore_others(topic);
        }
        Ok(())
    }

    /// Starts everything but the plugins.
    pub fn run(self, begun: Instant) -> Result<Host, HostError> {
        self.restore_others()?;
        let (fail, failed) = watch::channel(None);
        let (received, echoes, fail) = (Arc::default(), Arc::default(), Arc::new(fail));
        let running = Running::spawn(&self, &echoes, &received, &fail)?;
        let Self { config_file, loader, bus, sent, candidates, awaited } = self;
        let loading: BTreeSet<_> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
        let rows = roster::rows(&loader.store.snapshot()?)?;
        let claims = Claims::at_start(&candidates, &rows, &loader.config.now(), &loader.id);
        Ok(Host {
            id: loader.id.clone(),
            started: Timestamp::wall(),
            begun,
            config: loader.config.clone(),
            config_file,
            store: loader.store.clone(),
            log: loader.log.clone(),
            commit: loader.commit.clone(),
            keys: loader.keys.clone(),
            backend: loader.backend.clone(),
            bus,
            interest: loader.interest.clone(),
            hearings: loader.hearings.clone(),
            unresolved: loader.unresolved.clone(),
            failures: loader.failures.clone(),
            looks: loader.looks.clone(),
            received,
            sent,
            room: loader.room.clone(),
            backlog: loader.backlog.clone(),
            plugins: Plugins::default(),
            echoes,
            not_loaded: Mutex::default(),
            acknowledged: Acknowledged::default(),
            left_out: LeftOut::default(),
            letters_dropped_before: dead::dropped(&loader.store)?,
            folder_trouble: Mutex::default(),
            candidates: Mutex::new(candidates),
            loading: watch::Sender::new(loading),
            loaded_after: OnceLock::new(),
            awaited,
            loader,
            turns: Turns::default(),
            claims,
            compiling: Semaphore::new(cores()),
            backups: Arc::new(Semaphore::new(1)),
            exports: Arc::new(Semaphore::new(EXPORTS)),
            ended: CancellationToken::new(),
            fail,
            failed,
            running: Mutex::new(Some(running)),
        })
    }
}

/// The compiled components that programs share. A directory that cannot be trusted is not used.
fn shared(path: &Path) -> Option<Cache> {
    let opened = Cache::shared(path);
    opened.inspect_err(|error| tracing::warn!("compiled components are not shared: {error}")).ok()
}

/// Where compiled components lie.
pub(crate) fn compiled(store: &Store) -> Result<Cache, StoreError> {
    Cache::of(store).map_err(|source| StoreError::Directory { path: store.path().to_owned(), source })
}

/// Exports of events at a time: each holds a thread for as long as its reader takes.
const EXPORTS: usize = 4;

/// How many cores there are.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How much the store may hold, and has to leave of the disk.
pub(super) fn quota(config: &StoreConfig) -> Quota {
    Quota { max_held: config.max_bytes, min_free: config.min_free_bytes }
}

/// Opens the store, and packs it if the host before this one asked for it.
fn open(
    state_dir: &Path,
    medium: &Arc<dyn Medium>,
    cache: usize,
    absent: Absent,
    room: &Room,
) -> Result<Store, StoreError> {
    let mut store = Store::open_on(state_dir, medium.clone(), cache, absent)?;
    if room.slack.take_asked() {
        if let Err(error) = store.pack() {
            tracing::error!("the store cannot be packed: {}", chain(&error));
            drop(store);
            return Store::open_on(state_dir, medium.clone(), cache, Absent::Refused);
        }
        room.slack.measured(store.file_bytes(), Usage::of(&store.snapshot()?)?.total());
    }
    Ok(store)
}

fn choose_backend(
    config: &Config,
    store: &Arc<Store>,
    keys: &Arc<Keyring>,
) -> Result<(Backend, Option<Arc<Bus>>), HostError> {
    match &config.ipfs.api_url {
        Some(address) => {
            let authorization = config.ipfs.api_authorization.as_ref().map(Secret::read).transpose()?;
            let settings = Settings { address: address.parse()?, authorization };
            Ok((kubo::backend(&settings)?, None))
        }
        None => {
            let (backend, bus) = embedded::backend(store.clone(), keys.clone());
            Ok((backend, Some(bus)))
        }
    }
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
