//! Owns one plugin on trial: what comes from outside is fed to it entry by entry, time passes when it is told to, and
//! each thing that it does is noted. It can crash, and be replaced, between any two entries.

mod between;
mod handling;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::TestError;
use super::bench::{Bench, Given, Plugin};
use super::wiring::{Ground, Wiring};
use crate::effect::{Asked, DeadLetter, NameValue, Retry};
use crate::entry::exported::{Record, What};
use crate::entry::{Event, Kind, Offset, Origin, Resolution};
use crate::host::Ready;
use crate::ident::{ContentPath, IpnsName, KeyName, Topic};
use crate::plugin::Reply;
use crate::retries::{self, Due};
use crate::store::{StateKey, StoreError, TIMERS, names};
use crate::time::Timestamp;

pub use between::Between;

/// Shortest time between two timers of which the second was set to a time that had passed.
const TICK_EVERY: Duration = Duration::from_millis(10);

/// How often timers may fall due in one stretch of time.
const MOST_TICKS: u64 = 1_000_000;

/// How long the record of a followed name is valid.
const VALID_FOR: Duration = Duration::from_secs(24 * 3600);

/// Something that a plugin has done.
#[derive(Debug)]
pub struct Happened {
    /// The entry.
    pub offset: Offset,
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

/// One plugin on trial.
pub struct Trial {
    ground: Ground,
    wiring: Wiring,
    ready: Ready,
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
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial").field("plugin", &self.ground.plugin).finish_non_exhaustive()
    }
}

impl Trial {
    /// Begins with what is given; the plugin is not started before there is something to do.
    pub fn new(bench: &Bench, plugin: &Plugin, given: &Given) -> Result<Self, TestError> {
        let ready = plugin.ready(given)?;
        let ground = Ground::new(bench, plugin.name().clone(), &ready, given)?;
        Ok(Self {
            wiring: ground.wire(&ready)?,
            ground,
            ready,
            happened: Vec::new(),
            committed: 0,
            uncommitted: 0,
            holds: false,
            between: Between::Nothing,
            places: 0,
            replies: BTreeMap::new(),
            heard: BTreeMap::new(),
            listening: Listening::Yes,
            ticked_at: None,
            names: BTreeMap::new(),
            told: BTreeSet::new(),
        })
    }

    /// The time now.
    pub fn now(&self) -> Timestamp {
        self.wiring.loader.log.now()
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
        let mut ticks = 0;
        loop {
            let now = self.now();
            // One that was set to a time that has passed waits a little: nothing else could ever come.
            let earliest = self.ticked_at.map_or(now, |at| at.after(TICK_EVERY).max(now));
            let timer = self.wiring.actor.first_timer().map(|due| due.max(earliest));
            let Due { retries, next } = retries::due(&self.ground.store, now)?;
            if !retries.is_empty() {
                self.hear()?;
                self.with_interruption(|trial| trial.release(retries))?;
                continue;
            }
            match (timer, next) {
                (Some(timer), next) if timer <= until && next.is_none_or(|next| timer <= next) => {
                    // Listening is proven every second, so the proof is a little behind when a timer fires.
                    self.ground.set_time(now.max(Timestamp(timer.0 - 1)));
                    self.hear()?;
                    self.ground.set_time(timer);
                    self.ticked_at = Some(timer);
                    ticks += 1;
                    if ticks > MOST_TICKS {
                        return Err(TestError::Endless(MOST_TICKS, timer));
                    }
                    self.append(Kind::Tick(self.ground.plugin.clone()))?;
                }
                (_, Some(retry)) if retry <= until => self.ground.set_time(retry),
                _ => break,
            }
        }
        self.ground.set_time(until);
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
        self.ground.set_time(until);
        self.restart()?;
        self.tell_gaps()?;
        // What fell due meanwhile does now.
        self.wait_until(until)
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
            What::Command { plugin, .. } if *plugin != self.ground.plugin => return Ok(()),
            // What it has published itself it publishes again.
            What::Name { resolution, .. } | What::Confirmed(resolution) if self.is_own(&resolution.name) => {
                return Ok(());
            }
            What::Name { resolution, document: Some(document) } => {
                let document = document.bytes().map_err(|error| wrong(error.to_string()))?;
                if resolution.path.ipfs().is_none() {
                    return Err(wrong(format!("{} is no file", resolution.path)));
                }
                return self.resolve(resolution.clone(), document);
            }
            _ => {}
        }
        let kind = record.what.kind().map_err(|error| wrong(error.to_string()))?;
        if let Kind::Event(Event::Message { origin: Origin::Plugin(sender), .. }) = &kind
            && *sender == self.ground.plugin
        {
            return Ok(());
        }
        self.feed(kind)
    }

    fn is_own(&self, name: &IpnsName) -> bool {
        self.ready.allowance.reach.writes().any(|key| self.ground.keys.name(key).as_ref() == Some(name))
    }

    /// Asks a question.
    pub fn ask(&mut self, method: &str, body: &str) -> Result<Reply, TestError> {
        self.go_on()?;
        self.make_ready()?;
        Ok(self.wiring.actor.ask(method, body)?)
    }

    /// Gives an order: an entry of the log.
    pub fn command(&mut self, method: &str, body: &str) -> Result<(), TestError> {
        let (plugin, method, body) = (self.ground.plugin.clone(), method.to_owned(), body.to_owned());
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

    /// What has happened since this was last asked, made real or not. Nothing may come between entries then.
    pub fn drain_happened(&mut self) -> Vec<Happened> {
        debug_assert!(self.between == Between::Nothing, "what is taken cannot be taken back");
        self.committed = 0;
        std::mem::take(&mut self.happened)
    }

    /// What has happened since this was last asked, and was made real: nothing takes that back.
    pub fn drain_committed(&mut self) -> Vec<Happened> {
        self.happened.drain(..std::mem::take(&mut self.committed)).collect()
    }

    /// The state as it stands in the store: what was done and not made real is not in it.
    pub fn state(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, TestError> {
        let mut state = BTreeMap::new();
        let first = StateKey::new(self.ground.id, b"");
        for row in self.ground.store.snapshot()?.scan(std::ops::Bound::Included(first.as_bytes()))? {
            let (key, value) = row?;
            let Some(key) = StateKey::strip(self.ground.id, &key) else { break };
            state.insert(key.to_vec(), value);
        }
        Ok(state)
    }

    /// The timers as they stand in the store.
    pub fn timers(&self) -> Result<BTreeMap<String, Timestamp>, TestError> {
        let mut timers = BTreeMap::new();
        let first = StateKey::new(self.ground.id, b"");
        for row in self
            .ground
            .store
            .snapshot()?
            .table(TIMERS)?
            .range(first.as_bytes()..)
            .map_err(StoreError::from)?
        {
            let (key, at) = row.map_err(StoreError::from)?;
            let Some(key) = StateKey::strip(self.ground.id, key.value()) else { break };
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
        let all = names::all(&self.ground.store.snapshot()?)?;
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
