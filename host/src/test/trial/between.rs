//! Owns what comes between entries: crashes, and other code that takes over.

use std::collections::BTreeSet;

use tokio::sync::oneshot;

use super::Trial;
use crate::change::{Change, State};
use crate::entry::Offset;
use crate::host::Ready;
use crate::plugin::roster::Setup;
use crate::plugin::{Order, Successor};
use crate::test::TestError;

/// What comes between the entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Between {
    /// Nothing.
    Nothing,
    /// The host crashes before an entry is committed, and once more after it is: around the entries of these numbers,
    /// or around all.
    Crash(Option<BTreeSet<u64>>),
    /// The plugin is replaced by itself: after the entries of these numbers, or after all.
    Replace(Option<BTreeSet<u64>>),
}

impl Trial {
    /// Does something that a plugin reacts to, and what is to come between entries.
    pub(super) fn with_interruption(
        &mut self,
        does: impl FnOnce(&mut Self) -> Result<(), TestError>,
    ) -> Result<(), TestError> {
        self.places += 1;
        let place = self.places;
        let is_place = |places: &Option<BTreeSet<u64>>| places.as_ref().is_none_or(|it| it.contains(&place));
        match &self.between {
            Between::Crash(places) if is_place(places) => {
                self.commit()?;
                self.holds = true;
                let done = does(self);
                self.holds = false;
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

    /// Ends the plugin, and whatever is not committed, and goes on from what is: as after `kill -9`.
    fn crash(&mut self) -> Result<(), TestError> {
        // What came from outside is in the log before it is handled.
        self.wiring.loader.commit.run_once(&self.ground.store, &self.wiring.loader.log)?;
        self.restart()?;
        self.go_on()
    }

    pub(super) fn succeed(&mut self, ready: Ready) -> Result<(), TestError> {
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
            Ok(Err(reason)) => return Err(TestError::DoesNotStart(reason)),
            Err(_) => return Err(TestError::DoesNotStart("it has not taken over".to_owned())),
        }
        self.ready = ready;
        self.wiring.actor.confirm();
        self.go_on()?;
        self.commit()?;
        self.ground.settle_for_good()
    }

    /// Begins again from what is in the store.
    pub(super) fn restart(&mut self) -> Result<(), TestError> {
        self.happened.truncate(self.committed);
        self.uncommitted = 0;
        self.wiring = self.ground.wire(&self.ready)?;
        let waiting: Vec<u64> = self.replies.keys().copied().collect();
        for offset in waiting {
            self.replies.insert(offset, self.wiring.handle.reply_of(Offset(offset)));
        }
        Ok(())
    }
}
