//! Owns the changes of a plugin's code between two entries: a takeover, a rollback, and other grants for the
//! same code.
//!
//! At a takeover the actor submits the batch of the old code first. The effects of the new code's `start` begin
//! the next batch and commit together with the takeover. At a rollback the actor drops everything that is not
//! committed. One transaction reverts the committed effects, and the actor begins again with the stored data.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dim_model::beginning::Beginning;
use dim_model::entry::{Generation, Kind, Offset};
use dim_model::ident::Topic;
use dim_model::time::nanoseconds;
use dim_store::StoreError;
use dim_store::change::{Change, Pause};
use dim_store::checkpoint;
use dim_store::entry_context::SubscriptionRequest;
use dim_store::handover::{Handover, StartFailure, Succession, TakeBack, TakenOver};
use dim_store::plugin_registry::{self, Claim, Setup};
use dim_store::probation::{Probation, Rates, Verdict};
use tokio::sync::oneshot;

use super::Actor;
use super::instance_slot::refused;
use crate::event_conversion::said;
use crate::instance::{Instance, Setting};
use crate::session::{Mode, Session, SessionParts};
use crate::{Prepared, Runnable};

/// The interval at which a wait for the commit checks whether the host ends.
const LOOK: Duration = Duration::from_millis(20);

/// An order to change the code or the grants of an actor.
#[derive(Debug)]
pub enum Order {
    /// Run new code.
    Succeed(Box<Successor>),
    /// Run earlier code again.
    GoBack(Box<Rollback>),
    /// Run the same code with other grants.
    Reach(Box<OtherReach>),
}

/// The same code with other grants.
#[derive(Debug)]
pub struct OtherReach {
    /// The code that runs, with the new grants.
    pub run: Runnable,
    /// The code that runs again if that fails on probation.
    pub fallback: Option<Arc<Runnable>>,
    /// The channel for the result; false if other code runs by now.
    pub done: oneshot::Sender<bool>,
}

/// New code that takes over.
#[derive(Debug)]
pub struct Successor {
    /// The new code.
    pub run: Runnable,
    /// The source that the code follows, if it comes from a source that changes.
    pub follows: Option<String>,
    /// The plugin's settings beside the config.
    pub setup: Setup,
    /// The record of the change.
    pub change: Change,
    /// The channel for the result.
    pub done: oneshot::Sender<Succession>,
}

/// A rollback to the code before a checkpoint.
#[derive(Debug)]
pub struct Rollback {
    /// The first generation whose effects are reverted.
    pub to: Generation,
    /// The code before it.
    pub run: Runnable,
    /// The reason for the record.
    pub reason: String,
    /// The channel for the result: the new cursor and the number of entries to handle again; `None` if a
    /// rollback is no longer possible.
    pub done: oneshot::Sender<Option<(Offset, u64)>>,
}

/// The code before a takeover, which runs again if the takeover fails before it is durable.
#[derive(Debug)]
pub struct Predecessor {
    run: Runnable,
    fallback: Option<Fallback>,
    probation: Option<Probation>,
    rates: Rates,
    state_version: Option<u32>,
    by: Generation,
}

/// The code that runs again if the current code fails on probation.
#[derive(Clone, Debug)]
pub struct Fallback {
    /// The earlier code.
    pub run: Arc<Runnable>,
    /// The first generation after it.
    pub to: Generation,
}

impl Actor {
    /// Executes the pending order, once the batch of the current code is submitted.
    pub fn obey(&mut self) -> Result<(), StoreError> {
        let begun = Instant::now();
        if !self.inbox.has_order() || !self.hand_over() {
            return Ok(());
        }
        match self.inbox.take_order() {
            None => Ok(()),
            Some(Order::Succeed(successor)) => self.take_over(*successor, begun),
            Some(Order::Reach(other)) => {
                let OtherReach { run, fallback, done } = *other;
                let digest = |fallback: &Arc<Runnable>| fallback.code.digest.clone();
                let is_same = run.code.digest == self.run.code.digest
                    && fallback.as_ref().map(digest)
                        == self.watch.fallback.as_ref().map(|it| digest(&it.run));
                if is_same {
                    self.reach_other(run, fallback)?;
                }
                // The caller may have disconnected.
                let _ = done.send(is_same);
                Ok(())
            }
            Some(Order::GoBack(way)) => {
                let Rollback { to, run, reason, done } = *way;
                let before = self.cursor();
                if self.go_back(Fallback { run: Arc::new(run), to }, reason, Some(before))? {
                    let at = self.cursor();
                    let _ = done.send(Some((at, before.0.saturating_sub(at.0))));
                } else {
                    let _ = done.send(None);
                }
                Ok(())
            }
        }
    }

    fn take_over(&mut self, successor: Successor, begun: Instant) -> Result<(), StoreError> {
        let Successor { run, follows, setup, change, done } = successor;
        let dropping = Instant::now();
        self.drop_instance();
        let drop = nanoseconds(dropping.elapsed());
        let code = run.code.clone();
        let by = self.generation();
        self.see_whether_watched()?;
        let predecessor = Predecessor {
            run: self.exchange(run),
            fallback: self.watch.fallback.take(),
            probation: self.watch.probation.take(),
            rates: std::mem::take(&mut self.watch.rates),
            state_version: self.running.state_version,
            by,
        };
        self.session_mut().effects.batch.by = by.next();
        match self.start()? {
            Ok(()) => {
                self.failing.has_started();
                self.end_quarantine();
                self.keep_within_reach()?;
                self.exchange_topics(&predecessor.run.topics);
                let (instantiate, start) = self.running.start_took;
                let total = nanoseconds(begun.elapsed());
                let taken_over =
                    TakenOver { at: self.cursor(), pause: Pause { total, drop, instantiate, start } };
                self.watch_closely(&predecessor);
                let (rates, waiting) = (predecessor.rates, Mutex::new(Some(done)));
                let claim = Claim::of(&self.run.reach);
                let handover = Handover { code, follows, setup, claim, change, rates, taken_over, waiting };
                self.session_mut().effects.batch.code.handover = Some(handover);
                self.watch.predecessor = Some(predecessor);
                self.show_running();
                self.hand_over();
            }
            Err(failed) => {
                self.run_again(predecessor);
                let _ = done.send(Err(StartFailure(failed.reason)));
            }
        }
        Ok(())
    }

    /// Ends the probation if its checkpoint was dropped meanwhile.
    fn see_whether_watched(&mut self) -> Result<(), StoreError> {
        let Some(probation) = self.watch.probation else { return Ok(()) };
        let id = self.session().effects.batch.id;
        if checkpoint::of_probation(&self.session().store().snapshot()?, id)?.is_none() {
            self.watch.rates = probation.rates;
            (self.watch.probation, self.watch.fallback) = (None, None);
        }
        Ok(())
    }

    /// Puts the new code on probation. A rollback leads to the code that was confirmed last.
    fn watch_closely(&mut self, predecessor: &Predecessor) {
        let (before, fallback) = match predecessor.probation {
            // The fallback is missing if it could not be loaded.
            Some(probation) => (probation.before, predecessor.fallback.clone()),
            None => {
                let run = Arc::new(predecessor.run.clone());
                (predecessor.rates, Some(Fallback { run, to: predecessor.by.next() }))
            }
        };
        self.watch.probation = Some(Probation::new(before));
        self.watch.watched_at = self.monotonic();
        self.watch.could_run = true;
        self.watch.fallback = fallback;
    }

    fn run_again(&mut self, predecessor: Predecessor) {
        let Predecessor { run, fallback, probation, rates, state_version, by } = predecessor;
        self.exchange(run);
        self.session_mut().effects.batch.by = by;
        self.watch.fallback = fallback;
        self.watch.probation = probation;
        self.watch.rates = rates;
        self.running.state_version = state_version;
    }

    /// Exchanges the code; returns the code before.
    fn exchange(&mut self, run: Runnable) -> Runnable {
        let before = std::mem::replace(&mut self.run, run);
        self.inbox.show_code(&self.run);
        let (version, reach, limits) =
            (self.run.version().to_owned(), self.run.reach.clone(), self.run.limits);
        self.session_mut().run_as(version, reach, limits);
        before
    }

    /// Subscribes to topics that only the new manifest requests, and unsubscribes from topics that only the
    /// earlier one requested. Requests of `start` take precedence.
    fn exchange_topics(&mut self, before: &[Topic]) {
        let time = self.session().context.time();
        let now = self.run.topics.clone();
        let come = now.iter().filter(|topic| !before.contains(topic));
        let come: Vec<_> = come.map(|topic| (topic, Some(self.run.beginning(topic, time)))).collect();
        let gone = before.iter().filter(|topic| !now.contains(topic)).map(|topic| (topic, None));
        let session = self.session_mut();
        session.begin(Mode::Entry, time);
        for (topic, wanted) in come.into_iter().chain(gone) {
            let is_asked =
                session.effects.batch.requested.subscriptions.iter().any(|(asked, _)| asked == topic);
            if !is_asked && session.context.will_hear(topic) != wanted.is_some() {
                session.request_subscription(topic.clone(), SubscriptionRequest(wanted));
            }
        }
    }

    /// Exchanges the grants. Lost grants end subscriptions and follows, and the next instance starts with the
    /// new grants.
    pub(super) fn reach_other(
        &mut self,
        run: Runnable,
        fallback: Option<Arc<Runnable>>,
    ) -> Result<(), StoreError> {
        self.drop_instance();
        if let (Some(own), Some(run)) = (&mut self.watch.fallback, fallback) {
            // Grants belong to the plugin's name, so new denials apply to the earlier code, too.
            own.run = run;
        }
        let before = self.exchange(run);
        self.keep_within_reach()?;
        self.exchange_topics(&before.topics);
        self.hand_over();
        Ok(())
    }

    /// Ends subscriptions and follows that are no longer granted, and adds the plugin's own names to the context.
    fn keep_within_reach(&mut self) -> Result<(), StoreError> {
        let (plugin, log, by) = (self.plugin.clone(), self.host.log.clone(), Generation(0));
        let session = self.session_mut();
        let time = session.context.time();
        session.begin(Mode::Entry, time);
        let topics = session.context.topics_to_hear().into_iter();
        let lost: Vec<_> = topics.filter(|topic| !session.code.reach.may_subscribe(topic)).cloned().collect();
        for topic in lost {
            // The plugin must not receive such messages that are in the log already either.
            session.context.revoke(&topic);
            if session.context.will_hear(&topic) {
                session.effects.subscribe(&mut session.context, topic.clone(), SubscriptionRequest(None));
            }
            let (plugin, beginning) = (plugin.clone(), Beginning::Head);
            let (subscribed, own_too) = (false, false);
            log.append_now([Kind::Subscription { plugin, topic, subscribed, beginning, own_too, by }]);
        }
        let followed: Vec<_> = session.context.follows().keys().cloned().collect();
        for name in followed {
            if !session.may_read(&name) {
                session.effects.follow(&mut session.context, name, false);
            }
        }
        let (snapshot, own) = (session.store().snapshot()?, session.own_keys());
        session.context.add_own_names(&snapshot, own)?;
        self.sealing.context_changed = true;
        Ok(())
    }

    /// Whether there is code to roll back to.
    pub(super) fn can_go_back(&self) -> bool {
        self.watch.probation.is_some() && self.watch.fallback.is_some()
    }

    /// Records that the code on probation has failed.
    pub(super) fn note_failure(&mut self, reason: &str) {
        if self.can_go_back() {
            self.watch.failed.get_or_insert_with(|| reason.to_owned());
        }
    }

    /// Counts a handled event or command.
    pub(super) fn count(&mut self, is_rejected: bool) {
        let rates = match &mut self.watch.probation {
            Some(probation) => &mut probation.rates,
            None => &mut self.watch.rates,
        };
        rates.events += 1;
        rates.rejected += u64::from(is_rejected);
    }

    /// Adds the time since the last call to the probation, if the code could run meanwhile.
    pub(super) fn watch_on(&mut self, could_run: bool) {
        let now = self.monotonic();
        let elapsed = now.saturating_duration_since(std::mem::replace(&mut self.watch.watched_at, now));
        let elapsed = nanoseconds(elapsed);
        // A plugin that was paused at the last call could not run since.
        let could_run_since = std::mem::replace(&mut self.watch.could_run, could_run);
        if let Some(probation) = self.watch.probation.as_mut().filter(|_| could_run && could_run_since) {
            probation.watched += elapsed;
        }
    }

    /// Ends the probation if there is a verdict.
    pub(super) fn judge(&mut self) {
        let Some(probation) = self.watch.probation.filter(|_| self.watch.failed.is_none()) else { return };
        match probation.verdict(&self.watch.rules) {
            None => {}
            Some(Verdict::Fails(reason)) if self.can_go_back() => self.note_failure(&reason),
            Some(mut verdict) => {
                if let Verdict::Fails(reason) = &verdict {
                    tracing::error!(plugin = %self.plugin, "code on probation fails and cannot be rolled back: {reason}");
                    verdict = Verdict::Unproven;
                }
                tracing::info!(plugin = %self.plugin, version = self.run.version(), ?verdict, "the probation is over");
                self.watch.rates = probation.rates;
                (self.watch.probation, self.watch.fallback) = (None, None);
                self.session_mut().effects.batch.code.verdict = Some(verdict);
            }
        }
    }

    /// The time after which the probation can end without further events.
    pub(super) fn until_verdict(&self) -> Duration {
        self.watch.probation.map_or(Duration::MAX, |probation| probation.pause(&self.watch.rules))
    }

    /// Rolls back to the code before the probation, if the code on probation has failed.
    pub(super) fn give_way(&mut self) -> Result<(), StoreError> {
        let Some(reason) = self.watch.failed.take() else { return Ok(()) };
        tracing::error!(plugin = %self.plugin, version = self.run.version(), "taken back: {reason}");
        if let Some(fallback) = self.watch.fallback.clone()
            && !self.go_back(fallback, reason, None)?
        {
            // The checkpoint was dropped, so neither a rollback nor the probation can continue.
            (self.watch.probation, self.watch.fallback) = (None, None);
        }
        Ok(())
    }

    /// Rolls back to a checkpoint; returns false if that is no longer possible, and then the current code
    /// continues. Uncommitted effects are dropped, and callers continue to wait for their replies. `asked` is
    /// the plugin's cursor if the operator has requested the rollback.
    fn go_back(
        &mut self,
        fallback: Fallback,
        reason: String,
        asked: Option<Offset>,
    ) -> Result<bool, StoreError> {
        self.drop_instance();
        let mut dropped = self.session_mut().discard();
        let handover = dropped.code.handover.take();
        let (by, number, cursor) = (dropped.by, dropped.number, dropped.cursor);
        for reply in dropped.into_replies() {
            self.inbox.wait_again(reply.offset, reply.to);
        }
        if !self.wait_for_commit(number - 1)? {
            return Ok(false);
        }
        if let (Some(handover), Some(predecessor)) = (handover, self.watch.predecessor.take()) {
            self.run_again(predecessor);
            self.begin_again(number)?;
            self.keep_within_reach()?;
            handover.end(Err(StartFailure(reason)));
            return Ok(true);
        }
        let own = self.session().own_keys();
        let Fallback { run, to } = fallback;
        let session = self.session_mut();
        session.effects.batch.by = by.next();
        session.effects.batch.cursor = cursor;
        let is_verdict = asked.is_none();
        session.effects.batch.code.take_back =
            Some(TakeBack { to, is_verdict, reason, code: run.code.clone(), own });
        let batch = session.seal();
        self.host.commit.submit(batch, self.host.progress.clone());
        if !self.wait_for_commit(number)? {
            return Ok(false);
        }
        let has_gone = self.begin_again(number + 1)? == by.next();
        if has_gone {
            self.end_quarantine();
            (self.watch.probation, self.watch.fallback) = (None, None);
            self.exchange(Arc::unwrap_or_clone(run));
            // Denials from since then apply to the earlier code, too.
            self.keep_within_reach()?;
        }
        Ok(has_gone)
    }

    /// Waits until a batch is durable; returns false if it never will be.
    fn wait_for_commit(&mut self, number: u64) -> Result<bool, StoreError> {
        loop {
            let committed = self.host.progress.committed();
            self.session_mut().settle(committed)?;
            if committed >= number {
                return Ok(true);
            }
            if self.host.commit.is_closed() {
                return Ok(false);
            }
            self.inbox.mailbox.wait(LOOK);
        }
    }

    /// Begins again with the stored data; `number` is the number of the next batch.
    fn begin_again(&mut self, number: u64) -> Result<Generation, StoreError> {
        let store = self.session().store();
        let stored = plugin_registry::read(&store, &self.plugin)?
            .ok_or_else(|| StoreError::corrupt("plugins", format!("{} has no row", self.plugin)))?;
        let generation = stored.row.generation;
        self.running.state_version = stored.row.state_version;
        self.watch.rates = stored.row.rates;
        self.session_mut().begin_again(stored, number)?;
        self.buffer.clear();
        self.sealing.batch_begun = None;
        self.sealing.stored_cursor = self.cursor();
        self.sealing.stored_at = Instant::now();
        self.sealing.context_changed = false;
        self.failing.has_started();
        self.pace.ticked_at = None;
        self.attempts.tried = None;
        self.attempts.after = self.cursor();
        self.watch();
        self.show();
        Ok(generation)
    }
}

/// Runs `start` of a component on a copy of a plugin's data and drops its effects; returns the reason if it
/// fails. Blocks for at most the limit of a start.
pub fn rehearse(
    prepared: &Prepared,
    session: SessionParts,
    secret: &[u8; 32],
    config: &str,
    from_state_version: Option<u32>,
) -> Result<Result<(), StartFailure>, StoreError> {
    let setting = Setting::new(secret, &session.plugin, None);
    let mut session = Session::new(session, prepared.inspection.manifest.version.clone())?;
    let time = session.context.time();
    session.begin_start(time);
    setting.random.begin(session.effects.batch.cursor.0, u64::MAX);
    let started = match Instance::new(prepared, session, &setting) {
        Ok(mut instance) => instance.start(config, from_state_version),
        Err(failed) => Err(failed.1),
    };
    match started {
        Ok(started) => Ok(started.map_err(|reason| StartFailure(said(reason)))),
        Err(error) => Ok(refused(error)?.map_err(|trap| StartFailure(trap.reason))),
    }
}
