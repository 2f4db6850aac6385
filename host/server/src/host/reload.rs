//! Owns the reload of the config file while the host runs. It receives the order, applies the keys that can change,
//! and returns the others, which need a restart. A file with an error changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dim_model::error_chain::chain;
use dim_model::ident::PluginName;
use dim_runtime::Runnable;
use dim_store::plugin_registry::{self, Claim, Row};
use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

use super::candidate::{Allowance, CandidateError, Ready, Terms, settle};
use super::config_check::check;
use super::replacement::ReplaceError;
use super::{Host, Loaded, UNHURT};
use crate::config::findings::{Finding, Severity};
use crate::config::{self, Config, ConfigError, changes};

/// An adjustment of a config that was read: flags of the command line override the file.
type Adjust = Box<dyn Fn(&mut Config) + Send + Sync>;

/// The config file of a host, which can be read again.
pub struct ConfigFile {
    path: PathBuf,
    adjust: Adjust,
    /// Serializes reloads.
    turn: tokio::sync::Mutex<()>,
}

impl ConfigFile {
    /// Makes the config file at `path`; `adjust` applies the flags of the command line to each config that is read.
    pub fn new(path: PathBuf, adjust: impl Fn(&mut Config) + Send + Sync + 'static) -> Self {
        Self { path, adjust: Box::new(adjust), turn: tokio::sync::Mutex::default() }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The result of a reload.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = ConfigReload)]
pub struct Reloaded {
    /// The config file
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// The keys whose new values are in effect
    pub changed: Vec<String>,
    /// The keys whose new values take effect after a restart of the host
    pub needs_restart: Vec<String>,
    /// The suspicious keys of the file, and keys of other programs
    pub findings: Vec<Finding>,
}

/// An error that prevents a reload. Nothing has changed, unless the host ends or its store fails.
#[derive(Debug, Error)]
pub enum ReloadError {
    /// The host runs without a config file.
    #[error("the host runs without a config file: start it with `dim run --config FILE`")]
    NoFile,
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] ConfigError),
    /// The file has errors.
    #[error("the config file {path} is wrong, nothing was changed: {}", in_lines(.findings))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// All errors and other findings.
        findings: Vec<Finding>,
    },
    /// A plugin cannot continue with its new config.
    #[error("plugin {plugin} cannot continue with the new config")]
    Plugin {
        /// The plugin.
        plugin: PluginName,
        /// The reason.
        source: ReplaceError,
    },
}

fn in_lines(findings: &[Finding]) -> String {
    let wrong = findings.iter().filter(|it| it.severity == Severity::Error);
    wrong.map(Finding::to_string).collect::<Vec<_>>().join("\n")
}

/// A running plugin whose config, grants or limits change.
struct Affected {
    loaded: Arc<Loaded>,
    row: Row,
    ready: Ready,
}

impl Host {
    /// Reads the config file again. Changes that need no restart are in effect when this returns. If the file has an
    /// error, or a plugin does not start with its new config, nothing changes.
    pub async fn reload(self: &Arc<Self>, by: &str) -> Result<Reloaded, ReloadError> {
        let reloaded = self.try_reload().await;
        match &reloaded {
            Ok(Reloaded { changed, needs_restart, findings, .. }) => {
                for warning in findings.iter().filter(|it| it.severity == Severity::Warning) {
                    tracing::warn!("the config file: {warning}");
                }
                let (changed, needs_restart) = (changed.join(", "), needs_restart.join(", "));
                tracing::info!(by, changed, needs_restart, "the config file was read again");
            }
            Err(error) => tracing::error!(by, "the config file was not taken over: {}", chain(error)),
        }
        reloaded
    }

    async fn try_reload(self: &Arc<Self>) -> Result<Reloaded, ReloadError> {
        let file = self.config_file.clone().ok_or(ReloadError::NoFile)?;
        let _turn = file.turn.lock().await;
        let (path, id) = (file.path.clone(), self.id.clone());
        let examined =
            tokio::task::spawn_blocking(move || config::read_text_again(&path).map(|text| check(&text, &id)));
        let examined = examined.await.expect("a check does not panic")?;
        let wrong = |findings| ReloadError::Wrong { path: file.path.clone(), findings };
        let is_wrong = examined.is_wrong();
        let Some(mut read) = examined.config.filter(|_| !is_wrong) else {
            return Err(wrong(examined.findings));
        };
        (file.adjust)(&mut read);
        self.all_loaded().await;
        let (before, running) = (self.config.now(), self.plugins.all());
        let now = before.taking_over(&read, |name| running.contains_key(name));
        let affected = self.affected(&now, running).await.map_err(wrong)?;
        let differences = changes(&before, &read);
        let left = changes(&now, &read);
        let mut holds = Vec::new();
        for (name, Affected { ready, .. }) in &affected {
            let failed = |source| ReloadError::Plugin { plugin: name.clone(), source };
            holds.push(self.claim(name, &ready.allowance.reach).map_err(failed)?);
            self.make_keys(&ready.allowance.reach).await.map_err(failed)?;
        }
        // From here on only the end of the host or a failure of its store interrupts the reload.
        self.network.set(now.network());
        // Documents may be encrypted from now on, or no longer.
        self.storage.commit.names.notify_one();
        self.config.set(now);
        for ((plugin, affected), held) in affected.into_iter().zip(holds) {
            if let Err(source) = self.go_on_with(&plugin, affected).await {
                return Err(ReloadError::Plugin { plugin, source });
            }
            held.runs();
        }
        self.take_up_what_waits();
        let (needs_restart, changed) = differences.into_iter().partition::<Vec<_>, _>(|it| left.contains(it));
        let paths =
            |changes: Vec<config::ConfigChange>| changes.iter().map(config::ConfigChange::path).collect();
        Ok(Reloaded {
            file: file.path.clone(),
            changed: paths(changed),
            needs_restart: paths(needs_restart),
            findings: examined.findings,
        })
    }

    /// Returns the running plugins that the config changes, each with its new settings. The error contains the
    /// findings about plugins that fail with it.
    async fn affected(
        &self,
        now: &Config,
        running: BTreeMap<PluginName, Arc<Loaded>>,
    ) -> Result<BTreeMap<PluginName, Affected>, Vec<Finding>> {
        let (mut affected, mut wrong) = (BTreeMap::new(), Vec::new());
        for (name, loaded) in running {
            match self.affected_one(now, &name, loaded).await {
                Ok(Some(one)) => {
                    affected.insert(name, one);
                }
                Ok(None) => {}
                Err(error) => wrong.push(Finding {
                    severity: Severity::Error,
                    path: format!("plugins.{name}"),
                    line: None,
                    column: None,
                    message: chain(&error),
                }),
            }
        }
        if wrong.is_empty() { Ok(affected) } else { Err(wrong) }
    }

    async fn affected_one(
        &self,
        now: &Config,
        name: &PluginName,
        loaded: Arc<Loaded>,
    ) -> Result<Option<Affected>, ReplaceError> {
        let code = loaded.handle.code();
        let stored = plugin_registry::read(&self.storage.store, name)?;
        let Some(stored) = stored else { return Ok(None) };
        let row = stored.row.clone();
        let section = now.plugins.get(name).cloned().unwrap_or_default();
        let terms = Terms { config: section, given: row.setup.clone() };
        let (inspection, is_installed) = (&code.prepared.inspection, code.code.installed.is_some());
        let (config, allowance) =
            settle(now, name, &terms, is_installed, inspection, &self.id).map_err(CandidateError::Values)?;
        if is_as_before(&code, &config, &allowance) {
            return Ok(None);
        }
        let (prepared, source) = (code.prepared.clone(), code.source.clone());
        let ready = Ready { source, code: code.code.clone(), prepared, config, allowance };
        self.rehearse(name, &ready, stored).await?;
        Ok(Some(Affected { loaded, row, ready }))
    }

    /// Applies the new config to a plugin. The config in effect is the new one already.
    async fn go_on_with(&self, name: &PluginName, affected: Affected) -> Result<(), ReplaceError> {
        let Affected { loaded, row, ready } = affected;
        let turn = self.deployment.turns.of(name);
        let _turn = turn.change.lock().await;
        let (whose, claim) = (name.clone(), Claim::of(&ready.allowance.reach));
        if row.claim != claim {
            let written = self.storage.commit.write(move |write| {
                let row = plugin_registry::row_within(write, &whose)?;
                plugin_registry::put_within(write, &whose, &Row { claim, ..row })
            });
            written.await?;
        }
        // The grants or the code may have changed meanwhile: the running code is settled with the new config.
        let setup = || {
            Ok::<_, ReplaceError>(
                plugin_registry::known_row(&self.storage.store.snapshot()?, name)?.map(|row| row.setup),
            )
        };
        while let Some(setup) = setup()? {
            if self.reach(name, setup).await? {
                break;
            }
        }
        loaded.handle.wake();
        Ok(())
    }

    /// Installs the pending components that are granted everything now.
    fn take_up_what_waits(self: &Arc<Self>) {
        let host = self.clone();
        if let Some(running) = self.life.running.lock().expect(UNHURT).as_ref() {
            running.spawn_task(async move {
                tokio::select! {
                    biased;
                    () = host.life.ended.cancelled() => {}
                    taken_up = host.take_up_pending() => if let Err(error) = taken_up {
                        tracing::error!("cannot install the pending components: {error}");
                    },
                }
            });
        }
    }
}

fn is_as_before(code: &Runnable, config: &str, allowance: &Allowance) -> bool {
    code.config == config
        && *code.reach == allowance.reach
        && code.limits == allowance.limits
        && code.topics == allowance.topics()
}
