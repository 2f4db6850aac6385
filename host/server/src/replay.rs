//! Owns the replay of a recorded log. It receives a config and the state directory of a stopped host, runs fresh
//! plugins on the same entries without any external effect, and returns the effects of each plugin.
//!
//! Documents behind names are available for as long as `store.log` keeps them; a plugin that reads an older one gets
//! an error.

use std::path::Path;
use std::sync::Arc;

use dim_ipfs::keys::Keyring;
use dim_model::entry::{Entry, Generation, Offset};
use dim_model::ident::PluginName;
use dim_model::time::{MachineClock, Timestamp};
use dim_runtime::{Actor, Capacity, Compiler, Engine, Lines, Parts, ProbationParts, Reached, SessionParts};
use dim_store::batch::{Batch, Effects, Timers};
use dim_store::catch_ups::KeptTopics;
use dim_store::commit::Commit;
use dim_store::entry_context::{EntryContext, Void};
use dim_store::event_log::{EventLog, TAIL_BYTES};
use dim_store::plugin_registry;
use dim_store::{Store, StoreError};
use tempfile::TempDir;
use thiserror::Error;

use crate::config::Config;
use crate::host::{self, CandidateError, HostError};

/// An error that ends a replay.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part of the host cannot be opened.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The system has no place for a temporary directory.
    #[error("cannot make a temporary directory")]
    Scratch(#[source] std::io::Error),
    /// A plugin cannot be loaded or was not part of the log.
    #[error("plugin {name}: {reason}")]
    Plugin {
        /// The plugin.
        name: PluginName,
        /// The reason.
        reason: String,
    },
}

/// A recorded log and the plugins to replay it with.
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
    /// Opens the state directory of a stopped host. It is not changed.
    pub fn open(config: &Config, state_dir: &Path) -> Result<Self, ReplayError> {
        let source = Arc::new(Store::open(state_dir)?);
        Ok(Self {
            config: config.clone(),
            engine: Arc::new(
                Engine::new(host::compiled(&source)?, Compiler::Here, Capacity::Bench)
                    .map_err(HostError::Engine)?,
            ),
            keys: Arc::new(Keyring::open(source.dir()).map_err(HostError::Key)?),
            id: host::identity(&source)?,
            secret: host::secret(&source)?,
            source,
        })
    }

    /// Replays the log with each plugin, from an empty state up to the plugin's cursor. Returns the effects of each
    /// plugin.
    pub fn run(&self) -> Result<Vec<(PluginName, Batch)>, ReplayError> {
        let entries = self.entries()?;
        host::candidates(&self.config, &self.source)?
            .into_iter()
            .map(|candidate| {
                let name = candidate.name.clone();
                let refused = |error: CandidateError| ReplayError::Plugin {
                    name: name.clone(),
                    reason: error.to_string(),
                };
                let ready = candidate.ready(&self.engine, &self.config, &self.id).map_err(refused)?;
                // WASI must not be entered from an async thread, so each plugin gets its own thread.
                let run = || self.run_one(&name, ready, &entries);
                let done = std::thread::scope(|scope| {
                    let running = scope.spawn(run);
                    // A plugin may loop now although it did not when the log was recorded; the epoch ends it.
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
        let recorded = self.source.snapshot()?;
        let (id, cursor) = plugin_registry::known(&recorded, name)?.ok_or_else(|| ReplayError::Plugin {
            name: name.clone(),
            reason: "it was not there when the log was written".to_owned(),
        })?;
        let reached = Reached { cursor, timers: plugin_registry::timers(&recorded, id)? };
        let mut context = EntryContext::default();
        context.set_void(Void::of(name, entries));
        for (_, own) in self.keys.names_of(run.reach.writes()) {
            context.add_own(own, None);
        }
        let session = SessionParts {
            plugin: name.clone(),
            id,
            reach: run.reach.clone(),
            limits: run.limits,
            context,
            effects: Effects::new(
                Batch::new(name.clone(), id, Generation(1), 1, first),
                Timers::default(),
                0,
            ),
            store: store.clone(),
            files: self.source.clone(),
            keys: self.keys.clone(),
            outbox_len: Arc::default(),
            kept_topics: KeptTopics::All,
            listeners: Lines::default(),
        };
        let parts = Parts {
            run,
            probation: ProbationParts::default(),
            is_paused: false,
            quarantine: None,
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
            disk: Arc::default(),
        };
        let (actor, _) = Actor::new(parts)?;
        Ok(actor.replay(entries, &reached)?)
    }
}
