//! Owns the start of a host: opens what it is made of, loads the plugins and puts them into the world
//! as of their cursors. What runs is `running`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::Rng as _;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::candidate::{Allowance, Candidate, Ready, candidates, ready_all};
use super::running::Running;
use super::{Host, HostError, Loaded, NotLoaded, Options, Plugins};
use crate::backend::embedded::Bus;
use crate::backend::kubo::{self, Settings};
use crate::backend::{Backend, embedded};
use crate::cause::chain;
use crate::commit::Commit;
use crate::config::{Config, StoreConfig};
use crate::entry::{Event, Kind, Offset};
use crate::ident::{IpnsName, KeyName, PluginName, Topic};
use crate::interest::{Interest, Party};
use crate::keys::Keyring;
use crate::log::EventLog;
use crate::outbox::Sent;
use crate::plugin::roster::{self, Missed};
use crate::plugin::{Actor, Engine, Grants, NameOrKey, Parts, SessionParts, World};
use crate::room::{Lookout, Quota, Room};
use crate::store::outbox::Backlog;
use crate::store::{Medium, Store, StoreError, Usage, names, others};
use crate::subscription::Hearings;
use crate::time::Timestamp;

/// How long the daemon may take to say which keys it has, when the host makes its first ones.
const KEYS_TIMEOUT: Duration = Duration::from_secs(5);

/// A host on its way.
pub struct Start {
    pub(super) config: Config,
    pub(super) id: String,
    pub(super) secret: [u8; 32],
    pub(super) store: Arc<Store>,
    pub(super) keys: Arc<Keyring>,
    pub(super) backend: Backend,
    pub(super) bus: Option<Arc<Bus>>,
    pub(super) interest: Arc<Interest>,
    pub(super) sent: Arc<Sent>,
    pub(super) backlog: Arc<Backlog>,
    pub(super) hearings: Arc<Hearings>,
    pub(super) commit: Arc<Commit>,
    pub(super) log: Arc<EventLog>,
    pub(super) room: Arc<Room>,
    pub(super) engine: Arc<Engine>,
    pub(super) plugins: BTreeMap<PluginName, Loaded>,
    pub(super) actors: Vec<(PluginName, Actor)>,
    pub(super) not_loaded: Vec<NotLoaded>,
    /// The plugins of the config, loaded or not.
    pub(super) configured: Vec<PluginName>,
    /// What was there once and is gone.
    pub(super) lost: Vec<String>,
}

impl Start {
    /// Opens what the host is made of. May block.
    pub fn new(options: Options) -> Result<Self, HostError> {
        let Options { config, state_dir, medium, clock, room } = options;
        let room = room.unwrap_or_default();
        let store = Arc::new(open(&state_dir, &medium, &room)?);
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
        let log = Arc::new(EventLog::new(store.clone(), next, last, clock));
        let engine = Arc::new(Engine::new(store.clone()).map_err(HostError::Engine)?);
        let start = Self {
            id: identity(&store)?,
            secret: secret(&store)?,
            config,
            store,
            keys,
            backend,
            bus,
            interest,
            sent: Arc::default(),
            backlog,
            hearings: Arc::default(),
            commit,
            log,
            engine,
            plugins: BTreeMap::new(),
            actors: Vec::new(),
            not_loaded: Vec::new(),
            configured: Vec::new(),
            lost: Vec::new(),
            room,
        };
        // Before anything is taken in.
        start.lookout().look()?;
        Ok(start)
    }

    pub(super) fn lookout(&self) -> Lookout {
        Lookout {
            store: self.store.clone(),
            log: self.log.clone(),
            room: self.room.clone(),
            quota: quota(&self.config.store),
        }
    }

    /// Loads the plugins; one that cannot be loaded stops no other.
    pub async fn load_plugins(&mut self) -> Result<(), HostError> {
        let candidates = candidates(&self.config, &self.store)?;
        self.configured = candidates.iter().map(|candidate| candidate.name.clone()).collect();
        let (engine, config, id) = (self.engine.clone(), self.config.clone(), self.id.clone());
        // Compiling takes a core for a second: all cores at once, off the async threads.
        let ready = tokio::task::spawn_blocking(move || ready_all(&engine, candidates, &config, &id))
            .await
            .expect("preparing does not panic");
        let granted = ready.iter().flat_map(|(_, ready)| ready.as_ref().ok());
        let missing: BTreeSet<KeyName> = granted
            .flat_map(|ready| ready.allowance.grants.keys())
            .filter(|key| self.keys.get(key).is_none())
            .cloned()
            .collect();
        if !missing.is_empty() {
            let existing = daemon_keys(self.backend.clone()).await;
            self.make_keys(&missing, &existing)?;
        }
        for (candidate, ready) in ready {
            let name = candidate.name.clone();
            match ready {
                Ok(ready) => self.load(candidate, ready)?,
                Err(reason) => {
                    tracing::error!(plugin = %name, "not loaded: {reason}");
                    self.not_loaded.push(NotLoaded { name, reason });
                }
            }
        }
        Ok(())
    }

    fn load(&mut self, candidate: Candidate, ready: Ready) -> Result<(), HostError> {
        let Ready { prepared, resolved, allowance } = ready;
        let Candidate { name, source, installed, .. } = candidate;
        let topics = allowance.topics(&resolved);
        let Allowance { grants, limits } = allowance;
        if !grants.cover(&resolved.asks) {
            tracing::warn!(plugin = %name, "asks for more than it is granted; what is missing is refused when it is used");
        }
        let installed = installed.then(|| source.clone());
        let mut stored = roster::enter(&self.store, &name, &prepared.inspection, installed, self.log.head())?;
        if let Some(missed) = &stored.missed {
            self.tell_missed(&name, &stored.world, stored.cursor, missed);
        }
        self.take_back(&name, &grants, &mut stored.world);
        self.add_own_names(&grants, &mut stored.world)?;
        self.interest.restore(&name, &stored.world);
        self.subscribe_to_new(&name, &topics, &stored.world);
        let grants = Arc::new(grants);
        let session = SessionParts {
            plugin: name.clone(),
            id: stored.row.id,
            grants: grants.clone(),
            limits,
            world: stored.world,
            effects: stored.effects,
            store: self.store.clone(),
            files: self.store.clone(),
            keys: self.keys.clone(),
            outbox_len: self.backlog.length(Some(&name)),
        };
        let parts = Parts {
            prepared: prepared.clone(),
            config: resolved.config,
            state_version: stored.row.state_version,
            session,
            secret: self.secret,
            log: self.log.clone(),
            commit: self.commit.clone(),
            room: self.room.clone(),
        };
        let (actor, handle) = Actor::new(parts)?;
        self.actors.push((name.clone(), actor));
        self.plugins.insert(name, Loaded { handle, prepared, grants, limits, source, turns: Arc::default() });
        Ok(())
    }

    /// The log did not wait for a plugin that was disabled: it missed what was trimmed.
    fn tell_missed(&self, name: &PluginName, world: &World, cursor: Offset, missed: &Missed) {
        tracing::warn!(plugin = %name, since = %missed.since, until = %missed.until, "missed what the log no longer holds");
        self.log.append_now(world.subscriptions().iter().map(|topic| Kind::Again {
            plugin: name.clone(),
            attempt: 0,
            first: cursor,
            event: Event::Gap { topic: topic.clone(), since: missed.since, until: missed.until },
        }));
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
            world.revoke(&topic);
            self.log.append_now([Kind::Subscription { plugin: name.clone(), topic, subscribed: false }]);
        }
    }

    /// Subscribes to the topics of the manifest that are new, from the head of the log. From others
    /// the plugin may have unsubscribed.
    fn subscribe_to_new(&self, name: &PluginName, topics: &[Topic], world: &World) {
        for (topic, until) in world.last_heard() {
            self.hearings.restore(topic, until, !world.peers(topic).is_empty());
        }
        for topic in topics.iter().filter(|topic| world.is_new(topic)) {
            self.interest.want_topic(topic, Party::Plugin(name.clone()), true);
            let kind = Kind::Subscription { plugin: name.clone(), topic: topic.clone(), subscribed: true };
            self.log.append_now([kind]);
        }
    }

    /// Makes keys, or adopts those that the daemon has under these names.
    fn make_keys(
        &mut self,
        missing: &BTreeSet<KeyName>,
        existing: &[(KeyName, IpnsName)],
    ) -> Result<(), HostError> {
        let snapshot = self.store.snapshot()?;
        for key in missing {
            if names::known(&snapshot, key)?.is_some_and(|known| known.published.is_some()) {
                let lost = format!(
                    "the file of key {key} is gone, so its name is another one now: stop the host and restore keys/{key} from a backup"
                );
                tracing::error!("{lost}");
                self.lost.push(lost);
            }
            match existing.iter().find(|(there, _)| there == key) {
                Some((_, name)) => {
                    tracing::info!(%key, %name, "adopted the key that the daemon has under this name");
                    self.keys.adopt(key, name)?;
                }
                None => {
                    self.keys.get_or_create(key)?;
                }
            }
        }
        Ok(())
    }

    /// Takes in on which topics others were heard before.
    fn restore_others(&self) -> Result<(), StoreError> {
        let wanted = self.interest.topics();
        for topic in others::all(&self.store.snapshot()?)?.iter().filter(|topic| wanted.contains(topic)) {
            self.hearings.restore_others(topic);
        }
        Ok(())
    }

    /// Starts everything.
    pub fn run(mut self, begun: Instant) -> Result<Host, HostError> {
        self.restore_others()?;
        let (fail, failed) = watch::channel(None);
        let received = Arc::default();
        let actors = std::mem::take(&mut self.actors);
        let echoes = Arc::default();
        let running = Running::spawn(&self, actors, &echoes, &received, &Arc::new(fail))?;
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
            room: self.room,
            backlog: self.backlog,
            plugins: Plugins::new(self.plugins),
            echoes,
            not_loaded: self.not_loaded,
            lost: self.lost,
            engine: self.engine,
            secret: self.secret,
            backups: Arc::new(Semaphore::new(1)),
            ended: CancellationToken::new(),
            failed,
            running: Mutex::new(Some(running)),
        })
    }
}

/// How much the store may hold, and has to leave of the disk.
pub(super) fn quota(config: &StoreConfig) -> Quota {
    Quota { max_held: config.max_bytes, min_free: config.min_free_bytes }
}

/// Opens the store, and packs it if the host before this one asked for it.
fn open(state_dir: &Path, medium: &Arc<dyn Medium>, room: &Room) -> Result<Store, StoreError> {
    let mut store = Store::open_on(state_dir, medium.clone())?;
    if room.slack.take_asked() {
        if let Err(error) = store.pack() {
            tracing::error!("the store cannot be packed: {}", chain(&error));
            drop(store);
            return Store::open_on(state_dir, medium.clone());
        }
        room.slack.measured(store.file_bytes(), Usage::of(&store.snapshot()?)?.total());
    }
    Ok(store)
}

async fn daemon_keys(backend: Backend) -> Vec<(KeyName, IpnsName)> {
    match tokio::time::timeout(KEYS_TIMEOUT, backend.names.keys()).await {
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
