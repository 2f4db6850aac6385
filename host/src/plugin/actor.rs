//! Owns the life of one plugin: a thread that reads the log from the plugin's cursor, handles one
//! entry at a time, and hands batches of effects to the commit while it goes on.

mod body;
mod delivery;
mod failing;
mod handle;
mod recorded;
mod status;
mod stepped;
mod succession;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio_util::sync::CancellationToken;

pub use handle::Handle;
pub use status::{EffectCounts, PluginStatus};
pub use stepped::{Done, Started, Step};
pub use succession::{
    Fallback, Handover, Order, OtherReach, Successor, TakeBack, TakenOver, WayBack, rehearse,
};

use super::event::reply_error;
use super::instance::{CallError, Setting, thread_cpu};
use super::probation::{Probation, Rates, Rules};
use super::roster::Quarantine;
use super::session::{Mode, Session, SessionParts};
use super::wasi::Numbers;
use super::{Change, Reply, ReplyError, Runnable};
use crate::commit::{Commit, Progress};
use crate::entry::{Entry, Event, Generation, Kind, Offset};
use crate::ident::PluginName;
use crate::log::EventLog;
use crate::room::Room;
use crate::store::StoreError;

use body::Body;
use delivery::{Delivery, Outcome, Tried};
use failing::Failing;
use handle::Inbox;
use recorded::{Recorded, Starts};
use succession::Predecessor;

/// Work that a batch may hold before it is handed over.
const BATCH_TIME: Duration = Duration::from_millis(20);
/// Entries that a batch may hold; a plugin that is that far ahead of the commit waits.
const BATCH_ENTRIES: usize = 16_384;
/// Bytes of effects after which a batch is handed over.
const BATCH_BYTES: usize = 1 << 20;
/// Entries that are read from the log at a time.
const READ: usize = 512;
/// Entries that are handled between two looks at the queries.
const BETWEEN_QUERIES: usize = 64;
/// A cursor that has moved this far over entries that are not the plugin's own is stored.
const CURSOR_STRIDE: u64 = 4_096;
/// And so is one that has moved at all, after this long: the log waits for cursors.
const CURSOR_EVERY: Duration = Duration::from_secs(10);
/// How long an idle plugin waits before it reads over entries that are not for it.
const IDLE: Duration = Duration::from_secs(5);
/// Shortest time between two entries that a plugin's timers bring about while nothing else comes: a
/// timer that sets itself to the past must not fill the log.
const TICK_EVERY: Duration = Duration::from_millis(10);
/// How often it is looked whether an entry is durable that must be before it is handled.
const COMMIT_POLL: Duration = Duration::from_millis(1);
/// How often it is looked whether there is room again.
const STANDSTILL: Duration = Duration::from_millis(100);
/// For how long questions are answered before the plugin's thread looks at what else there is to do.
const QUESTION_TIME: Duration = Duration::from_millis(20);
/// Why an actor ended before it was told to.
#[derive(Debug, Error)]
#[error("plugin {plugin} cannot go on")]
pub struct ActorError {
    plugin: PluginName,
    source: StoreError,
}

/// What an actor is made of.
#[derive(Debug)]
pub struct Parts {
    /// What runs.
    pub run: Runnable,
    /// How its probation stands, if it is on one.
    pub probation: Option<Probation>,
    /// What runs again if it fails on probation.
    pub fallback: Option<Fallback>,
    /// How code is watched on probation.
    pub rules: Rules,
    /// Why the code has failed on probation before it could run.
    pub failed: Option<String>,
    /// Whether it handles nothing until it is resumed.
    pub is_paused: bool,
    /// Why it is not even started until then, if it has failed too often.
    pub quarantine: Option<Quarantine>,
    /// What it has handled since it was confirmed.
    pub rates: Rates,
    /// The version of the state that is there.
    pub state_version: Option<u32>,
    /// Its side of the host functions.
    pub session: SessionParts,
    /// The host's secret, for random.
    pub secret: [u8; 32],
    /// What random goes by in place of the entries' offsets, if it does.
    pub numbers: Option<Numbers>,
    /// The log.
    pub log: Arc<EventLog>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Whether there is room for more.
    pub room: Arc<Room>,
}

/// A plugin's thread.
#[derive(Debug)]
pub struct Actor {
    plugin: PluginName,
    run: Runnable,
    /// How the code does on probation, if it is on one.
    probation: Option<Probation>,
    /// What runs again if it fails there.
    fallback: Option<Fallback>,
    /// What ran before, until it is durable that the code has taken over.
    predecessor: Option<Predecessor>,
    rules: Rules,
    /// What the code has handled since its probation.
    rates: Rates,
    rates_stored_at: Instant,
    /// Until when the time on probation is counted.
    watched_at: Instant,
    /// Why the code has failed on probation, until the code before it goes on.
    failed: Option<String>,
    state_version: Option<u32>,
    /// Nanoseconds that the last instance took to be made, and to start.
    start_took: (u64, u64),
    body: Body,
    setting: Setting,
    log: Arc<EventLog>,
    commit: Arc<Commit>,
    room: Arc<Room>,
    progress: Arc<Progress>,
    inbox: Inbox,
    buffer: VecDeque<Arc<Entry>>,
    /// When the first entry of the batch was handled.
    batch_begun: Option<Instant>,
    /// The cursor of the last batch that was handed over.
    stored_cursor: Offset,
    stored_at: Instant,
    world_changed: bool,
    failing: Failing,
    ticked_at: Option<Instant>,
    /// How often the event was tried that is still to be handled.
    tried: Option<Tried>,
    /// The starts before the entry that is to be handled.
    starts: Starts,
    /// The limits that struck when a recorded log was handled first.
    recorded: Option<Recorded>,
    /// How much longer questions have taken than the entries that waited meanwhile: those are handled for as long first.
    ahead: Duration,
    /// Whether questions may be left that were not answered in this turn.
    has_questions: bool,
    warned_at: Option<Instant>,
    /// Events that were set aside without a word since.
    unwarned: u64,
    tally: PluginStatus,
}

impl Actor {
    /// An actor that has not run, and the handle to it.
    pub fn new(parts: Parts) -> Result<(Self, Handle), StoreError> {
        let Parts { run, probation, fallback, rules, failed, is_paused, quarantine, rates, .. } = parts;
        let Parts { state_version, session, secret, numbers, log, commit, room, .. } = parts;
        let plugin = session.plugin.clone();
        let mut session = Session::new(session, run.version().to_owned())?;
        let world_changed = session.world.forget_ended_but(&run.asked_topics) == Change::Some;
        let cursor = session.effects.batch.cursor;
        let (handle, inbox) = handle::pair(plugin.clone(), &run, log.clone(), room.clone());
        let mut actor = Self {
            run,
            probation,
            fallback,
            predecessor: None,
            rules,
            rates,
            rates_stored_at: Instant::now(),
            watched_at: Instant::now(),
            failed,
            state_version,
            start_took: (0, 0),
            body: Body::Bare(Box::new(session)),
            setting: Setting::new(&secret, &plugin, numbers),
            log,
            commit,
            room,
            progress: Arc::new(Progress::new(inbox.mailbox.clone())),
            inbox,
            buffer: VecDeque::new(),
            batch_begun: None,
            stored_cursor: cursor,
            stored_at: Instant::now(),
            world_changed,
            failing: Failing::from_before(quarantine.is_some()),
            ticked_at: None,
            tried: None,
            starts: Starts::default(),
            recorded: None,
            ahead: Duration::ZERO,
            has_questions: false,
            warned_at: None,
            unwarned: 0,
            tally: PluginStatus { state: "starting", ..PluginStatus::default() },
            plugin,
        };
        if is_paused {
            handle.pause(true);
        }
        actor.watch();
        match quarantine {
            Some(Quarantine { reason, since }) => {
                actor.inbox.show_quarantined(true);
                actor.tally.failing_since = Some(since);
                actor.show_failing("quarantined", reason);
            }
            None => actor.show(),
        }
        Ok((actor, handle))
    }

    /// Runs until `stop` is cancelled; what was handled by then is handed to the commit.
    pub fn run(mut self, stop: &CancellationToken) -> Result<(), ActorError> {
        while !stop.is_cancelled() {
            match self.turn() {
                Ok(None) => {}
                // Callers have rung already.
                Ok(Some(_)) if self.has_questions => {}
                Ok(Some(pause)) => self.inbox.mailbox.wait(pause),
                Err(source) => return Err(ActorError { plugin: self.plugin, source }),
            }
        }
        while !self.commit.is_closed() && !self.hand_over() && !self.session().effects.batch.is_empty() {
            self.inbox.mailbox.wait(Duration::from_millis(100));
        }
        self.log.unwatch(&self.plugin);
        Ok(())
    }

    /// One turn of the loop; returns how long there is nothing to do.
    fn turn(&mut self) -> Result<Option<Duration>, StoreError> {
        self.has_questions = false;
        let committed = self.progress.committed();
        self.session_mut().settle(committed)?;
        self.give_way()?;
        self.obey()?;
        if self.inbox.take_resumed() {
            self.end_quarantine();
        }
        if self.inbox.is_paused() || self.is_quarantined() {
            self.watch_on(false);
            return self.stand_still();
        }
        if let Some(rest) = self.failing.rest() {
            self.watch_on(true);
            self.hand_over();
            return Ok(Some(rest));
        }
        let is_ready = self.make_ready()?;
        self.watch_on(is_ready && !self.room.is_at_standstill());
        if !is_ready {
            if self.failed.is_some() {
                return Ok(None);
            }
            // What was handled before must not wait for a start, nor the store for the snapshot.
            self.hand_over();
            self.session_mut().renew_snapshot()?;
            self.answer_queries_alone()?;
            return Ok(Some(self.failing.until_restart()));
        }
        if self.room.is_at_standstill() {
            self.answer_queries_alone()?;
            self.hand_over();
            return Ok(Some(STANDSTILL));
        }
        if self.batch_is_too_large() && !self.hand_over() {
            // The commit is behind: it rings when it takes the batch that waits.
            self.answer_queries_alone()?;
            return Ok(Some(Duration::from_millis(100)));
        }
        self.answer_queries()?;
        let begun = Instant::now();
        if self.buffer.is_empty() {
            let cursor = self.cursor();
            self.log.read(cursor, READ, &mut self.buffer)?;
            self.miss()?;
        }
        if self.buffer.is_empty() {
            return self.idle();
        }
        self.handle_some()?;
        self.ahead = self.ahead.saturating_sub(begun.elapsed());
        self.judge();
        self.show();
        if self.batch_is_full() {
            self.hand_over();
        }
        Ok(None)
    }

    /// Paused: hands over what there is, and answers questions.
    fn stand_still(&mut self) -> Result<Option<Duration>, StoreError> {
        if self.has_something() && !self.hand_over() {
            return Ok(Some(Duration::from_millis(100)));
        }
        self.make_ready()?;
        self.answer_queries_alone()?;
        self.session_mut().renew_snapshot()?;
        self.show();
        Ok(Some(self.failing.rest().map_or(IDLE, |rest| rest.min(IDLE))))
    }

    /// Nothing to read: hands over what there is and waits for the next timer.
    fn idle(&mut self) -> Result<Option<Duration>, StoreError> {
        self.ahead = Duration::ZERO;
        self.judge();
        if self.failed.is_some() {
            return Ok(None);
        }
        if self.has_something() && !self.hand_over() {
            return Ok(Some(Duration::from_millis(100)));
        }
        // Whoever sleeps holds on to as little as may be.
        self.session_mut().renew_snapshot()?;
        self.show();
        let idle = IDLE.min(self.until_verdict());
        let Some((due, _)) = self.session().effects.timers.first() else {
            return Ok(Some(idle));
        };
        let now = self.log.now();
        if due <= now {
            let since = self.ticked_at.map_or(Duration::MAX, |at| at.elapsed());
            if since < TICK_EVERY {
                return Ok(Some(TICK_EVERY - since));
            }
            self.ticked_at = Some(Instant::now());
            self.log.append_now([Kind::Tick(self.plugin.clone())]);
            return Ok(None);
        }
        Ok(Some(due.since(now).min(idle)))
    }

    /// The log did not wait for the plugin: it was disabled, or too far behind. What it has missed is told to it as
    /// gaps, what it asked for meanwhile is asked for again, and so is what became of names.
    fn miss(&mut self) -> Result<(), StoreError> {
        let cursor = self.cursor();
        let missed = self.buffer.front().filter(|first| first.offset > cursor);
        let Some((first, until)) = missed.map(|first| (first.offset, first.time)) else { return Ok(()) };
        let since = self.session().world.time();
        tracing::warn!(plugin = %self.plugin, entries = first.0 - cursor.0, %since, %until, "missed what the log no longer holds");
        self.session_mut().meets("queue-bytes");
        let (plugin, by) = (&self.plugin, self.generation());
        let gaps = self.session().world.subscriptions().iter().map(|topic| Kind::Again {
            plugin: plugin.clone(),
            attempt: 0,
            first: cursor,
            by: Generation(0),
            event: Event::Gap { topic: topic.clone(), since, until },
        });
        let asked = self.session().world.asked().map(|(topic, subscribed)| {
            let (plugin, topic) = (plugin.clone(), topic.clone());
            Kind::Subscription { plugin, topic, subscribed, by }
        });
        self.log.append_now(gaps.chain(asked));
        self.inbox.forget_waiting(first);
        let session = self.session_mut();
        let (snapshot, own) = (session.store().snapshot()?, session.own_keys());
        session.world.renew_own_names(&snapshot, own)?;
        let followed: Vec<_> = session.world.follows().keys().map(|name| (name.clone(), true)).collect();
        let batch = &mut session.effects.batch;
        batch.follows.extend(followed);
        batch.cursor = first;
        self.world_changed = true;
        Ok(())
    }

    fn handle_some(&mut self) -> Result<(), StoreError> {
        self.batch_begun.get_or_insert_with(Instant::now);
        for _ in 0..BETWEEN_QUERIES {
            let Some(entry) = self.buffer.front().cloned() else { return Ok(()) };
            if self.must_wait_for_commit(&entry) {
                self.inbox.mailbox.wait(COMMIT_POLL);
                return Ok(());
            }
            match self.handle(&entry)? {
                Outcome::Stopped => return Ok(()),
                Outcome::Fired => {}
                Outcome::Done => {
                    self.buffer.pop_front();
                    self.session_mut().effects.batch.cursor = Offset(entry.offset.0 + 1);
                }
            }
            // A few entries may hold as much as a batch, or take as long.
            if self.batch_is_too_large() || self.take_slow() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// A changed name's document comes with the same commit as the entry; the plugin may read it.
    fn must_wait_for_commit(&self, entry: &Entry) -> bool {
        let Kind::Event(Event::NameChanged(changed)) = &entry.kind else { return false };
        self.session().world.knows(&changed.name) && !self.log.is_committed(entry.offset)
    }

    /// Handles one of the timers that fell due before an entry, or, when there is none, what the entry
    /// is to this plugin. Many timers may fall due at once: each is a step of its own, as entries are.
    fn handle(&mut self, entry: &Entry) -> Result<Outcome, StoreError> {
        if let Some((due, key)) = self.session().effects.timers.first()
            && due <= entry.time
        {
            let key = key.to_owned();
            return self.fire(entry, key, due);
        }
        let plugin = self.plugin.clone();
        let world = &mut self.session_mut().world;
        world.set_time(entry.time);
        if world.observe(&plugin, entry) == Change::Some {
            self.world_changed = true;
            if matches!(entry.kind, Kind::Subscription { .. }) {
                self.forget_ended_topics();
                self.watch();
            }
        }
        if let Kind::Command { plugin: whose, method, body } = &entry.kind {
            return if *whose == plugin { self.command(entry, method, body) } else { Ok(Outcome::Done) };
        }
        let (attempt, first) = match &entry.kind {
            Kind::Again { attempt, first, .. } => (*attempt, *first),
            _ => (0, entry.offset),
        };
        match self.session().world.event_for(&plugin, entry) {
            Some(event) => self.deliver(entry, 0, Delivery { event, attempt, first, timer: None }),
            None => Ok(Outcome::Done),
        }
    }

    /// Answers questions. While entries wait it is one question, and the next one once entries were handled for as long:
    /// callers that ask without end take half of the plugin's time at most.
    fn answer_queries(&mut self) -> Result<(), StoreError> {
        let until = Instant::now() + QUESTION_TIME;
        loop {
            if !self.ahead.is_zero() && self.entries_wait() {
                self.has_questions = true;
                return Ok(());
            }
            let begun = Instant::now();
            if !self.answer_next()? {
                self.has_questions = false;
                return Ok(());
            }
            self.ahead = begun.elapsed();
            // What failed is started anew before it is asked again.
            let is_live = matches!(self.body, Body::Live(_)) && self.failing.rest().is_none();
            if !is_live || Instant::now() >= until {
                self.has_questions = true;
                return Ok(());
            }
        }
    }

    /// Answers questions while no entry can be handled.
    fn answer_queries_alone(&mut self) -> Result<(), StoreError> {
        self.ahead = Duration::ZERO;
        let until = Instant::now() + QUESTION_TIME;
        while self.failing.rest().is_none() && self.answer_next()? {
            if Instant::now() >= until {
                self.has_questions = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether there are entries that were not looked at.
    fn entries_wait(&self) -> bool {
        !self.buffer.is_empty() || self.cursor() < self.log.head()
    }

    /// Answers the question that has waited longest; returns whether there was one.
    fn answer_next(&mut self) -> Result<bool, StoreError> {
        let Ok(query) = self.inbox.queries.try_recv() else { return Ok(false) };
        let reply = self.answer(&query.method, &query.body)?;
        // Whoever asked may have gone away.
        let _ = query.to.send(reply);
        Ok(true)
    }

    fn answer(&mut self, method: &str, body: &str) -> Result<Reply, StoreError> {
        if !matches!(self.body, Body::Live(_)) {
            let reason = self.tally.reason.clone().unwrap_or_else(|| "it is starting".into());
            return Ok(Err(ReplyError::Unavailable(reason)));
        }
        let time = self.session().world.time();
        self.session_mut().begin(Mode::Query, time);
        self.setting.random.begin(self.cursor().0, u64::MAX);
        let begun = thread_cpu();
        let asked = self.instance().query(method, body);
        if let Err(error) = &asked {
            self.meet(error);
        }
        Ok(match asked {
            Ok(answer) => {
                // That a question goes well says nothing of how the plugin handles events.
                if self.session().has_met() {
                    self.failing.note_bad(begun);
                }
                answer.map_err(|refusal| reply_error(refusal, method))
            }
            Err(CallError::Host(error)) => return Err(error),
            Err(CallError::Trap(trap) | CallError::Limit(trap)) => {
                self.failing.note_bad(begun);
                self.tally.failures += 1;
                self.fail(true);
                self.note_failure(&trap.reason);
                Err(ReplyError::Failed(trap.reason))
            }
        })
    }

    fn begin(&mut self, mode: Mode, entry: &Entry, part: u64, again: u32) {
        self.setting.random.begin(entry.offset.0, part);
        self.session_mut().begin(mode, entry.time);
        if let Some(recorded) = &self.recorded {
            let room = recorded.room(entry.offset, part, again);
            self.session_mut().outgoing = room;
        }
    }

    fn generation(&self) -> Generation {
        self.session().effects.batch.by
    }

    fn cursor(&self) -> Offset {
        self.session().effects.batch.cursor
    }

    fn has_something(&self) -> bool {
        let moved = self.cursor().0 - self.stored_cursor.0;
        // What it has handled can go, where there is no room for it.
        let is_time = || self.stored_at.elapsed() >= CURSOR_EVERY || self.room.check().is_err();
        let is_due = moved >= CURSOR_STRIDE || (moved > 0 && is_time());
        !self.session().effects.batch.is_empty() || self.world_changed || is_due
    }

    fn batch_is_full(&self) -> bool {
        self.batch_begun.is_some_and(|begun| begun.elapsed() >= BATCH_TIME) || self.batch_is_too_large()
    }

    fn batch_is_too_large(&self) -> bool {
        let batch = &self.session().effects.batch;
        batch.entries >= BATCH_ENTRIES || batch.bytes >= BATCH_BYTES
    }

    /// Hands the batch to the commit, unless an earlier one still waits there.
    fn hand_over(&mut self) -> bool {
        let taken = self.progress.taken();
        let waits = self.session().effects.in_flight.last().is_some_and(|batch| batch.number > taken);
        if waits || !self.has_something() {
            return !waits;
        }
        let batch = &self.session().effects.batch;
        let asked = !batch.follows.is_empty() || !batch.names.is_empty() || !batch.subscriptions.is_empty();
        if std::mem::take(&mut self.world_changed) || asked {
            let world = serde_json::to_vec(&self.session().world).expect("a world is plain data");
            self.session_mut().effects.batch.world = Some(world);
        }
        self.stored_cursor = self.cursor();
        self.stored_at = Instant::now();
        self.batch_begun = None;
        self.session_mut().effects.batch.probation = self.probation;
        let has_verdict = self.session().effects.batch.verdict.is_some();
        if self.probation.is_none() && (has_verdict || self.rates_stored_at.elapsed() >= CURSOR_EVERY) {
            self.session_mut().effects.batch.rates = Some(self.rates);
            self.rates_stored_at = Instant::now();
        }
        if self.session().effects.batch.handover.is_some() {
            self.predecessor = None;
        }
        let batch = self.session_mut().seal();
        self.tally.effects.add(&batch);
        self.commit.submit(batch, self.progress.clone());
        true
    }

    /// Has the world hold no more topics than the manifest has, and those that it is subscribed to.
    fn forget_ended_topics(&mut self) {
        let topics = std::mem::take(&mut self.run.asked_topics);
        self.session_mut().world.forget_ended_but(&topics);
        self.run.asked_topics = topics;
    }

    /// Has the log wake this thread for what the plugin is subscribed to.
    fn watch(&self) {
        let topics = self.session().world.subscriptions().iter().cloned().collect();
        self.log.watch(&self.plugin, topics, &self.inbox.mailbox);
    }
}
