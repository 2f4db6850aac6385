//! Owns the plugins that are to be loaded: where their components come from and what they may.

use std::borrow::Cow;
use std::io;

use super::Loaded;
use crate::bundled;
use crate::cause::chain;
use crate::config::{Config, PluginConfig};
use crate::ident::{PluginName, Topic};
use crate::plugin::roster::{self, Code};
use crate::plugin::{self, Engine, Grants, Limits, Prepared, Resolved};
use crate::store::{Store, StoreError, components};

/// A plugin that is to be loaded.
pub struct Candidate {
    /// Its name.
    pub name: PluginName,
    /// `bundled`, or the file that it comes from.
    pub source: String,
    /// Whether it was installed while a host ran, in place of what the config names.
    pub installed: bool,
    setup: PluginConfig,
    bytes: io::Result<Cow<'static, [u8]>>,
}

/// A plugin that can be loaded.
pub struct Ready {
    /// Its component.
    pub prepared: Prepared,
    /// Its config and what it asks for.
    pub resolved: Resolved,
    /// What it may.
    pub allowance: Allowance,
}

/// What a plugin may reach and take.
pub struct Allowance {
    /// What it may reach.
    pub grants: Grants,
    /// What it may take.
    pub limits: Limits,
}

impl Allowance {
    /// The topics that a manifest asks for and that may be subscribed to.
    pub fn topics(&self, resolved: &Resolved) -> Vec<Topic> {
        let asked = resolved.asks.subscribe.iter().filter_map(|pattern| pattern.exact());
        asked.filter(|topic| self.grants.may_subscribe(topic)).cloned().collect()
    }
}

/// The plugins of a config: the bundled ones, unless they are disabled, and those from files. Each runs the
/// component that was installed last while a host ran, if one was.
pub fn candidates(config: &Config, store: &Store) -> Result<Vec<Candidate>, StoreError> {
    let mut installed = roster::installed(&store.snapshot()?)?;
    let mut setups = config.plugins.clone();
    for (name, _) in bundled::PLUGINS {
        setups.entry(name.parse().expect("bundled names are valid")).or_default();
    }
    let wanted = setups.into_iter().filter(|(_, setup)| !setup.disabled);
    let candidate = |(name, setup)| match installed.remove(&name) {
        Some(code) => Candidate::installed(name, setup, code, store),
        None => Candidate::new(name, setup),
    };
    Ok(wanted.map(candidate).collect())
}

/// Judges and compiles all candidates at once; the error of one is for the operator.
pub fn ready_all(
    engine: &Engine,
    candidates: Vec<Candidate>,
    config: &Config,
    host_id: &str,
) -> Vec<(Candidate, Result<Ready, String>)> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = candidates
            .into_iter()
            .map(|candidate| {
                scope.spawn(move || {
                    let ready = candidate.ready(engine, config, host_id);
                    (candidate, ready)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("preparing does not panic")).collect()
    })
}

impl Candidate {
    fn new(name: PluginName, setup: PluginConfig) -> Self {
        let (source, bytes) = match &setup.file {
            Some(file) => (file.display().to_string(), plugin::read(file).map(Cow::from)),
            None => {
                let component = bundled::component(name.as_str()).map(Cow::from);
                let missing = "no plugin of this name comes with the host, and the config gives no `file`";
                ("bundled".to_owned(), component.ok_or_else(|| io::Error::other(missing)))
            }
        };
        Self { name, source, installed: false, setup, bytes }
    }

    /// What was installed while a host ran.
    fn installed(name: PluginName, setup: PluginConfig, code: Code, store: &Store) -> Self {
        let bytes = components::read(store, &code.digest).map(Cow::from);
        Self { name, source: code.installed.unwrap_or_default(), installed: true, setup, bytes }
    }

    /// A component that came from `source` to replace what runs: with its config, grants and limits.
    pub fn successor(
        config: &Config,
        name: PluginName,
        source: String,
        component: Vec<u8>,
        old: &Loaded,
    ) -> Self {
        let mut setup = config.plugins.get(&name).cloned().unwrap_or_default();
        setup.grants = Some((*old.grants).clone());
        Self { name, source, installed: true, setup, bytes: Ok(Cow::from(component)) }
    }

    /// The component.
    pub fn into_component(self) -> Vec<u8> {
        self.bytes.map(Cow::into_owned).unwrap_or_default()
    }

    /// Judges and compiles the component and settles what it may; the error is for the operator.
    pub fn ready(&self, engine: &Engine, config: &Config, host_id: &str) -> Result<Ready, String> {
        let prepared = self.prepare(engine)?;
        let (resolved, allowance) = self.resolve(config, &prepared, host_id)?;
        Ok(Ready { prepared, resolved, allowance })
    }

    /// Judges and compiles the component; the error is for the operator.
    fn prepare(&self, engine: &Engine) -> Result<Prepared, String> {
        match &self.bytes {
            Ok(bytes) => engine.prepare(bytes).map_err(|error| format!("{}: {}", self.source, chain(&error))),
            Err(error) if self.installed => {
                Err(format!("cannot read the component that was installed from {}: {error}", self.source))
            }
            Err(error) if self.setup.file.is_none() => Err(error.to_string()),
            Err(error) => Err(format!("cannot read {}: {error}", self.source)),
        }
    }

    /// Puts the operator's values into the manifest and settles what the plugin may. A bundled one
    /// has what it asks for; one from a file has what the config grants.
    fn resolve(
        &self,
        config: &Config,
        prepared: &Prepared,
        host_id: &str,
    ) -> Result<(Resolved, Allowance), String> {
        let manifest = &prepared.inspection.manifest;
        let values = match self.setup.file {
            None => config.bundled_values(self.name.as_str(), |key| manifest.config.contains_key(key)),
            Some(_) => self.setup.config.clone(),
        };
        let resolved = manifest.resolve(&values, &[("id", host_id)]).map_err(|error| error.to_string())?;
        let grants = match (&self.setup.grants, &self.setup.file) {
            (Some(grants), _) => grants.clone(),
            (None, None) => resolved.asks.clone(),
            (None, Some(_)) => Grants::default(),
        };
        // A plugin may have less than the defaults by asking; more only the operator gives.
        let limits = self.setup.limits.unwrap_or_else(|| manifest.limits.within(&Limits::default()));
        Ok((resolved, Allowance { grants, limits }))
    }
}
