//! Owns what the operator grants plugins while the host runs: it takes effect between two entries, and a component
//! that waits for it takes over.

use std::sync::Arc;

use bytes::Bytes;
use redb::WriteTransaction;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;

use super::candidate::{Allowance, Terms, settle};
use super::judging::Wanting;
use super::replacement::{Proposal, ReplaceError};
use super::{Grant, Host};
use crate::cause::chain;
use crate::cause::listed;
use crate::change::{Change, State, UnderWay};
use crate::ident::{Digest, PluginName};
use crate::plugin::mark;
use crate::plugin::roster::{self, Claim, Pending, Row, Setup};
use crate::plugin::{Grants, Inspection, Limits, Order, OtherReach, Reach, Runnable};
use crate::store::{StoreError, components};
use crate::time::Timestamp;

/// What an operator grants a plugin and denies it.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct GrantChange {
    /// First takes back all that was granted and denied before: what the config says counts again
    reset: bool,
    /// Grants all that is asked for, but for what was denied; also by a component that waits, if `pending` names it
    all: bool,
    /// Grants this
    allow: Grants,
    /// Denies this, whoever grants it
    deny: Grants,
    /// Gives up a component that waits
    refuse_pending: bool,
    /// The digest of the component that waits, as far as the operator has seen one: if another one waits by now,
    /// nothing is granted
    #[schema(value_type = Option<String>)]
    pending: Option<Digest>,
}

/// What a plugin asks for and may.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Granted {
    /// The plugin.
    pub plugin: PluginName,
    /// What its manifest asks for.
    pub asks: Grants,
    #[serde(flatten)]
    reach: Reach,
    /// What it asks for and may not, in words.
    pub missing: Vec<String>,
    /// What of that nobody has denied.
    pub unanswered: Vec<String>,
    /// What it may take.
    pub limits: Limits,
    /// A component that waits until it is granted what it asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pending: Option<Pending>,
    /// What became of the component that waited for these grants.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub change: Option<Change>,
}

/// Keeps what a component that waits is not granted.
fn show_missing(
    write: &WriteTransaction,
    plugin: &PluginName,
    digest: &str,
    missing: Vec<String>,
) -> Result<(), StoreError> {
    let row = roster::row_within(write, plugin)?;
    match row.pending {
        Some(pending) if pending.digest == digest => {
            let pending = Some(Pending { missing, ..pending });
            roster::put_within(write, plugin, &Row { pending, ..row })
        }
        _ => Ok(()),
    }
}

impl Host {
    /// What a plugin asks for and may.
    pub fn grants(&self, name: &PluginName) -> Result<Granted, ReplaceError> {
        let (row, code) = self.known(name)?;
        let allowance = self.settled(name, &code, row.setup.clone())?.1;
        let missing = allowance.missing();
        let Allowance { asks, reach, limits } = allowance;
        let (plugin, unanswered) = (name.clone(), reach.unanswered(&asks));
        Ok(Granted { plugin, asks, reach, missing, unanswered, limits, pending: row.pending, change: None })
    }

    /// Grants a plugin something and denies it something, which counts from the next entry on; a component that
    /// waited for it takes over then.
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

    /// Returns the component that waits, if it is granted all by now; if another has signed it than what runs, it is
    /// given that as it takes over.
    async fn regrant(
        &self,
        name: &PluginName,
        change: GrantChange,
        by: &str,
    ) -> Result<Option<(Pending, Grant)>, ReplaceError> {
        let turn = self.turns.of(name);
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
        // Consent to what waits is to what was seen.
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
                "what it lies in is denied as a whole: allow that, or reset; it stays denied to {}",
                still.join(", ")
            )));
        }
        setup.granted.take(&change.deny);
        setup.denied.add(&change.deny);
        let allowance = self.settled(name, &code, setup.clone())?.1;
        let _held = self.claim(name, &allowance.reach)?;
        self.make_keys(&allowance.reach).await?;
        let is_refused = row.pending.is_some() && pending.is_none();
        // Consent is to what is shown. What cannot be read or settled goes on waiting.
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
            let (now, setup, pending) = (self.log.now(), setup.clone(), pending.clone());
            self.commit
                .record(told, now, move |write| {
                    let row = roster::row_within(write, &whose)?;
                    roster::put_within(write, &whose, &Row { setup, claim, pending, ..row })
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

    /// Has a plugin that runs go on with what it may if it is given `given`; false if other code has come in between.
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
        // What cannot be settled any more has what it had, or less.
        let (row, _) = self.known(name)?;
        let mark = mark::of_probation(&self.store.snapshot()?, row.id)?;
        let before = mark.map_or_else(|| given.clone(), |(_, mark)| given.going_back(&mark.before.setup));
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

    /// Takes up the components that wait and are granted all by now: the host has ended before it could.
    pub(super) async fn take_up_pending(self: &Arc<Self>) -> Result<(), ReplaceError> {
        for (name, row) in roster::rows(&self.store.snapshot()?)? {
            let is_meant = |pending: &Pending| {
                self.plugins.get(&name).is_some() && row.setup.is_for(pending.signer.as_ref())
            };
            let Some(pending) = row.pending.clone().filter(is_meant) else { continue };
            let Ok(inspection) = self.inspect_kept(&pending.digest).await else { continue };
            let allowance = self.pending_allowance(&name, &row, &pending, &inspection, row.setup.clone());
            let Ok(missing) = allowance.map(|it| it.reach.unanswered(&it.asks)) else { continue };
            if missing.is_empty() {
                // If it fails that is on record.
                let _ = self.take_up(&name, pending, Grant::AsBefore).await;
            } else if missing != pending.missing {
                // The config asks for other things by now.
                self.commit.write(move |write| show_missing(write, &name, &pending.digest, missing)).await?;
            }
        }
        Ok(())
    }

    /// Installs a component that has waited; it waits no more, whatever becomes of it.
    async fn take_up(
        self: &Arc<Self>,
        name: &PluginName,
        pending: Pending,
        grant: Grant,
    ) -> Result<Change, ReplaceError> {
        let waits = roster::known_row(&self.store.snapshot()?, name)?.and_then(|row| row.pending);
        if waits.is_none_or(|waits| waits.digest != pending.digest) {
            return Err(ReplaceError::Moved(format!("{} does not wait any more", pending.digest)));
        }
        let Pending { digest, source, by, follows, .. } = pending;
        let (store, plugin, refused) = (self.store.clone(), name.clone(), digest.clone());
        let component = tokio::task::spawn_blocking(move || components::read(&store, &digest)).await;
        let outcome = match component.expect("reading does not panic") {
            Ok(component) => {
                let component = Bytes::from(component);
                // Somebody has vouched for it when it came.
                let trust = Some(Digest::of(&component));
                let proposal = Proposal { plugin, component, source, by, follows, is_named: false, trust };
                self.install(proposal, grant).await
            }
            Err(error) => Err(ReplaceError::Keep(error)),
        };
        if outcome.as_ref().is_err_and(ReplaceError::is_lasting) {
            let whose = name.clone();
            self.commit
                .write(move |write| {
                    let row = roster::row_within(write, &whose)?;
                    // Another one may wait by now.
                    let pending = row.pending.filter(|pending| pending.digest != refused);
                    roster::put_within(write, &whose, &Row { pending, ..row })
                })
                .await?;
        }
        outcome
    }

    /// Keeps a component until it is granted what it asks for. The caller has the plugin's turn.
    pub(super) async fn let_wait(
        &self,
        under_way: &mut UnderWay,
        wanting: Wanting,
        follows: Option<String>,
    ) -> Result<(), ReplaceError> {
        let Wanting { plugin, missing, inspection, component } = wanting;
        let (store, digest) = (self.store.clone(), inspection.digest);
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
        let known = roster::known_row(&self.store.snapshot()?, &plugin)?.and_then(|row| row.pending);
        if known.is_some_and(|it| {
            it.digest == pending.digest && it.missing == pending.missing && it.follows == pending.follows
        }) {
            // It is on record already: a folder brings it at each start.
            self.changes().tell(change);
            return Ok(());
        }
        tracing::warn!(%plugin, version = pending.version, "waits, it asks for more than it is granted: to {words}");
        let recorded = self.commit.record(change.clone(), self.log.now(), move |write| {
            let row = roster::row_within(write, &plugin)?;
            roster::put_within(write, &plugin, &Row { pending: Some(pending), ..row })
        });
        Ok(recorded.await?)
    }

    /// Makes the keys that are granted and not there.
    pub(super) async fn make_keys(&self, reach: &Reach) -> Result<(), ReplaceError> {
        let made = self.loader.make_keys(reach).await;
        made.map_err(|error| ReplaceError::Refused(chain(&error)))
    }

    /// The row of a plugin that runs, and what it runs.
    fn known(&self, name: &PluginName) -> Result<(Row, Arc<Runnable>), ReplaceError> {
        let none = || ReplaceError::NoPlugin(name.clone());
        let loaded = self.plugins.get(name).ok_or_else(none)?;
        let row = roster::known_row(&self.store.snapshot()?, name)?.ok_or_else(none)?;
        Ok((row, loaded.handle.code()))
    }

    /// The config of what a plugin runs, and what it may if it is given `given`.
    fn settled(
        &self,
        name: &PluginName,
        code: &Runnable,
        given: Setup,
    ) -> Result<(String, Allowance), ReplaceError> {
        let terms = Terms { config: self.section(name), given };
        let (inspection, is_installed) = (&code.prepared.inspection, code.code.installed.is_some());
        settle(&self.config.now(), name, &terms, is_installed, inspection, &self.id)
            .map_err(ReplaceError::Refused)
    }

    /// What a component that waits asks for and may.
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
        Ok(settled.map_err(ReplaceError::Refused)?.1)
    }
}

/// Grants something, also what was denied before.
fn allow(setup: &mut Setup, grants: &Grants) {
    setup.denied.take(grants);
    setup.granted.add(grants);
}

/// What is given and denied now and was not before, and what no longer is, in words.
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
        pieces.push("the component that waited is given up".to_owned());
    }
    pieces.join("; ")
}
