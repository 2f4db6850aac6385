//! Owns what a trial stands on: the store with what is given, and what is made anew on it after each crash.

use std::ops::RangeBounds;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use redb::ReadOnlyTable;
use tempfile::TempDir;

use super::TestError;
use super::bench::{Bench, Given};
use super::identity::{Identity, pair_of};
use super::shown::shown_key;
use crate::backend::embedded;
use crate::commit::{Commit, Durability, give_up};
use crate::config::{Config, Live};
use crate::entry::Offset;
use crate::host::{HostError, Loader, Ready, ToRun, Wired};
use crate::ident::PluginName;
use crate::keys::{KeyFile, Keyring};
use crate::log::{EventLog, TAIL_BYTES};
use crate::plugin::{Actor, Engine, Handle, KEY_BYTES, Limits, Numbers, check_key, mark, roster};
use crate::store::outbox::{self, Backlog};
use crate::store::{
    Absent, CURSORS, LOG, META, Memory, OUTBOX, PluginId, STATE, StateKey, Store, StoreError, TIMERS,
    documents, log,
};
use crate::time::{Clock, Timestamp};

/// Memory for the pages of the store, in bytes.
const CACHE: usize = 64 << 20;

/// Bytes of what nobody reads any more from which on it is let go of.
const KEPT: u64 = 1 << 20;

/// Bytes of the files that no name points to any more: a plugin may still read them by their paths.
const KEPT_FILES: u64 = 32 << 20;

/// What stays through crashes.
pub struct Ground {
    /// The plugin.
    pub plugin: PluginName,
    /// Its number.
    pub id: PluginId,
    /// The store, in memory.
    pub store: Arc<Store>,
    /// The keys.
    pub keys: Arc<Keyring>,
    /// What random goes by: what came from outside.
    pub numbers: Numbers,
    clock: Arc<VirtualClock>,
    engine: Arc<Engine>,
    host: Identity,
    _dir: TempDir,
}

/// What is made anew after a crash.
pub struct Wiring {
    /// What it is wired to.
    pub loader: Arc<Loader>,
    /// The plugin.
    pub actor: Actor,
    /// The plugin, as others know it.
    pub handle: Handle,
}

/// A clock that shows what it is told to.
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
    /// A store with what is given to a plugin that was settled.
    pub fn new(bench: &Bench, plugin: PluginName, ready: &Ready, given: &Given) -> Result<Self, TestError> {
        let dir = TempDir::new().map_err(TestError::Directory)?;
        let store = Arc::new(Store::open_on(dir.path(), Arc::new(Memory), CACHE, Absent::Refused)?);
        let keys = Arc::new(Keyring::open(&store).map_err(HostError::Key)?);
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

    /// Has it be this time.
    pub fn set_time(&self, time: Timestamp) {
        self.clock.wall.store(time.0, Ordering::Relaxed);
    }

    /// Lets go of what nobody reads any more, once it is much: entries that were handled, and publishes, which are sent
    /// at once; and of the oldest files that no name points to any more, as a host does.
    pub fn trim(&self) -> Result<(), TestError> {
        let snapshot = self.store.snapshot()?;
        let meta = snapshot.table(META)?;
        let held = log::bytes(&meta)? + outbox::bytes(&meta)?;
        let over = documents::superseded_bytes(&snapshot)?.saturating_sub(KEPT_FILES);
        if held < KEPT && over == 0 {
            return Ok(());
        }
        let cursor = snapshot.table(CURSORS)?.get(self.id.0).map_err(StoreError::from)?;
        let handled = Offset(cursor.map_or(0, |cursor| cursor.value().0));
        let mut rows = numbers(&snapshot.table(LOG)?, ..handled.0)?;
        // The last one may hold entries that were not handled, and the end of the log is read off it.
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
        log::trim(&write, &rows)?;
        outbox::forget(&write, &sent)?;
        documents::forget(&write, &gone)?;
        write.commit().map_err(StoreError::from)?;
        Ok(())
    }

    /// Gives up the ways back to what the plugin was before other code took over.
    pub fn settle_for_good(&self) -> Result<(), TestError> {
        let write = self.store.begin()?;
        for (place, mark) in mark::marks_within(&write, self.id)? {
            give_up(&write, place, &mark)?;
        }
        write.commit().map_err(StoreError::from)?;
        Ok(())
    }

    /// Makes a plugin that goes on with what is in the store.
    pub fn wire(&self, ready: &Ready) -> Result<Wiring, TestError> {
        let store = &self.store;
        let (next, last) = store.log_end()?;
        let event_log = Arc::new(EventLog::new(store.clone(), next, last, self.clock.clone(), TAIL_BYTES));
        let (backlog, interest, room): (Arc<Backlog>, Arc<_>, Arc<_>) = Default::default();
        let config = Config::default();
        let commit = Arc::new(Commit::new(
            Durability::Eventual,
            config.store.dead_letters,
            Arc::clone(&interest),
            backlog.clone(),
            Arc::clone(&room),
        ));
        let loader = Arc::new(Loader {
            config: Live::new(config),
            id: self.host.id.clone(),
            secret: self.host.secret,
            numbers: Some(self.numbers.clone()),
            store: store.clone(),
            keys: self.keys.clone(),
            backend: embedded::backend(store.clone(), self.keys.clone()).0,
            interest,
            backlog,
            hearings: Arc::default(),
            unresolved: Arc::default(),
            failures: Arc::default(),
            looks: Arc::default(),
            commit,
            log: event_log,
            room,
            engine: self.engine.clone(),
            lines: Default::default(),
            from: Offset(0),
            announced: Default::default(),
            lost: Default::default(),
        });
        let stored = roster::read(store, &self.plugin)?;
        let stored = stored.ok_or_else(|| StoreError::corrupt("plugins", "an entered one is gone"))?;
        let to_run = ToRun { ready: ready.clone(), fallback: None, failed: None };
        let Wired { actor, loaded } = loader.wire(&self.plugin, stored, to_run)?;
        Ok(Wiring { loader, actor, handle: loaded.handle })
    }
}

/// Whether a plugin could have set a key to a value.
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

/// The numbers of rows.
fn numbers(
    table: &ReadOnlyTable<u64, &'static [u8]>,
    range: impl RangeBounds<u64>,
) -> Result<Vec<u64>, StoreError> {
    table.range(range)?.map(|row| Ok(row?.0.value())).collect()
}

/// Enters the plugin into the store with what is given; returns its number.
fn enter(store: &Store, name: &PluginName, ready: &Ready, given: &Given) -> Result<PluginId, TestError> {
    let write = store.begin()?;
    roster::enter(&write, name, roster::entered(None, ready.code.clone()), Offset(0))?;
    let mut row = roster::row_within(&write, name)?;
    row.state_version = given.state_version;
    let mut size = 0;
    let limits = &ready.allowance.limits;
    {
        let mut table = write.open_table(STATE).map_err(StoreError::from)?;
        for (key, value) in &given.state {
            check(key, value, limits).map_err(TestError::Given)?;
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
    roster::put_within(&write, name, &row)?;
    write.commit().map_err(StoreError::from)?;
    Ok(row.id)
}
