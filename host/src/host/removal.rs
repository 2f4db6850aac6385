//! Owns how plugins rest and go while the host runs.

use std::time::{Duration, Instant};

use super::replacement::ReplaceError;
use super::{Host, Loaded, UNHURT};
use crate::change::{Change, State};
use crate::commit::give_up;
use crate::entry::Generation;
use crate::ident::PluginName;
use crate::interest::Party;
use crate::plugin::mark;
use crate::plugin::roster::{self, Row, Standing};
use crate::store::{PluginId, dead, retries};

/// How long a plugin that is removed may take to handle what has come by then.
const DRAIN: Duration = Duration::from_secs(30);

impl Host {
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
        let is_quarantined = loaded.handle.is_quarantined() && !paused;
        if loaded.handle.is_paused() == paused && !is_quarantined {
            return Ok(change);
        }
        let told = change.clone();
        let whose = name.clone();
        self.commit
            .record(change, self.log.now(), move |write| {
                let row = roster::row_within(write, &whose)?;
                let quarantine = row.quarantine.filter(|_| paused);
                roster::put_within(write, &whose, &Row { standing, quarantine, ..row })
            })
            .await?;
        loaded.handle.pause(paused);
        Ok(told)
    }

    /// Unloads a plugin once it has handled what has come by then; what it has is kept, or purged.
    pub async fn remove(&self, name: &PluginName, purge: bool, by: &str) -> Result<Change, ReplaceError> {
        let turn = self.turns.of(name);
        // Behind what came before it, or that would come back.
        let _place = turn.line.lock().await;
        let _turn = turn.change.lock().await;
        let known = roster::known_row(&self.store.snapshot()?, name)?;
        let known = known.ok_or_else(|| ReplaceError::NoPlugin(name.clone()))?;
        let state = if purge { State::Purged } else { State::Removed };
        let mut change = Change::new(name.clone(), state, by.to_owned(), known.code.source());
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
            // What it has handled last comes first; a large batch may let others go before it.
            loop {
                self.commit.write(|_| Ok(())).await?;
                if !self.commit.has_batch_of(name) {
                    break;
                }
            }
            self.commit.write(|_| Ok(())).await?;
            self.keep_claim(name);
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
                let row = Row { standing: Standing::Removed, pending: None, ..row };
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
        self.claims.forget(name);
        self.interest.forget(&Party::Plugin(name.clone()));
        self.interest.forget(&Party::Fallback(name.clone()));
        Ok(told_of)
    }

    /// Waits until a plugin has handled what is in the log, or cannot.
    async fn drain(&self, loaded: &Loaded) {
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
