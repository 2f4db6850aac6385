//! Owns the data of the host functions during a call: the context, the effects, the grants and the limits of
//! one plugin. It receives arguments as domain types, and returns answers or refusals. It knows nothing of
//! WebAssembly.

mod ipns;
mod outgoing;
mod pubsub;
mod state;
mod timers;

pub use outgoing::Room;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use dim_ipfs::keys::Keyring;
use dim_model::escape::escaped;
use dim_model::ident::{IpnsName, KeyName, PluginName};
use dim_model::time::Timestamp;
use dim_store::batch::{Batch, Effects};
use dim_store::catch_ups::KeptTopics;
use dim_store::entry_context::EntryContext;
use dim_store::grants::Reach;
use dim_store::plugin_limits::{KEY_BYTES, LimitName, Limits};
use dim_store::plugin_registry::Stored;
use dim_store::{PluginId, Snapshot, Store, StoreError};

use crate::{Line, Lines};

/// The reason why a host function refuses a call. Each interface has its own error for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The plugin has no grant for this topic, key or name.
    NotGranted(String),
    /// An argument is invalid, for this reason.
    Invalid(String),
    /// The value of a granted name is not known yet.
    NotYetKnown,
    /// A name points to something other than a document.
    NotADocument(String),
    /// The value exceeds the named limit, which has this value.
    TooLarge(LimitName, u64),
    /// A key is empty or longer than this number of bytes.
    KeyLength(u32),
    /// The state would exceed this number of bytes.
    Quota(u64),
    /// The plugin has this number of timers already, which is the maximum.
    TooMany(u32),
    /// The named limit of an entry is exhausted.
    Limit(LimitName),
    /// The call is a query, which has no effects.
    ReadOnly,
}

impl Refusal {
    /// The exceeded limit, or `grants`; `None` for other refusals.
    pub fn met(&self) -> Option<LimitName> {
        match self {
            Self::NotGranted(_) => Some(LimitName::GRANTS),
            Self::TooLarge(limit, _) | Self::Limit(limit) => Some(*limit),
            Self::KeyLength(_) => Some(LimitName::KEY_BYTES),
            Self::Quota(_) => Some(LimitName::STATE_BYTES),
            Self::TooMany(_) => Some(LimitName::TIMERS),
            Self::Invalid(_) | Self::NotYetKnown | Self::NotADocument(_) | Self::ReadOnly => None,
        }
    }
}

/// The result of a host function: an answer, a refusal that the plugin can handle, or a fault of the host,
/// which traps the guest.
pub type Answer<T> = Result<Result<T, Refusal>, StoreError>;

/// Returns the refusal from the function if there is one.
macro_rules! allowed {
    ($check:expr) => {
        match $check {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}
pub(super) use allowed;

/// The kind of the current call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An instance is being made. Effects are refused, because there is no entry that they could belong to.
    Making,
    /// An entry or a start. Effects are collected.
    Entry,
    /// A query. Effects are refused.
    Query,
}

/// The parts of a session.
#[derive(Debug)]
pub struct SessionParts {
    /// The plugin's name.
    pub plugin: PluginName,
    /// The plugin's number.
    pub id: PluginId,
    /// The effective grants.
    pub reach: Arc<Reach>,
    /// The limits.
    pub limits: Limits,
    /// The context as of the cursor.
    pub context: EntryContext,
    /// The effects, empty so far.
    pub effects: Effects,
    /// The store with the committed state.
    pub store: Arc<Store>,
    /// The store with the files: the same one, except when a recorded log is handled again.
    pub files: Arc<Store>,
    /// The host's keys.
    pub keys: Arc<Keyring>,
    /// The number of this plugin's publishes that wait to be sent.
    pub outbox_len: Arc<AtomicUsize>,
    /// The topics whose writers keep their events.
    pub kept_topics: KeptTopics,
    /// The feed of log lines.
    pub listeners: Lines,
}

/// The data of the host functions of one plugin.
#[derive(Debug)]
pub struct Session {
    pub(super) plugin: PluginName,
    id: PluginId,
    /// The context of the entry.
    pub context: EntryContext,
    /// The effects of the batch.
    pub effects: Effects,
    /// The kind of the current call.
    pub mode: Mode,
    /// The clock of WASI, in nanoseconds since 1970.
    clock: Arc<AtomicU64>,
    /// The code that a session runs, and what it may reach.
    pub(super) code: SessionCode,
    /// The log lines of a plugin.
    pub(super) log: SessionLog,
    /// The exceeded limits and the missing grants of a plugin.
    pub(super) violations: Violations,
    /// The allowances of a plugin for publishes.
    pub(super) publishing: Publishing,
    /// The data that host functions read.
    pub(super) reads: Reads,
}

/// The code that a session runs, and what it may reach.
#[derive(Debug)]
pub struct SessionCode {
    /// The version of the code.
    pub(super) version: String,
    /// The permissions.
    pub(super) reach: Arc<Reach>,
    /// The limits.
    pub(super) limits: Limits,
}

/// The log lines of a plugin.
#[derive(Debug)]
pub struct SessionLog {
    /// The plugin's log lines from the current call.
    pub(super) lines: Vec<String>,
    /// The number of lines that were dropped in the current call.
    pub(super) lines_dropped: usize,
    /// The number of lines that the rate still allows, and the time of that number.
    pub(super) line_rate: (f64, Instant),
    /// The listeners of the lines.
    pub(super) listeners: Lines,
}

/// The exceeded limits and the missing grants of a plugin.
#[derive(Debug)]
pub struct Violations {
    /// The exceeded limits and missing grants, with their counts.
    pub(super) counts: BTreeMap<LimitName, u64>,
    /// Whether a limit was exceeded since the call began.
    pub(super) since_begin: bool,
    /// The last request without a grant.
    pub(super) last_denied: Option<String>,
    /// The keys whose last document was too large, each with its limit in bytes.
    pub(super) too_large: BTreeMap<KeyName, usize>,
}

/// The allowances of a plugin for publishes.
#[derive(Debug)]
pub struct Publishing {
    /// The number of the plugin's waiting publishes.
    pub(super) outbox_len: Arc<AtomicUsize>,
    /// The allowance of the call for publishes.
    pub(super) outgoing: outgoing::Room,
    /// The rate for calls.
    pub(super) rate: outgoing::Rate,
    /// The rate for starts, in the machine's time: the log time does not advance while starts fail.
    pub(super) start_rate: outgoing::Rate,
    /// The allowance of the last start, with its use.
    pub(super) started: outgoing::Room,
}

/// The data that host functions read.
#[derive(Debug)]
pub struct Reads {
    /// The store with the state.
    pub(super) store: Arc<Store>,
    /// The store with the documents.
    pub(super) files: Arc<Store>,
    /// The state as of the last commit.
    pub(super) snapshot: Snapshot,
    /// The keys of the host.
    pub(super) keys: Arc<Keyring>,
    /// The topics whose writers keep their events.
    pub(super) kept_topics: KeptTopics,
    /// The last key that was read, with the length of its value: plugins mostly write the same key next.
    pub(super) last_read: Option<(Vec<u8>, Option<usize>)>,
}

impl Session {
    /// Creates a session for `version` of a plugin.
    pub fn new(parts: SessionParts, version: String) -> Result<Self, StoreError> {
        let SessionParts { plugin, id, reach, limits, context, effects, store, files, keys, .. } = parts;
        let SessionParts { outbox_len, kept_topics, listeners, .. } = parts;
        let clock = Arc::new(AtomicU64::new(context.time().0));
        let snapshot = store.snapshot()?;
        let line_rate = limits.log_lines_per_second.saturating_mul(outgoing::BURST) as f64;
        Ok(Self {
            plugin,
            id,
            context,
            effects,
            mode: Mode::Entry,
            code: SessionCode { version, reach, limits },
            log: SessionLog {
                lines: Vec::new(),
                lines_dropped: 0,
                line_rate: (line_rate, Instant::now()),
                listeners,
            },
            violations: Violations {
                counts: BTreeMap::new(),
                since_begin: false,
                last_denied: None,
                too_large: BTreeMap::new(),
            },
            publishing: Publishing {
                outbox_len,
                outgoing: outgoing::Room::ENDLESS,
                rate: outgoing::Rate::default(),
                start_rate: outgoing::Rate::default(),
                started: outgoing::Room::ENDLESS,
            },
            reads: Reads { store, files, snapshot, keys, kept_topics, last_read: None },
            clock,
        })
    }

    /// Continues as another version, with its grants and limits.
    pub fn run_as(&mut self, version: String, reach: Arc<Reach>, limits: Limits) {
        self.code.version = version;
        self.code.reach = reach;
        self.code.limits = limits;
    }

    /// The store with the committed state.
    pub fn store(&self) -> Arc<Store> {
        self.reads.store.clone()
    }

    /// The keys that the plugin may write, with their names.
    pub fn own_keys(&self) -> Vec<(KeyName, IpnsName)> {
        self.reads.keys.names_of(self.code.reach.writes())
    }

    /// Replaces the current batch by an empty one; returns it without submitting it.
    pub fn discard(&mut self) -> Batch {
        let Batch { id, by, number, cursor, .. } = self.effects.batch;
        let empty = Batch::new(self.plugin.clone(), id, by, number, cursor);
        std::mem::replace(&mut self.effects.batch, empty)
    }

    /// Begins again with the stored data; `number` is the number of the next batch.
    pub fn begin_again(&mut self, stored: Stored, number: u64) -> Result<(), StoreError> {
        self.context = stored.context;
        self.effects = stored.effects;
        self.effects.batch.number = number;
        self.violations.too_large.clear();
        self.reads.last_read = None;
        // Log time goes back as well, so earlier publishes no longer count.
        self.publishing.rate = outgoing::Rate::default();
        self.renew_snapshot()
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.code.limits
    }

    /// The clock of WASI.
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
        self.violations.since_begin = false;
        self.log.lines.clear();
        self.log.lines_dropped = 0;
        self.context.set_time(time);
        self.clock.store(self.context.time().0, Ordering::Relaxed);
        self.publishing.outgoing =
            self.publishing.rate.room(time, &self.code.limits, &self.publishing.outgoing, self.outbox_room());
        self.effects.begin_entry();
        self.reads.last_read = None;
    }

    /// Resets the effects and the log lines, for an entry that may lead to no call.
    pub fn begin_nothing(&mut self) {
        self.effects.begin_entry();
        self.log.lines.clear();
    }

    /// Begins a start at `time`.
    pub fn begin_start(&mut self, time: Timestamp) {
        self.begin(Mode::Entry, time);
        let (now, used) = (Timestamp::wall(), self.publishing.started);
        self.publishing.outgoing =
            self.publishing.start_rate.room(now, &self.code.limits, &used, self.outbox_room());
    }

    /// Ends a start; returns whether its publishes exceeded an allowance that may be larger later.
    pub fn end_start(&mut self) -> bool {
        self.publishing.started = std::mem::replace(&mut self.publishing.outgoing, outgoing::Room::ENDLESS);
        self.publishing.started.may_grow(&self.code.limits)
    }

    /// The number of further messages that may wait to be sent.
    fn outbox_room(&self) -> usize {
        let waiting = self.publishing.outbox_len.load(Ordering::Relaxed)
            + self.effects.layers().map(|batch| batch.requested.publishes.len()).sum::<usize>();
        self.code.limits.outbox.saturating_sub(waiting)
    }

    /// Reverts the effects of the call.
    pub fn roll_back(&mut self) {
        self.publishing.outgoing.give_back();
        self.effects.roll_back(&mut self.context);
        self.reads.last_read = None;
    }

    /// Drops batches that are durable by now, and takes a newer snapshot.
    pub fn settle(&mut self, committed: u64) -> Result<(), StoreError> {
        if self.effects.in_flight.first().is_some_and(|batch| batch.number <= committed) {
            self.renew_snapshot()?;
            self.effects.in_flight.retain(|batch| batch.number > committed);
        }
        Ok(())
    }

    /// Takes a snapshot of the current data. The store frees no page that an old snapshot shows.
    pub fn renew_snapshot(&mut self) -> Result<(), StoreError> {
        self.reads.snapshot = self.reads.store.snapshot()?;
        Ok(())
    }

    /// Closes the batch and begins the next one; returns the closed batch.
    pub fn seal(&mut self) -> Arc<Batch> {
        let next = Batch::new(
            self.plugin.clone(),
            self.id,
            self.effects.batch.by,
            self.effects.batch.number + 1,
            self.effects.batch.cursor,
        );
        self.effects.batch.requested.state_size = self.effects.state_size;
        let sealed = Arc::new(std::mem::replace(&mut self.effects.batch, next));
        self.effects.in_flight.push(sealed.clone());
        sealed
    }

    /// Logs a line of the plugin, for the operator and for a dead letter. It escapes characters that would end
    /// the line or move a terminal's cursor.
    pub fn line(&mut self, level: tracing::Level, text: String) {
        let text = escaped(&text).into_owned();
        if self.log.lines.len() >= self.code.limits.log_lines {
            self.log.lines_dropped += 1;
            self.meets(LimitName::LOG_LINES);
            return;
        }
        if !self.may_tell() {
            self.meets(LimitName::LOG_LINES_PER_SECOND);
            self.log.lines.push(text);
            return;
        }
        let (plugin, version) = (&self.plugin, &self.code.version);
        match level {
            tracing::Level::ERROR => tracing::error!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::WARN => tracing::warn!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::INFO => tracing::info!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::DEBUG => tracing::debug!(target: "dim::plugin", %plugin, version, "{text}"),
            tracing::Level::TRACE => tracing::trace!(target: "dim::plugin", %plugin, version, "{text}"),
        }
        let level = level.as_str().to_ascii_lowercase();
        let (plugin, version, time) = (plugin.clone(), version.clone(), Timestamp::wall());
        self.log.listeners.feed().tell(Line { plugin, version, time, level, text: text.clone() });
        self.log.lines.push(text);
    }

    /// Whether the rate allows one more line; if so, counts it.
    fn may_tell(&mut self) -> bool {
        let per_second = self.code.limits.log_lines_per_second as f64;
        let (left, at) = self.log.line_rate;
        let left = (left + per_second * at.elapsed().as_secs_f64()).min(per_second * outgoing::BURST as f64);
        let may = left >= 1.0;
        self.log.line_rate = (if may { left - 1.0 } else { left }, Instant::now());
        may
    }

    /// Counts an exceeded limit or a missing grant.
    pub fn meets(&mut self, what: LimitName) {
        *self.violations.counts.entry(what).or_default() += 1;
        // A full outbox is the fault of the network, not of the plugin.
        self.violations.since_begin |= what != LimitName::GRANTS && what != LimitName::OUTBOX;
    }

    /// Whether a limit was exceeded since the call began.
    pub fn has_met(&self) -> bool {
        self.violations.since_begin
    }

    /// Counts a refusal.
    pub fn refuses(&mut self, refusal: &Refusal) {
        if let Refusal::NotGranted(what) = refusal {
            self.violations.last_denied = Some(what.clone());
        }
        if let Some(what) = refusal.met() {
            self.meets(what);
        }
    }

    /// Takes the lines of the call, with a note about dropped lines.
    pub fn take_lines(&mut self) -> Vec<String> {
        let mut lines = std::mem::take(&mut self.log.lines);
        if self.log.lines_dropped > 0 {
            lines.push(format!("({} more lines were dropped)", self.log.lines_dropped));
        }
        lines
    }

    /// Whether the entry may have one more effect, of `bytes` bytes.
    fn may_effect(&self, bytes: usize) -> Result<(), Refusal> {
        if self.mode != Mode::Entry {
            return Err(Refusal::ReadOnly);
        }
        if self.effects.count() >= self.code.limits.effects {
            return Err(Refusal::Limit(LimitName::EFFECTS));
        }
        if self.effects.entry_bytes() + bytes > self.code.limits.effect_bytes {
            return Err(Refusal::Limit(LimitName::EFFECT_BYTES));
        }
        Ok(())
    }
}

/// Refuses an invalid key of the state or of a timer.
pub fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.is_empty() || key.len() > KEY_BYTES {
        return Err(Refusal::KeyLength(KEY_BYTES as u32));
    }
    Ok(())
}

/// Parses a word from a plugin.
pub fn word<T: std::str::FromStr<Err = dim_model::ident::InvalidWord>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|error: dim_model::ident::InvalidWord| Refusal::Invalid(error.to_string()))
}
