//! Owns what the host functions work on during a call: the world, the effects, the grants and the
//! limits of one plugin. Knows nothing of WebAssembly.

mod ipns;
mod outgoing;
mod pubsub;
mod state;
mod timers;

pub use outgoing::{OUTBOX, RATE, Room};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::effects::{Batch, Effects};
use super::limits::KEY_BYTES;
use super::roster::Stored;
use super::{Limits, Line, Lines, Reach, World};
use crate::escape::escaped;
use crate::ident::{IpnsName, KeyName, PluginName};
use crate::keys::Keyring;
use crate::store::{PluginId, Snapshot, Store, StoreError};
use crate::time::Timestamp;

/// Why a host function refuses. Each interface says it in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The grant is missing for this topic, key or name.
    NotGranted(String),
    /// What is wrong with an argument.
    Invalid(String),
    /// A granted name that is not known yet.
    NotYetKnown,
    /// What a name points to is no document.
    NotADocument(String),
    /// More bytes than the named limit allows, which is this.
    TooLarge(&'static str, u64),
    /// A key is empty or longer than this.
    KeyLength(u32),
    /// The state would grow past this.
    Quota(u64),
    /// There are as many as there may be.
    TooMany(u32),
    /// The named limit of an entry is used up.
    Limit(&'static str),
    /// Queries have no effects.
    ReadOnly,
}

impl Refusal {
    /// What is met: `grants`, or the name of a limit. None for what is wrong or not there.
    pub fn met(&self) -> Option<&'static str> {
        match self {
            Self::NotGranted(_) => Some(GRANTS),
            Self::TooLarge(limit, _) | Self::Limit(limit) => Some(limit),
            Self::KeyLength(_) => Some("key-bytes"),
            Self::Quota(_) => Some("state-bytes"),
            Self::TooMany(_) => Some("timers"),
            Self::Invalid(_) | Self::NotYetKnown | Self::NotADocument(_) | Self::ReadOnly => None,
        }
    }
}

/// What is met by who asks for what is not granted.
pub const GRANTS: &str = "grants";

/// How a host function ends: an answer, a refusal that the plugin can handle, or a fault of the
/// host that traps.
pub type Answer<T> = Result<Result<T, Refusal>, StoreError>;

/// Answers with the refusal if there is one.
macro_rules! allowed {
    ($check:expr) => {
        match $check {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}
pub(super) use allowed;

/// What kind of call is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An instance is being made: effects are refused, for nothing has begun that they could be part of.
    Making,
    /// An entry, or a start: effects are gathered.
    Entry,
    /// A query: effects are refused.
    Query,
}

/// What a session is made of.
#[derive(Debug)]
pub struct SessionParts {
    /// The plugin's name.
    pub plugin: PluginName,
    /// Its number.
    pub id: PluginId,
    /// What it may reach.
    pub reach: Arc<Reach>,
    /// What it may take.
    pub limits: Limits,
    /// Its world as of the cursor.
    pub world: World,
    /// Its effects, none yet.
    pub effects: Effects,
    /// Where committed state is read.
    pub store: Arc<Store>,
    /// Where files are read: the same, unless a recorded log is handled again.
    pub files: Arc<Store>,
    /// The host's keys.
    pub keys: Arc<Keyring>,
    /// How many publishes of this plugin wait to be sent.
    pub outbox_len: Arc<AtomicUsize>,
    /// Where the lines of its log go by.
    pub listeners: Lines,
}

/// One plugin's side of the host functions.
#[derive(Debug)]
pub struct Session {
    pub(super) plugin: PluginName,
    id: PluginId,
    pub(super) reach: Arc<Reach>,
    limits: Limits,
    /// The world of the entry.
    pub world: World,
    /// What was asked for.
    pub effects: Effects,
    /// What kind of call is under way.
    pub mode: Mode,
    /// What the plugin logged during the call.
    pub lines: Vec<String>,
    lines_dropped: usize,
    /// How many lines may be told, and since when that is known.
    line_rate: (f64, Instant),
    /// What the plugin has met: grants and limits, and how often.
    pub(super) met: BTreeMap<&'static str, u64>,
    /// Whether a limit was met since the call began.
    has_met: bool,
    /// What it asked for last that is not granted.
    pub(super) last_denied: Option<String>,
    version: String,
    store: Arc<Store>,
    files: Arc<Store>,
    snapshot: Snapshot,
    keys: Arc<Keyring>,
    outbox_len: Arc<AtomicUsize>,
    listeners: Lines,
    /// How much the call may publish.
    pub(super) outgoing: outgoing::Room,
    rate: outgoing::Rate,
    /// What starts may publish, in the time of the machine: that of the log stands still while they fail.
    start_rate: outgoing::Rate,
    /// What the last start has published.
    started: outgoing::Room,
    /// The keys whose last document was too large, each with its limit in bytes.
    pub(super) too_large: BTreeMap<KeyName, usize>,
    /// The clock that WASI shows, in nanoseconds since 1970.
    clock: Arc<AtomicU64>,
    /// The key that was read last and the length of its value: what is written next is mostly it.
    last_read: Option<(Vec<u8>, Option<usize>)>,
}

impl Session {
    /// A session for `version` of a plugin.
    pub fn new(parts: SessionParts, version: String) -> Result<Self, StoreError> {
        let SessionParts { plugin, id, reach, limits, world, effects, store, files, keys, .. } = parts;
        let SessionParts { outbox_len, listeners, .. } = parts;
        let clock = Arc::new(AtomicU64::new(world.time().0));
        let snapshot = store.snapshot()?;
        Ok(Self {
            plugin,
            id,
            reach,
            limits,
            world,
            effects,
            mode: Mode::Entry,
            lines: Vec::new(),
            lines_dropped: 0,
            line_rate: (limits.log_lines_per_second.saturating_mul(outgoing::BURST) as f64, Instant::now()),
            met: BTreeMap::new(),
            has_met: false,
            last_denied: None,
            version,
            store,
            files,
            snapshot,
            keys,
            outbox_len,
            listeners,
            outgoing: outgoing::Room::ENDLESS,
            rate: outgoing::Rate::default(),
            start_rate: outgoing::Rate::default(),
            started: outgoing::Room::ENDLESS,
            too_large: BTreeMap::new(),
            clock,
            last_read: None,
        })
    }

    /// Goes on as another version, with what that may reach and take.
    pub fn run_as(&mut self, version: String, reach: Arc<Reach>, limits: Limits) {
        self.version = version;
        self.reach = reach;
        self.limits = limits;
    }

    /// Where committed state is read.
    pub fn store(&self) -> Arc<Store> {
        self.store.clone()
    }

    /// The keys that the plugin may write, and their names.
    pub fn own_keys(&self) -> Vec<(KeyName, IpnsName)> {
        self.keys.names_of(self.reach.writes())
    }

    /// Drops what is not handed to the commit yet: an empty batch is in its place.
    pub fn discard(&mut self) -> Batch {
        let Batch { id, by, number, cursor, .. } = self.effects.batch;
        let empty = Batch::new(self.plugin.clone(), id, by, number, cursor);
        std::mem::replace(&mut self.effects.batch, empty)
    }

    /// Begins again with what is in the store; the next batch is number `number`.
    pub fn begin_again(&mut self, stored: Stored, number: u64) -> Result<(), StoreError> {
        self.world = stored.world;
        self.effects = stored.effects;
        self.effects.batch.number = number;
        self.too_large.clear();
        self.last_read = None;
        // Log time goes back, too: what was published since does not count any more.
        self.rate = outgoing::Rate::default();
        self.renew_snapshot()
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The clock that WASI shows.
    pub fn clock(&self) -> Arc<AtomicU64> {
        self.clock.clone()
    }

    /// The plugin's name.
    pub fn plugin(&self) -> &PluginName {
        &self.plugin
    }

    /// Begins a call at `time`.
    pub fn begin(&mut self, mode: Mode, time: Timestamp) {
        self.mode = mode;
        self.has_met = false;
        self.lines.clear();
        self.lines_dropped = 0;
        self.world.set_time(time);
        self.clock.store(self.world.time().0, Ordering::Relaxed);
        self.outgoing = self.rate.room(time, &self.limits, &self.outgoing, self.outbox_room());
        self.effects.begin_entry();
        self.last_read = None;
    }

    /// Begins what is no call: there is nothing that it asked for.
    pub fn begin_nothing(&mut self) {
        self.effects.begin_entry();
        self.lines.clear();
    }

    /// Begins a start at `time`.
    pub fn begin_start(&mut self, time: Timestamp) {
        self.begin(Mode::Entry, time);
        let (now, used) = (Timestamp::wall(), self.started);
        self.outgoing = self.start_rate.room(now, &self.limits, &used, self.outbox_room());
    }

    /// Ends a start; returns whether it has found too little room for its publishes, of which there may be more later.
    pub fn end_start(&mut self) -> bool {
        self.started = std::mem::replace(&mut self.outgoing, outgoing::Room::ENDLESS);
        self.started.may_grow(&self.limits)
    }

    /// How many messages more may wait to be sent.
    fn outbox_room(&self) -> usize {
        let waiting = self.outbox_len.load(Ordering::Relaxed)
            + self.effects.layers().map(|batch| batch.publishes.len()).sum::<usize>();
        self.limits.outbox.saturating_sub(waiting)
    }

    /// Takes back what the call asked for.
    pub fn roll_back(&mut self) {
        self.outgoing.give_back();
        self.effects.roll_back(&mut self.world);
        self.last_read = None;
    }

    /// Forgets batches that are durable by now, and reads from a newer snapshot.
    pub fn settle(&mut self, committed: u64) -> Result<(), StoreError> {
        if self.effects.in_flight.first().is_some_and(|batch| batch.number <= committed) {
            self.renew_snapshot()?;
            self.effects.in_flight.retain(|batch| batch.number > committed);
        }
        Ok(())
    }

    /// Reads from what is committed by now: the store frees no page that an old snapshot shows.
    pub fn renew_snapshot(&mut self) -> Result<(), StoreError> {
        self.snapshot = self.store.snapshot()?;
        Ok(())
    }

    /// Closes the batch and begins the next one.
    pub fn seal(&mut self) -> Arc<Batch> {
        let next = Batch::new(
            self.plugin.clone(),
            self.id,
            self.effects.batch.by,
            self.effects.batch.number + 1,
            self.effects.batch.cursor,
        );
        self.effects.batch.state_size = self.effects.state_size;
        let sealed = Arc::new(std::mem::replace(&mut self.effects.batch, next));
        self.effects.in_flight.push(sealed.clone());
        sealed
    }

    /// A line of the plugin's log, for the operator and for a dead letter. It is one line, whatever it holds: what
    /// would end it, or move a terminal's cursor, is written out.
    pub fn line(&mut self, level: tracing::Level, text: String) {
        let text = escaped(&text).into_owned();
        if self.lines.len() >= self.limits.log_lines {
            self.lines_dropped += 1;
            self.meets("log-lines");
            return;
        }
        if !self.may_tell() {
            self.meets("log-lines-per-second");
            self.lines.push(text);
            return;
        }
        let (plugin, version) = (&self.plugin, &self.version);
        match level {
            tracing::Level::ERROR => tracing::error!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::WARN => tracing::warn!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::INFO => tracing::info!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::DEBUG => tracing::debug!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::TRACE => tracing::trace!(target: "dim::plugin", %plugin, version, "{text}"),
        }
        let level = level.as_str().to_ascii_lowercase();
        let (plugin, version, time) = (plugin.clone(), version.clone(), Timestamp::wall());
        self.listeners.feed().tell(Line { plugin, version, time, level, text: text.clone() });
        self.lines.push(text);
    }

    /// Whether a line more may be told by the rate; then it is counted.
    fn may_tell(&mut self) -> bool {
        let per_second = self.limits.log_lines_per_second as f64;
        let (left, at) = self.line_rate;
        let left = (left + per_second * at.elapsed().as_secs_f64()).min(per_second * outgoing::BURST as f64);
        let may = left >= 1.0;
        self.line_rate = (if may { left - 1.0 } else { left }, Instant::now());
        may
    }

    /// Counts that a limit, or what is granted, was met.
    pub fn meets(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
        // That nobody takes what waits to be sent is no fault of the plugin.
        self.has_met |= what != GRANTS && what != OUTBOX;
    }

    /// Whether a limit was met since the call began.
    pub fn has_met(&self) -> bool {
        self.has_met
    }

    /// Counts a refusal.
    pub fn refuses(&mut self, refusal: &Refusal) {
        if let Refusal::NotGranted(what) = refusal {
            self.last_denied = Some(what.clone());
        }
        if let Some(what) = refusal.met() {
            self.meets(what);
        }
    }

    /// The lines of the call, with a note of those that were dropped.
    pub fn take_lines(&mut self) -> Vec<String> {
        let mut lines = std::mem::take(&mut self.lines);
        if self.lines_dropped > 0 {
            lines.push(format!("({} more lines were dropped)", self.lines_dropped));
        }
        lines
    }

    /// Whether one more effect of `bytes` bytes may be asked for.
    fn may_effect(&self, bytes: usize) -> Result<(), Refusal> {
        if self.mode != Mode::Entry {
            return Err(Refusal::ReadOnly);
        }
        if self.effects.count() >= self.limits.effects {
            return Err(Refusal::Limit("effects"));
        }
        if self.effects.entry_bytes() + bytes > self.limits.effect_bytes {
            return Err(Refusal::Limit("effect-bytes"));
        }
        Ok(())
    }
}

/// Refuses a key that may not be one of the state or of a timer.
pub fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.is_empty() || key.len() > KEY_BYTES {
        return Err(Refusal::KeyLength(KEY_BYTES as u32));
    }
    Ok(())
}

/// A word that a plugin has written.
pub fn word<T: std::str::FromStr<Err = crate::ident::InvalidWord>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|error: crate::ident::InvalidWord| Refusal::Invalid(error.to_string()))
}
