//! Owns the grants and denials of the operator while the host runs. It receives a change and returns the resulting
//! permissions. The change takes effect between two entries, and a pending component that is granted everything takes
//! over.

use std::sync::Arc;

use bytes::Bytes;
use dim_model::error_chain::listed;
use dim_model::ident::{Digest, PluginName};
use dim_model::time::Timestamp;
use dim_runtime::{Inspection, Order, OtherReach, Runnable};
use dim_store::change::{Change, State, UnderWay};
use dim_store::checkpoint;
use dim_store::grants::{Grants, Reach};
use dim_store::plugin_limits::Limits;
use dim_store::plugin_registry::{self, Claim, Pending, Row, Setup};
use dim_store::{StoreError, components};
use redb::WriteTransaction;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::assessment::Wanting;
use super::candidate::{Allowance, CandidateError, Terms, settle};
use super::replacement::{Proposal, ReplaceError};
use super::{Grant, Host};

/// A change of the operator's grants and denials for a plugin.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct GrantChange {
    /// First removes all earlier grants and denials of the operator, so that only the config counts
    reset: bool,
    /// Grants all requested permissions that are not denied. It includes those of a pending component if `pending`
    /// names it
    all: bool,
    /// Grants these permissions
    allow: Grants,
    /// Denies these permissions, which overrides a grant from any source
    deny: Grants,
    /// Drops the pending component
    refuse_pending: bool,
    /// The digest of the pending component that the operator has seen. If another component is pending now, nothing
    /// is granted
    #[schema(value_type = Option<String>)]
    pending: Option<Digest>,
}

/// The requested and granted permissions of a plugin.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Granted {
    /// The plugin.
    pub plugin: PluginName,
    /// The permissions that its manifest requests.
    pub asks: Grants,
    #[serde(flatten)]
    reach: Reach,
    /// The requested permissions that it does not have, as text.
    pub missing: Vec<String>,
    /// The missing permissions that nobody has denied.
    pub unanswered: Vec<String>,
    /// Its limits.
    pub limits: Limits,
    /// The component that waits until it is granted what it requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pending: Option<Pending>,
    /// The result for the component that waited for these grants.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub change: Option<Change>,
}

/// Stores the missing permissions of a pending component.
fn show_missing(
    write: &WriteTransaction,
    plugin: &PluginName,
    digest: &str,
    missing: Vec<String>,
) -> Result<(), StoreError> {
    let row = plugin_registry::row_within(write, plugin)?;
    match row.pending {
        Some(pending) if pending.digest == digest => {
            let pending = Some(Pending { missing, ..pending });
            plugin_registry::put_within(write, plugin, &Row { pending, ..row })
        }
        _ => Ok(()),
    }
}

impl Host {
    /// Returns the requested and granted permissions of a plugin.
    pub fn grants(&self, name: &PluginName) -> Result<Granted, ReplaceError> {
        let (row, code) = self.known(name)?;
        let allowance = self.settled(name, &code, row.setup.clone())?.1;
        let missing = allowance.missing();
        let Allowance { asks, reach, limits } = allowance;
        let (plugin, unanswered) = (name.clone(), reach.unanswered(&asks));
        Ok(Granted { plugin, asks, reach, missing, unanswered, limits, pending: row.pending, change: None })
    }

    /// Changes the grants and denials of a plugin, from its next entry on. A pending component that is granted
    /// everything then takes over.
    pub async fn grant(
        self: &Arc<Self>,
        name: &PluginName,
        change: GrantChange,
        by: &str,
    ) -> Result<Granted, ReplaceError> {
        self.loaded(name.as_str()).await;
        let covered = self.regrant(name, change, by).await?;
        let change = match covered {
            Some((pending, grant)) => Some(self.take_up(name, pending, grant).await?),
            None => None,
        };
        Ok(Granted { change, ..self.grants(name)? })
    }

    /// Returns the pending component if it is granted everything now. If its signer is not the signer of the running
    /// code, it receives its grants during the takeover.
    async fn regrant(
        &self,
        name: &PluginName,
        change: GrantChange,
        by: &str,
    ) -> Result<Option<(Pending, Grant)>, ReplaceError> {
        let turn = self.deployment.turns.of(name);
        let _turn = turn.change.lock().await;
        let (row, code) = self.known(name)?;
        if let Some(seen) = change.pending
            && row.pending.as_ref().is_none_or(|pending| pending.digest != seen.to_string())
        {
            return Err(ReplaceError::Moved(format!("{seen} does not wait any more")));
        }
        let pending = row.pending.clone().filter(|_| !change.refuse_pending);
        let is_for = |pending: &Pending| row.setup.is_for(pending.signer.as_ref());
        let signer = row.setup.signer.clone();
        let mut setup = if change.reset { Setup { signer, ..Setup::default() } } else { row.setup.clone() };
        // The operator consents only to the component that was shown.
        let all_of_pending = change.all && change.pending.is_some();
        let inspection = match pending.as_ref().filter(|pending| is_for(pending)) {
            Some(pending) => match self.inspect_kept(&pending.digest).await {
                Err(error) if all_of_pending => return Err(error),
                inspected => inspected.ok(),
            },
            None => None,
        };
        let waiting = pending.as_ref().zip(inspection);
        if change.all {
            let allowance = self.settled(name, &code, setup.clone())?.1;
            setup.grant_all(&allowance.asks);
            if let Some((pending, inspection)) = waiting.as_ref().filter(|_| all_of_pending) {
                let allowance = self.pending_allowance(name, &row, pending, inspection, setup.clone())?;
                setup.grant_all(&allowance.asks);
            }
        }
        allow(&mut setup, &change.allow);
        let still = setup.denied_of(&change.allow);
        if !still.is_empty() {
            return Err(ReplaceError::Refused(format!(
                "a wider permission that includes it is denied: allow that one, or reset; it stays denied to {}",
                still.join(", ")
            )));
        }
        setup.granted.take(&change.deny);
        setup.denied.add(&change.deny);
        let allowance = self.settled(name, &code, setup.clone())?.1;
        let _held = self.claim(name, &allowance.reach)?;
        self.make_keys(&allowance.reach).await?;
        let is_refused = row.pending.is_some() && pending.is_none();
        // Consent covers the permissions that were shown. A component that cannot be read or settled stays pending.
        let missing = waiting.and_then(|(pending, inspection)| {
            let allowance = self.pending_allowance(name, &row, pending, &inspection, setup.clone()).ok()?;
            Some(allowance.reach.unanswered(&allowance.asks))
        });
        let pending = pending.map(|pending| Pending {
            missing: missing.unwrap_or_else(|| pending.missing.clone()),
            ..pending
        });
        let words = in_words(&row.setup, &setup, is_refused);
        if !words.is_empty() {
            let mut told =
                Change::new(name.clone(), State::GrantsChanged, by.to_owned(), code.source.clone());
            told.after = Some(row.as_version());
            told.because(words);
            let (whose, claim) = (name.clone(), Claim::of(&allowance.reach));
            let (now, setup, pending) = (self.storage.log.now(), setup.clone(), pending.clone());
            self.storage
                .commit
                .record(told, now, move |write| {
                    let row = plugin_registry::row_within(write, &whose)?;
                    plugin_registry::put_within(write, &whose, &Row { setup, claim, pending, ..row })
                })
                .await?;
        }
        while !self.reach(name, setup.clone()).await? {}
        let Some(pending) = pending else { return Ok(None) };
        if !is_for(&pending) {
            return Ok(all_of_pending.then_some((pending, Grant::AllThatIsAsked)));
        }
        Ok(pending.missing.is_empty().then_some((pending, Grant::AsBefore)))
    }

    /// Applies the permissions that follow from `given` to a running plugin. Returns false if other code took over
    /// meanwhile.
    pub(super) async fn reach(&self, name: &PluginName, given: Setup) -> Result<bool, ReplaceError> {
        let loaded = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let (code, fallback) = (loaded.handle.code(), loaded.handle.fallback());
        let within = |code: &Arc<Runnable>, given: Setup| {
            let (config, allowance) = self.settled(name, code, given)?;
            let (topics, asked_topics) = (allowance.topics(), allowance.asked_topics());
            let Allowance { reach, limits, .. } = allowance;
            Ok::<_, ReplaceError>(Runnable {
                reach: Arc::new(reach),
                topics,
                asked_topics,
                limits,
                config,
                ..(**code).clone()
            })
        };
        let run = within(&code, given.clone())?;
        // If the fallback cannot be settled any more, it keeps its permissions.
        let (row, _) = self.known(name)?;
        let checkpoint = checkpoint::of_probation(&self.storage.store.snapshot()?, row.id)?;
        let before = checkpoint
            .map_or_else(|| given.clone(), |(_, checkpoint)| given.going_back(&checkpoint.before.setup));
        let fallback = fallback.map(|it| within(&it, before).map_or(it, Arc::new));
        let is_same = |one: &Runnable, other: &Runnable| {
            one.reach == other.reach
                && one.topics == other.topics
                && one.limits == other.limits
                && one.config == other.config
        };
        if is_same(&run, &code) && fallback.is_none() {
            return Ok(true);
        }
        let (done, reached) = oneshot::channel();
        loaded.handle.order(Order::Reach(Box::new(OtherReach { run, fallback, done })));
        reached.await.map_err(|_| ReplaceError::Closed)
    }

    /// Installs the pending components that are granted everything, because an earlier host ended before it could.
    pub(super) async fn take_up_pending(self: &Arc<Self>) -> Result<(), ReplaceError> {
        for (name, row) in plugin_registry::rows(&self.storage.store.snapshot()?)? {
            let is_meant = |pending: &Pending| {
                self.plugins.get(&name).is_some() && row.setup.is_for(pending.signer.as_ref())
            };
            let Some(pending) = row.pending.clone().filter(is_meant) else { continue };
            let Ok(inspection) = self.inspect_kept(&pending.digest).await else { continue };
            let allowance = self.pending_allowance(&name, &row, &pending, &inspection, row.setup.clone());
            let Ok(missing) = allowance.map(|it| it.reach.unanswered(&it.asks)) else { continue };
            if missing.is_empty() {
                // A failure is recorded.
                let _ = self.take_up(&name, pending, Grant::AsBefore).await;
            } else if missing != pending.missing {
                // The config may request other permissions now.
                self.storage
                    .commit
                    .write(move |write| show_missing(write, &name, &pending.digest, missing))
                    .await?;
            }
        }
        Ok(())
    }

    /// Installs a pending component. It is no longer pending afterwards, whatever the result.
    async fn take_up(
        self: &Arc<Self>,
        name: &PluginName,
        pending: Pending,
        grant: Grant,
    ) -> Result<Change, ReplaceError> {
        let waits =
            plugin_registry::known_row(&self.storage.store.snapshot()?, name)?.and_then(|row| row.pending);
        if waits.is_none_or(|waits| waits.digest != pending.digest) {
            return Err(ReplaceError::Moved(format!("{} does not wait any more", pending.digest)));
        }
        let Pending { digest, source, by, follows, .. } = pending;
        let (store, plugin, refused) = (self.storage.store.clone(), name.clone(), digest.clone());
        let component = tokio::task::spawn_blocking(move || components::read(&store, &digest)).await;
        let outcome = match component.expect("reading does not panic") {
            Ok(component) => {
                let component = Bytes::from(component);
                // The operator vouched for it when it arrived.
                let trust = Some(Digest::of(&component));
                let proposal = Proposal { plugin, component, source, by, follows, is_named: false, trust };
                self.install(proposal, grant).await
            }
            Err(error) => Err(ReplaceError::Keep(error)),
        };
        if outcome.as_ref().is_err_and(ReplaceError::is_lasting) {
            let whose = name.clone();
            self.storage
                .commit
                .write(move |write| {
                    let row = plugin_registry::row_within(write, &whose)?;
                    // Another component may be pending now.
                    let pending = row.pending.filter(|pending| pending.digest != refused);
                    plugin_registry::put_within(write, &whose, &Row { pending, ..row })
                })
                .await?;
        }
        outcome
    }

    /// Stores a component until it is granted what it requests. The caller holds the plugin's lock.
    pub(super) async fn let_wait(
        &self,
        under_way: &mut UnderWay,
        wanting: Wanting,
        follows: Option<String>,
    ) -> Result<(), ReplaceError> {
        let Wanting { plugin, missing, inspection, component } = wanting;
        let (store, digest) = (self.storage.store.clone(), inspection.digest);
        let kept = tokio::task::spawn_blocking(move || components::keep(&store, digest, &component)).await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        let change = &mut under_way.change;
        let words = listed(&missing);
        let hint = format!("`dim plugin grants {plugin} allow --all` lets it take over");
        change.missing.clone_from(&missing);
        change.ended(State::Pending, Some(format!("it asks to {words}: {hint}")), None);
        let pending = Pending {
            version: inspection.manifest.version,
            digest: digest.to_string(),
            source: change.source.clone(),
            by: change.by.clone(),
            since: Timestamp::wall(),
            missing,
            signer: inspection.signer,
            follows,
        };
        let known =
            plugin_registry::known_row(&self.storage.store.snapshot()?, &plugin)?.and_then(|row| row.pending);
        if known.is_some_and(|it| {
            it.digest == pending.digest && it.missing == pending.missing && it.follows == pending.follows
        }) {
            // The change is recorded already: a folder offers the component at each start.
            self.changes().tell(change);
            return Ok(());
        }
        tracing::warn!(%plugin, version = pending.version, "waits, it asks for more than it is granted: to {words}");
        let recorded = self.storage.commit.record(change.clone(), self.storage.log.now(), move |write| {
            let row = plugin_registry::row_within(write, &plugin)?;
            plugin_registry::put_within(write, &plugin, &Row { pending: Some(pending), ..row })
        });
        Ok(recorded.await?)
    }

    /// Makes the granted keys that do not exist yet.
    pub(super) async fn make_keys(&self, reach: &Reach) -> Result<(), ReplaceError> {
        let made = self.deployment.loader.make_keys(reach).await;
        made.map_err(|error| ReplaceError::Run(Box::new(error)))
    }

    /// Returns the row and the running code of a plugin.
    fn known(&self, name: &PluginName) -> Result<(Row, Arc<Runnable>), ReplaceError> {
        let none = || ReplaceError::NoPlugin(name.clone());
        let loaded = self.plugins.get(name).ok_or_else(none)?;
        let row = plugin_registry::known_row(&self.storage.store.snapshot()?, name)?.ok_or_else(none)?;
        Ok((row, loaded.handle.code()))
    }

    /// Returns the config and the allowance of a plugin's running code with the grants `given`.
    fn settled(
        &self,
        name: &PluginName,
        code: &Runnable,
        given: Setup,
    ) -> Result<(String, Allowance), ReplaceError> {
        let terms = Terms { config: self.section(name), given };
        let (inspection, is_installed) = (&code.prepared.inspection, code.code.installed.is_some());
        let settled = settle(&self.config.now(), name, &terms, is_installed, inspection, &self.id);
        Ok(settled.map_err(CandidateError::Values)?)
    }

    /// Returns the allowance of a pending component.
    fn pending_allowance(
        &self,
        name: &PluginName,
        row: &Row,
        pending: &Pending,
        inspection: &Inspection,
        given: Setup,
    ) -> Result<Allowance, ReplaceError> {
        let inspection = Inspection { signer: pending.signer.clone(), ..inspection.clone() };
        let running =
            self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?.handle.code();
        let row = Row { setup: given, ..row.clone() };
        let terms = self.terms(name, &row, &running, false);
        let settled = settle(&self.config.now(), name, &terms, true, &inspection, &self.id);
        Ok(settled.map_err(CandidateError::Values)?.1)
    }
}

/// Grants permissions, including those that were denied before.
fn allow(setup: &mut Setup, grants: &Grants) {
    setup.denied.take(grants);
    setup.granted.add(grants);
}

/// Describes the difference between two setups as text.
fn in_words(before: &Setup, now: &Setup, is_refused: bool) -> String {
    let differs = |one: &Grants, other: &Grants| {
        listed(&Reach { granted: one.clone(), denied: Grants::default() }.missing(other))
    };
    let pieces = [
        ("allowed to", differs(&before.granted, &now.granted)),
        ("no longer allowed to", differs(&now.granted, &before.granted)),
        ("denied to", differs(&before.denied, &now.denied)),
        ("no longer denied to", differs(&now.denied, &before.denied)),
    ];
    let pieces = pieces.into_iter().filter(|(_, words)| !words.is_empty());
    let mut pieces: Vec<String> = pieces.map(|(verb, words)| format!("{verb} {words}")).collect();
    if is_refused {
        pieces.push("the pending component is dropped".to_owned());
    }
    pieces.join("; ")
}
