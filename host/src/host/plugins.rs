//! Owns which plugins run: loads those of the config, and those that were installed, at a start.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt as _;

use super::candidate::{Candidate, Readied};
use super::following::follow;
use super::judging::broke_down;
use super::loader::{ToRun, Wired};
use super::start::cores;
use super::{Host, HostError, UNHURT};
use crate::change::{Change, State};
use crate::commit::CommitError;
use crate::entry::Offset;
use crate::ident::PluginName;
use crate::plugin::roster::{self, Claim, Row, Setup};
use crate::store::StoreError;

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
        self.looks.want();
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
        let (engine, config, id) = (self.loader.engine.clone(), self.config.now(), self.id.clone());
        let store = self.store.clone();
        let permit = self.compiling.acquire().await.expect("it is never closed");
        let readied = tokio::task::spawn_blocking(move || candidate.readied(&engine, &config, &id, &store));
        let readied = readied.await;
        drop(permit);
        let Readied { candidate, ready, fallback } = match readied {
            Ok(readied) => readied,
            Err(error) => {
                self.not_load(name, broke_down(error).to_string());
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
                match candidate.has_component() {
                    true => self.not_load(name, reason),
                    // What was announced under its name comes from the folder.
                    false => self.tell_not_loaded(name, reason),
                }
                return Ok(());
            }
        };
        let ready = &to_run.ready;
        let reach = &ready.allowance.reach;
        let (held, made) = match self.claim(&name, reach) {
            Ok(held) => (Some(held), self.make_keys(reach).await),
            Err(refused) => (None, Err(refused)),
        };
        if let Err(error) = made {
            self.not_load(name, crate::cause::chain(&error));
            return Ok(());
        }
        let known = roster::known_row(&self.store.snapshot()?, &name)?;
        let is_new = known.is_none();
        let code = roster::Code {
            installed: candidate.installed.then(|| ready.source.clone()),
            ..ready.code.clone()
        };
        let mut row = Row { claim: Claim::of(reach), ..roster::entered(known.clone(), code) };
        if !candidate.installed {
            // The config names whose code it is.
            let signer = ready.prepared.inspection.signer.as_ref();
            row.setup = Setup { signer: signer.cloned(), ..row.setup.of(signer) };
        }
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
            match is_new {
                true => self.enter_from_start(&name, row).await.map_err(closed)?,
                false => self.enter(&name, row, change).await.map_err(closed)?,
            }
        }
        self.run(name, to_run).await?;
        if let Some(held) = held {
            held.runs();
        }
        Ok(())
    }

    /// Goes on without a plugin.
    fn not_load(&self, name: PluginName, reason: String) {
        self.loader.withdraw(&name);
        self.tell_not_loaded(name, reason);
    }

    fn tell_not_loaded(&self, name: PluginName, reason: String) {
        tracing::error!(plugin = %name, "not loaded: {reason}");
        self.not_loaded.lock().expect(UNHURT).insert(name, reason);
    }

    /// Writes the row of a plugin that was never here and comes with a start: it reads what came since then.
    async fn enter_from_start(&self, name: &PluginName, row: Row) -> Result<(), CommitError> {
        let (name, from) = (name.clone(), self.start_of_intake()?);
        self.commit.write(move |write| roster::enter(write, &name, row, from)).await
    }

    /// The first entry of this host's intake; what is trimmed already cannot be read any more.
    fn start_of_intake(&self) -> Result<Offset, StoreError> {
        let (from, first) = (self.loader.from, self.store.log_start()?);
        Ok(first.map_or(from, |first| first.max(from)))
    }

    /// Writes the row of a plugin that is about to run, and puts on record that its code is another one.
    pub(super) async fn enter(
        &self,
        name: &PluginName,
        row: Row,
        change: Option<Change>,
    ) -> Result<(), CommitError> {
        let head = match self.loader.is_announced(name) {
            true => self.start_of_intake()?,
            false => self.log.head(),
        };
        let name = name.clone();
        match change {
            Some(change) => {
                let now = self.log.now();
                self.commit.record(change, now, move |write| roster::enter(write, &name, row, head)).await
            }
            None => self.commit.write(move |write| roster::enter(write, &name, row, head)).await,
        }
    }

    /// Wires a plugin that is in the roster, and starts its thread.
    pub(super) async fn run(self: &Arc<Self>, name: PluginName, to_run: ToRun) -> Result<(), HostError> {
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
}

fn closed(error: CommitError) -> HostError {
    match error {
        CommitError::Store(error) => error.into(),
        other => HostError::Closed(other.to_string()),
    }
}
