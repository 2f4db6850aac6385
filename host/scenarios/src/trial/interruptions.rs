//! Owns the interruptions between entries: crashes and replacements. Receives an action on the trial; runs it with the
//! interruption that is due.

use std::collections::BTreeSet;

use dim_model::entry::Offset;
use dim_runtime::{Order, Successor};
use dim_server::host::Ready;
use dim_store::change::{Change, State};
use dim_store::plugin_registry::Setup;
use tokio::sync::oneshot;

use super::Trial;
use crate::TrialError;

/// The interruptions between entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Between {
    /// No interruptions.
    Nothing,
    /// The host crashes before an entry is committed, and again after its commit. None means all entries, else the
    /// entries with these numbers, from 1.
    Crash(Option<BTreeSet<u64>>),
    /// The plugin is replaced by itself after an entry. None means all entries, else the entries with these numbers,
    /// from 1.
    Replace(Option<BTreeSet<u64>>),
}

impl Trial {
    /// Performs an action that the plugin reacts to, with the interruption that is set for this entry.
    pub(super) fn with_interruption(
        &mut self,
        does: impl FnOnce(&mut Self) -> Result<(), TrialError>,
    ) -> Result<(), TrialError> {
        self.places += 1;
        let place = self.places;
        let is_place = |places: &Option<BTreeSet<u64>>| places.as_ref().is_none_or(|it| it.contains(&place));
        match &self.between {
            Between::Crash(places) if is_place(places) => {
                self.commit()?;
                self.commits.holds = true;
                let done = does(self);
                self.commits.holds = false;
                done?;
                self.crash()?;
                self.commit()?;
                self.crash()
            }
            Between::Replace(places) if is_place(places) => {
                does(self)?;
                self.succeed(self.ready.clone())
            }
            _ => does(self),
        }
    }

    /// Drops the plugin and everything uncommitted, and continues from the committed data, as after `kill -9`.
    fn crash(&mut self) -> Result<(), TrialError> {
        // Entries from outside are in the log before the plugin handles them, so a crash does not lose them.
        self.wiring.loader.storage.commit.run_once(&self.ground.store, &self.wiring.loader.storage.log)?;
        self.restart()?;
        self.go_on()
    }

    pub(super) fn succeed(&mut self, ready: Ready) -> Result<(), TrialError> {
        self.make_ready()?;
        self.commit()?;
        let (done, mut result) = oneshot::channel();
        let test = || "this test".to_owned();
        let successor = Successor {
            run: ready.clone().into_runnable(),
            follows: None,
            setup: Setup::default(),
            change: Change::new(self.ground.plugin.clone(), State::TakingOver, test(), test()),
            done,
        };
        self.wiring.handle.order(Order::Succeed(Box::new(successor)));
        self.wiring.actor.obey()?;
        self.commit()?;
        match result.try_recv() {
            Ok(Ok(_)) => {}
            Ok(Err(reason)) => return Err(TrialError::DoesNotStart(reason.0)),
            Err(_) => return Err(TrialError::DoesNotStart("the new code has not taken over".to_owned())),
        }
        self.ready = ready;
        self.wiring.actor.confirm();
        self.go_on()?;
        self.commit()?;
        self.ground.settle_for_good()
    }

    /// Creates the actor again from the committed data.
    pub(super) fn restart(&mut self) -> Result<(), TrialError> {
        self.happened.truncate(self.commits.committed);
        self.commits.uncommitted = 0;
        self.wiring = self.ground.wire(&self.ready)?;
        let waiting: Vec<u64> = self.replies.keys().copied().collect();
        for offset in waiting {
            self.replies.insert(offset, self.wiring.handle.reply_of(Offset(offset)));
        }
        Ok(())
    }
}
