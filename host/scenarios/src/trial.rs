//! Owns the trial of one plugin. Receives entries and spans of time one by one; returns the effects of each call. The
//! host can crash, and the plugin can be replaced, between any two entries.

mod interruptions;
mod handling;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use dim_model::entry::export::{Record, What};
use dim_model::entry::{Event, Kind, Offset, Origin, Resolution};
use dim_model::ident::{ContentPath, IpnsName, KeyName, Topic};
use dim_model::time::Timestamp;
use dim_server::host::Ready;
use dim_store::batch::Reply;
use dim_store::effect::{Asked, DeadLetter, NameValue, Retry};
use dim_store::retry_scheduler::{self, Due};
use dim_store::{StateKey, StoreError, TIMERS, names};
use tokio::sync::oneshot;

use crate::TrialError;
use crate::test_bench::{Given, Plugin, TestBench};
use crate::wiring::{Ground, Wiring};

pub use interruptions::Between;

/// Minimum time before a timer fires that was set to a time in the past.
const TICK_EVERY: Duration = Duration::from_millis(10);

/// Maximum number of timers that fire in one [`Trial::wait_until`].
const MOST_TICKS: u64 = 1_000_000;

/// Validity of the record of a followed name.
const VALID_FOR: Duration = Duration::from_secs(24 * 3600);

/// One call of a plugin, and its effects.
#[derive(Debug)]
pub struct Happened {
    /// The offset of the entry.
    pub offset: Offset,
    /// The time of the entry.
    pub time: Timestamp,
    /// The cause of the call.
    pub cause: Cause,
    /// The effects that the plugin requested.
    pub asked: Asked,
    /// The dead letters of the call.
    pub dead: Vec<DeadLetter>,
    /// The retries of the call.
    pub retries: Vec<Retry>,
    /// The reply to a command; none until it is committed.
    pub reply: Option<Reply>,
    /// The log lines of the plugin.
    pub lines: Vec<String>,
    /// The CPU time of the call.
    pub cpu: Duration,
}

/// The cause of a call.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// The start of an instance.
    Start,
    /// A timer that fired.
    Timer(String),
    /// An entry of the log.
    Entry(Kind),
}

/// The topics that the host listens to while time passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listening {
    /// All topics.
    Yes,
    /// All topics except this one.
    NotTo(Topic),
    /// No topic.
    No,
    /// The topics in the listening records that are fed to the trial.
    AsRecorded,
}

/// The trial of one plugin.
pub struct Trial {
    ground: Ground,
    wiring: Wiring,
    ready: Ready,
    happened: Vec<Happened>,
    between: Between,
    /// The number of entries so far that an interruption can hit.
    places: u64,
    /// The receivers of replies to commands, by the offset of the command.
    replies: BTreeMap<u64, oneshot::Receiver<Reply>>,
    /// The time until which the host has listened to each topic.
    heard: BTreeMap<Topic, Timestamp>,
    listening: Listening,
    ticked_at: Option<Timestamp>,
    commits: Commits,
    followed: FollowedNames,
    kept: KeptEvents,
}

/// The events that members keep for plugins that subscribe later.
#[derive(Default)]
struct KeptEvents {
    /// The events and gaps that a plugin which subscribes later receives, with the times at which they came.
    events: Vec<(Timestamp, Event)>,
    /// Whether recorded entries bring the earlier events of a subscription.
    is_recorded: bool,
    /// The topics whose earlier events recorded entries bring now, and whether the messages of the host are among them.
    recorded: BTreeMap<Topic, bool>,
}

/// The commits of a trial.
#[derive(Default)]
struct Commits {
    /// The number of committed calls in `happened`.
    committed: usize,
    /// The number of handled entries that are not committed yet.
    uncommitted: usize,
    /// Whether automatic commits are suspended.
    holds: bool,
}

/// The names that the plugin follows.
#[derive(Default)]
struct FollowedNames {
    /// The values of the names of other owners.
    names: BTreeMap<IpnsName, (Resolution, Bytes)>,
    /// The names whose current value the plugin has received.
    told: BTreeSet<IpnsName>,
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial").field("plugin", &self.ground.plugin).finish_non_exhaustive()
    }
}

impl Trial {
    /// Creates a trial with the given data. The plugin starts with the first entry, or in [`Trial::start`].
    pub fn new(bench: &TestBench, plugin: &Plugin, given: &Given) -> Result<Self, TrialError> {
        let ready = plugin.ready(given)?;
        let ground = Ground::new(bench, plugin.name().clone(), &ready, given)?;
        Ok(Self {
            wiring: ground.wire(&ready)?,
            ground,
            ready,
            happened: Vec::new(),
            between: Between::Nothing,
            places: 0,
            replies: BTreeMap::new(),
            heard: BTreeMap::new(),
            listening: Listening::Yes,
            ticked_at: None,
            commits: Commits::default(),
            followed: FollowedNames::default(),
            kept: KeptEvents::default(),
        })
    }

    /// The current log time.
    pub fn now(&self) -> Timestamp {
        self.wiring.loader.storage.log.now()
    }

    /// Whether the plugin is subscribed to a topic.
    pub fn hears(&self, topic: &Topic) -> bool {
        self.wiring.actor.context().subscriptions().contains(topic)
    }

    /// The memory of the instance, in bytes.
    pub fn memory(&self) -> usize {
        self.wiring.actor.memory()
    }

    /// Starts the plugin, commits, and delivers the values of the names that it follows.
    pub fn start(&mut self) -> Result<(), TrialError> {
        self.go_on()?;
        self.make_ready()?;
        self.commit()?;
        self.catch_up()?;
        self.tell_names()
    }

    /// Leaves it to recorded entries to bring the earlier events of a subscription.
    pub fn expect_recorded_events(&mut self) {
        self.kept.is_recorded = true;
    }

    /// Appends an entry with the current time and handles it: an event for the plugin, or a change of its entry
    /// context.
    pub fn feed(&mut self, kind: Kind) -> Result<(), TrialError> {
        self.go_on()?;
        self.hear()?;
        self.append(kind)
    }

    /// Lets time pass until `until`: timers fire, and retries are due. Fails with [`TrialError::Endless`] if timers
    /// fire too often.
    pub fn wait_until(&mut self, until: Timestamp) -> Result<(), TrialError> {
        self.go_on()?;
        let mut ticks = 0;
        loop {
            let now = self.now();
            // A timer that was set to a time in the past waits a little. Otherwise a timer that sets itself again
            // would stop the time forever.
            let earliest = self.ticked_at.map_or(now, |at| at.after(TICK_EVERY).max(now));
            let timer = self.wiring.actor.first_timer().map(|due| due.max(earliest));
            let Due { retries, next } = retry_scheduler::due(&self.ground.store, now)?;
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
                        return Err(TrialError::Endless(MOST_TICKS, timer));
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

    /// Lets time pass while the host runs but does not hear all topics. Afterwards the plugin receives `gap` events.
    pub fn wait_deaf_until(&mut self, until: Timestamp, listening: Listening) -> Result<(), TrialError> {
        self.hear()?;
        self.listening = listening;
        let waited = self.wait_until(until);
        self.listening = Listening::Yes;
        waited?;
        self.tell_gaps()
    }

    /// Lets time pass while the host is down. Timers that are due in this time fire after the restart.
    pub fn be_down_until(&mut self, until: Timestamp) -> Result<(), TrialError> {
        self.go_on()?;
        self.hear()?;
        self.commit()?;
        self.ground.set_time(until);
        self.restart()?;
        self.tell_gaps()?;
        // The timers that were due in the meantime fire now.
        self.wait_until(until)
    }

    /// Sets the document of a name of another owner. A plugin that follows the name receives an event.
    pub fn set_name(&mut self, name: IpnsName, document: Bytes) -> Result<(), TrialError> {
        let now = self.now();
        let resolution = Resolution {
            path: NameValue::document(document.clone()).path(),
            sequence: self.followed.names.get(&name).map_or(1, |(known, _)| known.sequence + 1),
            valid_until: now.after(VALID_FOR),
            confirmed_at: now,
            name,
        };
        self.resolve(resolution, document)
    }

    fn resolve(&mut self, resolution: Resolution, document: Bytes) -> Result<(), TrialError> {
        self.followed.told.remove(&resolution.name);
        self.followed.names.insert(resolution.name.clone(), (resolution, document));
        self.go_on()?;
        self.hear()?;
        self.tell_names()
    }

    /// Feeds a recorded entry at its time. Timers and retries that are due before it come first. Entries that the
    /// plugin itself caused are skipped, because it causes them again.
    pub fn feed_record(&mut self, record: &Record) -> Result<(), TrialError> {
        let wrong = |why: String| TrialError::Given(format!("entry {}: {why}", record.offset));
        self.listening = Listening::AsRecorded;
        self.wait_until(record.time.max(self.now()))?;
        match &record.what {
            What::Command { plugin, .. } if *plugin != self.ground.plugin => return Ok(()),
            // The plugin publishes its own names again.
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
            What::CatchingUp { who, .. } | What::CaughtUp { who, .. } if who.plugin != self.ground.plugin => {
                return Ok(());
            }
            What::CatchingUp { topic, own_too, .. } => {
                self.kept.recorded.insert(topic.clone(), *own_too);
                return Ok(());
            }
            What::CaughtUp { topic, .. } => {
                self.kept.recorded.remove(topic);
            }
            _ => {}
        }
        let kind = record.what.kind().map_err(|error| wrong(error.to_string()))?;
        if let Kind::Event(event) = &kind {
            self.end_unrecorded_catch_up(event)?;
        }
        if let Kind::Event(Event::Message { origin: Origin::Plugin(sender), .. }) = &kind
            && *sender == self.ground.plugin
        {
            return Ok(());
        }
        self.feed(self.undeferred(kind))
    }

    fn is_own(&self, name: &IpnsName) -> bool {
        self.ready.allowance.reach.writes().any(|key| self.ground.keys.name(key).as_ref() == Some(name))
    }

    /// Sends a query; returns the reply.
    pub fn ask(&mut self, method: &str, body: &str) -> Result<Reply, TrialError> {
        self.go_on()?;
        self.make_ready()?;
        Ok(self.wiring.actor.ask(method, body)?)
    }

    /// Sends a command, which is an entry of the log.
    pub fn command(&mut self, method: &str, body: &str) -> Result<(), TrialError> {
        let (plugin, method, body) = (self.ground.plugin.clone(), method.to_owned(), body.to_owned());
        self.feed(Kind::Command { plugin, method, body })
    }

    /// Handles all entries and commits.
    pub fn settle(&mut self) -> Result<(), TrialError> {
        self.go_on()?;
        self.commit()
    }

    /// The calls so far, committed or not.
    pub fn happened(&self) -> &[Happened] {
        &self.happened
    }

    /// Takes the calls so far, committed or not. There must be no interruptions, because a crash could not revert these
    /// calls any more.
    pub fn drain_happened(&mut self) -> Vec<Happened> {
        debug_assert!(self.between == Between::Nothing, "what is taken cannot be taken back");
        self.commits.committed = 0;
        std::mem::take(&mut self.happened)
    }

    /// Takes the committed calls so far. No crash can revert them.
    pub fn drain_committed(&mut self) -> Vec<Happened> {
        self.happened.drain(..std::mem::take(&mut self.commits.committed)).collect()
    }

    /// The committed state.
    pub fn state(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, TrialError> {
        let mut state = BTreeMap::new();
        let first = StateKey::new(self.ground.id, b"");
        for row in self.ground.store.snapshot()?.scan(std::ops::Bound::Included(first.as_bytes()))? {
            let (key, value) = row?;
            let Some(key) = StateKey::strip(self.ground.id, &key) else { break };
            state.insert(key.to_vec(), value);
        }
        Ok(state)
    }

    /// The committed timers.
    pub fn timers(&self) -> Result<BTreeMap<String, Timestamp>, TrialError> {
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

    /// The topics that the plugin is subscribed to, and the names that it follows.
    pub fn hears_and_follows(&self) -> (Vec<Topic>, Vec<IpnsName>) {
        let context = self.wiring.actor.context();
        (context.subscriptions().iter().cloned().collect(), context.follows().keys().cloned().collect())
    }

    /// The paths of the plugin's own names.
    pub fn own_names(&self) -> Result<BTreeMap<KeyName, ContentPath>, TrialError> {
        let all = names::all(&self.ground.store.snapshot()?)?;
        Ok(all.into_iter().map(|(key, known)| (key, known.path)).collect())
    }

    /// Replaces the code of the plugin, as a running host does. Both must have the same name. Fails if the new code
    /// does not start.
    pub fn replace(&mut self, plugin: &Plugin, given: &Given) -> Result<(), TrialError> {
        let ready = plugin.ready(given)?;
        self.go_on()?;
        self.succeed(ready)
    }

    /// Sets the interruptions between the following entries.
    pub fn interrupt(&mut self, between: Between) {
        self.between = between;
    }

    /// The number of entries so far that an interruption can hit.
    pub fn places(&self) -> u64 {
        self.places
    }
}
