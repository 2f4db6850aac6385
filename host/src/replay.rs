//! Owns handling a recorded log again: fresh plugins, the same entries, nothing that reaches the
//! outside. A week of traffic is tried in as long as the plugins take to handle it.
//!
//! A document behind a name is there for as long as `store.log` keeps it; who reads one that is gone
//! is told that it is not held.

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use thiserror::Error;

use crate::commit::Commit;
use crate::config::Config;
use crate::entry::{Entry, Generation, Offset};
use crate::host::{self, HostError};
use crate::ident::PluginName;
use crate::keys::Keyring;
use crate::log::{EventLog, TAIL_BYTES};
use crate::plugin::{
    Actor, Batch, Capacity, Compiler, Effects, Engine, Lines, Parts, Rates, Rules, SessionParts, Timers,
    Void, World, roster,
};
use crate::store::{Store, StoreError};
use crate::time::{MachineClock, Timestamp};

/// Why a log cannot be handled again.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the host is made of.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A place to work in.
    #[error("cannot make a temporary directory")]
    Scratch(#[source] std::io::Error),
    /// A plugin.
    #[error("plugin {name}: {reason}")]
    Plugin {
        /// Which.
        name: PluginName,
        /// What is wrong with it.
        reason: String,
    },
}

/// A recorded log and the plugins that are to handle it.
#[derive(Debug)]
pub struct Replay {
    config: Config,
    source: Arc<Store>,
    engine: Arc<Engine>,
    keys: Arc<Keyring>,
    id: String,
    secret: [u8; 32],
}

impl Replay {
    /// Opens the state that a stopped host left; it is not changed.
    pub fn open(config: &Config, state_dir: &Path) -> Result<Self, ReplayError> {
        let source = Arc::new(Store::open(state_dir)?);
        Ok(Self {
            config: config.clone(),
            engine: Arc::new(
                Engine::new(host::compiled(&source)?, Compiler::Here, Capacity::Bench)
                    .map_err(HostError::Engine)?,
            ),
            keys: Arc::new(Keyring::open(&source).map_err(HostError::Key)?),
            id: host::identity(&source)?,
            secret: host::secret(&source)?,
            source,
        })
    }

    /// Handles the log with each plugin, from no state and as far as that plugin had handled it;
    /// returns what each has done.
    pub fn run(&self) -> Result<Vec<(PluginName, Batch)>, ReplayError> {
        let entries = self.entries()?;
        host::candidates(&self.config, &self.source)?
            .into_iter()
            .map(|candidate| {
                let name = candidate.name.clone();
                let refused = |reason| ReplayError::Plugin { name: name.clone(), reason };
                let ready = candidate.ready(&self.engine, &self.config, &self.id).map_err(refused)?;
                // On a thread of its own: WASI must not be entered from an async thread.
                let run = || self.run_one(&name, ready, &entries);
                let done = std::thread::scope(|scope| {
                    let running = scope.spawn(run);
                    // A plugin that loops now and did not then must not hold the replay for ever.
                    while !running.is_finished() {
                        std::thread::sleep(Engine::EPOCH);
                        self.engine.tick();
                    }
                    running.join().expect("a replay does not panic")
                });
                Ok((name.clone(), done?))
            })
            .collect()
    }

    fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let next = entries.last().map_or(Offset(0), |last| Offset(last.offset.0 + 1));
            let more = self.source.read_log(next, usize::MAX)?;
            if more.is_empty() {
                return Ok(entries);
            }
            entries.extend(more);
        }
    }

    fn run_one(
        &self,
        name: &PluginName,
        ready: host::Ready,
        entries: &[Entry],
    ) -> Result<Batch, ReplayError> {
        let run = ready.into_runnable();
        let scratch = TempDir::new().map_err(ReplayError::Scratch)?;
        let store = Arc::new(Store::open(scratch.path())?);
        let first = entries.first().map_or(Offset(0), |entry| entry.offset);
        let (id, cursor) =
            roster::known(&self.source.snapshot()?, name)?.ok_or_else(|| ReplayError::Plugin {
                name: name.clone(),
                reason: "it was not there when the log was written".to_owned(),
            })?;
        let handled = entries.partition_point(|entry| entry.offset < cursor);
        let mut world = World::default();
        world.set_void(Void::of(name, entries));
        for (_, own) in self.keys.names_of(run.reach.writes()) {
            world.add_own(own, None);
        }
        let session = SessionParts {
            plugin: name.clone(),
            id,
            reach: run.reach.clone(),
            limits: run.limits,
            world,
            effects: Effects::new(
                Batch::new(name.clone(), id, Generation(1), 1, first),
                Timers::default(),
                0,
            ),
            store: store.clone(),
            files: self.source.clone(),
            keys: self.keys.clone(),
            outbox_len: Arc::default(),
            listeners: Lines::default(),
        };
        let parts = Parts {
            run,
            probation: None,
            fallback: None,
            failed: None,
            rules: Rules::default(),
            is_paused: false,
            quarantine: None,
            rates: Rates::default(),
            state_version: None,
            session,
            secret: self.secret,
            numbers: None,
            log: Arc::new(EventLog::new(store, first, Timestamp(0), Arc::new(MachineClock), TAIL_BYTES)),
            commit: Arc::new(Commit::new(
                self.config.store.durability,
                self.config.store.dead_letters,
                Arc::default(),
                Arc::default(),
                Arc::default(),
            )),
            room: Arc::default(),
        };
        let (actor, _) = Actor::new(parts)?;
        Ok(actor.replay(&entries[..handled], entries)?)
    }
}
