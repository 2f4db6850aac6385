//! Owns the reload of the config file while the host runs: what can change is taken over, the rest needs a restart, and a
//! file with an error changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

use super::candidate::{Allowance, Ready, Terms, settle};
use super::config_check::check;
use super::replacement::ReplaceError;
use super::{Host, Loaded, UNHURT};
use crate::cause::chain;
use crate::config::findings::{Finding, Severity};
use crate::config::{self, Config, ConfigError, changes};
use crate::ident::PluginName;
use crate::plugin::Runnable;
use crate::plugin::roster::{self, Claim, Row};

/// Changes a config that was read: the command line counts more than the file.
type Adjust = Box<dyn Fn(&mut Config) + Send + Sync>;

/// The config file of a host, to be read again.
pub struct ConfigFile {
    path: PathBuf,
    adjust: Adjust,
    /// One reload at a time.
    turn: tokio::sync::Mutex<()>,
}

impl ConfigFile {
    /// The file at `path`; `adjust` changes what it says, as the command line does.
    pub fn new(path: PathBuf, adjust: impl Fn(&mut Config) + Send + Sync + 'static) -> Self {
        Self { path, adjust: Box::new(adjust), turn: tokio::sync::Mutex::default() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What a reload has changed.
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
    /// What is suspicious about the file, or belongs to other programs
    pub findings: Vec<Finding>,
}

/// Why the config was not read again. Nothing has changed then, unless the host ends or its store fails.
#[derive(Debug, Error)]
pub enum ReloadError {
    /// There is no file.
    #[error("the host runs without a config file: start it with `dim run --config FILE`")]
    NoFile,
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ConfigError),
    /// It is wrong.
    #[error("the config file {path} is wrong, nothing was changed: {}", in_lines(.findings))]
    Wrong {
        /// Which.
        path: PathBuf,
        /// All that is wrong with it.
        findings: Vec<Finding>,
    },
    /// A plugin could not go on with what changed for it.
    #[error("plugin {plugin} does not go on with the config that was read")]
    Plugin {
        /// Which.
        plugin: PluginName,
        /// Why.
        source: ReplaceError,
    },
}

fn in_lines(findings: &[Finding]) -> String {
    let wrong = findings.iter().filter(|it| it.severity == Severity::Error);
    wrong.map(Finding::to_string).collect::<Vec<_>>().join("\n")
}

/// A plugin that goes on with another config, other grants or other limits.
struct Affected {
    loaded: Arc<Loaded>,
    row: Row,
    ready: Ready,
}

impl Host {
    /// Reads the config file again. What can change while the host runs is in effect when this returns; if the file has
    /// an error, or a plugin does not start with its new config, nothing is changed.
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
        // From here on only the end of the host stops it.
        self.config.set(now);
        for ((plugin, affected), held) in affected.into_iter().zip(holds) {
            if let Err(source) = self.go_on_with(&plugin, affected).await {
                return Err(ReloadError::Plugin { plugin, source });
            }
            held.runs();
        }
        self.take_up_what_waits();
        let (needs_restart, changed) = differences.into_iter().partition::<Vec<_>, _>(|it| left.contains(it));
        let paths = |changes: Vec<config::Change>| changes.iter().map(config::Change::path).collect();
        Ok(Reloaded {
            file: file.path.clone(),
            changed: paths(changed),
            needs_restart: paths(needs_restart),
            findings: examined.findings,
        })
    }

    /// The running plugins for which a config changes something, each with what it goes on with. The error is what is
    /// wrong with it.
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
                Err(message) => wrong.push(Finding {
                    severity: Severity::Error,
                    path: format!("plugins.{name}"),
                    line: None,
                    column: None,
                    message,
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
    ) -> Result<Option<Affected>, String> {
        let code = loaded.handle.code();
        let stored = roster::read(&self.store, name).map_err(|error| chain(&error))?;
        let Some(stored) = stored else { return Ok(None) };
        let row = stored.row.clone();
        let section = now.plugins.get(name).cloned().unwrap_or_default();
        let terms = Terms { config: section, given: row.setup.clone() };
        let (inspection, is_installed) = (&code.prepared.inspection, code.code.installed.is_some());
        let (config, allowance) = settle(now, name, &terms, is_installed, inspection, &self.id)?;
        if is_as_before(&code, &config, &allowance) {
            return Ok(None);
        }
        let (prepared, source) = (code.prepared.clone(), code.source.clone());
        let ready = Ready { source, code: code.code.clone(), prepared, config, allowance };
        self.rehearse(name, &ready, stored).await.map_err(|error| chain(&error))?;
        Ok(Some(Affected { loaded, row, ready }))
    }

    /// Has a plugin go on with what the config says now. The config in effect is the one that was read.
    async fn go_on_with(&self, name: &PluginName, affected: Affected) -> Result<(), ReplaceError> {
        let Affected { loaded, row, ready } = affected;
        let turn = self.turns.of(name);
        let _turn = turn.change.lock().await;
        let (whose, claim) = (name.clone(), Claim::of(&ready.allowance.reach));
        if row.claim != claim {
            let written = self.commit.write(move |write| {
                let row = roster::row_within(write, &whose)?;
                roster::put_within(write, &whose, &Row { claim, ..row })
            });
            written.await?;
        }
        // Granted meanwhile, or replaced: what runs then is settled with the new config.
        let setup =
            || Ok::<_, ReplaceError>(roster::known_row(&self.store.snapshot()?, name)?.map(|row| row.setup));
        while let Some(setup) = setup()? {
            if self.reach(name, setup).await? {
                break;
            }
        }
        loaded.handle.wake();
        Ok(())
    }

    /// Takes up the components that wait and are granted all by now.
    fn take_up_what_waits(self: &Arc<Self>) {
        let host = self.clone();
        if let Some(running) = self.running.lock().expect(UNHURT).as_ref() {
            running.spawn_task(async move {
                tokio::select! {
                    biased;
                    () = host.ended.cancelled() => {}
                    taken_up = host.take_up_pending() => if let Err(error) = taken_up {
                        tracing::error!("cannot look after the components that wait: {error}");
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
