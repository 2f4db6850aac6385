//! Owns the moments at which other code goes on: a successor, or what ran before. Both lie between two
//! entries, with everything that the plugin has.
//!
//! The batch of the old code is closed; what a successor's `start` asks for begins the next one, and both
//! become real, or neither does. On the way back what was not committed is dropped, one transaction puts back
//! what was committed, and the actor begins again with what is in the store.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Actor;
use super::body::refused;
use crate::change::{Change, Pause};
use crate::entry::{Generation, Kind, Offset};
use crate::ident::{IpnsName, KeyName, Topic};
use crate::plugin::event::said;
use crate::plugin::instance::{Instance, Setting};
use crate::plugin::mark;
use crate::plugin::probation::{Probation, Rates, Verdict};
use crate::plugin::roster::{self, Claim, Code, Setup};
use crate::plugin::session::{Mode, Session, SessionParts};
use crate::plugin::{Prepared, Runnable};
use crate::store::StoreError;
use crate::time::nanoseconds;

/// How long it is waited for the commit before it is looked again whether the host ends.
const LOOK: Duration = Duration::from_millis(20);

/// What an actor is told to run in place of what it runs.
#[derive(Debug)]
pub enum Order {
    /// New code.
    Succeed(Box<Successor>),
    /// What ran before.
    GoBack(Box<WayBack>),
    /// The same code, with other grants.
    Reach(Box<OtherReach>),
}

/// What runs, with other grants.
#[derive(Debug)]
pub struct OtherReach {
    /// What runs.
    pub run: Runnable,
    /// What runs again if that fails on probation.
    pub fallback: Option<Arc<Runnable>>,
    /// Who waits is told whether it has them: other code may run by then.
    pub done: oneshot::Sender<bool>,
}

/// Code that takes over from what runs.
#[derive(Debug)]
pub struct Successor {
    /// What runs from then on.
    pub run: Runnable,
    /// What it follows, if it comes from somewhere that changes.
    pub follows: Option<String>,
    /// What the plugin is given beside what the config says.
    pub setup: Setup,
    /// What is told of it.
    pub change: Change,
    /// Who waits to hear how it went.
    pub done: oneshot::Sender<Succession>,
}

/// How it went: what is durable, or why the old code goes on.
pub type Succession = Result<TakenOver, String>;

/// Other code has taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenOver {
    /// The first entry that it handles.
    pub at: Offset,
    /// How long the plugin handled nothing.
    pub pause: Pause,
}

/// The way back to what ran before a mark.
#[derive(Debug)]
pub struct WayBack {
    /// The first code whose work is taken back.
    pub to: Generation,
    /// What ran before it.
    pub run: Runnable,
    /// Why.
    pub reason: String,
    /// Who waits to hear that it is done: from which entry on, and how many are handled again; none if there is
    /// no way back any more.
    pub done: oneshot::Sender<Option<(Offset, u64)>>,
}

/// What a batch says of the code that takes over with it.
#[derive(Debug)]
pub struct Handover {
    /// What the store says of it.
    pub code: Code,
    /// What it follows, if it comes from somewhere that changes.
    pub follows: Option<String>,
    /// What the plugin is given beside what the config says.
    pub setup: Setup,
    /// The keys that are its own.
    pub claim: Claim,
    /// What is told of it.
    pub change: Change,
    /// What the code before it has handled.
    pub rates: Rates,
    /// What becomes durable.
    pub taken_over: TakenOver,
    told: Mutex<Option<oneshot::Sender<Succession>>>,
}

impl Handover {
    /// Tells who waits that it is durable.
    pub fn tell(&self) {
        self.end(Ok(self.taken_over));
    }

    fn end(&self, succession: Succession) {
        if let Some(done) = self.told.lock().expect("no one panics while holding it").take() {
            // Whoever asked may have gone away.
            let _ = done.send(succession);
        }
    }
}

/// What a batch says of the way back to a mark.
#[derive(Debug)]
pub struct TakeBack {
    /// The first code whose work is taken back.
    pub to: Generation,
    /// Whether the code has failed on probation, rather than that an operator wants it.
    pub is_verdict: bool,
    /// Why.
    pub reason: String,
    /// What the store says from then on of what runs.
    pub code: Code,
    /// The plugin's own keys and their names.
    pub own: Vec<(KeyName, IpnsName)>,
}

/// What runs again if a successor fails before it is durable that it has taken over.
#[derive(Debug)]
pub struct Predecessor {
    run: Runnable,
    fallback: Option<Fallback>,
    probation: Option<Probation>,
    rates: Rates,
    state_version: Option<u32>,
    by: Generation,
}

/// What runs again if the code fails on probation.
#[derive(Clone, Debug)]
pub struct Fallback {
    /// What ran before.
    pub run: Arc<Runnable>,
    /// The first code since then.
    pub to: Generation,
}

impl Actor {
    /// Does what it is told, if it is told anything and the old code's batch is with the commit.
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
                    && fallback.as_ref().map(digest) == self.fallback.as_ref().map(|it| digest(&it.run));
                if is_same {
                    self.reach_other(run, fallback)?;
                }
                // Whoever asked may have gone away.
                let _ = done.send(is_same);
                Ok(())
            }
            Some(Order::GoBack(way)) => {
                let WayBack { to, run, reason, done } = *way;
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
            fallback: self.fallback.take(),
            probation: self.probation.take(),
            rates: std::mem::take(&mut self.rates),
            state_version: self.state_version,
            by,
        };
        self.session_mut().effects.batch.by = by.next();
        match self.start()? {
            Ok(()) => {
                self.failing.has_started();
                self.end_quarantine();
                self.keep_within_reach()?;
                self.exchange_topics(&predecessor.run.topics);
                let (instantiate, start) = self.start_took;
                let total = nanoseconds(begun.elapsed());
                let taken_over =
                    TakenOver { at: self.cursor(), pause: Pause { total, drop, instantiate, start } };
                self.watch_closely(&predecessor);
                let (rates, told) = (predecessor.rates, Mutex::new(Some(done)));
                let claim = Claim::of(&self.run.reach);
                let handover = Handover { code, follows, setup, claim, change, rates, taken_over, told };
                self.session_mut().effects.batch.handover = Some(handover);
                self.predecessor = Some(predecessor);
                self.show_running();
                self.hand_over();
            }
            Err(failed) => {
                self.run_again(predecessor);
                let _ = done.send(Err(failed.reason));
            }
        }
        Ok(())
    }

    /// Ends the probation if its mark was given up meanwhile.
    fn see_whether_watched(&mut self) -> Result<(), StoreError> {
        let Some(probation) = self.probation else { return Ok(()) };
        let id = self.session().effects.batch.id;
        if mark::of_probation(&self.session().store().snapshot()?, id)?.is_none() {
            self.rates = probation.rates;
            (self.probation, self.fallback) = (None, None);
        }
        Ok(())
    }

    /// Puts the successor on probation. The way back leads to the code that was confirmed last.
    fn watch_closely(&mut self, predecessor: &Predecessor) {
        let (before, fallback) = match predecessor.probation {
            // There is none if it could not be loaded.
            Some(probation) => (probation.before, predecessor.fallback.clone()),
            None => {
                let run = Arc::new(predecessor.run.clone());
                (predecessor.rates, Some(Fallback { run, to: predecessor.by.next() }))
            }
        };
        self.probation = Some(Probation::new(before));
        self.watched_at = Instant::now();
        self.fallback = fallback;
    }

    fn run_again(&mut self, predecessor: Predecessor) {
        let Predecessor { run, fallback, probation, rates, state_version, by } = predecessor;
        self.exchange(run);
        self.session_mut().effects.batch.by = by;
        self.fallback = fallback;
        self.probation = probation;
        self.rates = rates;
        self.state_version = state_version;
    }

    /// Runs other code from now on; returns what ran.
    fn exchange(&mut self, run: Runnable) -> Runnable {
        let before = std::mem::replace(&mut self.run, run);
        self.inbox.show_code(&self.run);
        let (version, reach, limits) =
            (self.run.version().to_owned(), self.run.reach.clone(), self.run.limits);
        self.session_mut().run_as(version, reach, limits);
        before
    }

    /// Subscribes to what the manifest asks for and the one before it did not, and ends what only that one
    /// asked for. What `start` has asked for counts for more.
    fn exchange_topics(&mut self, before: &[Topic]) {
        let now = self.run.topics.clone();
        let session = self.session_mut();
        let time = session.world.time();
        session.begin(Mode::Entry, time);
        let come = now.iter().filter(|topic| !before.contains(topic)).map(|topic| (topic, true));
        let gone = before.iter().filter(|topic| !now.contains(topic)).map(|topic| (topic, false));
        for (topic, wanted) in come.chain(gone) {
            let is_asked = session.effects.batch.subscriptions.iter().any(|(asked, _)| asked == topic);
            if !is_asked && session.world.will_hear(topic) != wanted {
                session.effects.subscribe(&mut session.world, topic.clone(), wanted);
            }
        }
    }

    /// Goes on with other grants: what is lost ends, and an instance is started that knows of what is gained.
    pub(super) fn reach_other(
        &mut self,
        run: Runnable,
        fallback: Option<Arc<Runnable>>,
    ) -> Result<(), StoreError> {
        self.drop_instance();
        if let (Some(own), Some(run)) = (&mut self.fallback, fallback) {
            // Grants go with the plugin's name: what is denied now is denied to what ran before, too.
            own.run = run;
        }
        let before = self.exchange(run);
        self.keep_within_reach()?;
        self.exchange_topics(&before.topics);
        self.hand_over();
        Ok(())
    }

    /// Ends what the plugin has and is not granted any more, and has it know its own names.
    fn keep_within_reach(&mut self) -> Result<(), StoreError> {
        let (plugin, log, by) = (self.plugin.clone(), self.log.clone(), Generation(0));
        let session = self.session_mut();
        let time = session.world.time();
        session.begin(Mode::Entry, time);
        let topics = session.world.topics_to_hear().into_iter();
        let lost: Vec<_> = topics.filter(|topic| !session.reach.may_subscribe(topic)).cloned().collect();
        for topic in lost {
            // What is in the log already is not for it either.
            session.world.revoke(&topic);
            if session.world.will_hear(&topic) {
                session.effects.subscribe(&mut session.world, topic.clone(), false);
            }
            log.append_now([Kind::Subscription { plugin: plugin.clone(), topic, subscribed: false, by }]);
        }
        let followed: Vec<_> = session.world.follows().keys().cloned().collect();
        for name in followed {
            if !session.may_read(&name) {
                session.effects.follow(&mut session.world, name, false);
            }
        }
        let (snapshot, own) = (session.store().snapshot()?, session.own_keys());
        session.world.add_own_names(&snapshot, own)?;
        self.world_changed = true;
        Ok(())
    }

    /// Whether there is code that can go on in place of this one.
    pub(super) fn can_go_back(&self) -> bool {
        self.probation.is_some() && self.fallback.is_some()
    }

    /// Notes that the code on probation has failed.
    pub(super) fn note_failure(&mut self, reason: &str) {
        if self.can_go_back() {
            self.failed.get_or_insert_with(|| reason.to_owned());
        }
    }

    /// Counts an event or a command that was handled.
    pub(super) fn count(&mut self, is_rejected: bool) {
        let rates = match &mut self.probation {
            Some(probation) => &mut probation.rates,
            None => &mut self.rates,
        };
        rates.events += 1;
        rates.rejected += u64::from(is_rejected);
    }

    /// Counts the time since the last look to the probation, if the code could run meanwhile.
    pub(super) fn watch_on(&mut self, could_run: bool) {
        let elapsed = nanoseconds(std::mem::replace(&mut self.watched_at, Instant::now()).elapsed());
        if let Some(probation) = self.probation.as_mut().filter(|_| could_run) {
            probation.watched += elapsed;
        }
    }

    /// Ends the probation when it is time to.
    pub(super) fn judge(&mut self) {
        let Some(probation) = self.probation.filter(|_| self.failed.is_none()) else { return };
        match probation.verdict(&self.rules) {
            None => {}
            Some(Verdict::Fails(reason)) if self.can_go_back() => self.note_failure(&reason),
            Some(mut verdict) => {
                if let Verdict::Fails(reason) = &verdict {
                    tracing::error!(plugin = %self.plugin, "there is no way back for code that fails: {reason}");
                    verdict = Verdict::Unproven;
                }
                tracing::info!(plugin = %self.plugin, version = self.run.version(), ?verdict, "the probation is over");
                self.rates = probation.rates;
                (self.probation, self.fallback) = (None, None);
                self.session_mut().effects.batch.verdict = Some(verdict);
            }
        }
    }

    /// How long it is until time alone may end the probation.
    pub(super) fn until_verdict(&self) -> Duration {
        self.probation.map_or(Duration::MAX, |probation| probation.pause(&self.rules))
    }

    /// Lets the code from before the probation go on, if the code on probation has failed.
    pub(super) fn give_way(&mut self) -> Result<(), StoreError> {
        let Some(reason) = self.failed.take() else { return Ok(()) };
        tracing::error!(plugin = %self.plugin, version = self.run.version(), "taken back: {reason}");
        if let Some(fallback) = self.fallback.clone()
            && !self.go_back(fallback, reason, None)?
        {
            // The mark was given up: there is no way back to it any more, and no probation.
            (self.probation, self.fallback) = (None, None);
        }
        Ok(())
    }

    /// Lets other code go on from before a mark; false if there is no way back to it any more, and what runs
    /// goes on. What is not committed yet has not happened; who waits for a reply waits on. `asked` is where
    /// the plugin stands if an operator asks for it.
    fn go_back(
        &mut self,
        fallback: Fallback,
        reason: String,
        asked: Option<Offset>,
    ) -> Result<bool, StoreError> {
        self.drop_instance();
        let mut dropped = self.session_mut().discard();
        let handover = dropped.handover.take();
        let (by, number, cursor) = (dropped.by, dropped.number, dropped.cursor);
        for reply in dropped.into_replies() {
            self.inbox.wait_again(reply.offset, reply.to);
        }
        if !self.wait_for_commit(number - 1)? {
            return Ok(false);
        }
        if let (Some(handover), Some(predecessor)) = (handover, self.predecessor.take()) {
            self.run_again(predecessor);
            self.begin_again(number)?;
            self.keep_within_reach()?;
            handover.end(Err(reason));
            return Ok(true);
        }
        let own = self.session().own_keys();
        let Fallback { run, to } = fallback;
        let session = self.session_mut();
        session.effects.batch.by = by.next();
        session.effects.batch.cursor = cursor;
        let is_verdict = asked.is_none();
        session.effects.batch.take_back =
            Some(TakeBack { to, is_verdict, reason, code: run.code.clone(), own });
        let batch = session.seal();
        self.commit.submit(batch, self.progress.clone());
        if !self.wait_for_commit(number)? {
            return Ok(false);
        }
        let has_gone = self.begin_again(number + 1)? == by.next();
        if has_gone {
            self.end_quarantine();
            (self.probation, self.fallback) = (None, None);
            self.exchange(Arc::unwrap_or_clone(run));
            // What was denied since is denied to what comes back.
            self.keep_within_reach()?;
        }
        Ok(has_gone)
    }

    /// Waits until the batch of a number is durable; false if it never will be.
    fn wait_for_commit(&mut self, number: u64) -> Result<bool, StoreError> {
        loop {
            let committed = self.progress.committed();
            self.session_mut().settle(committed)?;
            if committed >= number {
                return Ok(true);
            }
            if self.commit.is_closed() {
                return Ok(false);
            }
            self.inbox.mailbox.wait(LOOK);
        }
    }

    /// Begins again with what is in the store, where the next batch is number `number`.
    fn begin_again(&mut self, number: u64) -> Result<Generation, StoreError> {
        let store = self.session().store();
        let stored = roster::read(&store, &self.plugin)?
            .ok_or_else(|| StoreError::corrupt("plugins", format!("{} has no row", self.plugin)))?;
        let generation = stored.row.generation;
        self.state_version = stored.row.state_version;
        self.rates = stored.row.rates;
        self.session_mut().begin_again(stored, number)?;
        self.buffer.clear();
        self.batch_begun = None;
        self.stored_cursor = self.cursor();
        self.stored_at = Instant::now();
        self.world_changed = false;
        self.failing.has_started();
        self.ticked_at = None;
        self.tried = None;
        self.watch();
        self.show();
        Ok(generation)
    }
}

/// Starts a component on what a plugin has and throws away what it does; returns why it does not start.
/// Blocks for as long as a start may take.
pub fn rehearse(
    prepared: &Prepared,
    session: SessionParts,
    secret: &[u8; 32],
    config: &str,
    from_state_version: Option<u32>,
) -> Result<Result<(), String>, StoreError> {
    let setting = Setting::new(secret, &session.plugin, None);
    let mut session = Session::new(session, prepared.inspection.manifest.version.clone())?;
    let time = session.world.time();
    session.begin_start(time);
    setting.random.begin(session.effects.batch.cursor.0, u64::MAX);
    let started = match Instance::new(prepared, session, &setting) {
        Ok(mut instance) => instance.start(config, from_state_version),
        Err(failed) => Err(failed.1),
    };
    match started {
        Ok(started) => Ok(started.map_err(said)),
        Err(error) => Ok(refused(error)?.map_err(|trap| trap.reason)),
    }
}
