//! Owns which plugins run: loads those of the config at a start, and lets others come, go and rest while the
//! host runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;

use super::candidate::{Candidate, Readied, Ready, give};
use super::following::follow;
use super::loader::{ToRun, Wired};
use super::replacement::{Proposal, ReplaceError, broke_down};
use super::start::cores;
use super::{Host, HostError, UNHURT};
use crate::bundled;
use crate::change::{Change, State, UnderWay};
use crate::commit::{CommitError, give_up};
use crate::entry::Generation;
use crate::ident::PluginName;
use crate::interest::Party;
use crate::plugin::mark;
use crate::plugin::roster::{self, Row, Setup, Standing, Stored};
use crate::plugin::{Effects, Timers, World};
use crate::store::{PluginId, StoreError, components, dead, retries};

/// How long a plugin that is removed may take to handle what has come by then.
const DRAIN: Duration = Duration::from_secs(30);

/// What a plugin may that is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// What the config grants, or what it was granted when it was here before.
    AsBefore,
    /// All that it asks for, unless the config grants it something else.
    AllThatIsAsked,
}

impl Host {
    /// Loads the plugins of the config and those that were installed, each as soon as it is ready; returns once
    /// all are. One that cannot be loaded stops no other.
    pub async fn load(self: &Arc<Self>) -> Result<(), HostError> {
        let candidates = std::mem::take(&mut *self.candidates.lock().expect(UNHURT));
        let engine = self.loader.engine.clone();
        let sorted = tokio::task::spawn_blocking(move || {
            // What needs no compiling does not wait for what does.
            let mut candidates: Vec<_> =
                candidates.into_iter().map(|it| (!it.is_compiled(&engine), it)).collect();
            candidates.sort_by_key(|(is_slow, _)| *is_slow);
            candidates
        });
        let sorted = sorted.await.expect("sorting does not panic");
        let mut loads = futures::stream::iter(sorted)
            .map(|(_, candidate)| async move {
                let name = candidate.name.clone();
                let loaded = self.load_one(candidate).await;
                self.loading.send_modify(|loading| {
                    loading.remove(&name);
                });
                loaded
            })
            .buffer_unordered(cores());
        while let Some(loaded) = loads.next().await {
            loaded?;
        }
        let _ = self.loaded_after.set(self.begun.elapsed());
        self.tidy().await?;
        if let Some(running) = self.running.lock().expect(UNHURT).as_ref() {
            running.spawn_task(follow(Arc::downgrade(self)));
        }
        Ok(())
    }

    /// The plugins that are not loaded yet.
    pub fn loading(&self) -> BTreeSet<PluginName> {
        self.loading.borrow().clone()
    }

    /// Waits until a plugin that is being loaded is, or is refused.
    pub async fn loaded(&self, name: &str) {
        let mut loading = self.loading.subscribe();
        let is_done = |loading: &BTreeSet<PluginName>| !loading.iter().any(|it| it.as_str() == name);
        self.unless_ended(loading.wait_for(is_done)).await;
    }

    /// Waits for something that will not come once the host ends.
    async fn unless_ended(&self, awaited: impl Future) {
        tokio::select! {
            biased;
            () = self.ended.cancelled() => {}
            _ = awaited => {}
        }
    }

    /// Waits until all plugins are loaded, or refused.
    pub async fn all_loaded(&self) {
        let mut loading = self.loading.subscribe();
        self.unless_ended(loading.wait_for(BTreeSet::is_empty)).await;
    }

    async fn load_one(self: &Arc<Self>, candidate: Candidate) -> Result<(), HostError> {
        let name = candidate.name.clone();
        let (engine, config, id) = (self.loader.engine.clone(), self.config.clone(), self.id.clone());
        let store = self.store.clone();
        let permit = self.compiling.acquire().await.expect("it is never closed");
        let readied = tokio::task::spawn_blocking(move || candidate.readied(&engine, &config, &id, &store));
        let readied = readied.await;
        drop(permit);
        let Readied { candidate, ready, fallback } = match readied {
            Ok(readied) => readied,
            Err(error) => {
                let reason = format!("the compiler broke down over it: {error}");
                self.not_loaded.lock().expect(UNHURT).insert(name, reason);
                return Ok(());
            }
        };
        let to_run = match (ready, fallback) {
            (Ok(ready), fallback) => ToRun { ready, fallback, failed: None },
            // On probation it has failed.
            (Err(reason), Some(before)) => {
                ToRun { ready: before.clone(), fallback: Some(before), failed: Some(reason) }
            }
            (Err(reason), None) => {
                tracing::error!(plugin = %name, "not loaded: {reason}");
                self.not_loaded.lock().expect(UNHURT).insert(name, reason);
                return Ok(());
            }
        };
        let ready = &to_run.ready;
        if let Err(error) = self.loader.make_keys(&ready.allowance.grants).await {
            let reason = crate::cause::chain(&error);
            tracing::error!(plugin = %name, "not loaded: {reason}");
            self.not_loaded.lock().expect(UNHURT).insert(name, reason);
            return Ok(());
        }
        let known = roster::known_row(&self.store.snapshot()?, &name)?;
        let code = roster::Code {
            installed: candidate.installed.then(|| ready.source.clone()),
            ..ready.code.clone()
        };
        let row = roster::entered(known.clone(), code);
        // The disk may be full: what stands there already is not written again.
        if known.as_ref() != Some(&row) && to_run.failed.is_none() {
            let other = known.filter(|known| known.code.digest != row.code.digest);
            let change = other.map(|before| {
                let by = "a start of the host".to_owned();
                let mut change = Change::new(name.clone(), State::Installed, by, ready.source.clone());
                change.before = Some(before.as_version());
                change.after = Some(ready.prepared.inspection.as_version());
                change
            });
            self.enter(&name, row, change).await.map_err(closed)?;
        }
        self.run(name, to_run).await
    }

    /// Writes the row of a plugin that is about to run, and puts on record that its code is another one.
    async fn enter(&self, name: &PluginName, row: Row, change: Option<Change>) -> Result<(), CommitError> {
        let (name, head) = (name.clone(), self.log.head());
        match change {
            Some(change) => {
                let now = self.log.now();
                self.commit.record(change, now, move |write| roster::enter(write, &name, row, head)).await
            }
            None => self.commit.write(move |write| roster::enter(write, &name, row, head)).await,
        }
    }

    /// Wires a plugin that is in the roster, and starts its thread.
    async fn run(self: &Arc<Self>, name: PluginName, to_run: ToRun) -> Result<(), HostError> {
        let (loader, whose) = (self.loader.clone(), name.clone());
        let wired = tokio::task::spawn_blocking(move || -> Result<Wired, HostError> {
            let stored = roster::read(&loader.store, &whose)?;
            let stored = stored.ok_or_else(|| StoreError::corrupt("plugins", "an entered one is gone"))?;
            loader.wire(&whose, stored, to_run)
        });
        let Wired { actor, mut loaded } = wired.await.expect("wiring does not panic")?;
        let mut running = self.running.lock().expect(UNHURT);
        // The host may have ended meanwhile.
        let Some(running) = running.as_mut() else { return Ok(()) };
        let stop = running.plugin_stop();
        loaded.stop = stop.clone();
        self.plugins.put(name.clone(), Arc::new(loaded));
        running.spawn_plugin(&name, actor, stop, self.fail.clone())
    }

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
        if self.plugins.get(&name).is_some() {
            match self.try_replace(under_way, proposal.clone()).await {
                // It was removed meanwhile.
                Err(ReplaceError::NoPlugin(_)) => {}
                outcome => return outcome,
            }
        }
        let place = turn.line.lock().await;
        // Of two that install one plugin the second one replaces what the first has installed.
        if self.plugins.get(&name).is_some() {
            drop(place);
            return self.try_replace(under_way, proposal).await;
        }
        self.try_install(under_way, proposal, grant).await
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
        // What the config names has what the config says, whatever was installed under its name.
        let mut given = known.as_ref().and_then(|known| known.setup.clone()).filter(|_| !proposal.is_named);
        let mut setup = self.section(&name);
        if grant == Grant::AsBefore {
            give(&mut setup, given.as_ref());
        }
        let candidate = Candidate::proposed(proposal, setup);
        let (ready, component) = self.judge(under_way, candidate, grant).await?;
        if grant == Grant::AllThatIsAsked {
            given = Some(Setup { grants: ready.resolved.asks.clone() });
        }
        let turn = self.turns.of(&name);
        let _turn = turn.change.lock().await;
        under_way.reach(State::Rehearsing);
        let grants = Arc::new(ready.allowance.grants.clone());
        let stored = match roster::read(&self.store, &name)? {
            Some(stored) => stored,
            None => nothing_yet(&name, &ready),
        };
        self.rehearse(&name, grants.clone(), &ready, stored).await?;
        let (store, digest) = (self.store.clone(), ready.prepared.inspection.digest);
        let kept = tokio::task::spawn_blocking(move || components::keep(&store, digest, &component)).await;
        kept.expect("keeping does not panic").map_err(ReplaceError::Keep)?;
        self.loader
            .make_keys(&grants)
            .await
            .map_err(|error| ReplaceError::Refused(crate::cause::chain(&error)))?;
        under_way.reach(State::TakingOver);
        let code = roster::Code { installed, ..ready.code.clone() };
        let row = Row { standing: Standing::Runs, setup: given, follows, ..roster::entered(known, code) };
        under_way.change.reach(State::Installed);
        self.enter(&name, row, Some(under_way.change.clone())).await?;
        self.awaited.write().expect(UNHURT).insert(name.clone());
        self.not_loaded.lock().expect(UNHURT).remove(&name);
        let to_run = ToRun { ready, fallback: None, failed: None };
        self.run(name, to_run).await.map_err(|error| ReplaceError::Refused(crate::cause::chain(&error)))
    }

    /// Goes back to what the config names: for a bundled plugin, to the one that comes with the host.
    pub async fn restore(self: &Arc<Self>, name: &PluginName, by: &str) -> Result<Change, ReplaceError> {
        self.loaded(name.as_str()).await;
        if self.section(name).file.is_none() && bundled::component(name.as_str()).is_none() {
            return Err(ReplaceError::Refused(format!(
                "there is nothing to restore: {name} does not come with the host, and the config gives no file"
            )));
        }
        let (config, id, plugin, section) =
            (self.config.clone(), self.id.clone(), name.clone(), self.section(name));
        let read = tokio::task::spawn_blocking(move || {
            let named = Candidate::new(plugin, section);
            let asks = named.ask(&config, &named.inspect()?.manifest, &id)?.0;
            Ok((named.source.clone(), asks, named.into_component()?))
        });
        let (source, asks, component) = read.await.map_err(broke_down)?.map_err(ReplaceError::Refused)?;
        // What runs may have the grants of another plugin that was installed under this name. It goes, then, and
        // what the config names begins with its own.
        if self.plugins.get(name).is_some_and(|loaded| !loaded.grants.cover(&asks)) {
            self.remove(name, false, by).await?;
        }
        let (plugin, by) = (name.clone(), by.to_owned());
        let proposal = Proposal { plugin, component, source, by, follows: None, is_named: true };
        self.install(proposal, Grant::AsBefore).await
    }

    /// Has a plugin handle nothing from the next entry on, or go on; also after a restart of the host. What
    /// comes meanwhile waits.
    pub async fn pause(&self, name: &PluginName, paused: bool, by: &str) -> Result<Change, ReplaceError> {
        let turn = self.turns.of(name);
        let _turn = turn.change.lock().await;
        let loaded = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let (state, standing) = match paused {
            true => (State::Paused, Standing::Paused),
            false => (State::Resumed, Standing::Runs),
        };
        let code = loaded.handle.code();
        let mut change = Change::new(name.clone(), state, by.to_owned(), code.source.clone());
        change.after = Some(loaded.version());
        if loaded.handle.is_paused() == paused {
            return Ok(change);
        }
        let told = change.clone();
        let whose = name.clone();
        self.commit
            .record(change, self.log.now(), move |write| {
                let row = roster::row_within(write, &whose)?;
                roster::put_within(write, &whose, &Row { standing, ..row })
            })
            .await?;
        loaded.handle.pause(paused);
        Ok(told)
    }

    /// Unloads a plugin once it has handled what has come by then; what it has is kept, or purged.
    pub async fn remove(&self, name: &PluginName, purge: bool, by: &str) -> Result<Change, ReplaceError> {
        let turn = self.turns.of(name);
        let _turn = turn.change.lock().await;
        let known = roster::known_row(&self.store.snapshot()?, name)?;
        let known = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let state = if purge { State::Purged } else { State::Removed };
        let source = known.code.installed.clone().unwrap_or_else(|| "the config".to_owned());
        let mut change = Change::new(name.clone(), state, by.to_owned(), source);
        change.before = Some(known.as_version());
        if let Some(loaded) = self.plugins.get(name) {
            loaded.handle.leave();
            self.drain(&loaded).await;
            loaded.stop.cancel();
            loaded.handle.wake();
            let thread = self.running.lock().expect(UNHURT).as_mut().and_then(|it| it.take_plugin(name));
            if let Some(thread) = thread {
                let joined = tokio::task::spawn_blocking(move || thread.join()).await;
                if !matches!(joined, Ok(Ok(()))) {
                    tracing::error!(plugin = %name, "its thread panicked");
                }
            }
            // What it has handled last comes first.
            for _ in 0..2 {
                self.commit.write(|_| Ok(())).await?;
            }
            self.plugins.take(name);
        } else if known.standing == Standing::Removed && (!purge || known.id == PluginId(0)) {
            return Err(ReplaceError::NoPlugin(name.clone()));
        }
        self.not_loaded.lock().expect(UNHURT).remove(name);
        self.awaited.write().expect(UNHURT).remove(name);
        let (told_of, whose, now) = (change.clone(), name.clone(), self.log.now());
        self.commit
            .change(move |write, told| {
                let row = roster::row_within(write, &whose)?;
                let row = Row { standing: Standing::Removed, ..row };
                told.record(write, &change, now)?;
                if let Some(unproven) = mark::end_probation(write, row.id)? {
                    let why = "the plugin was removed before its probation was over".to_owned();
                    told.amend(write, unproven, now, |change| change.ended(state, Some(why), None))?;
                }
                if !purge {
                    return roster::put_within(write, &whose, &row);
                }
                for (place, mark) in mark::marks_within(write, row.id)? {
                    give_up(write, place, &mark)?;
                }
                retries::drop_of(write, &whose, Generation(0))?;
                dead::retract(write, &whose, 0, Generation(0))?;
                roster::purge(write, &whose, row)
            })
            .await?;
        self.interest.forget(&Party::Plugin(name.clone()));
        self.interest.forget(&Party::Fallback(name.clone()));
        Ok(told_of)
    }

    /// Waits until a plugin has handled what is in the log, or cannot.
    async fn drain(&self, loaded: &super::Loaded) {
        let (head, deadline) = (self.log.head().0, Instant::now() + DRAIN);
        loop {
            let status = loaded.handle.status();
            let waits = status.cursor < head && status.reason.is_none() && !loaded.handle.is_paused();
            if !waits || Instant::now() >= deadline || self.commit.is_closed() {
                return;
            }
            loaded.handle.wake();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// What a plugin has that was never here.
fn nothing_yet(name: &PluginName, ready: &Ready) -> Stored {
    let row = roster::entered(None, ready.code.clone());
    let cursor = crate::entry::Offset(0);
    let batch = crate::plugin::Batch::new(name.clone(), PluginId(0), row.generation, 1, cursor);
    let effects = Effects::new(batch, Timers::default(), 0);
    Stored { row, cursor, missed: None, world: World::default(), effects }
}

fn closed(error: CommitError) -> HostError {
    match error {
        CommitError::Store(error) => error.into(),
        other => HostError::Closed(other.to_string()),
    }
}
