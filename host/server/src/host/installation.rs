//! Owns the installation of components while the host runs. It receives a proposal and returns the recorded change: a
//! new plugin, or a replacement of the running code.

use std::sync::Arc;

use dim_model::entry::Offset;
use dim_model::ident::PluginName;
use dim_store::batch::{Batch, Effects, Timers};
use dim_store::change::{Change, State, UnderWay};
use dim_store::entry_context::EntryContext;
use dim_store::grants::Grants;
use dim_store::plugin_registry::{self, Claim, Row, Setup, Standing, Stored};
use dim_store::{PluginId, components};

use super::assessment::{Judged, broke_down};
use super::candidate::{Candidate, CandidateError, Ready, Terms};
use super::loader::ToRun;
use super::replacement::{Proposal, ReplaceError};
use super::{Host, UNHURT};

/// The grants of a new plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The grants of the config, or the grants from before its removal.
    AsBefore,
    /// Additionally all permissions that it requests.
    AllThatIsAsked,
}

impl Host {
    /// Installs a component. If a plugin of this name runs, its code is replaced. A new plugin has the grants of the
    /// config and those that `grant` adds. Returns once the change is durable.
    pub async fn install(self: &Arc<Self>, proposal: Proposal, grant: Grant) -> Result<Change, ReplaceError> {
        self.install_under_way(self.propose(&proposal), proposal, grant).await
    }

    /// Installs a component whose change has begun already, for example with its download.
    pub async fn install_under_way(
        self: &Arc<Self>,
        mut under_way: UnderWay,
        proposal: Proposal,
        grant: Grant,
    ) -> Result<Change, ReplaceError> {
        self.loaded(proposal.plugin.as_str()).await;
        let outcome = self.install_in_turn(&mut under_way, proposal, grant).await;
        self.conclude(under_way, outcome).await
    }

    async fn install_in_turn(
        self: &Arc<Self>,
        under_way: &mut UnderWay,
        proposal: Proposal,
        grant: Grant,
    ) -> Result<(), ReplaceError> {
        let name = proposal.plugin.clone();
        let turn = self.deployment.turns.of(&name);
        loop {
            if self.plugins.get(&name).is_some() {
                match self.try_replace(under_way, proposal.clone(), grant).await {
                    // The plugin was removed meanwhile.
                    Err(ReplaceError::NoPlugin(_)) => under_way.change.before = None,
                    outcome => return outcome,
                }
            }
            let _place = turn.line.lock().await;
            // Of two parallel installations of one plugin the second replaces the result of the first.
            if self.plugins.get(&name).is_none() {
                return self.try_install(under_way, proposal, grant).await;
            }
        }
    }

    async fn try_install(
        self: &Arc<Self>,
        under_way: &mut UnderWay,
        mut proposal: Proposal,
        grant: Grant,
    ) -> Result<(), ReplaceError> {
        let (name, follows) = (proposal.plugin.clone(), proposal.follows.take());
        let installed = (!proposal.is_named).then(|| proposal.source.clone());
        let known = plugin_registry::known_row(&self.storage.store.snapshot()?, &name)?;
        let mut given = known.as_ref().map(|known| known.setup.clone()).unwrap_or_default();
        if proposal.is_named {
            // A component from the config has the grants of the config, whatever was installed under its name before.
            given.granted = Grants::default();
        }
        let trust = proposal.trust;
        let candidate = Candidate::proposed(proposal, Terms { config: self.section(&name), given });
        let Judged { ready, component, given } = self.judge(under_way, candidate, trust, grant).await?;
        // `line` is held until the end, so the known row does not change meanwhile.
        let turn = self.deployment.turns.of(&name);
        let _turn = turn.change.lock().await;
        under_way.reach(State::Rehearsing);
        let stored = match plugin_registry::read(&self.storage.store, &name)? {
            Some(stored) => stored,
            None => nothing_yet(&name, &ready),
        };
        let held = self.claim(&name, &ready.allowance.reach)?;
        self.rehearse(&name, &ready, stored).await?;
        let (store, digest) = (self.storage.store.clone(), ready.prepared.inspection.digest);
        let kept = tokio::task::spawn_blocking(move || components::keep(&store, digest, &component)).await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        self.make_keys(&ready.allowance.reach).await?;
        under_way.reach(State::TakingOver);
        let code = plugin_registry::Code { installed, ..ready.code.clone() };
        let claim = Claim::of(&ready.allowance.reach);
        let row = plugin_registry::entered(known, code);
        let row = Row {
            standing: Standing::Runs,
            setup: given,
            claim,
            pending: None,
            quarantine: None,
            follows,
            ..row
        };
        under_way.change.reach(State::Installed);
        self.enter(&name, row, Some(under_way.change.clone())).await?;
        self.deployment.awaited.write().expect(UNHURT).insert(name.clone());
        self.deployment.not_loaded.lock().expect(UNHURT).remove(&name);
        let to_run = ToRun { ready, fallback: None, failed: None };
        let run = self.run(name, to_run).await;
        run.map_err(|error| ReplaceError::Run(Box::new(error)))?;
        held.runs();
        Ok(())
    }

    /// Installs the component that the config names again, or the bundled one.
    pub async fn restore(self: &Arc<Self>, name: &PluginName, by: &str) -> Result<Change, ReplaceError> {
        self.loaded(name.as_str()).await;
        if self.section(name).file.is_none() && dim_bundled::component(name.as_str()).is_none() {
            return Err(ReplaceError::Refused(format!(
                "there is nothing to restore: {name} does not come with the host, and the config gives no file"
            )));
        }
        let (plugin, section) = (name.clone(), self.section(name));
        let read = tokio::task::spawn_blocking(move || {
            let named = Candidate::new(plugin, Terms { config: section, given: Setup::default() });
            Ok::<_, CandidateError>((named.source.clone(), named.into_component()?))
        });
        let (source, component) = read.await.map_err(broke_down)??;
        let (plugin, by) = (name.clone(), by.to_owned());
        let proposal = Proposal { plugin, component, source, by, follows: None, is_named: true, trust: None };
        self.install(proposal, Grant::AsBefore).await
    }
}

/// Returns the stored state of a new plugin.
fn nothing_yet(name: &PluginName, ready: &Ready) -> Stored {
    let row = plugin_registry::entered(None, ready.code.clone());
    let cursor = Offset(0);
    let batch = Batch::new(name.clone(), PluginId(0), row.generation, 1, cursor);
    let effects = Effects::new(batch, Timers::default(), 0);
    Stored { row, cursor, context: EntryContext::default(), effects }
}
