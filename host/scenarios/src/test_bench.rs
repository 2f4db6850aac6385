//! Owns the test bench: an engine with its epoch clock, and compiled plugins. Receives components; returns plugins that
//! trials can run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use dim_runtime::{Cache, Capacity, Compiler, Engine, Inspection, Prepared};
use dim_server::config::{Config, PluginConfig};
use dim_server::host::with_bundled;
use dim_server::host::{Candidate, HostError, Proposal, Ready, Terms};
use dim_store::grants::Grants;
use dim_store::plugin_limits::SomeLimits;
use dim_store::plugin_registry::{Code, Setup};
use serde_json::{Map, Value};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::TrialError;
use crate::identity::Identity;

/// An engine for trials, and its epoch clock. Compiled components are kept in the user's cache directory.
#[derive(Debug)]
pub struct TestBench {
    engine: Arc<Engine>,
    stop: CancellationToken,
    ticker: Option<JoinHandle<()>>,
    /// A temporary directory for compiled components if there is no cache directory.
    _scratch: Option<TempDir>,
}

/// A compiled plugin.
#[derive(Clone, Debug)]
pub struct Plugin {
    prepared: Prepared,
}

/// The initial data of a plugin.
#[derive(Clone, Debug)]
pub struct Given {
    /// The config of the plugin; an absent value has the default of the manifest.
    pub config: Map<String, Value>,
    /// The state of the plugin.
    pub state: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The timers of the plugin.
    pub timers: BTreeMap<String, Timestamp>,
    /// The version of the state; none if there is no state yet.
    pub state_version: Option<u32>,
    /// The requested permissions that are denied.
    pub denied: Grants,
    /// The limits that the config sets for the plugin.
    pub limits: SomeLimits,
    /// The time at the start of the trial.
    pub time: Timestamp,
    /// The host of the plugin.
    pub host: Identity,
}

/// 2026-01-01T00:00:00Z.
const BEGIN: Timestamp = Timestamp(1_767_225_600_000_000_000);

impl Default for Given {
    fn default() -> Self {
        Self {
            config: Map::new(),
            state: BTreeMap::new(),
            timers: BTreeMap::new(),
            state_version: None,
            denied: Grants::default(),
            limits: SomeLimits::default(),
            time: BEGIN,
            host: Identity::of(0),
        }
    }
}

impl TestBench {
    /// Creates an engine and starts the thread of its epoch clock. Fails if there is no directory for compiled
    /// components, or if the engine or the thread cannot be created.
    pub fn new() -> Result<Self, TrialError> {
        let lasting = Cache::of_user().map(|dir| Cache::shared(&dir));
        let (cache, scratch) = match lasting {
            Some(Ok(cache)) => (cache, None),
            _ => {
                let scratch = TempDir::new().map_err(TrialError::Directory)?;
                let cache = Cache::open(scratch.path()).map_err(TrialError::Directory)?;
                (cache, Some(scratch))
            }
        };
        let engine = Arc::new(with_bundled(Engine::new(cache, Compiler::Here, Capacity::Bench)?));
        let stop = CancellationToken::new();
        let (ticked, stopped) = (engine.clone(), stop.clone());
        let tick = move || {
            while !stopped.is_cancelled() {
                std::thread::sleep(Engine::EPOCH);
                ticked.tick();
            }
        };
        let ticker = std::thread::Builder::new().name("epochs".to_owned()).spawn(tick);
        let ticker = ticker.map_err(|error| TrialError::Host(HostError::Thread(error)))?;
        Ok(Self { engine, stop, ticker: Some(ticker), _scratch: scratch })
    }

    /// Checks and compiles a component. Blocks for seconds if a large component is not in the cache.
    pub fn plugin(&self, component: &[u8]) -> Result<Plugin, TrialError> {
        let inspection = dim_runtime::judge(component, [])?;
        Ok(Plugin { prepared: self.engine.prepare(component, inspection)? })
    }

    /// Compiles a bundled plugin. Fails if there is none of this name.
    pub fn bundled(&self, name: &str) -> Result<Plugin, TrialError> {
        let component = dim_bundled::component(name);
        let missing = || TrialError::Given(format!("no plugin {name} comes with the host"));
        self.plugin(component.ok_or_else(missing)?)
    }

    pub(super) fn engine(&self) -> Arc<Engine> {
        self.engine.clone()
    }
}

impl Drop for TestBench {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(ticker) = self.ticker.take() {
            // The thread does nothing that can panic.
            let _ = ticker.join();
        }
    }
}

impl Plugin {
    /// The inspection of the component.
    pub fn inspection(&self) -> &Inspection {
        &self.prepared.inspection
    }

    /// The name in the manifest.
    pub fn name(&self) -> &PluginName {
        &self.prepared.inspection.manifest.name
    }

    /// Resolves the config and the permissions. All requested permissions are granted, except those in `given.denied`.
    pub(super) fn ready(&self, given: &Given) -> Result<Ready, TrialError> {
        let inspection = &self.prepared.inspection;
        let source = "this test".to_owned();
        let proposal = Proposal {
            plugin: self.name().clone(),
            component: bytes::Bytes::new(),
            source: source.clone(),
            by: source.clone(),
            follows: None,
            is_named: false,
            trust: None,
        };
        let config = PluginConfig {
            // A file, so that the plugin is not taken for the bundled plugin of this name, with its config.
            file: Some(PathBuf::new()),
            config: given.config.clone(),
            limits: given.limits.clone(),
            ..PluginConfig::default()
        };
        let settle = |setup: Setup| {
            let terms = Terms { config: config.clone(), given: setup };
            Candidate::proposed(proposal.clone(), terms).resolve(
                &Config::default(),
                inspection,
                &given.host.id,
            )
        };
        let denied = Setup { denied: given.denied.clone(), ..Setup::default() };
        let (_, asked) = settle(denied.clone())?;
        let granted = Setup { granted: asked.asks, ..denied };
        let (config, allowance) = settle(granted)?;
        let code = Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            installed: Some(source.clone()),
        };
        Ok(Ready { source, code, prepared: self.prepared.clone(), config, allowance })
    }
}
