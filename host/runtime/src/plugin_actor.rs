//! Owns the life of one plugin: a thread that reads the log from the plugin's cursor and handles one entry at a
//! time. It receives orders and queries through its handle, and submits batches of effects to the commit
//! without waiting for it.

mod instance_slot;
mod delivery;
mod restarts;
mod handle;
mod limit_records;
mod status;
mod stepping;
mod succession;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio_util::sync::CancellationToken;

pub use handle::Handle;
pub use status::{EffectCounts, PluginStatus};
pub use stepping::{Done, Reached, Started, Step};
pub use succession::{Fallback, Order, OtherReach, Rollback, Successor, rehearse};

use crate::Runnable;
use crate::event_conversion::reply_error;
use crate::instance::{CallError, Setting, thread_cpu};
use crate::session::{Mode, Session, SessionParts};
use crate::wasi::Numbers;
use dim_model::beginning::Beginning;
use dim_model::entry::{Entry, Event, Generation, Kind, Offset};
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Timestamp;
use dim_store::StoreError;
use dim_store::batch::{Reply, ReplyError};
use dim_store::catch_ups;
use dim_store::commit::{Commit, Progress};
use dim_store::disk_monitor::DiskMonitor;
use dim_store::entry_context::{ContextChange, SubscriptionRequest};
use dim_store::event_log::EventLog;
use dim_store::plugin_limits::LimitName;
use dim_store::plugin_registry::Quarantine;
use dim_store::probation::{Probation, Rates, Rules};

use delivery::{Delivery, Outcome, Tried};
use handle::Inbox;
use instance_slot::InstanceSlot;
use limit_records::{LimitRecords, Starts};
use restarts::Failing;
use succession::Predecessor;

/// Longest work in one batch before the actor submits it.
const BATCH_TIME: Duration = Duration::from_millis(20);
/// Most entries in one batch. A plugin that is so far ahead of the commit waits.
const BATCH_ENTRIES: usize = 16_384;
/// Size of the effects, in bytes, above which the actor submits the batch.
const BATCH_BYTES: usize = 1 << 20;
/// Most entries that one read of the log returns.
const READ: usize = 512;
/// Most entries that the actor handles between two checks for queries.
const BETWEEN_QUERIES: usize = 64;
/// Number of entries, none of which concern the plugin, after which the actor stores the cursor.
const CURSOR_STRIDE: u64 = 4_096;
/// Longest time before the actor stores a cursor that has moved at all. The log waits for stored cursors.
const CURSOR_EVERY: Duration = Duration::from_secs(10);
/// Longest wait of an idle plugin before it skips entries that do not concern it.
const IDLE: Duration = Duration::from_secs(5);
/// Shortest time between two tick entries for a plugin's timers while no other entry arrives. A timer that
/// resets itself to the past must not fill the log.
const TICK_EVERY: Duration = Duration::from_millis(10);
/// The interval of the checks whether a required entry is durable.
const COMMIT_POLL: Duration = Duration::from_millis(1);
/// The interval of the checks whether plugins may continue after a shortage of disk space.
const STANDSTILL: Duration = Duration::from_millis(100);
/// Longest time for queries before the plugin's thread checks for other work.
const QUESTION_TIME: Duration = Duration::from_millis(20);
/// The error of an actor that ended before it was stopped.
#[derive(Debug, Error)]
#[error("plugin {plugin} cannot continue")]
pub struct ActorError {
    plugin: PluginName,
    source: StoreError,
}

/// The parts of an actor.
#[derive(Debug)]
pub struct Parts {
    /// The component to run, with its config and grants.
    pub run: Runnable,
    /// The state of its probation.
    pub probation: ProbationParts,
    /// Whether the plugin handles nothing until it is resumed.
    pub is_paused: bool,
    /// The quarantine, if the plugin has failed too often. Until its end the plugin is not started.
    pub quarantine: Option<Quarantine>,
    /// The state version of the stored state.
    pub state_version: Option<u32>,
    /// The parts of the session.
    pub session: SessionParts,
    /// The host's secret, from which random numbers follow.
    pub secret: [u8; 32],
    /// The numbers from which random numbers follow instead of the entries' offsets, if any.
    pub numbers: Option<Numbers>,
    /// The log.
    pub log: Arc<EventLog>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The state of the intake.
    pub disk: Arc<DiskMonitor>,
}

/// The probation of the code that an actor runs.
#[derive(Debug, Default)]
pub struct ProbationParts {
    /// The probation so far, if the code is on probation.
    pub state: Option<Probation>,
    /// The code that runs again if this code fails on probation.
    pub fallback: Option<Fallback>,
    /// The rules of probation.
    pub rules: Rules,
    /// The reason, if the code has failed on probation before it could run.
    pub failed: Option<String>,
    /// The measurements of the code since it was confirmed.
    pub rates: Rates,
}

/// The thread of a plugin.
#[derive(Debug)]
pub struct Actor {
    plugin: PluginName,
    run: Runnable,
    inbox: Inbox,
    buffer: VecDeque<Arc<Entry>>,
    failing: Failing,
    counters: PluginStatus,
    watch: CodeWatch,
    sealing: Sealing,
    host: HostParts,
    attempts: Attempts,
    pace: Pace,
    running: RunningCode,
}

/// The code of a plugin under observation: its probation, and the code that runs again if it fails.
#[derive(Debug)]
struct CodeWatch {
    /// The probation so far, if the code is on probation.
    probation: Option<Probation>,
    /// The code that runs again if this code fails on probation.
    fallback: Option<Fallback>,
    /// The code before a takeover, until the takeover is durable.
    predecessor: Option<Predecessor>,
    /// The rules of a probation.
    rules: Rules,
    /// The measurements of the code since its probation.
    rates: Rates,
    /// The time of the last commit of the measurements.
    rates_stored_at: Instant,
    /// The time up to which the probation has counted.
    watched_at: Instant,
    /// Whether the code could run then: the plugin was ready, not paused and not quarantined.
    could_run: bool,
    /// The reason of a failure on probation, until the code before continues.
    failed: Option<String>,
}

/// The state of the open batch, which decides when the actor submits it.
#[derive(Debug)]
struct Sealing {
    /// The time at which the first entry of the batch was handled.
    batch_begun: Option<Instant>,
    /// The cursor of the last submitted batch.
    stored_cursor: Offset,
    /// The time of the last commit of the cursor.
    stored_at: Instant,
    /// Whether the entry context has changed since the last batch.
    context_changed: bool,
}

/// The parts of the host that an actor uses.
#[derive(Debug)]
struct HostParts {
    /// The event log.
    log: Arc<EventLog>,
    /// The writer.
    commit: Arc<Commit>,
    /// The disk monitor.
    disk: Arc<DiskMonitor>,
    /// The progress of the submitted batches.
    progress: Arc<Progress>,
}

/// The attempts at the entry that is handled next.
#[derive(Debug)]
struct Attempts {
    /// The attempts at the event that is still to be handled.
    tried: Option<Tried>,
    /// The starts since the last entry for which the plugin was called.
    starts: Starts,
    /// The offset after that entry. Entries that do not concern the plugin do not change it, because the actor may skip
    /// them before or after a start.
    after: Offset,
    /// Whether the plugin was called for the entry that is handled. Queries do not count: a replay has none.
    called: bool,
    /// The limits that were exceeded at the first handling, when a recorded log is handled again.
    recorded: Option<LimitRecords>,
}

/// The pace of queries, timer entries and log lines.
#[derive(Debug)]
struct Pace {
    /// The time by which queries are ahead of waiting entries; entries are handled for that time first.
    ahead: Duration,
    /// Whether queries may remain that this turn did not answer.
    has_questions: bool,
    /// The time of the last entry that timers caused.
    ticked_at: Option<Instant>,
    /// The time of the last log line about a dead letter.
    warned_at: Option<Instant>,
    /// The number of dead letters without a log line since the last one.
    unwarned: u64,
}

/// The instance of the code that runs.
#[derive(Debug)]
struct RunningCode {
    /// The instance, or what is left of it.
    body: InstanceSlot,
    /// The clock and the random numbers of the instance.
    setting: Setting,
    /// The times in nanoseconds that the last instance took for instantiation and for `start`.
    start_took: (u64, u64),
    /// The version of the state.
    state_version: Option<u32>,
}

impl Actor {
    /// Creates an actor that has not run, and its handle.
    pub fn new(parts: Parts) -> Result<(Self, Handle), StoreError> {
        let Parts { run, probation, is_paused, quarantine, state_version, session, .. } = parts;
        let ProbationParts { state: probation, fallback, rules, failed, rates } = probation;
        let Parts { secret, numbers, log, commit, disk, .. } = parts;
        let plugin = session.plugin.clone();
        let mut session = Session::new(session, run.version().to_owned())?;
        let context_changed = session.context.forget_ended_but(&run.asked_topics) == ContextChange::Some;
        let cursor = session.effects.batch.cursor;
        let (handle, inbox) = handle::pair(plugin.clone(), &run, log.clone(), disk.clone());
        let host = HostParts { log, commit, disk, progress: Arc::new(Progress::new(inbox.mailbox.clone())) };
        let now = Instant::now();
        let watched_at = host.log.clock().monotonic();
        let mut actor = Self {
            run,
            inbox,
            buffer: VecDeque::new(),
            failing: Failing::from_before(quarantine.is_some()),
            counters: PluginStatus { state: "starting", ..PluginStatus::default() },
            watch: CodeWatch {
                probation,
                fallback,
                predecessor: None,
                rules,
                rates,
                rates_stored_at: now,
                watched_at,
                could_run: false,
                failed,
            },
            sealing: Sealing { batch_begun: None, stored_cursor: cursor, stored_at: now, context_changed },
            host,
            attempts: Attempts {
                tried: None,
                starts: Starts::default(),
                after: cursor,
                called: false,
                recorded: None,
            },
            pace: Pace {
                ahead: Duration::ZERO,
                has_questions: false,
                ticked_at: None,
                warned_at: None,
                unwarned: 0,
            },
            running: RunningCode {
                body: InstanceSlot::Bare(Box::new(session)),
                setting: Setting::new(&secret, &plugin, numbers),
                start_took: (0, 0),
                state_version,
            },
            plugin,
        };
        if is_paused {
            handle.pause(true);
        }
        actor.watch();
        match quarantine {
            Some(Quarantine { reason, since }) => {
                actor.inbox.show_quarantined(true);
                actor.counters.failing_since = Some(since);
                actor.show_failing("quarantined", reason);
            }
            None => actor.show(),
        }
        Ok((actor, handle))
    }

    /// Runs until `stop` is cancelled. Before it returns, it submits the effects of all handled entries.
    pub fn run(mut self, stop: &CancellationToken) -> Result<(), ActorError> {
        while !stop.is_cancelled() {
            match self.turn() {
                Ok(None) => {}
                // The mailbox was rung for these queries already.
                Ok(Some(_)) if self.pace.has_questions => {}
                Ok(Some(pause)) => self.inbox.mailbox.wait(self.host.log.clock().real(pause)),
                Err(source) => return Err(ActorError { plugin: self.plugin, source }),
            }
        }
        while !self.host.commit.is_closed() && !self.hand_over() && !self.session().effects.batch.is_empty() {
            self.inbox.mailbox.wait(Duration::from_millis(100));
        }
        self.host.log.unwatch(&self.plugin);
        Ok(())
    }

    /// Runs one turn of the loop; returns the time without work, if there is no work.
    fn turn(&mut self) -> Result<Option<Duration>, StoreError> {
        self.pace.has_questions = false;
        let committed = self.host.progress.committed();
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
        if let Some(rest) = self.rest() {
            self.watch_on(true);
            self.hand_over();
            return Ok(Some(rest));
        }
        let is_ready = self.make_ready()?;
        self.watch_on(is_ready && !self.host.disk.is_at_standstill());
        if !is_ready {
            if self.watch.failed.is_some() {
                return Ok(None);
            }
            // The finished batch must not wait for a start, and the store must not wait for the snapshot.
            self.hand_over();
            self.session_mut().renew_snapshot()?;
            self.answer_queries_alone()?;
            return Ok(Some(self.failing.until_restart(self.monotonic())));
        }
        if self.host.disk.is_at_standstill() {
            self.answer_queries_alone()?;
            self.hand_over();
            return Ok(Some(STANDSTILL));
        }
        if self.batch_is_too_large() && !self.hand_over() {
            // The commit is behind. It rings the mailbox when it takes the waiting batch.
            self.answer_queries_alone()?;
            return Ok(Some(Duration::from_millis(100)));
        }
        self.answer_queries()?;
        let begun = Instant::now();
        if self.buffer.is_empty() {
            let cursor = self.cursor();
            self.host.log.read(cursor, READ, &mut self.buffer)?;
            self.miss()?;
        }
        if self.buffer.is_empty() {
            return self.idle();
        }
        self.handle_some()?;
        self.pace.ahead = self.pace.ahead.saturating_sub(begun.elapsed());
        self.judge();
        self.show();
        if self.batch_is_full() {
            self.hand_over();
        }
        Ok(None)
    }

    /// Submits the batch of a paused plugin, and answers queries.
    fn stand_still(&mut self) -> Result<Option<Duration>, StoreError> {
        if self.has_something() && !self.hand_over() {
            return Ok(Some(Duration::from_millis(100)));
        }
        self.make_ready()?;
        self.answer_queries_alone()?;
        self.session_mut().renew_snapshot()?;
        self.show();
        Ok(Some(self.rest().map_or(IDLE, |rest| rest.min(IDLE))))
    }

    /// Submits the batch of an idle plugin, and returns the time until the next timer or verdict.
    fn idle(&mut self) -> Result<Option<Duration>, StoreError> {
        self.pace.ahead = Duration::ZERO;
        self.judge();
        if self.watch.failed.is_some() {
            return Ok(None);
        }
        if self.has_something() && !self.hand_over() {
            return Ok(Some(Duration::from_millis(100)));
        }
        // A waiting plugin must not keep an old snapshot, because the store frees no page that it shows.
        self.session_mut().renew_snapshot()?;
        self.show();
        let idle = IDLE.min(self.until_verdict());
        let Some((due, _)) = self.session().effects.timers.first() else {
            return Ok(Some(idle));
        };
        let now = self.host.log.now();
        if due <= now {
            let since = self.pace.ticked_at.map_or(Duration::MAX, |at| at.elapsed());
            if since < TICK_EVERY {
                return Ok(Some(TICK_EVERY - since));
            }
            self.pace.ticked_at = Some(Instant::now());
            self.host.log.append_now([Kind::Tick(self.plugin.clone())]);
            return Ok(None);
        }
        Ok(Some(due.since(now).min(idle)))
    }

    /// Handles missing entries: the log did not wait, because the plugin was disabled or too far behind. The
    /// plugin receives gaps, repeats its pending requests, and gets the current values of names.
    fn miss(&mut self) -> Result<(), StoreError> {
        let cursor = self.cursor();
        let missed = self.buffer.front().filter(|first| first.offset > cursor);
        let Some((first, until)) = missed.map(|first| (first.offset, first.time)) else { return Ok(()) };
        let since = self.session().context.time();
        tracing::warn!(plugin = %self.plugin, entries = first.0 - cursor.0, %since, %until, "missed entries that the log no longer contains");
        self.session_mut().meets(LimitName::QUEUE_BYTES);
        let lost = self.stop_catching_up()?;
        let (plugin, by) = (&self.plugin, self.generation());
        let gaps = self.session().context.subscriptions().iter().map(|topic| {
            // Earlier events of any time may be among the missing entries.
            let since = if lost.contains(topic) { Timestamp(0) } else { since };
            let event = Event::Gap { topic: topic.clone(), since, until, missing: None };
            Kind::Again { plugin: plugin.clone(), attempt: 0, first: cursor, by: Generation(0), event }
        });
        let asked = self.session().context.asked().flat_map(|(topic, SubscriptionRequest(beginning))| {
            let kind = |beginning: Option<Beginning>| {
                let (plugin, topic) = (plugin.clone(), topic.clone());
                let (subscribed, beginning) = (beginning.is_some(), beginning.unwrap_or_default());
                Kind::Subscription { plugin, topic, subscribed, beginning, own_too: subscribed, by }
            };
            // The missing entries may have begun a catch-up that the plugin knows nothing of.
            let is_early = beginning.is_some_and(|beginning| beginning != Beginning::Head);
            is_early.then(|| kind(None)).into_iter().chain([kind(beginning)]).collect::<Vec<_>>()
        });
        self.host.log.append_now(gaps.chain(asked));
        self.inbox.forget_waiting(first);
        let session = self.session_mut();
        let (snapshot, own) = (session.store().snapshot()?, session.own_keys());
        session.context.renew_own_names(&snapshot, own)?;
        let followed: Vec<_> = session.context.follows().keys().map(|name| (name.clone(), true)).collect();
        let batch = &mut session.effects.batch;
        batch.requested.follows.extend(followed);
        batch.cursor = first;
        self.attempts.after = first;
        self.sealing.context_changed = true;
        Ok(())
    }

    /// Ends the receipt of earlier events of topics for which none come any more: the end may be among missing entries.
    /// Returns these topics.
    fn stop_catching_up(&mut self) -> Result<Vec<Topic>, StoreError> {
        let session = self.session_mut();
        let under_way = catch_ups::all(&session.store().snapshot()?)?;
        let is_over = |of: Offset| under_way.iter().all(|it| it.subscription != of);
        let over = session.context.catching_up().filter(|(_, of)| is_over(*of));
        let over: Vec<Topic> = over.map(|(topic, _)| topic.clone()).collect();
        over.iter().for_each(|topic| session.context.stop_catching_up(topic));
        Ok(over)
    }

    /// The time that measures pauses.
    fn monotonic(&self) -> Instant {
        self.host.log.clock().monotonic()
    }

    /// Moves the cursor past an entry.
    fn pass(&mut self, offset: Offset) {
        let next = Offset(offset.0 + 1);
        self.session_mut().effects.batch.cursor = next;
        if std::mem::take(&mut self.attempts.called) {
            self.attempts.after = next;
        }
    }

    fn handle_some(&mut self) -> Result<(), StoreError> {
        self.sealing.batch_begun.get_or_insert_with(Instant::now);
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
                    self.pass(entry.offset);
                }
            }
            // A few entries may have as many effects as a batch, or take as long.
            if self.batch_is_too_large() || self.take_slow() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the entry must be durable first: the document of a changed name comes with the same commit, and
    /// the plugin may read it.
    fn must_wait_for_commit(&self, entry: &Entry) -> bool {
        let Kind::Event(Event::NameChanged(changed)) = &entry.kind else { return false };
        self.session().context.knows(&changed.name) && !self.host.log.is_committed(entry.offset)
    }

    /// Handles one timer that is due before an entry, or the entry if there is none. Many timers may be due at
    /// the same time; each is a step of its own, like an entry.
    fn handle(&mut self, entry: &Entry) -> Result<Outcome, StoreError> {
        if let Some((due, key)) = self.session().effects.timers.first()
            && due <= entry.time
        {
            let key = key.to_owned();
            return self.fire(entry, key, due);
        }
        let plugin = self.plugin.clone();
        let context = &mut self.session_mut().context;
        context.set_time(entry.time);
        if context.observe(&plugin, entry) == ContextChange::Some {
            self.sealing.context_changed = true;
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
        match self.session().context.event_for(&plugin, entry) {
            Some(event) => self.deliver(entry, 0, Delivery { event, attempt, first, timer: None }),
            None => Ok(Outcome::Done),
        }
    }

    /// Answers queries. While entries wait, it answers one query, and the next one after entries were handled
    /// for the same time. So callers that query without end get at most half of the plugin's time.
    fn answer_queries(&mut self) -> Result<(), StoreError> {
        let until = Instant::now() + QUESTION_TIME;
        loop {
            if !self.pace.ahead.is_zero() && self.entries_wait() {
                self.pace.has_questions = true;
                return Ok(());
            }
            let begun = Instant::now();
            if !self.answer_next()? {
                self.pace.has_questions = false;
                return Ok(());
            }
            self.pace.ahead = begun.elapsed();
            // A failed instance is started again before the next query.
            let is_live = matches!(self.running.body, InstanceSlot::Live(_)) && self.rest().is_none();
            if !is_live || Instant::now() >= until {
                self.pace.has_questions = true;
                return Ok(());
            }
        }
    }

    /// Answers queries while no entry can be handled.
    fn answer_queries_alone(&mut self) -> Result<(), StoreError> {
        self.pace.ahead = Duration::ZERO;
        let until = Instant::now() + QUESTION_TIME;
        while self.rest().is_none() && self.answer_next()? {
            if Instant::now() >= until {
                self.pace.has_questions = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether there are entries that the actor has not examined.
    fn entries_wait(&self) -> bool {
        !self.buffer.is_empty() || self.cursor() < self.host.log.head()
    }

    /// Answers the oldest query; returns whether there was one.
    fn answer_next(&mut self) -> Result<bool, StoreError> {
        let Ok(query) = self.inbox.queries.try_recv() else { return Ok(false) };
        let reply = self.answer(&query.method, &query.body)?;
        // The caller may have disconnected.
        let _ = query.to.send(reply);
        Ok(true)
    }

    fn answer(&mut self, method: &str, body: &str) -> Result<Reply, StoreError> {
        if !matches!(self.running.body, InstanceSlot::Live(_)) {
            let reason = self.counters.reason.clone().unwrap_or_else(|| "it is starting".into());
            return Ok(Err(ReplyError::Unavailable(reason)));
        }
        let time = self.session().context.time();
        self.session_mut().begin(Mode::Query, time);
        self.running.setting.random.begin(self.cursor().0, u64::MAX);
        let begun = thread_cpu();
        let asked = self.instance().query(method, body);
        if let Err(error) = &asked {
            self.meet(error);
        }
        Ok(match asked {
            Ok(answer) => {
                // A successful query does not show that the plugin handles events well.
                if self.session().has_met() {
                    self.failing.note_bad(begun, self.monotonic());
                }
                answer.map_err(|refusal| reply_error(refusal, method))
            }
            Err(CallError::Host(error)) => return Err(error),
            Err(CallError::Trap(trap) | CallError::Limit(trap)) => {
                self.failing.note_bad(begun, self.monotonic());
                self.counters.failures += 1;
                self.fail(true);
                self.note_failure(&trap.reason);
                Err(ReplyError::Failed(trap.reason))
            }
        })
    }

    fn begin(&mut self, mode: Mode, entry: &Entry, part: u64, again: u32) {
        self.running.setting.random.begin(entry.offset.0, part);
        self.session_mut().begin(mode, entry.time);
        if let Some(recorded) = &self.attempts.recorded {
            let room = recorded.room(entry.offset, part, again);
            self.session_mut().publishing.outgoing = room;
        }
    }

    fn generation(&self) -> Generation {
        self.session().effects.batch.by
    }

    fn cursor(&self) -> Offset {
        self.session().effects.batch.cursor
    }

    fn has_something(&self) -> bool {
        let moved = self.cursor().0 - self.sealing.stored_cursor.0;
        // The log can drop handled entries when space is short.
        let is_time = || self.sealing.stored_at.elapsed() >= CURSOR_EVERY || self.host.disk.check().is_err();
        let is_due = moved >= CURSOR_STRIDE || (moved > 0 && is_time());
        !self.session().effects.batch.is_empty() || self.sealing.context_changed || is_due
    }

    fn batch_is_full(&self) -> bool {
        self.sealing.batch_begun.is_some_and(|begun| begun.elapsed() >= BATCH_TIME)
            || self.batch_is_too_large()
    }

    fn batch_is_too_large(&self) -> bool {
        let batch = &self.session().effects.batch;
        batch.entries >= BATCH_ENTRIES || batch.bytes >= BATCH_BYTES
    }

    /// Submits the batch to the commit, unless an earlier one still waits there. Returns whether none waits.
    fn hand_over(&mut self) -> bool {
        let taken = self.host.progress.taken();
        let waits = self.session().effects.in_flight.last().is_some_and(|batch| batch.number > taken);
        if waits || !self.has_something() {
            return !waits;
        }
        let batch = &self.session().effects.batch;
        let asked = !batch.requested.follows.is_empty()
            || !batch.requested.names.is_empty()
            || !batch.requested.subscriptions.is_empty();
        if std::mem::take(&mut self.sealing.context_changed) || asked {
            let context = serde_json::to_vec(&self.session().context).expect("a context is plain data");
            self.session_mut().effects.batch.context = Some(context);
        }
        self.sealing.stored_cursor = self.cursor();
        self.sealing.stored_at = Instant::now();
        self.sealing.batch_begun = None;
        self.session_mut().effects.batch.code.probation = self.watch.probation;
        let has_verdict = self.session().effects.batch.code.verdict.is_some();
        if self.watch.probation.is_none()
            && (has_verdict || self.watch.rates_stored_at.elapsed() >= CURSOR_EVERY)
        {
            self.session_mut().effects.batch.code.rates = Some(self.watch.rates);
            self.watch.rates_stored_at = Instant::now();
        }
        if self.session().effects.batch.code.handover.is_some() {
            self.watch.predecessor = None;
        }
        let batch = self.session_mut().seal();
        self.counters.effects.add(&batch);
        self.host.commit.submit(batch, self.host.progress.clone());
        true
    }

    /// Reduces the topics in the context to those of the manifest and of current subscriptions.
    fn forget_ended_topics(&mut self) {
        let topics = std::mem::take(&mut self.run.asked_topics);
        self.session_mut().context.forget_ended_but(&topics);
        self.run.asked_topics = topics;
    }

    /// Registers the plugin's subscriptions with the log, which wakes this thread for them.
    fn watch(&self) {
        let topics = self.session().context.subscriptions().iter().cloned().collect();
        self.host.log.watch(&self.plugin, topics, &self.inbox.mailbox);
    }
}
