//! Owns the plugins that are about to be loaded. It receives the config, the rows of the store and proposals, and
//! returns compiled components with their permissions.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use dim_client::masked;
use dim_model::error_chain::chain;
use dim_model::ident::{Digest, PluginName, Topic};
use dim_model::signer::Signer;
use dim_runtime::{Engine, EngineError, Inspection, Manifest, ManifestError, Prepared, Resolved, Runnable};
use dim_store::checkpoint;
use dim_store::grants::{Grants, Reach};
use dim_store::plugin_limits::Limits;
use dim_store::plugin_registry::{self, Claim, Code, Row, Setup, Standing};
use dim_store::{Store, StoreError, components};
use serde_json::{Map, Value};
use thiserror::Error;

use super::Proposal;
use crate::config::{Config, PluginConfig, Policy};

/// A reason why a candidate cannot be loaded. The text names the source of its component.
#[derive(Debug, Error)]
pub enum CandidateError {
    /// There is no component: the config names no file, and no bundled plugin has the name.
    #[error("{0}")]
    Missing(#[source] io::Error),
    /// The file that the config names cannot be read.
    #[error("cannot read {file}: {error}")]
    File {
        /// The file.
        file: String,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// The installed component cannot be read from the store.
    #[error("cannot read the component that was installed from {from}: {error}")]
    Installed {
        /// The source from which it was installed.
        from: String,
        /// The cause.
        #[source]
        error: io::Error,
    },
    /// The component exceeds the limit of the config.
    #[error("{from}: the component has {size} bytes; it may have {limit} (limits.component-bytes)")]
    TooLarge {
        /// The source of the component.
        from: String,
        /// Its number of bytes.
        size: usize,
        /// The maximum.
        limit: usize,
    },
    /// The component is no plugin that this host can run.
    #[error("{from}: {}", chain(error))]
    Invalid {
        /// The source of the component.
        from: String,
        /// The cause.
        #[source]
        error: EngineError,
    },
    /// The config requires a trusted signature.
    #[error(
        "{from}: {signer} has signed it, and components without a trusted signature do not run here (signing.unsigned)"
    )]
    Unsigned {
        /// The source of the component.
        from: String,
        /// The signer, as text.
        signer: String,
    },
    /// The operator's values do not fit the manifest.
    #[error(transparent)]
    Values(#[from] ManifestError),
}

/// A plugin that is about to be loaded.
pub struct Candidate {
    /// Its name.
    pub name: PluginName,
    /// `bundled`, or the source of the component.
    pub source: String,
    /// Whether the component was installed while a host ran, instead of being named by the config.
    pub installed: bool,
    terms: Terms,
    bytes: io::Result<Bytes>,
    /// The digest of the component that ran last, if it is known.
    last: Option<String>,
    /// The code to run if probation fails, if the plugin is on probation.
    fallback: Option<Box<Candidate>>,
}

/// The terms on which a plugin runs.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The section of the plugin in the config.
    pub config: PluginConfig,
    /// The grants and denials of the operator outside the config.
    pub given: Setup,
}

impl Terms {
    /// Returns the permissions of code by `signer` that has `granted` in addition to the operator's grants.
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
    /// The plugin.
    pub candidate: Candidate,
    /// The code, or the reason why it cannot be loaded.
    pub ready: Result<Ready, CandidateError>,
    /// The code to run if probation fails, if the plugin is on probation and that code can be loaded.
    pub fallback: Option<Ready>,
}

/// A plugin that can be loaded.
#[derive(Clone)]
pub struct Ready {
    /// The source of its component.
    pub source: String,
    /// The description of its component in the store, if it replaces other code.
    pub code: Code,
    /// Its component.
    pub prepared: Prepared,
    /// Its config.
    pub config: String,
    /// Its permissions and limits.
    pub allowance: Allowance,
}

/// The permissions and the limits of a plugin.
#[derive(Clone)]
pub struct Allowance {
    /// The requested permissions.
    pub asks: Grants,
    /// The permissions that it has.
    pub reach: Reach,
    /// The limits that apply.
    pub limits: Limits,
}

impl Ready {
    /// Converts it to the form that an actor runs.
    pub fn into_runnable(self) -> Runnable {
        let Self { source, code, prepared, config, allowance } = self;
        let (topics, asked_topics) = (allowance.topics(), allowance.asked_topics());
        let Allowance { reach, limits, .. } = allowance;
        Runnable { prepared, config, topics, asked_topics, reach: Arc::new(reach), limits, code, source }
    }
}

impl Allowance {
    /// Returns the topics of the manifest that the plugin may subscribe to.
    pub fn topics(&self) -> Vec<Topic> {
        let asked = self.asked_topics().into_iter();
        asked.filter(|topic| self.reach.may_subscribe(topic)).collect()
    }

    /// Returns the topics that the manifest requests.
    pub fn asked_topics(&self) -> Vec<Topic> {
        self.asks.subscribe.iter().filter_map(|pattern| pattern.exact()).cloned().collect()
    }

    /// Returns the requested permissions that it does not have, as text.
    pub fn missing(&self) -> Vec<String> {
        self.reach.missing(&self.asks)
    }
}

/// Returns the plugins to load: the bundled ones that are not disabled, those of the config, and those that were
/// installed while a host ran. Each has its last installed component, if there is one.
pub fn candidates(config: &Config, store: &Store) -> Result<Vec<Candidate>, StoreError> {
    let snapshot = store.snapshot()?;
    let mut rows = plugin_registry::rows(&snapshot)?;
    let mut fallbacks = checkpoint::on_probation(&snapshot)?;
    let mut setups = config.plugins.clone();
    for name in dim_bundled::names() {
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
        let fallback = fallback.map(|checkpoint| {
            let given = terms.given.going_back(&checkpoint.before.setup);
            Candidate::kept(name.clone(), Terms { given, ..terms.clone() }, checkpoint.before.code, store)
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
    /// Returns the keys that it claims by its present grants. A bundled plugin without grants in the config claims
    /// its keys from before; its component is inspected only if the plugin is new.
    pub fn may_claim(&self, row: Option<&Row>, config: &Config, host_id: &str) -> Claim {
        let by_name = self.terms.given.signer.as_ref();
        let granted = match (&self.terms.config.grants, row) {
            (Some(grants), _) => grants.clone(),
            (None, _) if self.installed || self.terms.config.file.is_some() => Grants::default(),
            (None, Some(row)) => {
                Grants { write: row.claim.keys.clone(), share: row.claim.shared.clone(), ..Grants::default() }
            }
            (None, None) => {
                let asks = self.inspect(config).and_then(|it| Ok(self.resolve(config, &it, host_id)?));
                // A plugin that cannot be loaded claims nothing.
                asks.map_or_else(|_| Grants::default(), |(_, allowance)| allowance.asks)
            }
        };
        Claim::of(&self.terms.reach(granted, by_name))
    }

    /// Returns whether the cache probably contains its compiled form; the component is not judged for this.
    pub fn is_compiled(&self, engine: &Engine) -> bool {
        match &self.last {
            Some(last) => engine.has_compiled(last),
            None => self.bytes.as_ref().is_ok_and(|bytes| engine.has_compiled(Digest::of(bytes))),
        }
    }

    /// Judges and compiles the component and its fallback, and stores a component that comes from a file. May block.
    pub fn readied(self, engine: &Engine, config: &Config, host_id: &str, store: &Store) -> Readied {
        let ready = self.ready(engine, config, host_id);
        let fallback = self.fallback(engine, config, host_id);
        if let (Ok(ready), Some(component)) = (&ready, self.of_file()) {
            let digest = ready.prepared.inspection.digest;
            if let Err(error) = components::keep(store, digest, component) {
                tracing::warn!("a rollback to {} will not be possible: {error}", self.source);
            }
        }
        Readied { candidate: self, ready, fallback }
    }

    /// Returns the candidate that the config names.
    pub fn new(name: PluginName, terms: Terms) -> Self {
        let (source, bytes) = match &terms.config.file {
            Some(file) => (file.display().to_string(), dim_runtime::read(file).map(Bytes::from)),
            None => {
                let component = dim_bundled::component(name.as_str()).map(Bytes::from_static);
                let missing = "no plugin of this name comes with the host, the config gives no `file`, and none was installed";
                ("bundled".to_owned(), component.ok_or_else(|| io::Error::other(missing)))
            }
        };
        Self { name, source, installed: false, terms, bytes, last: None, fallback: None }
    }

    /// Returns the candidate that was installed while a host ran.
    fn installed(name: PluginName, terms: Terms, code: Code, store: &Store) -> Self {
        let bytes = components::read(store, &code.digest).map(Bytes::from);
        // Earlier versions stored complete URLs.
        let source = masked(&code.installed.unwrap_or_default());
        Self { name, source, installed: true, terms, bytes, last: None, fallback: None }
    }

    /// Returns the candidate of a proposal, on these terms.
    pub fn proposed(proposal: Proposal, terms: Terms) -> Self {
        let Proposal { plugin: name, component, source, is_named, .. } = proposal;
        Self { name, source, installed: !is_named, terms, bytes: Ok(component), last: None, fallback: None }
    }

    /// Grants the requested permissions that the operator has not denied.
    pub fn grant(&mut self, asks: &Grants) {
        self.terms.given.grant_all(asks);
    }

    /// Binds the plugin's grants to the signer of its component.
    pub fn bind_to(&mut self, signer: Option<&Signer>) {
        self.terms.given = Setup { signer: signer.cloned(), ..self.terms.given.of(signer) };
    }

    /// Returns the grants and denials of the operator outside the config.
    pub fn given(&self) -> Setup {
        self.terms.given.clone()
    }

    /// Returns the candidate for code that ran before: from the store, or from the config if that has the same
    /// component still.
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

    /// Returns the component if it comes from a file of the config, which may have other content at a rollback.
    pub fn of_file(&self) -> Option<&[u8]> {
        self.terms.config.file.as_ref().filter(|_| !self.installed)?;
        self.bytes.as_deref().ok()
    }

    /// Returns whether there is a component; a section of the config alone has none.
    pub fn has_component(&self) -> bool {
        self.bytes.is_ok()
    }

    /// Returns the component.
    pub fn into_component(self) -> Result<Bytes, CandidateError> {
        self.bytes.map_err(CandidateError::Missing)
    }

    /// Judges and compiles the component and settles its permissions.
    pub fn ready(&self, engine: &Engine, config: &Config, host_id: &str) -> Result<Ready, CandidateError> {
        self.compile(self.inspect(config)?, engine, config, host_id)
    }

    /// Compiles an inspected component and settles its permissions.
    pub fn compile(
        &self,
        inspection: Inspection,
        engine: &Engine,
        config: &Config,
        host_id: &str,
    ) -> Result<Ready, CandidateError> {
        let prepared = engine.prepare(self.bytes()?, inspection).map_err(|error| self.invalid(error))?;
        let (plugin_config, allowance) = self.resolve(config, &prepared.inspection, host_id)?;
        let inspection = &prepared.inspection;
        let is_bundled = self.terms.config.file.is_none() && !self.installed;
        let code = Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            // A file may have other content at a rollback; a bundled component comes with the host.
            installed: (!is_bundled).then(|| self.source.clone()),
        };
        Ok(Ready { source: self.source.clone(), code, prepared, config: plugin_config, allowance })
    }

    /// Returns the code to run if probation fails. Without it no automatic rollback is possible.
    fn fallback(&self, engine: &Engine, config: &Config, host_id: &str) -> Option<Ready> {
        let name = &self.name;
        match self.fallback.as_ref()?.ready(engine, config, host_id) {
            Ok(ready) => Some(ready),
            Err(error) => {
                tracing::error!(plugin = %name, "the code for an automatic rollback cannot be loaded: {error}");
                None
            }
        }
    }

    /// Inspects the component without running it.
    pub fn inspect(&self, config: &Config) -> Result<Inspection, CandidateError> {
        let (size, limit) = (self.bytes()?.len(), config.limits.component_bytes);
        if size > limit {
            return Err(CandidateError::TooLarge { from: self.source.clone(), size, limit });
        }
        let (signing, bytes) = (&config.signing, self.bytes()?);
        let inspection =
            dim_runtime::judge(bytes, signing.signers.values()).map_err(|error| self.invalid(error))?;
        if self.policy(config, &inspection) == Policy::Refuse {
            let signer = signing.in_words(inspection.signer.as_ref());
            return Err(CandidateError::Unsigned { from: self.source.clone(), signer });
        }
        Ok(inspection)
    }

    /// Returns the policy for the component by its signer. A bundled component needs no signature.
    pub fn policy(&self, config: &Config, inspection: &Inspection) -> Policy {
        let bundled = || dim_bundled::component(self.name.as_str());
        match config.signing.policy(&self.source, inspection.signer.as_ref()) {
            Policy::Allow => Policy::Allow,
            _ if bundled().is_some_and(|bundled| Digest::of(bundled) == inspection.digest) => Policy::Allow,
            // The author of the config vouches for the component.
            Policy::Ask if !self.installed => Policy::Allow,
            policy => policy,
        }
    }

    fn invalid(&self, error: EngineError) -> CandidateError {
        CandidateError::Invalid { from: self.source.clone(), error }
    }

    fn bytes(&self) -> Result<&[u8], CandidateError> {
        self.bytes.as_deref().map_err(|error| {
            let (source, error) = (self.source.clone(), io::Error::new(error.kind(), error.to_string()));
            match &self.terms.config.file {
                _ if self.installed => CandidateError::Installed { from: source, error },
                None => CandidateError::Missing(error),
                Some(_) => CandidateError::File { file: source, error },
            }
        })
    }

    /// Returns its config with the operator's values, and its allowance.
    pub fn resolve(
        &self,
        config: &Config,
        inspection: &Inspection,
        host_id: &str,
    ) -> Result<(String, Allowance), ManifestError> {
        settle(config, &self.name, &self.terms, self.installed, inspection, host_id)
    }
}

fn is_bundled(name: &PluginName, terms: &Terms) -> bool {
    terms.config.file.is_none() && dim_bundled::component(name.as_str()).is_some()
}

/// Returns the config values that the operator sets for a plugin. A bundled plugin also has values from the section
/// `ipfs`.
pub fn values(config: &Config, name: &PluginName, terms: &Terms, manifest: &Manifest) -> Map<String, Value> {
    match is_bundled(name, terms) {
        true => config.bundled_values(name.as_str(), |key| manifest.config.contains_key(key)),
        false => terms.config.config.clone(),
    }
}

/// Applies the operator's values to a manifest and settles the permissions and limits. A bundled plugin is granted
/// what it requests unless the config has grants; any other has the grants of the config. The operator's later grants
/// are added if they were for this signer, and denials are removed. Returns the config of the plugin and its
/// allowance, or an error if the values do not fit the manifest.
pub fn settle(
    config: &Config,
    name: &PluginName,
    terms: &Terms,
    is_installed: bool,
    inspection: &Inspection,
    host_id: &str,
) -> Result<(String, Allowance), ManifestError> {
    let (manifest, signer) = (&inspection.manifest, inspection.signer.as_ref());
    let is_bundled = is_bundled(name, terms);
    let values = values(config, name, terms, manifest);
    let resolved = manifest.resolve(&values, &[("id", host_id)])?;
    let (policy, set) = (&config.limits, &terms.config.limits);
    let Resolved { asks, config } = resolved;
    let asks = Grants { limits: policy.asked(&manifest.limits, set), ..asks };
    let granted = match &terms.config.grants {
        Some(grants) => grants.clone(),
        // An installed component under a bundled name is not the bundled plugin.
        None if is_bundled && !is_installed => asks.clone(),
        None => Grants::default(),
    };
    let reach = terms.reach(granted, signer);
    let limits = policy.settle(&manifest.limits, set, &reach.limits());
    Ok((config, Allowance { asks, reach, limits }))
}
