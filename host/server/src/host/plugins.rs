//! Owns the loading of plugins at a start. It receives the candidates of the config and the store, and starts an
//! actor for each plugin that can be loaded.

use std::collections::BTreeSet;
use std::sync::Arc;

use dim_model::entry::Offset;
use dim_model::ident::PluginName;
use dim_store::StoreError;
use dim_store::change::{Change, State};
use dim_store::commit::CommitError;
use dim_store::plugin_registry::{self, Claim, Row, Setup};
use futures::StreamExt as _;

use super::assessment::broke_down;
use super::candidate::{Candidate, Readied};
use super::loader::{ToRun, Wired};
use super::start::cores;
use super::updates::follow;
use super::{Host, HostError, UNHURT};

impl Host {
    /// Loads the plugins of the config and the installed plugins, each as soon as it is ready. Returns once all are
    /// loaded or refused. A plugin that cannot be loaded does not stop the others.
    pub async fn load(self: &Arc<Self>) -> Result<(), HostError> {
        let candidates = std::mem::take(&mut *self.deployment.candidates.lock().expect(UNHURT));
        let engine = self.deployment.loader.engine.clone();
        let sorted = tokio::task::spawn_blocking(move || {
            // Plugins with a compiled form must not wait for compilations.
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
                self.deployment.loading.send_modify(|loading| {
                    loading.remove(&name);
                });
                loaded
            })
            .buffer_unordered(cores());
        while let Some(loaded) = loads.next().await {
            loaded?;
        }
        let _ = self.deployment.loaded_after.set(self.life.begun.elapsed());
        self.exchange.links.checked_names.want();
        self.tidy().await?;
        if let Some(running) = self.life.running.lock().expect(UNHURT).as_ref() {
            running.spawn_task(follow(Arc::downgrade(self)));
        }
        Ok(())
    }

    /// Returns the plugins that are not loaded yet.
    pub fn loading(&self) -> BTreeSet<PluginName> {
        self.deployment.loading.borrow().clone()
    }

    /// Waits until a plugin is loaded or refused.
    pub async fn loaded(&self, name: &str) {
        let mut loading = self.deployment.loading.subscribe();
        let is_done = |loading: &BTreeSet<PluginName>| !loading.iter().any(|it| it.as_str() == name);
        self.unless_ended(loading.wait_for(is_done)).await;
    }

    /// Waits for a future, or for the end of the host.
    async fn unless_ended(&self, awaited: impl Future) {
        tokio::select! {
            biased;
            () = self.life.ended.cancelled() => {}
            _ = awaited => {}
        }
    }

    /// Waits until all plugins are loaded or refused.
    pub async fn all_loaded(&self) {
        let mut loading = self.deployment.loading.subscribe();
        self.unless_ended(loading.wait_for(BTreeSet::is_empty)).await;
    }

    async fn load_one(self: &Arc<Self>, candidate: Candidate) -> Result<(), HostError> {
        let name = candidate.name.clone();
        let (engine, config, id) =
            (self.deployment.loader.engine.clone(), self.config.now(), self.id.clone());
        let store = self.storage.store.clone();
        let permit = self.deployment.compiling.acquire().await.expect("it is never closed");
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
            // The new code counts as failed on probation.
            (Err(error), Some(before)) => {
                ToRun { ready: before.clone(), fallback: Some(before), failed: Some(error.to_string()) }
            }
            (Err(error), None) => {
                let reason = error.to_string();
                match candidate.has_component() {
                    true => self.not_load(name, reason),
                    // The announcement under this name can belong to a plugin of the folder.
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
            self.not_load(name, dim_model::error_chain::chain(&error));
            return Ok(());
        }
        let known = plugin_registry::known_row(&self.storage.store.snapshot()?, &name)?;
        let is_new = known.is_none();
        let code = plugin_registry::Code {
            installed: candidate.installed.then(|| ready.source.clone()),
            ..ready.code.clone()
        };
        let mut row = Row { claim: Claim::of(reach), ..plugin_registry::entered(known.clone(), code) };
        if !candidate.installed {
            // The config names the component, so the grants are bound to its signer.
            let signer = ready.prepared.inspection.signer.as_ref();
            row.setup = Setup { signer: signer.cloned(), ..row.setup.of(signer) };
        }
        // The disk may be full, so an unchanged row is not written again.
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

    /// Continues without a plugin, and removes its announcement.
    fn not_load(&self, name: PluginName, reason: String) {
        self.deployment.loader.withdraw(&name);
        self.tell_not_loaded(name, reason);
    }

    fn tell_not_loaded(&self, name: PluginName, reason: String) {
        tracing::error!(plugin = %name, "not loaded: {reason}");
        self.deployment.not_loaded.lock().expect(UNHURT).insert(name, reason);
    }

    /// Writes the row of a plugin that is new at this start, with a cursor at the start of the intake.
    async fn enter_from_start(&self, name: &PluginName, row: Row) -> Result<(), CommitError> {
        let (name, from) = (name.clone(), self.start_of_intake()?);
        self.storage.commit.write(move |write| plugin_registry::enter(write, &name, row, from)).await
    }

    /// Returns the first entry of this host's intake that is still in the log.
    fn start_of_intake(&self) -> Result<Offset, StoreError> {
        let (from, first) = (self.deployment.loader.from, self.storage.store.log_start()?);
        Ok(first.map_or(from, |first| first.max(from)))
    }

    /// Writes the row of a plugin that is about to run, and records the change of its code.
    pub(super) async fn enter(
        &self,
        name: &PluginName,
        row: Row,
        change: Option<Change>,
    ) -> Result<(), CommitError> {
        let head = match self.deployment.loader.is_announced(name) {
            true => self.start_of_intake()?,
            false => self.storage.log.head(),
        };
        let name = name.clone();
        match change {
            Some(change) => {
                let now = self.storage.log.now();
                self.storage
                    .commit
                    .record(change, now, move |write| plugin_registry::enter(write, &name, row, head))
                    .await
            }
            None => {
                self.storage.commit.write(move |write| plugin_registry::enter(write, &name, row, head)).await
            }
        }
    }

    /// Wires a plugin that is in the plugin registry, and starts its thread.
    pub(super) async fn run(self: &Arc<Self>, name: PluginName, to_run: ToRun) -> Result<(), HostError> {
        let (loader, whose) = (self.deployment.loader.clone(), name.clone());
        let wired = tokio::task::spawn_blocking(move || -> Result<Wired, HostError> {
            let stored = plugin_registry::read(&loader.storage.store, &whose)?;
            let stored = stored.ok_or_else(|| StoreError::corrupt("plugins", "an entered one is gone"))?;
            loader.wire(&whose, stored, to_run)
        });
        let Wired { actor, mut loaded } = wired.await.expect("wiring does not panic")?;
        let mut running = self.life.running.lock().expect(UNHURT);
        // The host may have ended meanwhile.
        let Some(running) = running.as_mut() else { return Ok(()) };
        let stop = running.plugin_stop();
        loaded.stop = stop.clone();
        self.plugins.put(name.clone(), Arc::new(loaded));
        running.spawn_plugin(&name, actor, stop, self.life.fail.clone())
    }
}

fn closed(error: CommitError) -> HostError {
    match error {
        CommitError::Store(error) => error.into(),
        other => HostError::Closed(other.to_string()),
    }
}
