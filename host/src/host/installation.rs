//! Owns how components come while the host runs: as new plugins, or in place of what runs.

use std::sync::Arc;

use super::candidate::{Candidate, Ready, Terms};
use super::judging::{Judged, broke_down};
use super::loader::ToRun;
use super::replacement::{Proposal, ReplaceError};
use super::{Host, UNHURT};
use crate::bundled;
use crate::change::{Change, State, UnderWay};
use crate::entry::Offset;
use crate::ident::PluginName;
use crate::plugin::roster::{self, Claim, Row, Setup, Standing, Stored};
use crate::plugin::{Batch, Effects, Grants, Timers, World};
use crate::store::{PluginId, components};

/// What a plugin may that is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// What the config grants, or what it was granted when it was here before.
    AsBefore,
    /// All that it asks for, too.
    AllThatIsAsked,
}

impl Host {
    /// Installs a component: in place of what runs under its name, or as a new plugin, which has the grants of
    /// the config, those that are given here, or none. Returns once that is durable.
    pub async fn install(self: &Arc<Self>, proposal: Proposal, grant: Grant) -> Result<Change, ReplaceError> {
        self.install_under_way(self.propose(&proposal), proposal, grant).await
    }

    /// The same for a component whose change is under way: it has come from somewhere.
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
        let turn = self.turns.of(&name);
        loop {
            if self.plugins.get(&name).is_some() {
                match self.try_replace(under_way, proposal.clone(), grant).await {
                    // It was removed meanwhile.
                    Err(ReplaceError::NoPlugin(_)) => under_way.change.before = None,
                    outcome => return outcome,
                }
            }
            let _place = turn.line.lock().await;
            // Of two that install one plugin the second one replaces what the first has installed.
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
        let known = roster::known_row(&self.store.snapshot()?, &name)?;
        let mut given = known.as_ref().map(|known| known.setup.clone()).unwrap_or_default();
        if proposal.is_named {
            // What the config names has what the config says, whatever was installed under its name.
            given.granted = Grants::default();
        }
        let trust = proposal.trust;
        let candidate = Candidate::proposed(proposal, Terms { config: self.section(&name), given });
        let Judged { ready, component, given } = self.judge(under_way, candidate, trust, grant).await?;
        // It is entered while the place in the line is held: what is known of it does not change meanwhile.
        let turn = self.turns.of(&name);
        let _turn = turn.change.lock().await;
        under_way.reach(State::Rehearsing);
        let stored = match roster::read(&self.store, &name)? {
            Some(stored) => stored,
            None => nothing_yet(&name, &ready),
        };
        let held = self.claim(&name, &ready.allowance.reach)?;
        self.rehearse(&name, &ready, stored).await?;
        let (store, digest) = (self.store.clone(), ready.prepared.inspection.digest);
        let kept = tokio::task::spawn_blocking(move || components::keep(&store, digest, &component)).await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        self.make_keys(&ready.allowance.reach).await?;
        under_way.reach(State::TakingOver);
        let code = roster::Code { installed, ..ready.code.clone() };
        let claim = Claim::of(&ready.allowance.reach);
        let row = roster::entered(known, code);
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
        self.awaited.write().expect(UNHURT).insert(name.clone());
        self.not_loaded.lock().expect(UNHURT).remove(&name);
        let to_run = ToRun { ready, fallback: None, failed: None };
        let run = self.run(name, to_run).await;
        run.map_err(|error| ReplaceError::Refused(crate::cause::chain(&error)))?;
        held.runs();
        Ok(())
    }

    /// Goes back to what the config names: for a bundled plugin, to the one that comes with the host.
    pub async fn restore(self: &Arc<Self>, name: &PluginName, by: &str) -> Result<Change, ReplaceError> {
        self.loaded(name.as_str()).await;
        if self.section(name).file.is_none() && bundled::component(name.as_str()).is_none() {
            return Err(ReplaceError::Refused(format!(
                "there is nothing to restore: {name} does not come with the host, and the config gives no file"
            )));
        }
        let (plugin, section) = (name.clone(), self.section(name));
        let read = tokio::task::spawn_blocking(move || {
            let named = Candidate::new(plugin, Terms { config: section, given: Setup::default() });
            Ok((named.source.clone(), named.into_component()?))
        });
        let (source, component) = read.await.map_err(broke_down)?.map_err(ReplaceError::Refused)?;
        let (plugin, by) = (name.clone(), by.to_owned());
        let proposal = Proposal { plugin, component, source, by, follows: None, is_named: true, trust: None };
        self.install(proposal, Grant::AsBefore).await
    }
}

/// What a plugin has that was never here.
fn nothing_yet(name: &PluginName, ready: &Ready) -> Stored {
    let row = roster::entered(None, ready.code.clone());
    let cursor = Offset(0);
    let batch = Batch::new(name.clone(), PluginId(0), row.generation, 1, cursor);
    let effects = Effects::new(batch, Timers::default(), 0);
    Stored { row, cursor, world: World::default(), effects }
}
