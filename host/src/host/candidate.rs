//! Owns the plugins that are to be loaded: where their components come from and what they may.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use dim_client::masked;
use serde_json::{Map, Value};

use super::Proposal;
use crate::bundled;
use crate::cause::chain;
use crate::config::{Config, PluginConfig, Policy};
use crate::ident::{Digest, PluginName, Topic};
use crate::plugin::mark;
use crate::plugin::roster::{self, Claim, Code, Row, Setup, Standing};
use crate::plugin::{
    self, Engine, EngineError, Grants, Inspection, Limits, Manifest, Prepared, Reach, Resolved, Runnable,
};
use crate::signing::Signer;
use crate::store::{Store, StoreError, components};

/// A plugin that is to be loaded.
pub struct Candidate {
    /// Its name.
    pub name: PluginName,
    /// `bundled`, or the file that it comes from.
    pub source: String,
    /// Whether it was installed while a host ran, in place of what the config names.
    pub installed: bool,
    terms: Terms,
    bytes: io::Result<Bytes>,
    /// The digest of what ran last, as far as it is known.
    last: Option<String>,
    /// What runs again if it fails on probation, if it is on one.
    fallback: Option<Box<Candidate>>,
}

/// On which terms a plugin runs.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// What the config says of it.
    pub config: PluginConfig,
    /// What it was given and denied beside that.
    pub given: Setup,
}

impl Terms {
    /// What may be reached by code that `signer` has signed and that is granted this beside what it was given.
    fn reach(&self, mut granted: Grants, signer: Option<&Signer>) -> Reach {
        let given = self.given.of(signer);
        granted.add(&given.granted);
        Reach { granted, denied: given.denied }
    }
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate")
            .field("name", &self.name)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// A plugin that was judged and compiled.
pub struct Readied {
    /// What was.
    pub candidate: Candidate,
    /// What came of it; the error is for the operator.
    pub ready: Result<Ready, String>,
    /// What runs again if it fails on probation, if it is on one and that can be had.
    pub fallback: Option<Ready>,
}

/// A plugin that can be loaded.
#[derive(Clone)]
pub struct Ready {
    /// Where its component came from.
    pub source: String,
    /// What the store says of its component if it goes on after something else.
    pub code: Code,
    /// Its component.
    pub prepared: Prepared,
    /// Its config.
    pub config: String,
    /// What it may.
    pub allowance: Allowance,
}

/// What a plugin may reach and take.
#[derive(Clone)]
pub struct Allowance {
    /// What it asks for.
    pub asks: Grants,
    /// What it may reach.
    pub reach: Reach,
    /// What it may take.
    pub limits: Limits,
}

impl Ready {
    /// What an actor runs.
    pub fn into_runnable(self) -> Runnable {
        let Self { source, code, prepared, config, allowance } = self;
        let (topics, asked_topics) = (allowance.topics(), allowance.asked_topics());
        let Allowance { reach, limits, .. } = allowance;
        Runnable { prepared, config, topics, asked_topics, reach: Arc::new(reach), limits, code, source }
    }
}

impl Allowance {
    /// The topics that a manifest asks for and that may be subscribed to.
    pub fn topics(&self) -> Vec<Topic> {
        let asked = self.asked_topics().into_iter();
        asked.filter(|topic| self.reach.may_subscribe(topic)).collect()
    }

    /// The topics that a manifest asks for.
    pub fn asked_topics(&self) -> Vec<Topic> {
        self.asks.subscribe.iter().filter_map(|pattern| pattern.exact()).cloned().collect()
    }

    /// What it asks for and may not, in words.
    pub fn missing(&self) -> Vec<String> {
        self.reach.missing(&self.asks)
    }
}

/// The plugins of a config: the bundled ones, unless they are disabled, and those from files; and those that
/// were installed while a host ran. Each runs the component that was installed last, if one was.
pub fn candidates(config: &Config, store: &Store) -> Result<Vec<Candidate>, StoreError> {
    let snapshot = store.snapshot()?;
    let mut rows = roster::rows(&snapshot)?;
    let mut fallbacks = mark::on_probation(&snapshot)?;
    let mut setups = config.plugins.clone();
    for (name, _) in bundled::PLUGINS {
        setups.entry(name.parse().expect("bundled names are valid")).or_default();
    }
    for (name, _) in rows.iter().filter(|(_, row)| row.code.installed.is_some()) {
        setups.entry(name.clone()).or_default();
    }
    rows.retain(|name, row| {
        let is_removed = row.standing == Standing::Removed;
        if is_removed {
            setups.remove(name);
        }
        !is_removed
    });
    let wanted = setups.into_iter().filter(|(_, setup)| !setup.disabled);
    let candidate = |(name, config): (PluginName, PluginConfig)| {
        let row = rows.remove(&name);
        let given = row.as_ref().map(|row| row.setup.clone()).unwrap_or_default();
        let terms = Terms { config, given };
        let fallback = fallbacks.remove(&name);
        let fallback = fallback.map(|mark| {
            let given = terms.given.going_back(&mark.before.setup);
            Candidate::kept(name.clone(), Terms { given, ..terms.clone() }, mark.before.code, store)
        });
        let last = row.as_ref().map(|row| row.code.digest.clone());
        let candidate = match row {
            Some(row) if row.code.installed.is_some() => Candidate::installed(name, terms, row.code, store),
            _ => Candidate::new(name, terms),
        };
        Candidate { last, fallback: fallback.map(Box::new), ..candidate }
    };
    Ok(wanted.map(candidate).collect())
}

impl Candidate {
    /// What it claims by what it is granted now. Of what comes with the host, which has what it asks for, that is
    /// what it had; its component is looked at only if it was not here before.
    pub fn may_claim(&self, row: Option<&Row>, config: &Config, host_id: &str) -> Claim {
        let by_name = self.terms.given.signer.as_ref();
        let granted = match (&self.terms.config.grants, row) {
            (Some(grants), _) => grants.clone(),
            (None, _) if self.installed || self.terms.config.file.is_some() => Grants::default(),
            (None, Some(row)) => {
                Grants { write: row.claim.keys.clone(), share: row.claim.shared.clone(), ..Grants::default() }
            }
            (None, None) => {
                let asks = self.inspect(config).and_then(|it| self.resolve(config, &it, host_id));
                // What cannot be loaded claims nothing.
                asks.map_or_else(|_| Grants::default(), |(_, allowance)| allowance.asks)
            }
        };
        Claim::of(&self.terms.reach(granted, by_name))
    }

    /// Whether its compiled form is in the cache, as far as can be told without judging it.
    pub fn is_compiled(&self, engine: &Engine) -> bool {
        match &self.last {
            Some(last) => engine.has_compiled(last),
            None => self.bytes.as_ref().is_ok_and(|bytes| engine.has_compiled(Digest::of(bytes))),
        }
    }

    /// Judges and compiles it, and what it would go back to; what comes from a file is kept. May block.
    pub fn readied(self, engine: &Engine, config: &Config, host_id: &str, store: &Store) -> Readied {
        let ready = self.ready(engine, config, host_id);
        let fallback = self.fallback(engine, config, host_id);
        if let (Ok(ready), Some(component)) = (&ready, self.of_file()) {
            let digest = ready.prepared.inspection.digest;
            if let Err(error) = components::keep(store, digest, component) {
                tracing::warn!("there will be no way back to {}: {error}", self.source);
            }
        }
        Readied { candidate: self, ready, fallback }
    }

    /// What the config names.
    pub fn new(name: PluginName, terms: Terms) -> Self {
        let (source, bytes) = match &terms.config.file {
            Some(file) => (file.display().to_string(), plugin::read(file).map(Bytes::from)),
            None => {
                let component = bundled::component(name.as_str()).map(Bytes::from_static);
                let missing = "no plugin of this name comes with the host, the config gives no `file`, and none was installed";
                ("bundled".to_owned(), component.ok_or_else(|| io::Error::other(missing)))
            }
        };
        Self { name, source, installed: false, terms, bytes, last: None, fallback: None }
    }

    /// What was installed while a host ran.
    fn installed(name: PluginName, terms: Terms, code: Code, store: &Store) -> Self {
        let bytes = components::read(store, &code.digest).map(Bytes::from);
        // Earlier versions have kept whole URLs.
        let source = masked(&code.installed.unwrap_or_default());
        Self { name, source, installed: true, terms, bytes, last: None, fallback: None }
    }

    /// A component that is to run as a plugin, on these terms.
    pub fn proposed(proposal: Proposal, terms: Terms) -> Self {
        let Proposal { plugin: name, component, source, is_named, .. } = proposal;
        Self { name, source, installed: !is_named, terms, bytes: Ok(component), last: None, fallback: None }
    }

    /// Grants it what it asks for, but for what the operator has denied.
    pub fn grant(&mut self, asks: &Grants) {
        self.terms.given.grant_all(asks);
    }

    /// Gives what the plugin was given to whoever has signed it.
    pub fn bind_to(&mut self, signer: Option<&Signer>) {
        self.terms.given = Setup { signer: signer.cloned(), ..self.terms.given.of(signer) };
    }

    /// What it was given and denied beside what the config says.
    pub fn given(&self) -> Setup {
        self.terms.given.clone()
    }

    /// What a plugin ran before: kept in the store, or what the config names, if that is the same still.
    pub fn kept(name: PluginName, terms: Terms, code: Code, store: &Store) -> Self {
        if code.installed.is_some() {
            return Self::installed(name, terms, code, store);
        }
        let named = Self::new(name.clone(), terms.clone());
        if named.bytes.as_ref().is_ok_and(|bytes| Digest::of(bytes).to_string() == code.digest) {
            return named;
        }
        let code = Code { installed: Some(named.source), ..code };
        Self::installed(name, terms, code, store)
    }

    /// The component of a file, which may be another one by the time that it is gone back to.
    pub fn of_file(&self) -> Option<&[u8]> {
        self.terms.config.file.as_ref().filter(|_| !self.installed)?;
        self.bytes.as_deref().ok()
    }

    /// Whether there is a component: a section of the config alone is none.
    pub fn has_component(&self) -> bool {
        self.bytes.is_ok()
    }

    /// The component; the error is for the operator.
    pub fn into_component(self) -> Result<Bytes, String> {
        self.bytes.map_err(|error| error.to_string())
    }

    /// Judges and compiles the component and settles what it may; the error is for the operator.
    pub fn ready(&self, engine: &Engine, config: &Config, host_id: &str) -> Result<Ready, String> {
        self.compile(self.inspect(config)?, engine, config, host_id)
    }

    /// Compiles the component that was judged and settles what it may; the error is for the operator.
    pub fn compile(
        &self,
        inspection: Inspection,
        engine: &Engine,
        config: &Config,
        host_id: &str,
    ) -> Result<Ready, String> {
        let prepared = engine.prepare(self.bytes()?, inspection).map_err(|error| self.wrong(&error))?;
        let (plugin_config, allowance) = self.resolve(config, &prepared.inspection, host_id)?;
        let inspection = &prepared.inspection;
        let is_bundled = self.terms.config.file.is_none() && !self.installed;
        let code = Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            // A file may be another one by then; what is bundled goes with the host.
            installed: (!is_bundled).then(|| self.source.clone()),
        };
        Ok(Ready { source: self.source.clone(), code, prepared, config: plugin_config, allowance })
    }

    /// What runs again if it fails on probation; without it there is no way back by itself.
    fn fallback(&self, engine: &Engine, config: &Config, host_id: &str) -> Option<Ready> {
        let name = &self.name;
        match self.fallback.as_ref()?.ready(engine, config, host_id) {
            Ok(ready) => Some(ready),
            Err(error) => {
                tracing::error!(plugin = %name, "what it would go back to cannot be loaded: {error}");
                None
            }
        }
    }

    /// Looks at the component without running it; the error is for the operator.
    pub fn inspect(&self, config: &Config) -> Result<Inspection, String> {
        let (size, most) = (self.bytes()?.len(), config.limits.component_bytes);
        if size > most {
            return Err(format!(
                "{}: the component has {size} bytes; it may have {most} (limits.component-bytes)",
                self.source
            ));
        }
        let (signing, bytes) = (&config.signing, self.bytes()?);
        let inspection =
            plugin::judge(bytes, signing.signers.values()).map_err(|error| self.wrong(&error))?;
        if self.policy(config, &inspection) == Policy::Refuse {
            return Err(format!(
                "{}: {} has signed it, and what nobody who is trusted has signed does not run here (signing.unsigned)",
                self.source,
                signing.in_words(inspection.signer.as_ref())
            ));
        }
        Ok(inspection)
    }

    /// What becomes of it, going by who has signed it. What comes with the host needs no signature.
    pub fn policy(&self, config: &Config, inspection: &Inspection) -> Policy {
        let bundled = || bundled::component(self.name.as_str());
        match config.signing.policy(&self.source, inspection.signer.as_ref()) {
            Policy::Allow => Policy::Allow,
            _ if bundled().is_some_and(|bundled| Digest::of(bundled) == inspection.digest) => Policy::Allow,
            // Who wrote it into the config vouches for it.
            Policy::Ask if !self.installed => Policy::Allow,
            policy => policy,
        }
    }

    fn wrong(&self, error: &EngineError) -> String {
        format!("{}: {}", self.source, chain(error))
    }

    fn bytes(&self) -> Result<&[u8], String> {
        self.bytes.as_deref().map_err(|error| match &self.terms.config.file {
            _ if self.installed => {
                format!("cannot read the component that was installed from {}: {error}", self.source)
            }
            None => error.to_string(),
            Some(_) => format!("cannot read {}: {error}", self.source),
        })
    }

    /// Its config with the operator's values, and what it asks for and may; the error is for the operator.
    pub fn resolve(
        &self,
        config: &Config,
        inspection: &Inspection,
        host_id: &str,
    ) -> Result<(String, Allowance), String> {
        settle(config, &self.name, &self.terms, self.installed, inspection, host_id)
    }
}

fn is_bundled(name: &PluginName, terms: &Terms) -> bool {
    terms.config.file.is_none() && bundled::component(name.as_str()).is_some()
}

/// The config values that the operator sets for a plugin; a bundled one has some from the section `ipfs`, too.
pub fn values(config: &Config, name: &PluginName, terms: &Terms, manifest: &Manifest) -> Map<String, Value> {
    match is_bundled(name, terms) {
        true => config.bundled_values(name.as_str(), |key| manifest.config.contains_key(key)),
        false => terms.config.config.clone(),
    }
}

/// Puts the operator's values into a manifest and settles what the plugin may. A bundled one is granted what it
/// asks for unless the config says otherwise; any other has what the config grants. What the operator has given
/// it while a host ran is added, if it was for whoever has signed the component, and what was denied is denied.
/// Returns its config and what it may; the error is for the operator.
pub fn settle(
    config: &Config,
    name: &PluginName,
    terms: &Terms,
    is_installed: bool,
    inspection: &Inspection,
    host_id: &str,
) -> Result<(String, Allowance), String> {
    let (manifest, signer) = (&inspection.manifest, inspection.signer.as_ref());
    let is_bundled = is_bundled(name, terms);
    let values = values(config, name, terms, manifest);
    let resolved = manifest.resolve(&values, &[("id", host_id)]).map_err(|error| error.to_string())?;
    let (policy, set) = (&config.limits, &terms.config.limits);
    let Resolved { asks, config } = resolved;
    let asks = Grants { limits: policy.asked(&manifest.limits, set), ..asks };
    let granted = match &terms.config.grants {
        Some(grants) => grants.clone(),
        // Whatever is installed under its name is not the one that comes with the host.
        None if is_bundled && !is_installed => asks.clone(),
        None => Grants::default(),
    };
    let reach = terms.reach(granted, signer);
    let limits = policy.settle(&manifest.limits, set, &reach.limits());
    Ok((config, Allowance { asks, reach, limits }))
}
