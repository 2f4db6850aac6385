//! Owns the check of a config file together with the addresses, secrets, files and manifests that it names. It
//! receives the text and returns findings. It starts nothing and sends nothing over the network.

use std::collections::{BTreeMap, BTreeSet};

use dim_ipfs::kubo;
use dim_model::error_chain::{chain, listed};
use dim_model::ident::{ContentPath, PluginName, Topic};
use dim_runtime::{Inspection, ManifestError};
use dim_store::grants::NameOrKey;
use dim_store::plugin_registry::Setup;

use super::candidate::{Candidate, Terms, values};
use crate::config::findings::Severity;
use crate::config::{Config, Examined};
use crate::secret::{HeaderText, Secret};

/// Checks the text of a config file and everything that it names; `host_id` replaces `${host.id}`. May block.
pub fn check(text: &str, host_id: &str) -> Examined {
    let mut examined = Examined::of(text);
    if let Some(config) = examined.config.clone() {
        let mut check = Check { examined: &mut examined, config: &config, host_id };
        check.addresses();
        check.secrets();
        check.topics();
        check.limits();
        check.plugins();
        examined.sort();
    }
    examined
}

/// A store below this size, in bytes, is full after a few documents.
const LITTLE: u64 = 1 << 20;

struct Check<'a> {
    examined: &'a mut Examined,
    config: &'a Config,
    host_id: &'a str,
}

impl Check<'_> {
    fn addresses(&mut self) {
        let Config { ipfs, replacement, plugins_dir, .. } = self.config;
        if let Some(Err(error)) = ipfs.api_url.as_ref().map(|address| address.parse::<kubo::Address>()) {
            self.examined.tell(Severity::Error, &["ipfs", "api_url"], error.to_string());
        }
        if ipfs.api_url.is_none() && ipfs.api_authorization.is_some() {
            let why = "nothing is sent: there is no `api_url`";
            self.examined.tell(Severity::Warning, &["ipfs", "api_authorization"], why);
        }
        let registry = ipfs.registry_ipns.as_deref().map(str::trim).filter(|name| !name.is_empty());
        if let Some(Err(error)) = registry.map(str::parse::<NameOrKey>) {
            let why = format!("no registry is merged: {error}");
            self.examined.tell(Severity::Warning, &["ipfs", "registry_ipns"], why);
        }
        for wrong in ipfs.jobs_ipns.iter().filter_map(|name| name.trim().parse::<NameOrKey>().err()) {
            let why = format!("no jobs are merged from it: {wrong}");
            self.examined.tell(Severity::Warning, &["ipfs", "jobs_ipns"], why);
        }
        for trusted in replacement.trusted.iter().filter(|it| it.parse::<ContentPath>().is_err()) {
            let why =
                format!("{trusted:?} is neither `/ipfs/…` nor `/ipns/…`: nothing is installed from there");
            self.examined.tell(Severity::Warning, &["replacement", "trusted"], why);
        }
        if let Some(folder) = plugins_dir.as_ref().filter(|folder| !folder.is_dir()) {
            let why = format!("{} is no folder that can be read", folder.display());
            self.examined.tell(Severity::Warning, &["plugins_dir"], why);
        }
        if let Some(endpoint) = &self.config.telemetry.otlp_endpoint
            && !reqwest::Url::parse(endpoint).is_ok_and(|url| url.has_host())
        {
            let why = "it is no URL, as in http://127.0.0.1:4318";
            self.examined.tell(Severity::Error, &["telemetry", "otlp_endpoint"], why);
        }
    }

    /// The host may be able to read secrets that the user of the check cannot, so this is no error.
    fn secrets(&mut self) {
        let mut secret = |path: &[&str], secret: Option<&Secret>| {
            if let Some(Err(error)) = secret.map(Secret::read) {
                let why = format!("the secret cannot be read here: {}", chain(&error));
                self.examined.tell(Severity::Warning, path, why);
            }
        };
        secret(&["ipfs", "api_authorization"], self.config.ipfs.api_authorization.as_ref());
        secret(&["api", "token"], self.config.api.token.as_ref());
        for (name, header) in &self.config.telemetry.headers {
            let HeaderText::Secret(value) = header else { continue };
            secret(&["telemetry", "headers", name], Some(value));
        }
    }

    fn topics(&mut self) {
        let silent = self
            .config
            .topics
            .iter()
            .filter(|(_, topic)| topic.peers.as_ref().is_some_and(BTreeSet::is_empty));
        for (pattern, _) in silent {
            let why = "no peer is named: every message on it is refused";
            self.examined.tell(Severity::Warning, &["topics", &pattern.to_string(), "peers"], why);
        }
        let topics = &self.config.ipfs.pubsub;
        let mut named: BTreeMap<&Topic, &str> = BTreeMap::new();
        for (key, topic) in [
            ("job_updates", &topics.job_updates),
            ("node_heartbeat", &topics.node_heartbeat),
            ("results_ready", &topics.results_ready),
            ("node_status", &topics.node_status),
        ] {
            if let Some(other) = named.insert(topic, key) {
                let why = format!(
                    "it is also the topic of `{other}`: messages for one become dead letters of the other"
                );
                self.examined.tell(Severity::Warning, &["ipfs", "pubsub", key], why);
            }
        }
    }

    /// Warns about limits with which nothing works.
    fn limits(&mut self) {
        let Config { limits, store, .. } = self.config;
        if limits.plugins == 0 {
            self.examined.tell(Severity::Warning, &["limits", "plugins"], "no plugin is loaded");
        }
        if let Some(why) = limits.over_ceiling(&limits.default) {
            self.examined.tell(Severity::Warning, &["limits", "default"], why);
        }
        if let Some(most) = store.max_bytes.filter(|most| *most < LITTLE) {
            let why = format!("a store of {most} bytes is soon full, and then the intake stops");
            self.examined.tell(Severity::Warning, &["store", "max_bytes"], why);
        }
    }

    fn plugins(&mut self) {
        let config = self.config;
        let mut wanted = config.plugins.clone();
        for name in dim_bundled::names() {
            wanted.entry(name.parse().expect("bundled names are valid")).or_default();
        }
        for (name, section) in wanted.into_iter().filter(|(_, section)| !section.disabled) {
            // The bundled plugin is not compared with, because an installed one has its own manifest.
            if section.file.is_none() && dim_bundled::component(name.as_str()).is_none() {
                let why =
                    "it has no `file` and does not come with the host: it is loaded if it was installed";
                self.examined.tell(Severity::Note, &["plugins", name.as_str()], why);
                continue;
            }
            let terms = Terms { config: section, given: Setup::default() };
            let candidate = Candidate::new(name.clone(), terms.clone());
            match candidate.inspect(config) {
                Ok(inspection) => self.plugin(&name, &candidate, &terms, inspection),
                Err(error) => {
                    self.examined.tell(
                        Severity::Error,
                        &["plugins", name.as_str(), "file"],
                        error.to_string(),
                    );
                }
            }
        }
    }

    fn plugin(&mut self, name: &PluginName, candidate: &Candidate, terms: &Terms, inspection: Inspection) {
        let mut set = values(self.config, name, terms, &inspection.manifest);
        let host: &[(&str, &str)] = &[("id", self.host_id)];
        while let Err(error) = inspection.manifest.resolve(&set, host) {
            let key = error.key().map(str::to_owned);
            match &key {
                Some(key) => self.examined.tell(
                    Severity::Error,
                    &["plugins", name.as_str(), "config", key],
                    error.why(),
                ),
                None => self.examined.tell(Severity::Error, &["plugins", name.as_str()], error.to_string()),
            }
            // Other values may be wrong too, so the loop continues without this one. A missing value cannot be
            // removed.
            let is_missing = matches!(error, ManifestError::MissingValue(_));
            if is_missing || key.is_none_or(|key| set.remove(&key).is_none()) {
                return;
            }
        }
        if let Ok((_, allowance)) = candidate.resolve(self.config, &inspection, self.host_id) {
            let missing = allowance.missing();
            if !missing.is_empty() {
                let why = format!("it asks for more than it is granted: to {}", listed(&missing));
                self.examined.tell(Severity::Note, &["plugins", name.as_str(), "grants"], why);
            }
        }
    }
}
