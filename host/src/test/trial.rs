//! Owns one plugin on trial: what comes from outside is fed to it entry by entry, time passes when it is told to, and
//! each thing that it does is noted. It can crash, and be replaced, between any two entries.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt as _;
use libp2p_identity::Keypair;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::{Bench, Given, Identity, Plugin, TestError};
use crate::backend::embedded;
use crate::change::{Change, State};
use crate::commit::{Commit, Durability, NameChange};
use crate::config::Config;
use crate::effect::{Asked, DeadLetter, NameValue, Retry};
use crate::entry::exported::{Record, What};
use crate::entry::{Entry, Event, Hearing, Kind, Offset, Origin, Resolution};
use crate::host::{Loader, Ready, ToRun, Wired};
use crate::ident::{ContentPath, IpnsName, KeyName, PeerName, PluginName, Topic};
use crate::keys::{KeyFile, Keyring, name_of};
use crate::log::{EventLog, TAIL_BYTES};
use crate::plugin::roster::{self, Setup};
use crate::plugin::{Actor, Done, Engine, Handle, Numbers, Order, Reply, Started, Step, Successor};
use crate::retries::{self, Due};
use crate::store::followed::Followed;
use crate::store::outbox::Backlog;
use crate::store::{CURSORS, Memory, PluginId, STATE, StateKey, Store, StoreError, TIMERS, names};
use crate::time::{Clock, Timestamp};

/// Entries that are handled before they are committed, if they concern the plugin's state and timers alone.
const TOGETHER: usize = 256;

/// Shortest time between two timers of which the second was set to a time that had passed.
const TICK_EVERY: Duration = Duration::from_millis(10);

/// Entries that a trial may have.
const MOST_ENTRIES: u64 = 20_000_000;

/// Memory for the pages of the store, in bytes.
const CACHE: usize = 64 << 20;

/// How long the record of a followed name is valid.
const VALID_FOR: Duration = Duration::from_secs(24 * 3600);

/// Something that a plugin has done.
#[derive(Debug)]
pub struct Happened {
    /// The entry.
    pub offset: Offset,
    /// The number of the entry among those that came from outside, from 1; 0 before the first.
    pub number: u64,
    /// The time of the entry.
    pub time: Timestamp,
    /// What it was about.
    pub cause: Cause,
    /// What it asked for.
    pub asked: Asked,
    /// What was set aside.
    pub dead: Vec<DeadLetter>,
    /// What is to be handled again.
    pub retries: Vec<Retry>,
    /// The reply of a command.
    pub reply: Option<Reply>,
    /// What it logged.
    pub lines: Vec<String>,
    /// CPU time.
    pub cpu: Duration,
}

/// What a plugin was called for.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// A start of an instance.
    Start,
    /// A timer that fell due.
    Timer(String),
    /// An entry of the log.
    Entry(Kind),
}

/// Whether the host listens while time passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listening {
    /// To everything.
    Yes,
    /// Not to this topic.
    NotTo(Topic),
    /// To nothing.
    No,
    /// As the records say that are fed.
    AsRecorded,
}

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

/// A clock that shows what it is told to.
#[derive(Debug)]
struct VirtualClock {
    wall: AtomicU64,
    begun: Instant,
}

impl Clock for VirtualClock {
    fn wall(&self) -> Timestamp {
        Timestamp(self.wall.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Instant {
        self.begun
    }
}

/// One plugin on trial.
pub struct Trial {
    plugin: PluginName,
    id: PluginId,
    ready: Ready,
    engine: Arc<Engine>,
    host: Identity,
    clock: Arc<VirtualClock>,
    store: Arc<Store>,
    keys: Arc<Keyring>,
    /// What came from outside.
    numbers: Numbers,
    wiring: Wiring,
    happened: Vec<Happened>,
    /// How much of it is committed.
    committed: usize,
    /// Entries that were handled and are not committed yet.
    uncommitted: usize,
    /// Whether they stay so.
    holds: bool,
    between: Between,
    /// How many entries something may come between.
    places: u64,
    /// How many entries there are, those of passing time included.
    appended: u64,
    /// Who waits for the replies of commands.
    replies: BTreeMap<u64, oneshot::Receiver<Reply>>,
    /// Until when each topic was listened to.
    heard: BTreeMap<Topic, Timestamp>,
    listening: Listening,
    ticked_at: Option<Timestamp>,
    /// What the names of others point to.
    names: BTreeMap<IpnsName, (Resolution, Bytes)>,
    /// Those of them that the plugin was told of.
    told: BTreeSet<IpnsName>,
    _dir: TempDir,
}

/// What is made anew after a crash.
struct Wiring {
    loader: Arc<Loader>,
    actor: Actor,
    handle: Handle,
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial").field("plugin", &self.plugin).finish_non_exhaustive()
    }
}

impl Trial {
    /// Begins with what is given; the plugin is not started before there is something to do.
    pub fn new(bench: &Bench, plugin: &Plugin, given: &Given) -> Result<Self, TestError> {
        let dir = TempDir::new().map_err(TestError::Directory)?;
        let store = Arc::new(Store::open_on(dir.path(), Arc::new(Memory), CACHE)?);
        let ready = plugin.ready(given)?;
        let keys = Arc::new(Keyring::open(&store).map_err(crate::host::HostError::Key)?);
        for key in ready.allowance.reach.keys() {
            let file = match given.host.keys.get(key) {
                Some(name) => KeyFile { is_adopted: true, bytes: name.as_str().as_bytes().to_vec() },
                None => {
                    let bytes = pair_of(given.host.seed, &format!("key {key}")).to_protobuf_encoding();
                    KeyFile { is_adopted: false, bytes: bytes.expect("an ed25519 key has a protobuf form") }
                }
            };
            keys.import(key, &file).map_err(crate::host::HostError::Key)?;
        }
        let name = plugin.name().clone();
        let id = enter(&store, &name, &ready, given)?;
        let clock = Arc::new(VirtualClock { wall: AtomicU64::new(given.time.0), begun: Instant::now() });
        let (engine, numbers) = (bench.engine(), Numbers::default());
        let parts = (&store, &keys, &clock, &engine, &numbers);
        let wiring = Wiring::new(parts, &given.host, &name, &ready)?;
        Ok(Self {
            plugin: name,
            id,
            ready,
            engine,
            host: given.host.clone(),
            clock,
            store,
            keys,
            numbers,
            wiring,
            happened: Vec::new(),
            committed: 0,
            uncommitted: 0,
            holds: false,
            between: Between::Nothing,
            places: 0,
            appended: 0,
            replies: BTreeMap::new(),
            heard: BTreeMap::new(),
            listening: Listening::Yes,
            ticked_at: None,
            names: BTreeMap::new(),
            told: BTreeSet::new(),
            _dir: dir,
        })
    }

    /// The time now.
    pub fn now(&self) -> Timestamp {
        self.wiring.loader.log.now()
    }

    /// How many entries have come from outside.
    pub fn entries(&self) -> u64 {
        self.numbers.count()
    }

    /// Whether the plugin hears a topic.
    pub fn hears(&self, topic: &Topic) -> bool {
        self.wiring.actor.world().subscriptions().contains(topic)
    }

    /// Bytes of memory of its instance.
    pub fn memory(&self) -> usize {
        self.wiring.actor.memory()
    }

    /// Starts the plugin, as it would be before its first entry.
    pub fn start(&mut self) -> Result<(), TestError> {
        self.go_on()?;
        self.make_ready()?;
        self.commit()?;
        self.tell_names()
    }

    /// Feeds it an entry: what a plugin reacts to, or what changes its world. The entry has the time that it is.
    pub fn feed(&mut self, kind: Kind) -> Result<(), TestError> {
        self.go_on()?;
        self.hear()?;
        self.append(kind)
    }

    /// Lets time pass: timers fall due, and what was put off comes again.
    pub fn wait_until(&mut self, until: Timestamp) -> Result<(), TestError> {
        self.go_on()?;
        loop {
            let now = self.now();
            // One that was set to a time that has passed waits a little: nothing else could ever come.
            let earliest = self.ticked_at.map_or(now, |at| at.after(TICK_EVERY).max(now));
            let timer = self.wiring.actor.first_timer().map(|due| due.max(earliest));
            let Due { retries, next } = retries::due(&self.store, now)?;
            if !retries.is_empty() {
                self.hear()?;
                self.with_interruption(|trial| trial.release(retries))?;
                continue;
            }
            match (timer, next) {
                (Some(timer), next) if timer <= until && next.is_none_or(|next| timer <= next) => {
                    // Listening is proven every second, so the proof is a little behind when a timer fires.
                    self.set_time(now.max(Timestamp(timer.0 - 1)));
                    self.hear()?;
                    self.set_time(timer);
                    self.ticked_at = Some(timer);
                    self.feed(Kind::Tick(self.plugin.clone()))?;
                }
                (_, Some(retry)) if retry <= until => self.set_time(retry),
                _ => break,
            }
        }
        self.set_time(until);
        self.hear()
    }

    /// Lets time pass while the host runs and does not hear everything; what it has missed is told as gaps.
    pub fn wait_deaf_until(&mut self, until: Timestamp, listening: Listening) -> Result<(), TestError> {
        self.hear()?;
        self.listening = listening;
        let waited = self.wait_until(until);
        self.listening = Listening::Yes;
        waited?;
        self.tell_gaps()
    }

    /// Lets time pass while the host is down. Timers that fall due meanwhile fire once it is up again.
    pub fn be_down_until(&mut self, until: Timestamp) -> Result<(), TestError> {
        self.go_on()?;
        self.hear()?;
        self.commit()?;
        self.set_time(until);
        self.restart()?;
        self.tell_gaps()
    }

    /// Gives a name of someone else a value; who follows it is told.
    pub fn set_name(&mut self, name: IpnsName, document: Bytes) -> Result<(), TestError> {
        let now = self.now();
        let resolution = Resolution {
            path: NameValue::document(document.clone()).path(),
            sequence: self.names.get(&name).map_or(1, |(known, _)| known.sequence + 1),
            valid_until: now.after(VALID_FOR),
            confirmed_at: now,
            name,
        };
        self.resolve(resolution, document)
    }

    fn resolve(&mut self, resolution: Resolution, document: Bytes) -> Result<(), TestError> {
        self.told.remove(&resolution.name);
        self.names.insert(resolution.name.clone(), (resolution, document));
        self.go_on()?;
        self.hear()?;
        self.tell_names()
    }

    /// Feeds it what a host has recorded, at its time: timers fall due before it.
    pub fn feed_record(&mut self, record: &Record) -> Result<(), TestError> {
        let wrong = |why: String| TestError::Given(format!("entry {}: {why}", record.offset));
        self.listening = Listening::AsRecorded;
        self.wait_until(record.time.max(self.now()))?;
        match &record.what {
            What::Command { plugin, .. } if *plugin != self.plugin => return Ok(()),
            // What it has published itself it publishes again.
            What::Name { resolution, .. } | What::Confirmed(resolution) if self.is_own(&resolution.name) => {
                return Ok(());
            }
            What::Name { resolution, document: Some(document) } => {
                let document = document.bytes().map_err(|error| wrong(error.to_string()))?;
                if NameValue::document(document.clone()).path() != resolution.path {
                    return Err(wrong(format!("the document is not {}", resolution.path)));
                }
                return self.resolve(resolution.clone(), document);
            }
            _ => {}
        }
        let kind = record.what.kind().map_err(|error| wrong(error.to_string()))?;
        if let Kind::Event(Event::Message { origin: Origin::Plugin(sender), .. }) = &kind
            && *sender == self.plugin
        {
            return Ok(());
        }
        self.feed(kind)
    }

    fn is_own(&self, name: &IpnsName) -> bool {
        self.ready.allowance.reach.writes().any(|key| self.keys.name(key).as_ref() == Some(name))
    }

    /// Asks a question.
    pub fn ask(&mut self, method: &str, body: &str) -> Result<Reply, TestError> {
        self.go_on()?;
        self.make_ready()?;
        Ok(self.wiring.actor.ask(method, body)?)
    }

    /// Gives an order: an entry of the log.
    pub fn command(&mut self, method: &str, body: &str) -> Result<(), TestError> {
        let (plugin, method, body) = (self.plugin.clone(), method.to_owned(), body.to_owned());
        self.feed(Kind::Command { plugin, method, body })
    }

    /// Makes real what was done.
    pub fn settle(&mut self) -> Result<(), TestError> {
        self.go_on()?;
        self.commit()
    }

    /// What has happened so far, made real or not.
    pub fn happened(&self) -> &[Happened] {
        &self.happened
    }

    /// Makes real what was done, and returns what has happened since this was last asked.
    pub fn take_happened(&mut self) -> Result<Vec<Happened>, TestError> {
        self.go_on()?;
        self.commit()?;
        self.committed = 0;
        Ok(std::mem::take(&mut self.happened))
    }

    /// What has happened since this was last asked, made real or not. Nothing may come between entries then.
    pub fn drain_happened(&mut self) -> Vec<Happened> {
        debug_assert!(self.between == Between::Nothing, "what is taken cannot be taken back");
        self.committed = 0;
        std::mem::take(&mut self.happened)
    }

    /// The state as it stands in the store: what was done and not made real is not in it.
    pub fn state(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, TestError> {
        let mut state = BTreeMap::new();
        let first = StateKey::new(self.id, b"");
        for row in self.store.snapshot()?.scan(std::ops::Bound::Included(first.as_bytes()))? {
            let (key, value) = row?;
            let Some(key) = StateKey::strip(self.id, &key) else { break };
            state.insert(key.to_vec(), value);
        }
        Ok(state)
    }

    /// The timers as they stand in the store.
    pub fn timers(&self) -> Result<BTreeMap<String, Timestamp>, TestError> {
        let mut timers = BTreeMap::new();
        let first = StateKey::new(self.id, b"");
        for row in
            self.store.snapshot()?.table(TIMERS)?.range(first.as_bytes()..).map_err(StoreError::from)?
        {
            let (key, at) = row.map_err(StoreError::from)?;
            let Some(key) = StateKey::strip(self.id, key.value()) else { break };
            timers.insert(String::from_utf8_lossy(key).into_owned(), Timestamp(at.value()));
        }
        Ok(timers)
    }

    /// The topics that the plugin hears, and the names that it follows.
    pub fn hears_and_follows(&self) -> (Vec<Topic>, Vec<IpnsName>) {
        let world = self.wiring.actor.world();
        (world.subscriptions().iter().cloned().collect(), world.follows().keys().cloned().collect())
    }

    /// What its own names point to.
    pub fn own_names(&self) -> Result<BTreeMap<KeyName, ContentPath>, TestError> {
        let all = names::all(&self.store.snapshot()?)?;
        Ok(all.into_iter().map(|(key, known)| (key, known.path)).collect())
    }

    /// Lets other code take over, as in a running host. Both have the same name.
    pub fn replace(&mut self, plugin: &Plugin, given: &Given) -> Result<(), TestError> {
        let ready = plugin.ready(given)?;
        self.go_on()?;
        self.succeed(ready)
    }

    /// Has something come between the entries from now on.
    pub fn interrupt(&mut self, between: Between) {
        self.between = between;
    }

    /// Between how many entries something may come.
    pub fn places(&self) -> u64 {
        self.places
    }
}

impl Trial {
    fn set_time(&self, time: Timestamp) {
        self.clock.wall.store(time.0, Ordering::Relaxed);
    }

    /// Appends what comes from outside, and handles it.
    fn append(&mut self, kind: Kind) -> Result<(), TestError> {
        if self.appended >= MOST_ENTRIES {
            return Err(TestError::Endless(MOST_ENTRIES));
        }
        if matches!(kind, Kind::Heard(_) | Kind::Peers { .. }) {
            self.append_quietly(kind)?;
        } else {
            self.with_interruption(|trial| trial.append_quietly(kind))?;
        }
        self.tell_names()
    }

    /// Does something that a plugin reacts to, and what is to come between entries.
    fn with_interruption(
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
        self.wiring.loader.commit.run_once(&self.store, &self.wiring.loader.log)?;
        self.restart()?;
        self.go_on()
    }

    fn succeed(&mut self, ready: Ready) -> Result<(), TestError> {
        self.make_ready()?;
        self.commit()?;
        let (done, mut result) = oneshot::channel();
        let test = || "this test".to_owned();
        let successor = Successor {
            run: ready.clone().into_runnable(),
            follows: None,
            setup: Setup::default(),
            change: Change::new(self.plugin.clone(), State::TakingOver, test(), test()),
            done,
        };
        self.wiring.handle.order(Order::Succeed(Box::new(successor)));
        self.wiring.actor.obey_now()?;
        self.commit()?;
        match result.try_recv() {
            Ok(Ok(_)) => {}
            Ok(Err(reason)) => return Err(TestError::DoesNotStart(reason)),
            Err(_) => return Err(TestError::DoesNotStart("it has not taken over".to_owned())),
        }
        self.ready = ready;
        self.wiring.actor.confirm();
        self.go_on()?;
        self.commit()
    }

    fn append_quietly(&mut self, kind: Kind) -> Result<(), TestError> {
        let is_command = matches!(kind, Kind::Command { .. });
        // Time that passes, and listening, come from no one; versions may differ in the timers that they set.
        let is_from_outside = !matches!(kind, Kind::Tick(_) | Kind::Heard(_));
        let entry = self.wiring.loader.log.append(kind);
        if is_from_outside {
            self.came(entry.offset);
        }
        self.appended += 1;
        if is_command {
            self.replies.insert(entry.offset.0, self.wiring.handle.reply_of(entry.offset));
        }
        self.go_on()
    }

    fn came(&mut self, offset: Offset) {
        self.numbers.add(offset.0);
    }

    /// Proves that the topics of the plugin were listened to until now.
    fn hear(&mut self) -> Result<(), TestError> {
        let now = self.now();
        let topics = self.wiring.actor.world().subscriptions().clone();
        self.heard.retain(|topic, _| topics.contains(topic));
        let mut heard = Vec::new();
        for topic in topics {
            let is_heard = match &self.listening {
                Listening::Yes => true,
                Listening::NotTo(other) => *other != topic,
                Listening::No | Listening::AsRecorded => false,
            };
            let since = *self.heard.entry(topic.clone()).or_insert(now);
            if is_heard && since < now {
                self.heard.insert(topic.clone(), now);
                heard.push(Hearing { topic, since, until: now });
            }
        }
        if heard.is_empty() { Ok(()) } else { self.append(Kind::Heard(heard)) }
    }

    /// Tells what was missed, and listens again from now on.
    fn tell_gaps(&mut self) -> Result<(), TestError> {
        let now = self.now();
        let missed: Vec<_> = self.heard.iter().filter(|(_, until)| **until < now).collect();
        let missed: Vec<_> = missed.into_iter().map(|(topic, until)| (topic.clone(), *until)).collect();
        for (topic, since) in missed {
            self.heard.insert(topic.clone(), now);
            self.append(Kind::Event(Event::Gap { topic, since, until: now }))?;
        }
        Ok(())
    }

    /// Makes entries of what was put off.
    fn release(&mut self, due: Vec<((u64, u64), Kind)>) -> Result<(), TestError> {
        let (keys, kinds): (Vec<_>, Vec<_>) = due.into_iter().unzip();
        self.commit()?;
        let first = self.wiring.loader.log.head();
        let count = kinds.len() as u64;
        let commit = self.wiring.loader.commit.clone();
        let mut write = pin!(commit.append_and_write(kinds, move |write| retries::forget(write, &keys)));
        debug_assert!((&mut write).now_or_never().is_none(), "it waits for the commit");
        self.wiring.loader.commit.run_once(&self.store, &self.wiring.loader.log)?;
        write.now_or_never().expect("it was committed")?;
        (first.0..first.0 + count).for_each(|offset| self.came(Offset(offset)));
        self.go_on()
    }

    /// Handles everything that is in the log.
    fn go_on(&mut self) -> Result<(), TestError> {
        loop {
            let mut entries = VecDeque::new();
            self.wiring.loader.log.read(self.wiring.actor.next(), 512, &mut entries)?;
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                self.handle(&entry)?;
            }
        }
    }

    fn handle(&mut self, entry: &Arc<Entry>) -> Result<(), TestError> {
        loop {
            self.make_ready()?;
            let (cause, done, is_over) = match self.wiring.actor.step(entry)? {
                Step::Entry(done) => (Cause::Entry(entry.kind.clone()), done, true),
                Step::Timer(key, done) => (Cause::Timer(key), done, false),
                Step::Stopped(reason) => return Err(TestError::DoesNotStart(reason)),
            };
            self.note(entry, cause, done);
            self.uncommitted += 1;
            let must_be_real = self.wiring.actor.reaches_out() || matches!(entry.kind, Kind::Command { .. });
            if !self.holds && (must_be_real || self.uncommitted >= TOGETHER) {
                self.commit()?;
            }
            if is_over {
                return Ok(());
            }
        }
    }

    fn note(&mut self, entry: &Entry, cause: Cause, done: Done) {
        let Done { was_called, asked, dead, retries, lines, cpu } = done;
        if !was_called && dead.is_empty() && asked == Asked::default() {
            return;
        }
        let (offset, number, time) = (entry.offset, self.numbers.until(entry.offset.0), entry.time);
        let reply = None;
        self.happened.push(Happened { offset, number, time, cause, asked, dead, retries, reply, lines, cpu });
    }

    fn make_ready(&mut self) -> Result<(), TestError> {
        match self.wiring.actor.ready()? {
            Ok(Some(started)) => {
                self.note_started(started);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(reason) => Err(TestError::DoesNotStart(reason)),
        }
    }

    fn note_started(&mut self, Started { asked, lines }: Started) {
        if asked == Asked::default() && lines.is_empty() {
            return;
        }
        self.happened.push(Happened {
            offset: self.wiring.actor.next(),
            number: self.entries(),
            time: self.now(),
            cause: Cause::Start,
            asked,
            dead: Vec::new(),
            retries: Vec::new(),
            reply: None,
            lines,
            cpu: Duration::ZERO,
        });
    }

    /// Makes real what was done.
    fn commit(&mut self) -> Result<(), TestError> {
        let Wiring { loader, actor, .. } = &mut self.wiring;
        actor.submit();
        loader.commit.run_once(&self.store, &loader.log)?;
        actor.take_in()?;
        // All of it is sent at once.
        loader.backlog.length(Some(&self.plugin)).store(0, Ordering::Relaxed);
        self.uncommitted = 0;
        self.take_replies();
        self.committed = self.happened.len();
        Ok(())
    }

    fn take_replies(&mut self) {
        for happened in &mut self.happened[self.committed..] {
            if matches!(happened.cause, Cause::Entry(Kind::Command { .. })) {
                let reply = self.replies.remove(&happened.offset.0);
                happened.reply = reply.and_then(|mut reply| reply.try_recv().ok());
            }
        }
    }

    /// Tells the plugin of the names that it follows and was not told of yet.
    fn tell_names(&mut self) -> Result<(), TestError> {
        loop {
            let follows = self.wiring.actor.world().follows();
            self.told.retain(|name| follows.contains_key(name));
            let is_news = |name: &&IpnsName| self.names.contains_key(*name) && !self.told.contains(*name);
            let Some(name) = follows.keys().find(is_news).cloned() else { return Ok(()) };
            self.told.insert(name.clone());
            self.with_interruption(|trial| trial.tell(name))?;
        }
    }

    fn tell(&mut self, name: IpnsName) -> Result<(), TestError> {
        let (resolution, document) = self.names[&name].clone();
        let NameValue::Document { cid, data } = NameValue::document(document) else {
            unreachable!("a document is one")
        };
        self.commit()?;
        let target = resolution.path.clone();
        let known = Followed { resolution, target, record: Vec::new() };
        let commit = self.wiring.loader.commit.clone();
        let mut change = pin!(commit.change_name(NameChange::Followed { known, cid, data }));
        let offset = self.wiring.loader.log.head();
        debug_assert!((&mut change).now_or_never().is_none(), "it waits for the commit");
        commit.run_once(&self.store, &self.wiring.loader.log)?;
        change.now_or_never().expect("it was committed")?;
        self.came(offset);
        self.go_on()
    }

    /// Begins again from what is in the store.
    fn restart(&mut self) -> Result<(), TestError> {
        self.happened.truncate(self.committed);
        self.uncommitted = 0;
        let parts = (&self.store, &self.keys, &self.clock, &self.engine, &self.numbers);
        self.wiring = Wiring::new(parts, &self.host, &self.plugin, &self.ready)?;
        let waiting: Vec<u64> = self.replies.keys().copied().collect();
        for offset in waiting {
            self.replies.insert(offset, self.wiring.handle.reply_of(Offset(offset)));
        }
        Ok(())
    }
}

type Kept<'a> = (&'a Arc<Store>, &'a Arc<Keyring>, &'a Arc<VirtualClock>, &'a Arc<Engine>, &'a Numbers);

impl Wiring {
    fn new(kept: Kept<'_>, host: &Identity, name: &PluginName, ready: &Ready) -> Result<Self, TestError> {
        let (store, keys, clock, engine, numbers) = kept;
        let (next, last) = store.log_end()?;
        let log = Arc::new(EventLog::new(store.clone(), next, last, clock.clone(), TAIL_BYTES));
        let (backlog, interest, room): (Arc<Backlog>, Arc<_>, Arc<_>) = Default::default();
        let config = Config::default();
        let commit = Arc::new(Commit::new(
            Durability::Eventual,
            config.store.dead_letters,
            Arc::clone(&interest),
            backlog.clone(),
            Arc::clone(&room),
        ));
        let loader = Arc::new(Loader {
            config,
            id: host.id.clone(),
            secret: host.secret,
            numbers: Some(numbers.clone()),
            store: store.clone(),
            keys: keys.clone(),
            backend: embedded::backend(store.clone(), keys.clone()).0,
            interest,
            backlog,
            hearings: Arc::default(),
            commit,
            log,
            room,
            engine: engine.clone(),
            lines: Default::default(),
            lost: Default::default(),
        });
        let stored = roster::read(store, name)?;
        let stored = stored.ok_or_else(|| StoreError::corrupt("plugins", "an entered one is gone"))?;
        let to_run = ToRun { ready: ready.clone(), fallback: None, failed: None };
        let Wired { actor, loaded } = loader.wire(name, stored, to_run)?;
        Ok(Self { loader, actor, handle: loaded.handle })
    }
}

/// Enters the plugin into the store with what is given; returns its number.
fn enter(store: &Store, name: &PluginName, ready: &Ready, given: &Given) -> Result<PluginId, TestError> {
    let write = store.begin()?;
    roster::enter(&write, name, roster::entered(None, ready.code.clone()), Offset(0))?;
    let mut row = roster::row_within(&write, name)?;
    row.state_version = given.state_version;
    let mut size = 0;
    {
        let mut table = write.open_table(STATE).map_err(StoreError::from)?;
        for (key, value) in &given.state {
            size += (key.len() + value.len()) as u64;
            let key = StateKey::new(row.id, key);
            table.insert(key.as_bytes(), value.as_slice()).map_err(StoreError::from)?;
        }
        let mut table = write.open_table(TIMERS).map_err(StoreError::from)?;
        for (key, at) in &given.timers {
            let key = StateKey::new(row.id, key.as_bytes());
            table.insert(key.as_bytes(), at.0).map_err(StoreError::from)?;
        }
        let mut table = write.open_table(CURSORS).map_err(StoreError::from)?;
        table.insert(row.id.0, (0, size)).map_err(StoreError::from)?;
    }
    roster::put_within(&write, name, &row)?;
    write.commit().map_err(StoreError::from)?;
    Ok(row.id)
}

/// Bytes that follow from a seed and a word.
pub(super) fn secret_of(seed: u64, word: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"dim test");
    hash.update(seed.to_be_bytes());
    hash.update(word);
    hash.finalize().into()
}

fn pair_of(seed: u64, word: &str) -> Keypair {
    Keypair::ed25519_from_bytes(secret_of(seed, word)).expect("any 32 bytes are an ed25519 key")
}

/// A peer that has this word for a name.
pub fn peer_of(seed: u64, word: &str) -> PeerName {
    let peer = pair_of(seed, &format!("peer {word}")).public().to_peer_id();
    peer.to_base58().parse().expect("a peer id is base58")
}

/// The name of the plugin's own key of this name.
pub fn key_for(seed: u64, key: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("key {key}")))
}

/// An IPNS name that has this word for a name.
pub fn name_for(seed: u64, word: &str) -> IpnsName {
    name_of(&pair_of(seed, &format!("name {word}")))
}
