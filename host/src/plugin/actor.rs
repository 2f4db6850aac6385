//! Owns the life of one plugin: a thread that reads the log from the plugin's cursor, handles one
//! entry at a time, and hands batches of effects to the commit while it goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::bindings::{self, dim::coordination::event as wit};
use super::instance::{CallError, Instance, Setting, thread_cpu};
use super::limits::REASON_BYTES;
use super::session::{Mode, Session, SessionParts};
use super::wasi::EntryRandom;
use super::{Batch, Change, Prepared, Reply, ReplyError, Retry, ipns};
use crate::commit::{Commit, Progress};
use crate::dead::DeadLetter;
use crate::ident::PluginName;
use crate::log::{Entry, Event, EventLog, Kind, Mailbox, Offset, Origin};
use crate::store::StoreError;
use crate::time::{Timestamp, nanoseconds};

/// Work that a batch may hold before it is handed over.
const BATCH_TIME: Duration = Duration::from_millis(20);
/// Entries that a batch may hold; a plugin that is that far ahead of the commit waits.
const BATCH_ENTRIES: usize = 16_384;
/// Bytes of effects that a batch may hold.
const BATCH_BYTES: usize = 16 << 20;
/// Entries that are read from the log at a time.
const READ: usize = 512;
/// Entries that are handled between two looks at the queries.
const BETWEEN_QUERIES: usize = 64;
/// Queries that wait at one plugin; one more is refused.
const QUERIES: usize = 1024;
/// A cursor that has moved this far over entries that are not the plugin's own is stored.
const CURSOR_STRIDE: u64 = 4_096;
/// How long an idle plugin waits before it reads over entries that are not for it.
const IDLE: Duration = Duration::from_secs(5);
/// How often it is looked whether an entry is durable that must be before it is handled.
const COMMIT_POLL: Duration = Duration::from_millis(1);
/// How long a plugin that does not start is left alone, at first and at most.
const RESTART: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often a trapping event is tried.
const TRIES: u32 = 2;

/// Why an actor ended before it was told to.
#[derive(Debug, Error)]
#[error("plugin {plugin} cannot go on")]
pub struct ActorError {
    plugin: PluginName,
    source: StoreError,
}

/// A question to a plugin.
#[derive(Debug)]
pub struct Query {
    /// Which question.
    pub method: String,
    /// JSON.
    pub body: String,
    /// Where the answer goes.
    pub to: oneshot::Sender<Reply>,
}

/// How a plugin is doing, as the operator sees it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct PluginStatus {
    /// `starting`, `running` or `failing`.
    pub state: &'static str,
    /// Why it is failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The next entry that it will read.
    pub cursor: u64,
    /// Events, commands and timers that it handled.
    pub handled: u64,
    /// Events that it rejected or put off, and traps.
    pub failures: u64,
    /// Events that were set aside.
    pub dead_letters: u64,
    /// Instances that were made.
    pub instances: u64,
    /// CPU time, in nanoseconds.
    pub cpu: u64,
    /// Bytes of memory of the instance.
    pub memory: usize,
    /// Bytes of its state.
    pub state_bytes: u64,
    /// Timers that are set.
    pub timers: usize,
}

/// A status that is written by the plugin's thread and read by others.
#[derive(Debug, Default)]
pub struct Status(Mutex<PluginStatus>);

impl Status {
    /// How the plugin is doing.
    pub fn get(&self) -> PluginStatus {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, PluginStatus> {
        self.0.lock().expect("no one panics while holding a status")
    }
}

/// Who waits for the reply of a command, by the offset of its entry.
type Waiting = Mutex<HashMap<Offset, oneshot::Sender<Reply>>>;

/// A plugin, as the rest of the host knows it.
#[derive(Clone, Debug)]
pub struct Handle {
    name: PluginName,
    log: Arc<EventLog>,
    mailbox: Arc<Mailbox>,
    queries: SyncSender<Query>,
    waiting: Arc<Waiting>,
    status: Arc<Status>,
}

impl Handle {
    /// How the plugin is doing.
    pub fn status(&self) -> PluginStatus {
        self.status.get()
    }

    /// Gives an order: an entry of the log. The reply comes once its effects are durable.
    pub async fn command(&self, method: String, body: String) -> Reply {
        let (to, reply) = oneshot::channel();
        {
            // Held while appending, so that the plugin finds who waits.
            let mut waiting = self.waiting.lock().expect("no one panics while holding the waiting");
            let kind = Kind::Command { plugin: self.name.clone(), method, body };
            let offset = self.log.append_command(kind);
            waiting.insert(offset, to);
        }
        reply.await.unwrap_or_else(|_| Err(ReplyError::Unavailable("the host is shutting down".into())))
    }

    /// Asks a question.
    pub async fn query(&self, method: String, body: String) -> Reply {
        let (to, reply) = oneshot::channel();
        match self.queries.try_send(Query { method, body, to }) {
            Ok(()) => self.mailbox.ring(),
            Err(TrySendError::Full(_)) => {
                return Err(ReplyError::Unavailable(format!("{QUERIES} queries are waiting")));
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(ReplyError::Unavailable("it has stopped".into()));
            }
        }
        reply.await.unwrap_or_else(|_| Err(ReplyError::Unavailable("it has stopped".into())))
    }

    /// Wakes the plugin's thread, for it to see that it was told to stop, or what is in the log.
    pub fn wake(&self) {
        self.mailbox.ring();
    }
}

/// What an actor is made of.
#[derive(Debug)]
pub struct Parts {
    /// The component.
    pub prepared: Prepared,
    /// Its config, a JSON object.
    pub config: String,
    /// The version of the state that is there.
    pub state_version: Option<u32>,
    /// Its side of the host functions.
    pub session: SessionParts,
    /// The host's secret, for random.
    pub secret: [u8; 32],
    /// The log.
    pub log: Arc<EventLog>,
    /// The writer.
    pub commit: Arc<Commit>,
}

/// A plugin's thread.
#[derive(Debug)]
pub struct Actor {
    plugin: PluginName,
    version: String,
    prepared: Prepared,
    config: String,
    state_version: Option<u32>,
    body: Body,
    random: EntryRandom,
    hash_seed: u128,
    log: Arc<EventLog>,
    commit: Arc<Commit>,
    progress: Arc<Progress>,
    mailbox: Arc<Mailbox>,
    queries: Receiver<Query>,
    waiting: Arc<Waiting>,
    status: Arc<Status>,
    buffer: VecDeque<Arc<Entry>>,
    /// When the first entry of the batch was handled.
    batch_begun: Option<Instant>,
    /// The cursor of the last batch that was handed over.
    stored_cursor: Offset,
    world_changed: bool,
    restart: Option<Restart>,
    tally: PluginStatus,
}

/// The session, with or without an instance around it.
enum Body {
    Bare(Box<Session>),
    Live(Box<Instance>),
    /// Only while one of the other two is being made.
    Between,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Body::Bare(_) => "Bare",
            Body::Live(_) => "Live",
            Body::Between => "Between",
        })
    }
}

/// A plugin that did not start.
#[derive(Debug)]
struct Restart {
    at: Instant,
    pause: Duration,
}

/// How an event went.
enum Outcome {
    Done,
    /// The instance did not start; the event is still to be handled.
    NotStarted,
}

impl Actor {
    /// An actor that has not run, and the handle to it.
    pub fn new(parts: Parts) -> Result<(Self, Handle), StoreError> {
        let Parts { prepared, config, state_version, session, secret, log, commit } = parts;
        let plugin = session.plugin.clone();
        let version = prepared.inspection.manifest.version.clone();
        let session = Session::new(session, version.clone())?;
        let cursor = session.effects.batch.cursor;
        let mailbox = Arc::new(Mailbox::new());
        let (to_queries, queries) = sync_channel(QUERIES);
        let (waiting, status) = (Arc::<Waiting>::default(), Arc::<Status>::default());
        let handle = Handle {
            name: plugin.clone(),
            log: log.clone(),
            mailbox: mailbox.clone(),
            queries: to_queries,
            waiting: waiting.clone(),
            status: status.clone(),
        };
        let secret = secret_of(&secret, &plugin);
        let mut actor = Self {
            version,
            prepared,
            config,
            state_version,
            body: Body::Bare(Box::new(session)),
            random: EntryRandom::new(secret),
            hash_seed: u128::from_be_bytes(secret[..16].try_into().expect("16 of 32 bytes")),
            log,
            commit,
            progress: Arc::new(Progress::new(mailbox.clone())),
            mailbox,
            queries,
            waiting,
            status,
            buffer: VecDeque::new(),
            batch_begun: None,
            stored_cursor: cursor,
            world_changed: false,
            restart: None,
            tally: PluginStatus { state: "starting", ..PluginStatus::default() },
            plugin,
        };
        actor.watch();
        actor.show();
        Ok((actor, handle))
    }

    /// Runs until `stop` is cancelled; what was handled by then is handed to the commit.
    pub fn run(mut self, stop: &CancellationToken) -> Result<(), ActorError> {
        while !stop.is_cancelled() {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(pause)) => self.mailbox.wait(pause),
                Err(source) => return Err(ActorError { plugin: self.plugin, source }),
            }
        }
        while !self.commit.is_closed() && !self.hand_over() && !self.session().effects.batch.is_empty() {
            self.mailbox.wait(Duration::from_millis(100));
        }
        self.log.unwatch(&self.plugin);
        Ok(())
    }

    /// Handles recorded entries, one after the other, and commits nothing; returns all that the
    /// plugin has done. A plugin that does not start has done nothing.
    pub fn replay(mut self, entries: &[Entry]) -> Result<Batch, StoreError> {
        self.make_ready()?;
        for entry in entries {
            if let Outcome::NotStarted = self.handle(entry)? {
                break;
            }
            self.session_mut().effects.batch.cursor = Offset(entry.offset.0 + 1);
        }
        let session = self.session_mut();
        let next =
            Batch::new(session.plugin().clone(), session.effects.batch.id, 2, session.effects.batch.cursor);
        Ok(std::mem::replace(&mut session.effects.batch, next))
    }

    /// One turn of the loop; returns how long there is nothing to do.
    fn turn(&mut self) -> Result<Option<Duration>, StoreError> {
        let committed = self.progress.committed();
        self.session_mut().settle(committed)?;
        if !self.make_ready()? {
            self.answer_queries()?;
            let pause = self
                .restart
                .as_ref()
                .map_or(RESTART.0, |restart| restart.at.saturating_duration_since(Instant::now()));
            return Ok(Some(pause));
        }
        self.answer_queries()?;
        if self.buffer.is_empty() {
            let cursor = self.cursor();
            self.log.read(cursor, READ, &mut self.buffer)?;
        }
        if self.buffer.is_empty() {
            return self.idle();
        }
        self.handle_some()?;
        self.show();
        if self.batch_is_full() && !self.hand_over() {
            // The commit is behind: it rings when it takes the batch that waits.
            return Ok(self.batch_is_too_large().then_some(Duration::from_millis(100)));
        }
        Ok(None)
    }

    /// Nothing to read: hands over what there is and waits for the next timer.
    fn idle(&mut self) -> Result<Option<Duration>, StoreError> {
        if self.has_something() && !self.hand_over() {
            return Ok(Some(Duration::from_millis(100)));
        }
        self.show();
        let Some((due, _)) = self.session().effects.timers.first() else {
            return Ok(Some(IDLE));
        };
        let now = self.log.now();
        if due <= now {
            self.log.append_now([Kind::Tick(self.plugin.clone())]);
            return Ok(None);
        }
        Ok(Some(due.since(now).min(IDLE)))
    }

    fn handle_some(&mut self) -> Result<(), StoreError> {
        self.batch_begun.get_or_insert_with(Instant::now);
        for _ in 0..BETWEEN_QUERIES {
            let Some(entry) = self.buffer.pop_front() else { return Ok(()) };
            if self.must_wait_for_commit(&entry) {
                self.buffer.push_front(entry);
                self.mailbox.wait(COMMIT_POLL);
                return Ok(());
            }
            if let Outcome::NotStarted = self.handle(&entry)? {
                self.buffer.push_front(entry);
                return Ok(());
            }
            let session = self.session_mut();
            session.effects.batch.cursor = Offset(entry.offset.0 + 1);
        }
        Ok(())
    }

    /// A changed name's document comes with the same commit as the entry; the plugin may read it.
    fn must_wait_for_commit(&self, entry: &Entry) -> bool {
        let Kind::Event(Event::NameChanged(changed)) = &entry.kind else { return false };
        self.session().world.follows().contains_key(&changed.name) && !self.log.is_committed(entry.offset)
    }

    /// Handles one entry: the timers that fell due before it, then what it is to this plugin.
    fn handle(&mut self, entry: &Entry) -> Result<Outcome, StoreError> {
        let mut part = 0;
        while let Some((due, key)) = self.session().effects.timers.first()
            && due <= entry.time
        {
            let key = key.to_owned();
            part += 1;
            if let Outcome::NotStarted = self.fire(entry, part, key, due)? {
                return Ok(Outcome::NotStarted);
            }
        }
        let plugin = self.plugin.clone();
        let world = &mut self.session_mut().world;
        world.set_time(entry.time);
        if world.observe(&plugin, entry) == Change::Some {
            self.world_changed = true;
            if matches!(entry.kind, Kind::Subscription { .. }) {
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

    fn fire(&mut self, entry: &Entry, part: u64, key: String, due: Timestamp) -> Result<Outcome, StoreError> {
        let event = Event::Timer { key: key.clone(), due };
        self.deliver(entry, part, Delivery { event, attempt: 0, first: entry.offset, timer: Some(key) })
    }

    /// Calls `handle` until the event is handled, put off or set aside.
    fn deliver(&mut self, entry: &Entry, part: u64, delivery: Delivery) -> Result<Outcome, StoreError> {
        let event = wit_event(&delivery.event);
        let mut lines = Vec::new();
        let mut reason = String::new();
        for _ in 0..TRIES {
            if !self.make_ready()? {
                return Ok(Outcome::NotStarted);
            }
            self.begin(Mode::Entry, entry, part);
            self.clear_fired(&delivery);
            let failure = match self.instance().handle(&event) {
                Ok(Ok(())) => {
                    self.tally.handled += 1;
                    self.session_mut().effects.batch.entries += 1;
                    return Ok(Outcome::Done);
                }
                Ok(Err(failure)) => failure,
                Err(CallError::Host(error)) => return Err(error),
                Err(CallError::Trap(trap)) => {
                    self.tally.failures += 1;
                    lines.extend(self.fail(true));
                    reason = trap;
                    continue;
                }
            };
            self.tally.failures += 1;
            lines.extend(self.fail(false));
            self.begin(Mode::Entry, entry, part);
            self.clear_fired(&delivery);
            match failure {
                wit::Failure::Retry(after) if delivery.attempt < self.session().limits().retries => {
                    self.put_off(delivery, entry, Duration::from_nanos(after));
                }
                wit::Failure::Retry(_) => {
                    let tries = delivery.attempt + 1;
                    self.set_aside(delivery, entry, format!("still not handled after {tries} tries"), lines);
                }
                wit::Failure::Reject(why) => self.set_aside(delivery, entry, cut(why), lines),
            }
            return Ok(Outcome::Done);
        }
        self.session_mut().begin(Mode::Entry, entry.time);
        self.clear_fired(&delivery);
        self.set_aside(delivery, entry, reason, lines);
        Ok(Outcome::Done)
    }

    fn clear_fired(&mut self, delivery: &Delivery) {
        if let Some(key) = &delivery.timer {
            self.session_mut().effects.set_timer(key.clone(), None);
        }
    }

    fn put_off(&mut self, delivery: Delivery, entry: &Entry, after: Duration) {
        let bytes = match &delivery.event {
            Event::Message { data, .. } => data.len(),
            Event::Timer { .. } | Event::NameChanged(_) | Event::Gap { .. } => 0,
        };
        let retry = Retry {
            at: entry.time.after(after.max(Duration::from_millis(100)).min(Duration::from_secs(86_400))),
            attempt: delivery.attempt + 1,
            first: delivery.first,
            event: delivery.event,
        };
        let batch = &mut self.session_mut().effects.batch;
        batch.bytes += bytes;
        batch.retries.push(retry);
        batch.entries += 1;
    }

    fn set_aside(&mut self, delivery: Delivery, entry: &Entry, reason: String, log: Vec<String>) {
        tracing::warn!(plugin = %self.plugin, offset = %entry.offset, "event set aside: {reason}");
        self.tally.dead_letters += 1;
        let letter = DeadLetter {
            plugin: self.plugin.clone(),
            version: self.version.clone(),
            offset: delivery.first.0,
            time: entry.time.0,
            attempts: delivery.attempt + 1,
            reason,
            log,
            event: delivery.event.to_bytes(),
        };
        let batch = &mut self.session_mut().effects.batch;
        batch.bytes +=
            letter.event.len() + letter.reason.len() + letter.log.iter().map(String::len).sum::<usize>();
        batch.dead.push(letter);
        batch.entries += 1;
    }

    fn command(&mut self, entry: &Entry, method: &str, body: &str) -> Result<Outcome, StoreError> {
        if !self.make_ready()? {
            return Ok(Outcome::NotStarted);
        }
        self.begin(Mode::Entry, entry, 0);
        let reply = match self.instance().command(method, body) {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(refusal)) => {
                self.fail(false);
                Err(reply_error(refusal, method))
            }
            Err(CallError::Host(error)) => return Err(error),
            Err(CallError::Trap(reason)) => {
                self.tally.failures += 1;
                self.fail(true);
                Err(ReplyError::Failed(reason))
            }
        };
        self.tally.handled += 1;
        let to = self.waiting.lock().expect("no one panics while holding the waiting").remove(&entry.offset);
        let batch = &mut self.session_mut().effects.batch;
        batch.entries += 1;
        if let Some(to) = to {
            batch.reply(to, reply);
        }
        Ok(Outcome::Done)
    }

    /// Drops the effects of the call. If it trapped or had any, its instance goes too: the
    /// instance's memory may have seen them. Returns what the plugin logged.
    fn fail(&mut self, trapped: bool) -> Vec<String> {
        let session = self.session_mut();
        let had_effects = session.effects.count() > 0;
        session.roll_back();
        let lines = session.take_lines();
        if trapped || had_effects {
            self.drop_instance();
        }
        lines
    }

    fn answer_queries(&mut self) -> Result<(), StoreError> {
        while let Ok(query) = self.queries.try_recv() {
            let reply = self.answer(&query)?;
            // Whoever asked may have gone away.
            let _ = query.to.send(reply);
        }
        Ok(())
    }

    fn answer(&mut self, query: &Query) -> Result<Reply, StoreError> {
        if !matches!(self.body, Body::Live(_)) {
            let reason = self.tally.reason.clone().unwrap_or_else(|| "it is starting".into());
            return Ok(Err(ReplyError::Unavailable(reason)));
        }
        let time = self.session().world.time();
        self.session_mut().begin(Mode::Query, time);
        self.random.begin(self.cursor().0, u64::MAX);
        Ok(match self.instance().query(&query.method, &query.body) {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(refusal)) => Err(reply_error(refusal, &query.method)),
            Err(CallError::Host(error)) => return Err(error),
            Err(CallError::Trap(reason)) => {
                self.tally.failures += 1;
                self.fail(true);
                Err(ReplyError::Failed(reason))
            }
        })
    }

    /// Makes sure that there is an instance that has started; false if it does not start.
    fn make_ready(&mut self) -> Result<bool, StoreError> {
        if matches!(self.body, Body::Live(_)) {
            return Ok(true);
        }
        if self.restart.as_ref().is_some_and(|restart| Instant::now() < restart.at) {
            return Ok(false);
        }
        match self.start()? {
            Ok(()) => {
                self.restart = None;
                self.tally.state = "running";
                self.tally.reason = None;
                self.show();
                Ok(true)
            }
            Err(reason) => {
                let pause = self.restart.as_ref().map_or(RESTART.0, |last| (last.pause * 2).min(RESTART.1));
                tracing::error!(plugin = %self.plugin, "does not start, trying again in {pause:?}: {reason}");
                self.restart = Some(Restart { at: Instant::now() + pause, pause });
                self.tally.state = "failing";
                self.tally.reason = Some(reason);
                self.show();
                Ok(false)
            }
        }
    }

    /// Makes an instance and calls `start`, whose effects join the batch.
    fn start(&mut self) -> Result<Result<(), String>, StoreError> {
        let Body::Bare(mut session) = std::mem::replace(&mut self.body, Body::Between) else {
            unreachable!("an instance is made only when there is none");
        };
        let time = session.world.time();
        session.begin(Mode::Entry, time);
        self.random.begin(session.effects.batch.cursor.0, u64::MAX);
        let setting = Setting { random: self.random.clone(), hash_seed: self.hash_seed };
        self.tally.instances += 1;
        match Instance::new(&self.prepared, *session, &setting) {
            Ok(instance) => self.body = Body::Live(Box::new(instance)),
            Err(failed) => {
                let (session, error) = *failed;
                self.body = Body::Bare(Box::new(session));
                return refused(error);
            }
        }
        let (config, from) = (self.config.clone(), self.state_version);
        match self.instance().start(&config, from) {
            Ok(Ok(())) => {
                let version = self.prepared.inspection.manifest.state_version;
                if self.state_version != Some(version) {
                    self.session_mut().effects.batch.started = Some(version);
                    self.state_version = Some(version);
                }
                Ok(Ok(()))
            }
            Ok(Err(reason)) => {
                self.fail(true);
                Ok(Err(reason))
            }
            Err(error) => {
                self.fail(true);
                refused(error)
            }
        }
    }

    fn begin(&mut self, mode: Mode, entry: &Entry, part: u64) {
        self.random.begin(entry.offset.0, part);
        self.session_mut().begin(mode, entry.time);
    }

    fn instance(&mut self) -> &mut Instance {
        match &mut self.body {
            Body::Live(instance) => instance,
            _ => unreachable!("made ready before"),
        }
    }

    fn drop_instance(&mut self) {
        self.body = match std::mem::replace(&mut self.body, Body::Between) {
            Body::Live(instance) => Body::Bare(Box::new(instance.into_session())),
            other => other,
        };
    }

    fn session(&self) -> &Session {
        match &self.body {
            Body::Bare(session) => session,
            Body::Live(instance) => instance.session(),
            Body::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }

    fn session_mut(&mut self) -> &mut Session {
        match &mut self.body {
            Body::Bare(session) => session,
            Body::Live(instance) => instance.session_mut(),
            Body::Between => unreachable!("only inside `start` and `drop_instance`"),
        }
    }

    fn cursor(&self) -> Offset {
        self.session().effects.batch.cursor
    }

    fn has_something(&self) -> bool {
        let moved = self.cursor().0 - self.stored_cursor.0;
        !self.session().effects.batch.is_empty() || self.world_changed || moved >= CURSOR_STRIDE
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
        let asked = !batch.follows.is_empty() || !batch.names.is_empty();
        if std::mem::take(&mut self.world_changed) || asked {
            let world = serde_json::to_vec(&self.session().world).expect("a world is plain data");
            self.session_mut().effects.batch.world = Some(world);
        }
        self.stored_cursor = self.cursor();
        self.batch_begun = None;
        let batch = self.session_mut().seal();
        self.commit.submit(batch, self.progress.clone());
        true
    }

    /// Has the log wake this thread for what the plugin is subscribed to.
    fn watch(&self) {
        let topics = self.session().world.subscriptions().iter().cloned().collect();
        self.log.watch(&self.plugin, topics, &self.mailbox);
    }

    fn show(&mut self) {
        self.tally.cursor = self.cursor().0;
        self.tally.state_bytes = self.session().effects.state_size;
        self.tally.timers = self.session().effects.timers.count();
        self.tally.memory = match &self.body {
            Body::Live(instance) => instance.memory(),
            _ => 0,
        };
        self.tally.cpu = nanoseconds(thread_cpu());
        *self.status.lock() = self.tally.clone();
    }
}

/// An event on its way to a plugin.
struct Delivery {
    event: Event,
    attempt: u32,
    first: Offset,
    /// The timer that fired, if it is one.
    timer: Option<String>,
}

fn secret_of(secret: &[u8; 32], plugin: &PluginName) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(secret);
    hash.update(plugin.as_str());
    hash.finalize().into()
}

fn refused(error: CallError) -> Result<Result<(), String>, StoreError> {
    match error {
        CallError::Trap(reason) => Ok(Err(reason)),
        CallError::Host(error) => Err(error),
    }
}

fn reply_error(refusal: bindings::Refusal, method: &str) -> ReplyError {
    match refusal {
        wit::Refusal::UnknownMethod => ReplyError::UnknownMethod(method.to_owned()),
        wit::Refusal::Invalid(why) => ReplyError::Invalid(cut(why)),
        wit::Refusal::NotFound(what) => ReplyError::NotFound(cut(what)),
        wit::Refusal::Conflict(why) => ReplyError::Conflict(cut(why)),
        wit::Refusal::Other(why) => ReplyError::Refused(cut(why)),
    }
}

/// What a plugin says of a failure, as long as an operator reads it.
fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON_BYTES));
    reason
}

fn wit_event(event: &Event) -> wit::Event {
    match event {
        Event::Message { topic, data, origin } => wit::Event::Message(wit::Message {
            topic: topic.to_string(),
            data: data.to_vec(),
            origin: match origin {
                Origin::Plugin(name) => wit::Origin::Plugin(name.to_string()),
                Origin::Host => wit::Origin::Host,
                Origin::Peer(peer) => wit::Origin::Peer(peer.to_string()),
            },
        }),
        Event::Timer { key, due } => wit::Event::Timer(wit::DueTimer { key: key.clone(), due: due.0 }),
        Event::NameChanged(known) => wit::Event::NameChanged(ipns::resolution(known)),
        Event::Gap { topic, since, until } => {
            wit::Event::Gap(wit::Gap { topic: topic.to_string(), since: since.0, until: until.0 })
        }
    }
}
