//! Owns the plugins that are to be loaded: where their components come from and what they may.

use std::borrow::Cow;
use std::io;

use crate::bundled;
use crate::cause::chain;
use crate::config::{Config, PluginConfig};
use crate::ident::PluginName;
use crate::plugin::{self, Engine, Grants, Limits, Prepared, Resolved};

/// A plugin that is to be loaded.
pub struct Candidate {
    /// Its name.
    pub name: PluginName,
    /// `bundled`, or the file that it comes from.
    pub source: String,
    setup: PluginConfig,
    bytes: io::Result<Cow<'static, [u8]>>,
}

/// What a plugin may reach and take.
pub struct Allowance {
    /// What it may reach.
    pub grants: Grants,
    /// What it may take.
    pub limits: Limits,
}

/// The plugins of a config: the bundled ones, unless they are disabled, and those from files.
pub fn candidates(config: &Config) -> Vec<Candidate> {
    let mut setups = config.plugins.clone();
    for (name, _) in bundled::PLUGINS {
        setups.entry(name.parse().expect("bundled names are valid")).or_default();
    }
    let wanted = setups.into_iter().filter(|(_, setup)| !setup.disabled);
    wanted.map(|(name, setup)| Candidate::new(name, setup)).collect()
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
        Self { name, source, setup, bytes }
    }

    /// Judges and compiles the component; the error is for the operator.
    pub fn prepare(&self, engine: &Engine) -> Result<Prepared, String> {
        match &self.bytes {
            Ok(bytes) => engine.prepare(bytes).map_err(|error| format!("{}: {}", self.source, chain(&error))),
            Err(error) if self.setup.file.is_none() => Err(error.to_string()),
            Err(error) => Err(format!("cannot read {}: {error}", self.source)),
        }
    }

    /// Puts the operator's values into the manifest and settles what the plugin may. A bundled one
    /// has what it asks for; one from a file has what the config grants.
    pub fn resolve(
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
