//! Owns how a plugin's code is replaced while the host runs: what comes is judged, compiled and rehearsed
//! while the old code works on, and takes over between two entries.

use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::candidate::{Candidate, Ready};
use super::{Host, Loaded};
use crate::entry::Offset;
use crate::ident::{Digest, PluginName};
use crate::plugin::roster::{self, Code};
use crate::plugin::{SessionParts, Successor, rehearse};
use crate::store::{StoreError, components};

/// Why a component does not replace what runs, which goes on.
#[derive(Debug, Error)]
pub enum ReplaceError {
    /// There is no such plugin.
    #[error("there is no plugin {0:?}")]
    NoPlugin(PluginName),
    /// It is not fit for it.
    #[error("{0}")]
    Refused(String),
    /// It does not start on what the plugin has.
    #[error("it does not start: {0}")]
    DoesNotStart(String),
    /// The host ends.
    #[error("the host is shutting down")]
    Closed,
    /// Its file cannot be kept.
    #[error("cannot keep the component")]
    Keep(#[source] std::io::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A version of a plugin's component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Version {
    /// Its version.
    pub version: String,
    /// Its digest.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// The version of its state's layout.
    pub state_version: u32,
}

/// What has become of a component that was to replace another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Replacement {
    /// The plugin.
    pub plugin: PluginName,
    /// `replaced`, or `unchanged` where it ran already.
    pub outcome: Outcome,
    /// What ran before.
    pub before: Version,
    /// What runs now.
    pub after: Version,
    /// The first entry that the new one handles.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, nullable = false)]
    pub at: Option<Offset>,
    /// Nanoseconds for which the plugin handled nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pause: Option<u64>,
}

/// See [`Replacement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It took over.
    Replaced,
    /// It ran already.
    Unchanged,
}

impl Loaded {
    fn version(&self) -> Version {
        let inspection = &self.prepared.inspection;
        Version {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest,
            state_version: inspection.manifest.state_version,
        }
    }
}

impl Host {
    /// Replaces the code of a plugin by a component that came from `source`; returns once that is durable.
    /// The new code has the grants of the old one. Whatever is wrong with it, the old code goes on.
    pub async fn replace(
        &self,
        name: &PluginName,
        component: Vec<u8>,
        source: String,
    ) -> Result<Replacement, ReplaceError> {
        let old = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let before = old.version();
        let digested = tokio::task::spawn_blocking(move || (Digest::of(&component), component)).await;
        let (digest, component) = digested.expect("digesting does not panic");
        if digest == before.digest {
            let after = before.clone();
            let (plugin, outcome) = (name.clone(), Outcome::Unchanged);
            return Ok(Replacement { plugin, outcome, before, after, at: None, pause: None });
        }
        // Judged at once with others that came, and taken over in the order in which they came.
        let turns = old.turns.clone();
        let (_turn, judged) = tokio::join!(turns.lock(), self.judge(name, component, source.clone(), &old));
        let (ready, component) = judged?;
        let old = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let before = old.version();
        self.rehearse(name, &old, &ready).await?;
        let (store, digest) = (self.store.clone(), ready.prepared.inspection.digest);
        let kept = tokio::task::spawn_blocking(move || components::keep(&store, digest, &component)).await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        let Ready { prepared, resolved, allowance } = ready;
        let (done, taken_over) = oneshot::channel();
        let inspection = prepared.inspection.clone();
        let code = Code {
            version: inspection.manifest.version.clone(),
            digest: inspection.digest.to_string(),
            installed: Some(source.clone()),
        };
        let topics = allowance.topics(&resolved);
        let (config, limits) = (resolved.config, allowance.limits);
        let successor = Successor { prepared: prepared.clone(), config, limits, topics, code, done };
        old.handle.succeed(successor);
        let taken_over = taken_over.await.map_err(|_| ReplaceError::Closed)?;
        let taken_over = taken_over.map_err(ReplaceError::DoesNotStart)?;
        let (handle, grants) = (old.handle.clone(), old.grants.clone());
        let turns = old.turns.clone();
        let new = Loaded { handle, prepared, grants, limits, source, turns };
        let after = new.version();
        self.plugins.put(name.clone(), new);
        tracing::info!(plugin = %name, from = before.version, to = after.version, pause = ?taken_over.pause, "replaced");
        Ok(Replacement {
            plugin: name.clone(),
            outcome: Outcome::Replaced,
            before,
            after,
            at: Some(taken_over.at),
            pause: Some(crate::time::nanoseconds(taken_over.pause)),
        })
    }

    /// Judges and compiles, off the async threads, while the old code works on.
    async fn judge(
        &self,
        name: &PluginName,
        component: Vec<u8>,
        source: String,
        old: &Loaded,
    ) -> Result<(Ready, Vec<u8>), ReplaceError> {
        let candidate = Candidate::successor(&self.config, name.clone(), source, component, old);
        let (engine, config, id) = (self.engine.clone(), self.config.clone(), self.id.clone());
        let judged = tokio::task::spawn_blocking(move || {
            let ready = candidate.ready(&engine, &config, &id)?;
            Ok((ready, candidate.into_component()))
        });
        let (ready, component) =
            judged.await.expect("preparing does not panic").map_err(ReplaceError::Refused)?;
        let asks = &ready.resolved.asks;
        if !old.grants.cover(asks) {
            let why =
                format!("it asks for more than {name} is granted: {}", old.grants.missing(asks).join(", "));
            return Err(ReplaceError::Refused(why));
        }
        Ok((ready, component))
    }

    /// Starts the new code on what is committed, and throws away what it does.
    async fn rehearse(&self, name: &PluginName, old: &Loaded, ready: &Ready) -> Result<(), ReplaceError> {
        let stored = roster::read(&self.store, name)?;
        let stored = stored.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let session = SessionParts {
            plugin: name.clone(),
            id: stored.row.id,
            grants: old.grants.clone(),
            limits: ready.allowance.limits,
            world: stored.world,
            effects: stored.effects,
            store: self.store.clone(),
            files: self.store.clone(),
            keys: self.keys.clone(),
            outbox_len: Arc::default(),
        };
        let (prepared, config) = (ready.prepared.clone(), ready.resolved.config.clone());
        let (secret, from) = (self.secret, stored.row.state_version);
        let rehearsed =
            tokio::task::spawn_blocking(move || rehearse(&prepared, session, &secret, &config, from));
        rehearsed.await.expect("a rehearsal does not panic")?.map_err(ReplaceError::DoesNotStart)
    }
}
