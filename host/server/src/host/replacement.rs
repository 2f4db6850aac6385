//! Owns the replacement and the rollback of a plugin's code while the host runs. It receives a proposed component,
//! which is judged, compiled and rehearsed while the old code runs, and returns the recorded change after the
//! takeover between two entries.

use std::sync::Arc;

use bytes::Bytes;
use dim_model::error_chain::{chain, listed};
use dim_model::ident::{Digest, KeyName, PluginName};
use dim_runtime::{Lines, Order, Rollback, Runnable, SessionParts, Successor, rehearse};
use dim_store::change::{Change, State, UnderWay, Version};
use dim_store::checkpoint::{self, Checkpoint};
use dim_store::commit::CommitError;
use dim_store::disk_monitor::IntakeStopped;
use dim_store::grants::Grants;
use dim_store::handover::StartFailure;
use dim_store::plugin_registry::{self, Row, Setup, Stored};
use dim_store::rollback_rows::Place;
use dim_store::{StoreError, components};
use thiserror::Error;
use tokio::sync::oneshot;

use super::assessment::{InspectionError, Judged, Wanting, broke_down};
use super::candidate::{Candidate, CandidateError, Ready, Terms};
use super::{Grant, Host, HostError, Loaded};
use crate::config::PluginConfig;

/// An error that prevents a change of a plugin's code; the running code stays.
#[derive(Debug, Error)]
pub enum ReplaceError {
    /// There is no such plugin.
    #[error("there is no plugin {0}")]
    NoPlugin(PluginName),
    /// The component or the request is refused, with the reason.
    #[error("{0}")]
    Refused(String),
    /// No trusted signer has signed the component, and nobody vouches for its digest.
    #[error(
        "{from} is {digest}, and {by} has signed it: if it is what you want, install it with --trust {digest}"
    )]
    Untrusted {
        /// The source of the component.
        from: String,
        /// The digest of the component.
        digest: Digest,
        /// The signer, as text.
        by: String,
    },
    /// The situation has changed since the operator looked at it.
    #[error("{0}: check the present state and repeat the command")]
    Moved(String),
    /// The component requests more than the plugin is granted.
    #[error("it asks to {}: install it with --grant, or grant it in the config under plugins.{}.grants", listed(&.0.missing), .0.plugin)]
    AsksForMore(Box<Wanting>),
    /// The component cannot be loaded.
    #[error(transparent)]
    Component(#[from] CandidateError),
    /// A component in the store cannot be read or inspected again.
    #[error(transparent)]
    Stored(#[from] InspectionError),
    /// The plugin cannot run, or its keys cannot be made.
    #[error("{}", chain(&**.0))]
    Run(#[source] Box<HostError>),
    /// Two plugins would publish under one key without sharing it.
    #[error(
        "the key {key} is {other}'s: if both are to publish under it, grant both to share it, in the config under plugins.NAME.grants.share, or one that runs with `dim plugin grants NAME allow --share {key}`"
    )]
    KeyTaken {
        /// The key.
        key: KeyName,
        /// The plugin that owns the key.
        other: PluginName,
    },
    /// The new code fails to start on the plugin's state.
    #[error("it does not start: {0}")]
    DoesNotStart(#[source] StartFailure),
    /// No rollback is possible.
    #[error("{0}")]
    NoWayBack(String),
    /// The host is shutting down.
    #[error("the host is shutting down")]
    Closed,
    /// The file of the component cannot be stored.
    #[error("cannot keep the component")]
    Keep(#[source] std::io::Error),
    /// The intake is stopped because the disk is full.
    #[error(transparent)]
    IntakeStopped(IntakeStopped),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ReplaceError {
    /// Returns whether the error is a property of the component, so that a second attempt would fail too.
    pub fn is_lasting(&self) -> bool {
        matches!(
            self,
            Self::Refused(_)
                | Self::Component(_)
                | Self::Stored(_)
                | Self::Run(_)
                | Self::Untrusted { .. }
                | Self::DoesNotStart(_)
                | Self::AsksForMore(_)
                | Self::KeyTaken { .. }
        )
    }
}

impl From<CommitError> for ReplaceError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Store(error) => Self::Store(error),
            CommitError::Closed => Self::Closed,
            CommitError::IntakeStopped(error) => Self::IntakeStopped(error),
        }
    }
}

/// A component that is proposed as the code of a plugin.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The plugin.
    pub plugin: PluginName,
    /// The component.
    pub component: Bytes,
    /// The source of the component.
    pub source: String,
    /// The person or the part of the host that proposes it.
    pub by: String,
    /// The file or the IPNS name that the plugin follows from then on.
    pub follows: Option<String>,
    /// Whether the config names the component.
    pub is_named: bool,
    /// The digest that the operator vouches for, or the config by trusting the source.
    pub trust: Option<Digest>,
}

impl Host {
    /// Replaces the code of a plugin. Returns once the replacement is durable and the new code is on probation. The
    /// new code has the grants of the old code; if it requests more, it waits for the operator. After any error the
    /// old code continues, and the refusal is recorded.
    pub async fn replace(&self, proposal: Proposal) -> Result<Change, ReplaceError> {
        if self.plugins.get(&proposal.plugin).is_none() {
            return Err(ReplaceError::NoPlugin(proposal.plugin));
        }
        let mut under_way = self.propose(&proposal);
        let outcome = self.try_replace(&mut under_way, proposal, Grant::AsBefore).await;
        self.conclude(under_way, outcome).await
    }

    /// Begins the change for a proposal.
    pub(super) fn propose(&self, proposal: &Proposal) -> UnderWay {
        let (plugin, source) = (proposal.plugin.clone(), proposal.source.clone());
        self.changes().begin(Change::new(plugin, State::Judging, proposal.by.clone(), source))
    }

    /// Ends a change. An error becomes a recorded refusal.
    pub async fn conclude(
        &self,
        mut under_way: UnderWay,
        outcome: Result<(), ReplaceError>,
    ) -> Result<Change, ReplaceError> {
        let Err(error) = outcome else { return Ok(under_way.change.clone()) };
        let change = under_way.refused(dim_model::error_chain::chain(&error));
        let why = change.reason.as_deref().unwrap_or_default();
        tracing::warn!(plugin = %change.plugin, source = change.source, "refused: {why}");
        if let Err(unrecorded) = self.storage.commit.record(change, self.storage.log.now(), |_| Ok(())).await
        {
            tracing::warn!("cannot record the refusal: {unrecorded}");
        }
        Err(error)
    }

    /// Returns the section of a plugin in the config.
    pub(super) fn section(&self, name: &PluginName) -> PluginConfig {
        self.config.now().plugins.get(name).cloned().unwrap_or_default()
    }

    /// Returns the terms for a component that replaces the running code. Grants belong to the plugin's name.
    pub(super) fn terms(&self, name: &PluginName, row: &Row, running: &Runnable, is_named: bool) -> Terms {
        let (config, mut given) = (self.section(name), row.setup.clone());
        if is_named {
            // A component from the config has the grants of the config, whatever was installed under its name before.
            given.granted = Grants::default();
        } else if config.grants.is_none() && row.code.installed.is_none() {
            // A bundled plugin has what it requests. Its replacement keeps these grants, which other plugins do not
            // get by default.
            given.granted.add(&running.reach.granted);
        }
        Terms { config, given }
    }

    pub(super) async fn try_replace(
        &self,
        under_way: &mut UnderWay,
        proposal: Proposal,
        grant: Grant,
    ) -> Result<(), ReplaceError> {
        while !self.try_replace_once(under_way, proposal.clone(), grant).await? {}
        Ok(())
    }

    /// Returns false if the operator changed the grants meanwhile, so that the caller must try again.
    async fn try_replace_once(
        &self,
        under_way: &mut UnderWay,
        mut proposal: Proposal,
        grant: Grant,
    ) -> Result<bool, ReplaceError> {
        let (name, follows) = (proposal.plugin.clone(), proposal.follows.take());
        let none = || ReplaceError::NoPlugin(name.clone());
        let known = || plugin_registry::known_row(&self.storage.store.snapshot()?, &name);
        let old = self.plugins.get(&name).ok_or_else(none)?;
        under_way.change.before = Some(old.version());
        let row = known()?.ok_or_else(none)?;
        let terms = self.terms(&name, &row, &old.handle.code(), proposal.is_named);
        let trust = proposal.trust;
        let candidate = Candidate::proposed(proposal, terms);
        // Components of one plugin are judged in parallel and take over in the order of their arrival, so this one
        // queues first.
        let turn = self.deployment.turns.of(&name);
        let judging = self.judge(under_way, candidate, trust, grant);
        let (_place, judged) = tokio::join!(turn.line.lock(), judging);
        let _turn = turn.change.lock().await;
        let old = self.plugins.get(&name).ok_or_else(none)?;
        under_way.change.before = Some(old.version());
        // The running code is known only now. If it is the same component, it continues, whatever the judgement.
        if under_way.change.after == under_way.change.before {
            under_way.unchanged();
            self.go_on(&name, follows).await?;
            return Ok(true);
        }
        if known()?.ok_or_else(none)?.setup != row.setup {
            return Ok(false);
        }
        let Judged { ready, component, given } = match judged {
            Err(ReplaceError::AsksForMore(wanting)) => {
                return self.let_wait(under_way, *wanting, follows).await.map(|()| true);
            }
            judged => judged?,
        };
        let _held = self.claim(&name, &ready.allowance.reach)?;
        let successor = (ready, component, given, follows);
        self.hand_over(under_way, &old, successor).await.map(|()| true)
    }

    /// Rehearses judged code and lets it take over. The caller holds the plugin's lock.
    async fn hand_over(
        &self,
        under_way: &mut UnderWay,
        old: &Loaded,
        (ready, component, given, follows): (Ready, Bytes, Setup, Option<String>),
    ) -> Result<(), ReplaceError> {
        let name = under_way.change.plugin.clone();
        self.make_keys(&ready.allowance.reach).await?;
        let digest = ready.prepared.inspection.digest;
        under_way.reach(State::Rehearsing);
        let stored = plugin_registry::read(&self.storage.store, &name)?;
        let stored = stored.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        self.rehearse(&name, &ready, stored).await?;
        let (store, before) = (self.storage.store.clone(), old.handle.code());
        let whose = name.clone();
        let kept = tokio::task::spawn_blocking(move || {
            // A newer host may bundle another component, so the file is stored for a rollback.
            let before = before.prepared.inspection.digest;
            if let Some(bundled) =
                dim_bundled::component(whose.as_str()).filter(|it| Digest::of(it) == before)
            {
                components::keep(&store, before, bundled)?;
            }
            components::keep(&store, digest, &component)
        })
        .await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        under_way.reach(State::TakingOver);
        let (done, taken_over) = oneshot::channel();
        let change = under_way.change.clone();
        let before = old.version();
        let run = ready.into_runnable();
        let successor = Successor { run, follows, setup: given, change, done };
        old.handle.order(Order::Succeed(Box::new(successor)));
        let taken_over = taken_over.await.map_err(|_| ReplaceError::Closed)?;
        let taken_over = taken_over.map_err(ReplaceError::DoesNotStart)?;
        under_way.change.taken_over(before, taken_over.at, taken_over.pause);
        let version = old.version().version;
        tracing::info!(plugin = %name, version, pause = ?taken_over.pause, "replaced, and on probation");
        Ok(())
    }

    /// Records what the plugin follows now, and removes a pending component that runs already.
    async fn go_on(&self, name: &PluginName, follows: Option<String>) -> Result<(), ReplaceError> {
        let Some(row) = plugin_registry::known_row(&self.storage.store.snapshot()?, name)? else {
            return Ok(());
        };
        let now = move |row: Row| {
            let pending = row.pending.filter(|pending| pending.digest != row.code.digest);
            Row { follows: follows.clone().or(row.follows), pending, ..row }
        };
        if now(row.clone()) == row {
            return Ok(());
        }
        let whose = name.clone();
        let written = self.storage.commit.write(move |write| {
            let row = plugin_registry::row_within(write, &whose)?;
            plugin_registry::put_within(write, &whose, &now(row))
        });
        Ok(written.await?)
    }

    /// Runs `start` of the new code on a snapshot of the committed state, and drops its effects.
    pub(super) async fn rehearse(
        &self,
        name: &PluginName,
        ready: &Ready,
        stored: Stored,
    ) -> Result<(), ReplaceError> {
        let Stored { row, context, effects, .. } = stored;
        let session = SessionParts {
            plugin: name.clone(),
            id: row.id,
            reach: Arc::new(ready.allowance.reach.clone()),
            limits: ready.allowance.limits,
            context,
            effects,
            store: self.storage.store.clone(),
            files: self.storage.store.clone(),
            keys: self.storage.keys.clone(),
            outbox_len: Arc::default(),
            kept_topics: self.deployment.loader.links.kept_topics.clone(),
            listeners: Lines::default(),
        };
        let (prepared, config) = (ready.prepared.clone(), ready.config.clone());
        let (secret, from) = (self.deployment.loader.identity.secret, row.state_version);
        let rehearsed =
            tokio::task::spawn_blocking(move || rehearse(&prepared, session, &secret, &config, from));
        rehearsed.await.expect("a rehearsal does not panic")?.map_err(ReplaceError::DoesNotStart)
    }

    /// Rolls a plugin back to `version`, or to the version before the running one. The state of that moment is
    /// restored, and later entries are handled again.
    pub async fn roll_back(
        &self,
        name: &PluginName,
        version: Option<&str>,
        by: &str,
    ) -> Result<RolledBack, ReplaceError> {
        self.loaded(name.as_str()).await;
        let turn = self.deployment.turns.of(name);
        let _turn = turn.change.lock().await;
        let loaded = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let (place, checkpoint) = self.way_back(name, version)?;
        let before = loaded.version();
        let code = checkpoint.before.code.clone();
        let known = plugin_registry::known_row(&self.storage.store.snapshot()?, name)?;
        let row = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let mut terms = self.terms(name, &row, &loaded.handle.code(), false);
        terms.given = terms.given.going_back(&checkpoint.before.setup);
        let (engine, config, id) =
            (self.deployment.loader.engine.clone(), self.config.now(), self.id.clone());
        let (store, whose) = (self.storage.store.clone(), name.clone());
        let ready = tokio::task::spawn_blocking(move || {
            Candidate::kept(whose, terms, code, &store).ready(&engine, &config, &id)
        });
        let ready = ready.await;
        let ready = ready.map_err(broke_down)?.map_err(|error| {
            ReplaceError::NoWayBack(format!(
                "cannot roll back to {}: {error}",
                checkpoint.before.code.version
            ))
        })?;
        let _held = self.claim(name, &ready.allowance.reach)?;
        // The topics that the old code listened to had no listener meanwhile: that is a gap.
        if let Some(context) = checkpoint::context(&self.storage.store.snapshot()?, place)? {
            self.deployment.loader.restore_hearings(&context);
        }
        let (done, gone_back) = oneshot::channel();
        let reason = format!("rolled back by {by}");
        let (to, run) = (place.1, ready.into_runnable());
        loaded.handle.order(Order::GoBack(Box::new(Rollback { to, run, reason, done })));
        let gone_back = gone_back.await.map_err(|_| ReplaceError::Closed)?;
        let (at, replayed) = gone_back.ok_or_else(|| {
            ReplaceError::NoWayBack(format!("the rollback data of {name} were dropped meanwhile"))
        })?;
        let after = loaded.version();
        tracing::warn!(plugin = %name, from = before.version, to = after.version, replayed, "rolled back by {by}");
        Ok(RolledBack { plugin: name.clone(), before, after, at: at.0, replayed })
    }

    /// Returns the checkpoint for a rollback.
    fn way_back(
        &self,
        name: &PluginName,
        version: Option<&str>,
    ) -> Result<(Place, Checkpoint), ReplaceError> {
        let snapshot = self.storage.store.snapshot()?;
        let known = plugin_registry::known(&snapshot, name)?;
        let (id, _) = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let checkpoints = checkpoint::checkpoints(&snapshot, id)?;
        let versions = || {
            checkpoints
                .iter()
                .map(|(_, checkpoint)| checkpoint.before.code.version.as_str())
                .collect::<Vec<_>>()
        };
        let found = checkpoints
            .iter()
            .find(|(_, checkpoint)| version.is_none_or(|it| checkpoint.before.code.version == it));
        found.cloned().ok_or_else(|| {
            ReplaceError::NoWayBack(match version {
                _ if checkpoints.is_empty() => format!("no earlier version of {name} is kept"),
                Some(version) => format!(
                    "version {version} of {name} is not kept; a rollback is possible to {}",
                    versions().join(", ")
                ),
                None => unreachable!("any checkpoint matches"),
            })
        })
    }
}

/// A plugin that was rolled back.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct RolledBack {
    /// The plugin.
    pub plugin: PluginName,
    /// The version that ran before the rollback.
    pub before: Version,
    /// The version that runs now.
    pub after: Version,
    /// The first entry that is handled again
    pub at: u64,
    /// The number of entries of the log that are handled again.
    pub replayed: u64,
}

impl Loaded {
    /// Returns the version of the running code.
    pub fn version(&self) -> Version {
        self.handle.code().prepared.inspection.as_version()
    }
}
