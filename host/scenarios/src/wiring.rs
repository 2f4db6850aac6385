//! Owns the parts of a host in a trial: the store with the given data, which survives crashes, and the actor and
//! commit, which are created again after each crash. Receives a plugin and its initial data; returns a wired actor.

use std::ops::RangeBounds;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use dim_ipfs::embedded;
use dim_ipfs::keys::{KeyFile, Keyring};
use dim_model::entry::Offset;
use dim_model::ident::PluginName;
use dim_model::live::Live;
use dim_model::time::{Clock, Timestamp};
use dim_runtime::{Actor, Engine, Handle, Numbers, check_key};
use dim_server::config::Config;
use dim_server::host::{HostError, HostIdentity, Links, Loader, Ready, Storage, ToRun, Wired};
use dim_store::commit::{Commit, Durability, give_up};
use dim_store::event_log::{EventLog, TAIL_BYTES};
use dim_store::outbox::{self, Backlog};
use dim_store::plugin_limits::{KEY_BYTES, Limits};
use dim_store::{
    Absent, CURSORS, LOG, META, Memory, OUTBOX, PluginId, STATE, StateKey, Store, StoreError, TIMERS,
    documents, event_log_rows,
};
use dim_store::{checkpoint, plugin_registry};
use redb::ReadOnlyTable;
use tempfile::TempDir;

use crate::TrialError;
use crate::identity::{Identity, pair_of};
use crate::notation::shown_key;
use crate::test_bench::{Given, TestBench};

/// Size of the store's page cache, in bytes.
const CACHE: usize = 64 << 20;

/// Size of handled entries and sent publishes, in bytes, from which the trial deletes them.
const KEPT: u64 = 1 << 20;

/// Maximum size of kept files that no name points to any more, in bytes. A plugin may still read them by their paths.
const KEPT_FILES: u64 = 32 << 20;

/// The parts that survive crashes.
pub struct Ground {
    /// The name of the plugin.
    pub plugin: PluginName,
    /// The id of the plugin in the store.
    pub id: PluginId,
    /// The store, in memory.
    pub store: Arc<Store>,
    /// The keys of the host.
    pub keys: Arc<Keyring>,
    /// The offsets of entries from outside, from which random numbers derive.
    pub numbers: Numbers,
    clock: Arc<VirtualClock>,
    engine: Arc<Engine>,
    host: Identity,
    _dir: TempDir,
}

/// The parts that are created again after a crash.
pub struct Wiring {
    /// The shared parts of the host.
    pub loader: Arc<Loader>,
    /// The actor of the plugin.
    pub actor: Actor,
    /// The handle with which the rest of the host reaches the actor.
    pub handle: Handle,
}

/// A clock with a settable time.
#[derive(Debug)]
struct VirtualClock {
    wall: AtomicU64,
    begun: Instant,
}

impl Clock for VirtualClock {
    fn wall(&self) -> Timestamp {
        Timestamp(self.wall.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Instant {
        self.begun
    }
}

impl Ground {
    /// Creates the store with the keys of the plugin and the given data. Fails if the data exceeds a limit.
    pub fn new(
        bench: &TestBench,
        plugin: PluginName,
        ready: &Ready,
        given: &Given,
    ) -> Result<Self, TrialError> {
        let dir = TempDir::new().map_err(TrialError::Directory)?;
        let store = Arc::new(Store::open_on(dir.path(), Arc::new(Memory), CACHE, Absent::Refused)?);
        let keys = Arc::new(Keyring::open(store.dir()).map_err(HostError::Key)?);
        for key in ready.allowance.reach.keys() {
            let file = match given.host.keys.get(key) {
                Some(name) => KeyFile { is_adopted: true, bytes: name.as_str().as_bytes().to_vec() },
                None => {
                    let bytes = pair_of(given.host.seed, &format!("key {key}")).to_protobuf_encoding();
                    KeyFile { is_adopted: false, bytes: bytes.expect("an ed25519 key has a protobuf form") }
                }
            };
            keys.import(key, &file).map_err(HostError::Key)?;
        }
        let id = enter(&store, &plugin, ready, given)?;
        let clock = Arc::new(VirtualClock { wall: AtomicU64::new(given.time.0), begun: Instant::now() });
        let (engine, host, numbers) = (bench.engine(), given.host.clone(), Numbers::default());
        Ok(Self { plugin, id, store, keys, numbers, clock, engine, host, _dir: dir })
    }

    /// Sets the wall clock.
    pub fn set_time(&self, time: Timestamp) {
        self.clock.wall.store(time.0, Ordering::Relaxed);
    }

    /// Deletes rows that nobody reads any more, above [`KEPT`]: handled entries, and publishes, which count as sent
    /// immediately. Also deletes the oldest files that no name points to any more, above [`KEPT_FILES`], as a host
    /// does.
    pub fn trim(&self) -> Result<(), TrialError> {
        let snapshot = self.store.snapshot()?;
        let meta = snapshot.table(META)?;
        let held = event_log_rows::bytes(&meta)? + outbox::bytes(&meta)?;
        let over = documents::superseded_bytes(&snapshot)?.saturating_sub(KEPT_FILES);
        if held < KEPT && over == 0 {
            return Ok(());
        }
        let cursor = snapshot.table(CURSORS)?.get(self.id.0).map_err(StoreError::from)?;
        let handled = Offset(cursor.map_or(0, |cursor| cursor.value().0));
        let mut rows = numbers(&snapshot.table(LOG)?, ..handled.0)?;
        // The last row may contain entries that are not handled yet, and it determines the end of the log.
        rows.pop();
        let sent = numbers(&snapshot.table(OUTBOX)?, ..)?;
        let (mut gone, mut freed) = (Vec::new(), 0);
        for file in documents::superseded(&snapshot)? {
            let file = file?;
            if freed >= over || file.at >= handled {
                break;
            }
            freed += file.bytes;
            gone.push(file);
        }
        let write = self.store.begin()?;
        event_log_rows::trim(&write, &rows)?;
        outbox::forget(&write, &sent)?;
        documents::forget(&write, &gone)?;
        write.commit().map_err(StoreError::from)?;
        Ok(())
    }

    /// Drops all checkpoints of the plugin, so that a takeover cannot be rolled back.
    pub fn settle_for_good(&self) -> Result<(), TrialError> {
        let write = self.store.begin()?;
        for (place, checkpoint) in checkpoint::checkpoints_within(&write, self.id)? {
            give_up(&write, place, &checkpoint)?;
        }
        write.commit().map_err(StoreError::from)?;
        Ok(())
    }

    /// Creates an actor that continues from the data in the store.
    pub fn wire(&self, ready: &Ready) -> Result<Wiring, TrialError> {
        let store = &self.store;
        let (next, last) = store.log_end()?;
        let event_log = Arc::new(EventLog::new(store.clone(), next, last, self.clock.clone(), TAIL_BYTES));
        let (backlog, interest, disk): (Arc<Backlog>, Arc<_>, Arc<_>) = Default::default();
        let config = Config::default();
        let network = Live::new(config.network());
        let commit = Arc::new(Commit::new(
            Durability::Eventual,
            config.store.dead_letters,
            Arc::clone(&interest),
            backlog.clone(),
            Arc::clone(&disk),
        ));
        let loader = Arc::new(Loader {
            config: Live::new(config),
            identity: HostIdentity {
                id: self.host.id.clone(),
                secret: self.host.secret,
                numbers: Some(self.numbers.clone()),
            },
            storage: Storage { store: store.clone(), log: event_log, commit, keys: self.keys.clone(), disk },
            links: Links::offline(
                embedded::backend(store.clone(), self.keys.clone()).0,
                interest,
                backlog,
                network.clone(),
            ),
            network,
            engine: self.engine.clone(),
            lines: Default::default(),
            from: Offset(0),
            announced: Default::default(),
            lost: Default::default(),
        });
        let stored = plugin_registry::read(store, &self.plugin)?;
        let stored = stored.ok_or_else(|| StoreError::corrupt("plugins", "an entered one is gone"))?;
        let to_run = ToRun { ready: ready.clone(), fallback: None, failed: None };
        let Wired { actor, loaded } = loader.wire(&self.plugin, stored, to_run)?;
        Ok(Wiring { loader, actor, handle: loaded.handle })
    }
}

/// Checks that a plugin could have set this key and value itself.
fn check(key: &[u8], value: &[u8], limits: &Limits) -> Result<(), String> {
    let place = || format!("given.state.{}", shown_key(key));
    if check_key(key).is_err() {
        return Err(format!("{}: a key has 1 to {KEY_BYTES} bytes", place()));
    }
    if value.len() > limits.value_bytes {
        return Err(format!("{}: a value has at most {} bytes (value-bytes)", place(), limits.value_bytes));
    }
    Ok(())
}

/// The keys of the rows in a range.
fn numbers(
    table: &ReadOnlyTable<u64, &'static [u8]>,
    range: impl RangeBounds<u64>,
) -> Result<Vec<u64>, StoreError> {
    table.range(range)?.map(|row| Ok(row?.0.value())).collect()
}

/// Enters the plugin with its given data into the store; returns its id.
fn enter(store: &Store, name: &PluginName, ready: &Ready, given: &Given) -> Result<PluginId, TrialError> {
    let write = store.begin()?;
    plugin_registry::enter(&write, name, plugin_registry::entered(None, ready.code.clone()), Offset(0))?;
    let mut row = plugin_registry::row_within(&write, name)?;
    row.state_version = given.state_version;
    let mut size = 0;
    let limits = &ready.allowance.limits;
    {
        let mut table = write.open_table(STATE).map_err(StoreError::from)?;
        for (key, value) in &given.state {
            check(key, value, limits).map_err(TrialError::Given)?;
            size += (key.len() + value.len()) as u64;
            let key = StateKey::new(row.id, key);
            table.insert(key.as_bytes(), value.as_slice()).map_err(StoreError::from)?;
        }
        let mut table = write.open_table(TIMERS).map_err(StoreError::from)?;
        for (key, at) in &given.timers {
            let key = StateKey::new(row.id, key.as_bytes());
            table.insert(key.as_bytes(), at.0).map_err(StoreError::from)?;
        }
        let mut table = write.open_table(CURSORS).map_err(StoreError::from)?;
        table.insert(row.id.0, (0, size)).map_err(StoreError::from)?;
    }
    plugin_registry::put_within(&write, name, &row)?;
    write.commit().map_err(StoreError::from)?;
    Ok(row.id)
}
