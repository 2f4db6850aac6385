//! Owns how a plugin's code is replaced while the host runs: what comes is judged, compiled and rehearsed
//! while the old code works on, and takes over between two entries; and how it is taken back.

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::oneshot;

use super::candidate::{Candidate, Ready, Terms};
use super::judging::{Judged, Wanting, broke_down};
use super::{Grant, Host, Loaded};
use crate::bundled;
use crate::cause::listed;
use crate::change::{Change, State, UnderWay, Version};
use crate::commit::CommitError;
use crate::config::PluginConfig;
use crate::ident::{Digest, KeyName, PluginName};
use crate::plugin::mark::{self, Mark};
use crate::plugin::roster::{self, Row, Setup, Stored};
use crate::plugin::{Grants, Lines, Order, Runnable, SessionParts, Successor, WayBack, rehearse};
use crate::room::NoRoom;
use crate::store::undo::Place;
use crate::store::{StoreError, components};

/// Why a plugin's code does not change; what runs goes on.
#[derive(Debug, Error)]
pub enum ReplaceError {
    /// There is no such plugin.
    #[error("there is no plugin {0}")]
    NoPlugin(PluginName),
    /// It is not fit for it.
    #[error("{0}")]
    Refused(String),
    /// Nobody who is trusted has signed it, and nobody vouches for it.
    #[error(
        "{from} is {digest}, and {by} has signed it: if it is what you want, install it with --trust {digest}"
    )]
    Untrusted {
        /// Where it comes from.
        from: String,
        /// What it is.
        digest: Digest,
        /// Who has signed it, in words.
        by: String,
    },
    /// It is not what was meant: it has moved meanwhile.
    #[error("{0}: look again")]
    Moved(String),
    /// It asks for more than it is granted.
    #[error("it asks to {}: install it with --grant, or grant it in the config under plugins.{}.grants", listed(&.0.missing), .0.plugin)]
    AsksForMore(Box<Wanting>),
    /// Two plugins would have one key by accident.
    #[error(
        "the key {key} is {other}'s: if both are to publish under it, grant both to share it, in the config under plugins.NAME.grants.share, or one that runs with `dim plugin grants NAME allow --share {key}`"
    )]
    KeyTaken {
        /// The key.
        key: KeyName,
        /// Whose it is.
        other: PluginName,
    },
    /// It does not start on what the plugin has.
    #[error("it does not start: {0}")]
    DoesNotStart(String),
    /// There is no way back.
    #[error("{0}")]
    NoWayBack(String),
    /// The host ends.
    #[error("the host is shutting down")]
    Closed,
    /// Its file cannot be kept.
    #[error("cannot keep the component")]
    Keep(#[source] std::io::Error),
    /// There is no room for it now.
    #[error(transparent)]
    NoRoom(NoRoom),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ReplaceError {
    /// Whether it says something of the component, rather than of the moment.
    pub fn is_lasting(&self) -> bool {
        matches!(
            self,
            Self::Refused(_)
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
            CommitError::NoRoom(error) => Self::NoRoom(error),
        }
    }
}

/// A component that is to run as a plugin.
#[derive(Clone, Debug)]
pub struct Proposal {
    /// The plugin.
    pub plugin: PluginName,
    /// The component.
    pub component: Bytes,
    /// Where it came from.
    pub source: String,
    /// Who asks for it.
    pub by: String,
    /// The file or the IPNS name that is followed from then on.
    pub follows: Option<String>,
    /// Whether it is what the config names.
    pub is_named: bool,
    /// The digest that somebody vouches for: the operator, or the config for where it comes from.
    pub trust: Option<Digest>,
}

impl Host {
    /// Replaces the code of a plugin; returns once that is durable and the new code is on probation. The new
    /// code has the grants of the old one; if it asks for more it waits until that is granted. Whatever is wrong
    /// with it, the old code goes on; that is put on record, too.
    pub async fn replace(&self, proposal: Proposal) -> Result<Change, ReplaceError> {
        if self.plugins.get(&proposal.plugin).is_none() {
            return Err(ReplaceError::NoPlugin(proposal.plugin));
        }
        let mut under_way = self.propose(&proposal);
        let outcome = self.try_replace(&mut under_way, proposal, Grant::AsBefore).await;
        self.conclude(under_way, outcome).await
    }

    /// Begins the change that a proposal is.
    pub(super) fn propose(&self, proposal: &Proposal) -> UnderWay {
        let (plugin, source) = (proposal.plugin.clone(), proposal.source.clone());
        self.changes().begin(Change::new(plugin, State::Judging, proposal.by.clone(), source))
    }

    /// Ends a change; that a component was refused is put on record.
    pub(crate) async fn conclude(
        &self,
        mut under_way: UnderWay,
        outcome: Result<(), ReplaceError>,
    ) -> Result<Change, ReplaceError> {
        let Err(error) = outcome else { return Ok(under_way.change.clone()) };
        let change = under_way.refused(crate::cause::chain(&error));
        let why = change.reason.as_deref().unwrap_or_default();
        tracing::warn!(plugin = %change.plugin, source = change.source, "refused: {why}");
        if let Err(unrecorded) = self.commit.record(change, self.log.now(), |_| Ok(())).await {
            tracing::warn!("that it was refused is not on record: {unrecorded}");
        }
        Err(error)
    }

    /// What the config says of a plugin.
    pub(super) fn section(&self, name: &PluginName) -> PluginConfig {
        self.config.now().plugins.get(name).cloned().unwrap_or_default()
    }

    /// On which terms a component goes on after what runs. Grants go with the plugin's name.
    pub(super) fn terms(&self, name: &PluginName, row: &Row, running: &Runnable, is_named: bool) -> Terms {
        let (config, mut given) = (self.section(name), row.setup.clone());
        if is_named {
            // What the config names has what the config says, whatever was installed under its name.
            given.granted = Grants::default();
        } else if config.grants.is_none() && row.code.installed.is_none() {
            // What is bundled has what it asks for, which nothing else has by itself.
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

    /// Returns false if the operator has granted or denied something meanwhile: it is to be tried again.
    async fn try_replace_once(
        &self,
        under_way: &mut UnderWay,
        mut proposal: Proposal,
        grant: Grant,
    ) -> Result<bool, ReplaceError> {
        let (name, follows) = (proposal.plugin.clone(), proposal.follows.take());
        let none = || ReplaceError::NoPlugin(name.clone());
        let known = || roster::known_row(&self.store.snapshot()?, &name);
        let old = self.plugins.get(&name).ok_or_else(none)?;
        under_way.change.before = Some(old.version());
        let row = known()?.ok_or_else(none)?;
        let terms = self.terms(&name, &row, &old.handle.code(), proposal.is_named);
        let trust = proposal.trust;
        let candidate = Candidate::proposed(proposal, terms);
        // Judged at once with others that came, and taken over in the order in which they came: it stands in
        // line from the first moment.
        let turn = self.turns.of(&name);
        let judging = self.judge(under_way, candidate, trust, grant);
        let (_place, judged) = tokio::join!(turn.line.lock(), judging);
        let _turn = turn.change.lock().await;
        let old = self.plugins.get(&name).ok_or_else(none)?;
        under_way.change.before = Some(old.version());
        // What runs is known only now; it may go on whatever is said of it.
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

    /// Has judged code take over from what runs, once it has been rehearsed. The caller has the plugin's turn.
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
        let stored = roster::read(&self.store, &name)?;
        let stored = stored.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        self.rehearse(&name, &ready, stored).await?;
        let (store, before) = (self.store.clone(), old.handle.code());
        let whose = name.clone();
        let kept = tokio::task::spawn_blocking(move || {
            // What comes with the host may be another one by the time that it is gone back to.
            let before = before.prepared.inspection.digest;
            if let Some(bundled) = bundled::component(whose.as_str()).filter(|it| Digest::of(it) == before) {
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

    /// Has a plugin follow what its code comes from now; the component waits no more, for it runs.
    async fn go_on(&self, name: &PluginName, follows: Option<String>) -> Result<(), ReplaceError> {
        let Some(row) = roster::known_row(&self.store.snapshot()?, name)? else { return Ok(()) };
        let now = move |row: Row| {
            let pending = row.pending.filter(|pending| pending.digest != row.code.digest);
            Row { follows: follows.clone().or(row.follows), pending, ..row }
        };
        if now(row.clone()) == row {
            return Ok(());
        }
        let whose = name.clone();
        let written = self.commit.write(move |write| {
            let row = roster::row_within(write, &whose)?;
            roster::put_within(write, &whose, &now(row))
        });
        Ok(written.await?)
    }

    /// Starts the new code on what is committed, and throws away what it does.
    pub(super) async fn rehearse(
        &self,
        name: &PluginName,
        ready: &Ready,
        stored: Stored,
    ) -> Result<(), ReplaceError> {
        let Stored { row, world, effects, .. } = stored;
        let session = SessionParts {
            plugin: name.clone(),
            id: row.id,
            reach: Arc::new(ready.allowance.reach.clone()),
            limits: ready.allowance.limits,
            world,
            effects,
            store: self.store.clone(),
            files: self.store.clone(),
            keys: self.keys.clone(),
            outbox_len: Arc::default(),
            listeners: Lines::default(),
        };
        let (prepared, config) = (ready.prepared.clone(), ready.config.clone());
        let (secret, from) = (self.loader.secret, row.state_version);
        let rehearsed =
            tokio::task::spawn_blocking(move || rehearse(&prepared, session, &secret, &config, from));
        rehearsed.await.expect("a rehearsal does not panic")?.map_err(ReplaceError::DoesNotStart)
    }

    /// Goes back to what ran before: to `version`, or to what was confirmed last before what runs. The state
    /// is as of then, and what came since is handled again.
    pub async fn roll_back(
        &self,
        name: &PluginName,
        version: Option<&str>,
        by: &str,
    ) -> Result<RolledBack, ReplaceError> {
        self.loaded(name.as_str()).await;
        let turn = self.turns.of(name);
        let _turn = turn.change.lock().await;
        let loaded = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let (place, mark) = self.way_back(name, version)?;
        let before = loaded.version();
        let code = mark.before.code.clone();
        let known = roster::known_row(&self.store.snapshot()?, name)?;
        let row = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let mut terms = self.terms(name, &row, &loaded.handle.code(), false);
        terms.given = terms.given.going_back(&mark.before.setup);
        let (engine, config, id) = (self.loader.engine.clone(), self.config.now(), self.id.clone());
        let (store, whose) = (self.store.clone(), name.clone());
        let ready = tokio::task::spawn_blocking(move || {
            Candidate::kept(whose, terms, code, &store).ready(&engine, &config, &id)
        });
        let ready = ready.await;
        let ready = ready.map_err(broke_down)?.map_err(|error| {
            ReplaceError::NoWayBack(format!("there is no way back to {}: {error}", mark.before.code.version))
        })?;
        let _held = self.claim(name, &ready.allowance.reach)?;
        // What it will hear again was not listened to meanwhile.
        if let Some(world) = mark::world(&self.store.snapshot()?, place)? {
            self.loader.restore_hearings(&world);
        }
        let (done, gone_back) = oneshot::channel();
        let reason = format!("rolled back by {by}");
        let (to, run) = (place.1, ready.into_runnable());
        loaded.handle.order(Order::GoBack(Box::new(WayBack { to, run, reason, done })));
        let gone_back = gone_back.await.map_err(|_| ReplaceError::Closed)?;
        let (at, replayed) = gone_back.ok_or_else(|| {
            ReplaceError::NoWayBack(format!("the way back of {name} was given up meanwhile"))
        })?;
        let after = loaded.version();
        tracing::warn!(plugin = %name, from = before.version, to = after.version, replayed, "rolled back by {by}");
        Ok(RolledBack { plugin: name.clone(), before, after, at: at.0, replayed })
    }

    /// The mark to go back to.
    fn way_back(&self, name: &PluginName, version: Option<&str>) -> Result<(Place, Mark), ReplaceError> {
        let snapshot = self.store.snapshot()?;
        let known = roster::known(&snapshot, name)?;
        let (id, _) = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let marks = mark::marks(&snapshot, id)?;
        let versions = || marks.iter().map(|(_, mark)| mark.before.code.version.as_str()).collect::<Vec<_>>();
        let found = marks.iter().find(|(_, mark)| version.is_none_or(|it| mark.before.code.version == it));
        found.cloned().ok_or_else(|| {
            ReplaceError::NoWayBack(match version {
                _ if marks.is_empty() => format!("nothing is kept of what {name} was before"),
                Some(version) => format!(
                    "nothing is kept of {name} {version}; there is a way back to {}",
                    versions().join(", ")
                ),
                None => unreachable!("any mark will do"),
            })
        })
    }
}

/// A plugin whose earlier code goes on.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct RolledBack {
    /// The plugin.
    pub plugin: PluginName,
    /// What ran.
    pub before: Version,
    /// What runs.
    pub after: Version,
    /// The first entry that is handled again.
    pub at: u64,
    /// How many entries of the log it has to go over again.
    pub replayed: u64,
}

impl Loaded {
    /// What runs.
    pub fn version(&self) -> Version {
        self.handle.code().prepared.inspection.as_version()
    }
}
