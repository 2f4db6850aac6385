//! Owns what plugins are tried on: the engine, with its clock of deadlines, and the components that were compiled.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::{Map, Value};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::TestError;
use super::identity::Identity;
use crate::config::{Config, PluginConfig};
use crate::host::{Candidate, HostError, Proposal, Ready, Terms};
use crate::ident::PluginName;
use crate::plugin::roster::{Code, Setup};
use crate::plugin::{self, Cache, Capacity, Compiler, Engine, Grants, Inspection, Prepared, SomeLimits};
use crate::time::Timestamp;

/// An engine on which plugins are tried. What it has compiled is kept in the user's cache directory.
#[derive(Debug)]
pub struct Bench {
    engine: Arc<Engine>,
    stop: CancellationToken,
    ticker: Option<JoinHandle<()>>,
    /// Where compiled components lie if there is no place that lasts.
    _scratch: Option<TempDir>,
}

/// A plugin that was compiled.
#[derive(Clone, Debug)]
pub struct Plugin {
    prepared: Prepared,
}

/// What a plugin starts with.
#[derive(Clone, Debug)]
pub struct Given {
    /// Its config; what is not there has the manifest's default.
    pub config: Map<String, Value>,
    /// Its state.
    pub state: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Its timers.
    pub timers: BTreeMap<String, Timestamp>,
    /// The version of the state; none if there is no state yet.
    pub state_version: Option<u32>,
    /// What it asks for and is denied.
    pub denied: Grants,
    /// Limits that are set for it.
    pub limits: SomeLimits,
    /// When it begins.
    pub time: Timestamp,
    /// The host that it runs on.
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

impl Bench {
    /// An engine.
    pub fn new() -> Result<Self, TestError> {
        let lasting = Cache::of_user().map(|dir| Cache::shared(&dir));
        let (cache, scratch) = match lasting {
            Some(Ok(cache)) => (cache, None),
            _ => {
                let scratch = TempDir::new().map_err(TestError::Directory)?;
                let cache = Cache::open(scratch.path()).map_err(TestError::Directory)?;
                (cache, Some(scratch))
            }
        };
        let engine = Arc::new(Engine::new(cache, Compiler::Here, Capacity::Bench)?);
        let stop = CancellationToken::new();
        let (ticked, stopped) = (engine.clone(), stop.clone());
        let tick = move || {
            while !stopped.is_cancelled() {
                std::thread::sleep(Engine::EPOCH);
                ticked.tick();
            }
        };
        let ticker = std::thread::Builder::new().name("epochs".to_owned()).spawn(tick);
        let ticker = ticker.map_err(|error| TestError::Host(HostError::Thread(error)))?;
        Ok(Self { engine, stop, ticker: Some(ticker), _scratch: scratch })
    }

    /// Judges and compiles a component. Takes seconds for a large one that was not compiled before.
    pub fn plugin(&self, component: &[u8]) -> Result<Plugin, TestError> {
        let inspection = plugin::judge(component, [])?;
        Ok(Plugin { prepared: self.engine.prepare(component, inspection)? })
    }

    /// A plugin that comes with the host.
    pub fn bundled(&self, name: &str) -> Result<Plugin, TestError> {
        let component = crate::bundled::component(name);
        let missing = || TestError::Given(format!("no plugin {name} comes with the host"));
        self.plugin(component.ok_or_else(missing)?)
    }

    pub(super) fn engine(&self) -> Arc<Engine> {
        self.engine.clone()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(ticker) = self.ticker.take() {
            // It does nothing that could panic.
            let _ = ticker.join();
        }
    }
}

impl Plugin {
    /// What is known of the file.
    pub fn inspection(&self) -> &Inspection {
        &self.prepared.inspection
    }

    /// Its name.
    pub fn name(&self) -> &PluginName {
        &self.prepared.inspection.manifest.name
    }

    /// Settles what it may, with everything that it asks for granted but for what is denied.
    pub(super) fn ready(&self, given: &Given) -> Result<Ready, TestError> {
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
            // Not what comes with the host under this name, and with the config of that.
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
        let (_, asked) = settle(denied.clone()).map_err(TestError::Given)?;
        let granted = Setup { granted: asked.asks, ..denied };
        let (config, allowance) = settle(granted).map_err(TestError::Given)?;
        let code = Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            installed: Some(source.clone()),
        };
        Ok(Ready { source, code, prepared: self.prepared.clone(), config, allowance })
    }
}
