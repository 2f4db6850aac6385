//! Owns the pause and the removal of plugins while the host runs. It receives an order and returns the recorded
//! change.

use std::time::{Duration, Instant};

use dim_model::entry::Generation;
use dim_model::ident::PluginName;
use dim_store::change::{Change, State};
use dim_store::checkpoint;
use dim_store::commit::give_up;
use dim_store::interest::Subscriber;
use dim_store::plugin_registry::{self, Row, Standing};
use dim_store::{PluginId, catch_ups, dead_letters, retry_rows};

use super::replacement::ReplaceError;
use super::{Host, Loaded, UNHURT};

/// The maximum time for a plugin under removal to handle the entries that are in the log.
const DRAIN: Duration = Duration::from_secs(30);

impl Host {
    /// Pauses a plugin from the next entry on, or resumes it. The state survives a restart of the host. Entries wait
    /// meanwhile. Resuming also ends a quarantine.
    pub async fn pause(&self, name: &PluginName, paused: bool, by: &str) -> Result<Change, ReplaceError> {
        let turn = self.deployment.turns.of(name);
        let _turn = turn.change.lock().await;
        let loaded = self.plugins.get(name).ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let (state, standing) = match paused {
            true => (State::Paused, Standing::Paused),
            false => (State::Resumed, Standing::Runs),
        };
        let code = loaded.handle.code();
        let mut change = Change::new(name.clone(), state, by.to_owned(), code.source.clone());
        change.after = Some(loaded.version());
        let is_quarantined = loaded.handle.is_quarantined() && !paused;
        if loaded.handle.is_paused() == paused && !is_quarantined {
            return Ok(change);
        }
        let told = change.clone();
        let whose = name.clone();
        self.storage
            .commit
            .record(change, self.storage.log.now(), move |write| {
                let row = plugin_registry::row_within(write, &whose)?;
                let quarantine = row.quarantine.filter(|_| paused);
                plugin_registry::put_within(write, &whose, &Row { standing, quarantine, ..row })
            })
            .await?;
        loaded.handle.pause(paused);
        Ok(told)
    }

    /// Unloads a plugin after it has handled the entries that are in the log now. Its state is kept, or purged if
    /// `purge` is true.
    pub async fn remove(&self, name: &PluginName, purge: bool, by: &str) -> Result<Change, ReplaceError> {
        let turn = self.deployment.turns.of(name);
        // A component that is in the line would install the plugin again, so the removal waits for it.
        let _place = turn.line.lock().await;
        let _turn = turn.change.lock().await;
        let known = plugin_registry::known_row(&self.storage.store.snapshot()?, name)?;
        let known = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let state = if purge { State::Purged } else { State::Removed };
        let mut change = Change::new(name.clone(), state, by.to_owned(), known.code.source());
        change.before = Some(known.as_version());
        if let Some(loaded) = self.plugins.get(name) {
            loaded.handle.leave();
            self.drain(&loaded).await;
            loaded.stop.cancel();
            loaded.handle.wake();
            let thread = self.life.running.lock().expect(UNHURT).as_mut().and_then(|it| it.take_plugin(name));
            if let Some(thread) = thread {
                let joined = tokio::task::spawn_blocking(move || thread.join()).await;
                if !matches!(joined, Ok(Ok(()))) {
                    tracing::error!(plugin = %name, "its thread panicked");
                }
            }
            // The last batch of the plugin must be committed first. Other batches may precede a large one.
            loop {
                self.storage.commit.write(|_| Ok(())).await?;
                if !self.storage.commit.has_batch_of(name) {
                    break;
                }
            }
            self.storage.commit.write(|_| Ok(())).await?;
            self.keep_claim(name);
            self.plugins.take(name);
        } else if known.standing == Standing::Removed && (!purge || known.id == PluginId(0)) {
            return Err(ReplaceError::NoPlugin(name.clone()));
        }
        self.deployment.not_loaded.lock().expect(UNHURT).remove(name);
        self.deployment.awaited.write().expect(UNHURT).remove(name);
        let (told_of, whose, now) = (change.clone(), name.clone(), self.storage.log.now());
        self.storage
            .commit
            .change(move |write, told| {
                let row = plugin_registry::row_within(write, &whose)?;
                let row = Row { standing: Standing::Removed, pending: None, ..row };
                told.record(write, &change, now)?;
                if let Some(unproven) = checkpoint::end_probation(write, row.id)? {
                    let why = "the plugin was removed before its probation was over".to_owned();
                    told.amend(write, unproven, now, |change| change.ended(state, Some(why), None))?;
                }
                catch_ups::forget_plugin(write, &whose)?;
                if !purge {
                    return plugin_registry::put_within(write, &whose, &row);
                }
                for (place, checkpoint) in checkpoint::checkpoints_within(write, row.id)? {
                    give_up(write, place, &checkpoint)?;
                }
                retry_rows::drop_of(write, &whose, Generation(0))?;
                dead_letters::retract(write, &whose, 0, Generation(0))?;
                plugin_registry::purge(write, &whose, row)
            })
            .await?;
        self.storage.commit.catch_ups.notify_one();
        self.deployment.claims.forget(name);
        self.exchange.links.interest.forget(&Subscriber::Plugin(name.clone()));
        self.exchange.links.interest.forget(&Subscriber::Fallback(name.clone()));
        Ok(told_of)
    }

    /// Waits until a plugin has handled the entries that are in the log, or cannot handle them.
    async fn drain(&self, loaded: &Loaded) {
        let (head, deadline) = (self.storage.log.head().0, Instant::now() + DRAIN);
        loop {
            let status = loaded.handle.status();
            let waits = status.cursor < head && status.reason.is_none() && !loaded.handle.is_paused();
            if !waits || Instant::now() >= deadline || self.storage.commit.is_closed() {
                return;
            }
            loaded.handle.wake();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
