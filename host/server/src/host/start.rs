//! Owns the start of a host. It receives the options, opens the store and the backend, and returns a host whose
//! stages run. `loader` and `plugins` start the plugins, `running` spawns the threads and tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::Instant;

use dim_ipfs::embedded::Bus;
use dim_ipfs::keys::Keyring;
use dim_ipfs::kubo::{self, Settings};
use dim_ipfs::{Backend, embedded};
use dim_model::beginning::Beginning;
use dim_model::error_chain::chain;
use dim_model::health::Acknowledged;
use dim_model::ident::{Digest, PluginName, Topic};
use dim_model::live::Live;
use dim_model::time::Timestamp;
use dim_network::encrypted_documents::DocumentCipher;
use dim_network::outbox::Sent;
use dim_network::reliable_topics::{Identity, Inputs, Reliable, enter_fleet, has_roster};
use dim_runtime::{Allotment, Cache, Capacity, Compiler, Engine, Inspection, Lines};
use dim_store::commit::Commit;
use dim_store::disk_monitor::{DiskCheck, DiskMonitor, Quota};
use dim_store::event_log::EventLog;
use dim_store::interest::Interest;
use dim_store::outbox::Backlog;
use dim_store::plugin_registry::{self, Row, Setup};
use dim_store::retention::Awaited;
use dim_store::{Absent, Medium, Store, StoreError, Usage, dead_letters, heard_topics};
use rand::Rng as _;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::adopt_name::LeftOut;
use super::candidate::{Allowance, Candidate, Terms, candidates};
use super::key_claims::KeyClaims;
use super::loader::{HostIdentity, Links, Loader};
use super::running::Running;
use super::updates::plugins_of;
use super::{
    ConfigFile, Deployment, Exchange, HealthNotes, Host, HostError, Life, Options, Permits, Plugins,
    Proposal, Storage, Turns,
};
use crate::config::{Config, Policy, StoreConfig};
use crate::secret::Secret;

/// A host that is opened and does not run yet.
pub struct Start {
    config_file: Option<Arc<ConfigFile>>,
    pub(super) loader: Arc<Loader>,
    pub(super) bus: Option<Arc<Bus>>,
    pub(super) sent: Arc<Sent>,
    /// The identity of the host in its fleet, if the host shares something there.
    pub(super) identity: Option<Identity>,
    /// The inputs of the driver of reliable topics.
    pub(super) inputs: Inputs,
    /// The plugins to load.
    candidates: Vec<Candidate>,
    /// The plugins for which retention keeps the log.
    pub(super) awaited: Awaited,
}

impl Start {
    /// Opens the store, the keys, the backend and the log. May block.
    pub fn new(options: Options) -> Result<Self, HostError> {
        let Options { config, config_file, state_dir, medium, absent, clock, compiler, shared_cache, disk } =
            options;
        let disk = disk.unwrap_or_default();
        let (cache, tail) = config.store.memory();
        let store = Arc::new(open(&state_dir, &medium, cache, absent, &disk)?);
        let keys = Arc::new(Keyring::open(store.dir())?);
        let (backend, bus) = choose_backend(&config, &store, &keys)?;
        let interest = Arc::new(Interest::default());
        let backlog = Arc::new(Backlog::restore(&store)?);
        let commit = Arc::new(Commit::new(
            config.store.durability,
            config.store.dead_letters,
            interest.clone(),
            backlog.clone(),
            disk.clone(),
        ));
        let (next, last) = store.log_end()?;
        let log = Arc::new(EventLog::new(store.clone(), next, last, clock, tail));
        // The limit of a process has whole seconds.
        let seconds = config.limits.compile_time.as_secs_f64().ceil() as u64;
        let memory = config.limits.compile_memory;
        let compiler = match compiler {
            Some(program) => Compiler::Apart { program, may: Allotment { seconds, memory } },
            None => Compiler::Here,
        };
        let engine = Engine::new(compiled(&store)?, compiler, Capacity::Host).map_err(HostError::Engine)?;
        let engine = with_bundled(engine);
        let engine = Arc::new(engine.sharing(shared_cache.as_deref().and_then(shared)));
        let fleet = super::fleet::of_start(&config.fleet, &store)?;
        let (reliable, inputs) = Reliable::new(&fleet, config.deliveries());
        let identity_of = || Identity::new(&keys, &fleet, log.clock().wall());
        enter_fleet(&store, &fleet)?;
        // Encrypted documents need the keys of the fleet, too.
        let encrypts = !config.network().encrypted_names.is_empty();
        let shares = reliable.is_used() || encrypts || has_roster(&fleet);
        let identity_in_fleet = if shares { Some(identity_of()?) } else { None };
        let network = Live::new(config.network());
        let cipher = DocumentCipher { reliable: reliable.clone(), settings: network.clone() };
        let loader = Loader {
            identity: HostIdentity { id: identity(&store)?, secret: secret(&store)?, numbers: None },
            network: network.clone(),
            config: Live::new(config),
            storage: Storage { store, log, commit, keys, disk },
            links: Links {
                backend,
                interest,
                backlog,
                listening_records: Arc::default(),
                kept_topics: reliable.kept_topics(),
                reliable,
                cipher,
                unresolved: Arc::default(),
                failures: Arc::default(),
                checked_names: Arc::default(),
            },
            engine,
            lines: Lines::default(),
            from: next,
            announced: Mutex::default(),
            lost: Mutex::default(),
        };
        let candidates = candidates(&loader.config.now(), &loader.storage.store)?;
        loader.restore_interest(candidates.iter().map(|candidate| &candidate.name))?;
        let awaited = candidates.iter().map(|candidate| candidate.name.clone()).collect();
        let start = Self {
            config_file,
            loader: Arc::new(loader),
            bus,
            sent: Arc::default(),
            identity: identity_in_fleet,
            inputs,
            candidates,
            awaited: Arc::new(RwLock::new(awaited)),
        };
        // The intake must not begin on a full disk, nor before the subscriptions of new plugins are in the log.
        start.disk_check().look()?;
        start.announce_new()?;
        Ok(start)
    }

    pub(super) fn disk_check(&self) -> DiskCheck {
        DiskCheck {
            store: self.loader.storage.store.clone(),
            log: self.loader.storage.log.clone(),
            disk: self.loader.storage.disk.clone(),
            quota: quota(&self.loader.config.now().store),
        }
    }

    /// Announces the subscriptions of new plugins.
    fn announce_new(&self) -> Result<(), StoreError> {
        let known = plugin_registry::rows(&self.loader.storage.store.snapshot()?)?;
        let (config, id) = (&self.loader.config.now(), &self.loader.identity.id);
        for candidate in self.candidates.iter().filter(|it| !known.contains_key(&it.name)) {
            // An error is reported when the plugin is loaded.
            let Ok(inspection) = candidate.inspect(config) else { continue };
            if let Ok((set, allowance)) = candidate.resolve(config, &inspection, id) {
                self.announce(&candidate.name, &inspection, &set, &allowance);
            }
        }
        self.announce_folder(&known);
        Ok(())
    }

    /// Announces the subscriptions of new plugins in the folder, which are installed once the host runs.
    fn announce_folder(&self, known: &BTreeMap<PluginName, Row>) {
        let (config, id) = (self.loader.config.now(), &self.loader.identity.id);
        let Some(folder) = &config.plugins_dir else { return };
        // A section of the config without a component can belong to a plugin of the folder.
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
            let Some(inspection) = may_run else { continue };
            // A plugin that requests more than it is granted waits for the operator.
            match candidate.resolve(&config, &inspection, id) {
                Ok((set, allowance)) if allowance.missing().is_empty() => {
                    self.announce(&candidate.name, &inspection, &set, &allowance);
                }
                _ => {}
            }
        }
    }

    /// Announces the subscriptions of a plugin with the config `set`.
    fn announce(&self, name: &PluginName, inspection: &Inspection, set: &str, allowance: &Allowance) {
        let (beginnings, now) = (inspection.manifest.beginnings(set), self.loader.storage.log.now());
        let beginning = |topic: &Topic| beginnings.get(topic).map_or(Beginning::Head, |from| from.at(now));
        let topics = allowance.topics().into_iter();
        self.loader.announce(name, topics.map(|topic| (topic.clone(), beginning(&topic))).collect());
    }

    /// Restores the topics on which other peers were heard before.
    fn restore_others(&self) -> Result<(), StoreError> {
        let wanted = self.loader.links.interest.topics();
        let others = heard_topics::all(&self.loader.storage.store.snapshot()?)?;
        for topic in others.iter().filter(|topic| wanted.contains(topic)) {
            self.loader.links.listening_records.restore_others(topic);
        }
        Ok(())
    }

    /// Starts everything but the plugins.
    pub fn run(mut self, begun: Instant) -> Result<Host, HostError> {
        self.restore_others()?;
        let (fail, failed) = watch::channel(None);
        let (received, echoes, fail) = (Arc::default(), Arc::default(), Arc::new(fail));
        let running = Running::spawn(&self, &echoes, &received, &fail)?;
        self.end_catch_ups_of_plain_topics(&running);
        let identity = self.identity.take();
        let driver = self.reliable_topics(&running, identity, &echoes)?;
        let Self { config_file, loader, bus, sent, identity: _, inputs, candidates, awaited } = self;
        running.spawn_driver(driver, inputs);
        let loading: BTreeSet<_> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
        let rows = plugin_registry::rows(&loader.storage.store.snapshot()?)?;
        let claims = KeyClaims::at_start(&candidates, &rows, &loader.config.now(), &loader.identity.id);
        Ok(Host {
            id: loader.identity.id.clone(),
            config: loader.config.clone(),
            network: loader.network.clone(),
            config_file,
            plugins: Plugins::default(),
            notes: HealthNotes {
                acknowledged: Acknowledged::default(),
                left_out: LeftOut::default(),
                letters_dropped_before: dead_letters::dropped(&loader.storage.store)?,
            },
            permits: Permits {
                backups: Arc::new(Semaphore::new(1)),
                exports: Arc::new(Semaphore::new(EXPORTS)),
            },
            life: Life {
                started: Timestamp::wall(),
                begun,
                ended: CancellationToken::new(),
                fail,
                failed,
                running: Mutex::new(Some(running)),
            },
            storage: loader.storage.clone(),
            exchange: Exchange {
                links: loader.links.clone(),
                bus,
                received,
                sent,
                echoes,
                joins: Default::default(),
            },
            deployment: Deployment {
                loader,
                candidates: Mutex::new(candidates),
                loading: watch::Sender::new(loading),
                loaded_after: OnceLock::new(),
                not_loaded: Mutex::default(),
                folder_trouble: Mutex::default(),
                awaited,
                turns: Turns::default(),
                claims,
                compiling: Semaphore::new(cores()),
            },
        })
    }
}

/// Opens the shared cache of compiled components. Returns `None` if the directory cannot be trusted.
fn shared(path: &Path) -> Option<Cache> {
    let opened = Cache::shared(path);
    opened.inspect_err(|error| tracing::warn!("compiled components are not shared: {error}")).ok()
}

/// Opens the cache of compiled components in the state directory.
pub(crate) fn compiled(store: &Store) -> Result<Cache, StoreError> {
    Cache::of(store).map_err(|source| StoreError::Directory { path: store.path().to_owned(), source })
}

/// The maximum number of parallel exports. Each holds a thread until its reader has read everything.
const EXPORTS: usize = 4;

/// Returns the number of cores.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Gives an engine the bundled plugins in the form that the build of this program has compiled them to.
pub fn with_bundled(engine: Engine) -> Engine {
    let compiled = dim_bundled::compiled().map(|(component, frame)| (Digest::of(component), frame));
    // SAFETY: the build script of `dim-bundled` has compiled each form from the component beside it.
    unsafe { engine.with_built_in(compiled) }
}

/// Returns the limits on the size of the store and on the free space of the disk.
pub(super) fn quota(config: &StoreConfig) -> Quota {
    Quota { max_held: config.max_bytes, min_free: config.min_free_bytes }
}

/// Opens the store, and packs it if the previous host of this process requested it.
fn open(
    state_dir: &Path,
    medium: &Arc<dyn Medium>,
    cache: usize,
    absent: Absent,
    disk: &DiskMonitor,
) -> Result<Store, StoreError> {
    let mut store = Store::open_on(state_dir, medium.clone(), cache, absent)?;
    if disk.reclaimable.take_asked() {
        if let Err(error) = store.pack() {
            tracing::error!("the store cannot be packed: {}", chain(&error));
            drop(store);
            return Store::open_on(state_dir, medium.clone(), cache, Absent::Refused);
        }
        disk.reclaimable.measured(store.file_bytes(), Usage::of(&store.snapshot()?)?.total());
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

/// Returns the identity of the host. It is made once and kept in the store.
pub(crate) fn identity(store: &Store) -> Result<String, StoreError> {
    if let Some(id) = store.meta("id")? {
        return String::from_utf8(id).map_err(|error| StoreError::corrupt("meta", error));
    }
    let id = embedded::new_peer().to_string();
    store.set_meta("id", id.as_bytes())?;
    Ok(id)
}

/// Returns the secret that seeds the plugins' random numbers. It is made once and kept in the store.
pub(crate) fn secret(store: &Store) -> Result<[u8; 32], StoreError> {
    if let Some(secret) = store.meta("secret")? {
        return secret.try_into().map_err(|_| StoreError::corrupt("meta", "the secret has not 32 bytes"));
    }
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    store.set_meta("secret", &secret)?;
    Ok(secret)
}
