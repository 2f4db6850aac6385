//! Owns what the host functions work on during a call: the world, the effects, the grants and the
//! limits of one plugin. Knows nothing of WebAssembly.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::effects::{Batch, Effects, NameUpdate, NameValue, Publish};
use super::limits::{KEY_BYTES, PAGE_BYTES};
use super::{Grants, Limits, NameOrKey, World};
use crate::documents;
use crate::followed::Resolution;
use crate::ident::{ContentPath, IpnsName, KeyName, PluginName, Topic};
use crate::keys::Keyring;
use crate::names;
use crate::store::{PluginId, Snapshot, StateKey, Store, StoreError};
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
    /// More bytes than this.
    TooLarge(u64),
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
    pub grants: Arc<Grants>,
    /// What it may take.
    pub limits: Limits,
    /// Its world as of the cursor.
    pub world: World,
    /// Its effects, none yet.
    pub effects: Effects,
    /// Where committed state is read.
    pub store: Arc<Store>,
    /// The host's keys.
    pub keys: Arc<Keyring>,
    /// How many publishes of this plugin wait to be sent.
    pub outbox_len: Arc<AtomicUsize>,
}

/// One plugin's side of the host functions.
#[derive(Debug)]
pub struct Session {
    pub(super) plugin: PluginName,
    id: PluginId,
    pub(super) grants: Arc<Grants>,
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
    version: String,
    store: Arc<Store>,
    snapshot: Snapshot,
    keys: Arc<Keyring>,
    outbox_len: Arc<AtomicUsize>,
    /// The clock that WASI shows, in nanoseconds since 1970.
    clock: Arc<AtomicU64>,
    /// The key that was read last and the length of its value: what is written next is mostly it.
    last_read: Option<(Vec<u8>, Option<usize>)>,
}

impl Session {
    /// A session for `version` of a plugin.
    pub fn new(parts: SessionParts, version: String) -> Result<Self, StoreError> {
        let SessionParts { plugin, id, grants, limits, world, effects, store, keys, outbox_len } = parts;
        let mut world = world;
        for name in grants.write.iter().filter_map(|key| keys.name(key)) {
            world.add_own(name, None);
        }
        let clock = Arc::new(AtomicU64::new(world.time().0));
        let snapshot = store.snapshot()?;
        Ok(Self {
            plugin,
            id,
            grants,
            limits,
            world,
            effects,
            mode: Mode::Entry,
            lines: Vec::new(),
            lines_dropped: 0,
            version,
            store,
            snapshot,
            keys,
            outbox_len,
            clock,
            last_read: None,
        })
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
        self.lines.clear();
        self.lines_dropped = 0;
        self.world.set_time(time);
        self.clock.store(self.world.time().0, Ordering::Relaxed);
        self.effects.begin_entry();
        self.last_read = None;
    }

    /// Takes back what the call asked for.
    pub fn roll_back(&mut self) {
        self.effects.roll_back(&mut self.world);
        self.last_read = None;
    }

    /// Forgets batches that are durable by now, and reads from a newer snapshot.
    pub fn settle(&mut self, committed: u64) -> Result<(), StoreError> {
        if self.effects.in_flight.first().is_some_and(|batch| batch.number <= committed) {
            self.snapshot = self.store.snapshot()?;
            self.effects.in_flight.retain(|batch| batch.number > committed);
        }
        Ok(())
    }

    /// Closes the batch and begins the next one.
    pub fn seal(&mut self) -> Arc<Batch> {
        let next = Batch::new(
            self.plugin.clone(),
            self.id,
            self.effects.batch.number + 1,
            self.effects.batch.cursor,
        );
        self.effects.batch.state_size = self.effects.state_size;
        let sealed = Arc::new(std::mem::replace(&mut self.effects.batch, next));
        self.effects.in_flight.push(sealed.clone());
        sealed
    }

    /// A line of the plugin's log, for the operator and for a dead letter.
    pub fn line(&mut self, level: tracing::Level, text: String) {
        if self.lines.len() >= self.limits.log_lines {
            self.lines_dropped += 1;
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
        self.lines.push(text);
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
        if self.mode == Mode::Query {
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

    // State.

    /// The value of a state key.
    pub fn get_state(&mut self, key: &[u8]) -> Answer<Option<Vec<u8>>> {
        allowed!(check_key(key));
        let value = self.read_state(key)?;
        self.last_read = Some((key.to_vec(), value.as_ref().map(Vec::len)));
        Ok(Ok(value))
    }

    fn read_state(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.effects.state(key) {
            Some(value) => Ok(value.map(<[u8]>::to_vec)),
            None => self.snapshot.state(&StateKey::new(self.id, key)),
        }
    }

    /// Sets a state key, or deletes it.
    pub fn set_state(&mut self, key: &[u8], value: Option<&[u8]>) -> Answer<()> {
        allowed!(check_key(key));
        let len = value.map_or(0, <[u8]>::len);
        if len > self.limits.value_bytes {
            return Ok(Err(Refusal::TooLarge(self.limits.value_bytes as u64)));
        }
        allowed!(self.may_effect(key.len() + len));
        let old = match self.last_read.take() {
            Some((read, len)) if read == key => len,
            _ => self.read_state(key)?.map(|value| value.len()),
        };
        let grows = value.map_or(0, |value| key.len() + value.len()) as u64;
        let shrinks = old.map_or(0, |len| (key.len() + len) as u64);
        if grows > shrinks && self.effects.state_size + grows - shrinks > self.limits.state_bytes {
            return Ok(Err(Refusal::Quota(self.limits.state_bytes)));
        }
        if value.is_none() && old.is_none() {
            return Ok(Ok(()));
        }
        self.effects.set_state(key.to_vec(), value.map(<[u8]>::to_vec), old);
        Ok(Ok(()))
    }

    /// A page of the keys that start with `prefix` and come after `after`.
    pub fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Answer<Vec<(Vec<u8>, Vec<u8>)>> {
        if prefix.len() > KEY_BYTES || after.is_some_and(|after| after.len() > KEY_BYTES) {
            return Ok(Err(Refusal::KeyLength(KEY_BYTES as u32)));
        }
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        // What is not committed yet, newest layer last, so that it wins.
        let mut fresh: BTreeMap<&[u8], Option<&[u8]>> = BTreeMap::new();
        let layers: Vec<&Batch> = self.effects.layers().collect();
        for batch in layers.into_iter().rev() {
            let range = batch.state.range::<[u8], _>((from, Bound::Unbounded));
            let within = range.take_while(|(key, _)| key.starts_with(prefix));
            fresh.extend(within.map(|(key, value)| (key.as_slice(), value.as_deref())));
        }
        let mut fresh = fresh.into_iter().peekable();
        let stored_from = from.map(|key| StateKey::new(self.id, key));
        let stored = self.snapshot.scan(stored_from.as_ref().map(|key| key.as_bytes()))?;
        let mut stored = stored
            .map_while(|row| match row {
                Ok((key, value)) => {
                    let key = StateKey::strip(self.id, &key)?.to_vec();
                    key.starts_with(prefix).then_some(Ok((key, value)))
                }
                Err(error) => Some(Err(error)),
            })
            .peekable();
        let mut page = Page { rows: Vec::new(), bytes: 0, limit };
        while page.has_room() {
            let next_stored = match stored.peek() {
                Some(Ok((key, _))) => Some(key.as_slice()),
                Some(Err(_)) => return Err(stored.next().and_then(Result::err).expect("just seen")),
                None => None,
            };
            match (fresh.peek(), next_stored) {
                (None, None) => break,
                (Some((new, _)), old) if old.is_none_or(|old| *new <= old) => {
                    if old == Some(*new) {
                        stored.next();
                    }
                    let (key, value) = fresh.next().expect("just seen");
                    if let Some(value) = value {
                        page.push(key.to_vec(), value.to_vec());
                    }
                }
                _ => {
                    let (key, value) = stored.next().expect("just seen")?;
                    page.push(key, value);
                }
            }
        }
        Ok(Ok(page.rows))
    }

    // Timers.

    /// Sets a timer, or clears it.
    pub fn set_timer(&mut self, key: &str, at: Option<Timestamp>) -> Answer<()> {
        allowed!(check_key(key.as_bytes()));
        allowed!(self.may_effect(key.len() + 8));
        // What has passed falls due with the next entry: within this one it would fire for ever.
        let at = at.map(|at| at.max(Timestamp(self.world.time().0.saturating_add(1))));
        let known = self.effects.timers.get(key);
        if at.is_some() && known.is_none() && self.effects.timers.count() >= self.limits.timers {
            return Ok(Err(Refusal::TooMany(u32::try_from(self.limits.timers).unwrap_or(u32::MAX))));
        }
        if known != at {
            self.effects.set_timer(key.to_owned(), at);
        }
        Ok(Ok(()))
    }

    /// When a timer is due.
    pub fn timer(&self, key: &str) -> Answer<Option<Timestamp>> {
        allowed!(check_key(key.as_bytes()));
        Ok(Ok(self.effects.timers.get(key)))
    }

    // Pubsub.

    /// Publishes on a topic.
    pub fn publish(&mut self, topic: &str, data: Bytes) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        if !self.grants.may_publish(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        if data.len() > self.limits.message_bytes {
            return Ok(Err(Refusal::TooLarge(self.limits.message_bytes as u64)));
        }
        allowed!(self.may_effect(topic.as_str().len() + data.len()));
        let waiting = self.outbox_len.load(Ordering::Relaxed) + self.effects.batch.publishes.len();
        if waiting >= self.limits.outbox {
            return Ok(Err(Refusal::Limit("outbox")));
        }
        self.effects.publish(Publish { topic, data });
        Ok(Ok(()))
    }

    /// Subscribes to a topic, or unsubscribes.
    pub fn subscribe(&mut self, topic: &str, subscribed: bool) -> Answer<()> {
        let topic = allowed!(word::<Topic>(topic));
        if subscribed && !self.grants.may_subscribe(&topic) {
            return Ok(Err(Refusal::NotGranted(topic.to_string())));
        }
        allowed!(self.may_effect(topic.as_str().len()));
        let asked = self.world.subscriptions().len() + self.effects.batch.subscriptions.len();
        if subscribed && asked >= self.limits.topics {
            return Ok(Err(Refusal::Limit("topics")));
        }
        // Noted even if it seems to hold already: an earlier one may still be on its way to the log.
        self.effects.subscribe(topic, subscribed);
        Ok(Ok(()))
    }

    /// The topic, if the plugin may subscribe to it.
    pub fn heard_topic(&self, topic: &str) -> Result<Topic, Refusal> {
        let topic = word::<Topic>(topic)?;
        if self.grants.may_subscribe(&topic) {
            Ok(topic)
        } else {
            Err(Refusal::NotGranted(topic.to_string()))
        }
    }

    // Names.

    /// Gives a key's name a new value.
    pub fn set_name(&mut self, key: &str, value: NameValue, lifetime: Option<Duration>) -> Answer<()> {
        let key = allowed!(self.writable(key));
        let bytes = match &value {
            NameValue::Document { data, .. } => data.len(),
            NameValue::Path(path) => path.as_str().len(),
        };
        if bytes > self.limits.document_bytes {
            return Ok(Err(Refusal::TooLarge(self.limits.document_bytes as u64)));
        }
        allowed!(self.may_effect(bytes));
        let lifetime = lifetime.unwrap_or(names::LIFETIME);
        if !names::LIFETIMES.contains(&lifetime) {
            return Ok(Err(Refusal::Invalid("a lifetime lies between one minute and one year".to_owned())));
        }
        let Some(name) = self.keys.name(&key) else {
            return Ok(Err(Refusal::Invalid(format!("the host has no key {key}"))));
        };
        self.effects.set_name(&mut self.world, key, NameUpdate { name, value, lifetime });
        Ok(Ok(()))
    }

    fn writable(&self, key: &str) -> Result<KeyName, Refusal> {
        let key = word::<KeyName>(key)?;
        if self.grants.write.contains(&key) { Ok(key) } else { Err(Refusal::NotGranted(key.to_string())) }
    }

    /// The name of a key that the plugin may write.
    pub fn key_id(&self, key: &str) -> Answer<IpnsName> {
        let key = allowed!(self.writable(key));
        Ok(self.keys.name(&key).ok_or_else(|| Refusal::Invalid(format!("the host has no key {key}"))))
    }

    /// Follows a name, or stops doing so.
    pub fn follow(&mut self, name: &str, followed: bool) -> Answer<()> {
        let name = allowed!(self.readable(name));
        allowed!(self.may_effect(name.as_str().len()));
        if followed
            && self.world.follows().len() >= self.limits.follows
            && !self.world.follows().contains_key(&name)
        {
            return Ok(Err(Refusal::Limit("follows")));
        }
        self.effects.follow(&mut self.world, name, followed);
        Ok(Ok(()))
    }

    fn readable(&self, name: &str) -> Result<IpnsName, Refusal> {
        let asked = word::<NameOrKey>(name)?;
        let name = self.name_of(&asked);
        let granted = self
            .grants
            .read
            .iter()
            .any(|grant| *grant == asked || (name.is_some() && self.name_of(grant) == name));
        match name {
            Some(name) if granted => Ok(name),
            _ => Err(Refusal::NotGranted(String::from(asked))),
        }
    }

    fn name_of(&self, either: &NameOrKey) -> Option<IpnsName> {
        match either {
            NameOrKey::Name(name) => Some(name.clone()),
            NameOrKey::Key(key) => self.keys.name(key),
        }
    }

    /// What is known of a followed name or of an own key.
    pub fn resolve(&mut self, name: &str) -> Answer<Resolution> {
        if let Some(name) = self.own_name(name) {
            return Ok(self.world.own(&name).ok_or(Refusal::NotYetKnown));
        }
        let name = allowed!(self.readable(name));
        match self.world.follows().get(&name) {
            Some(Some(known)) => Ok(Ok(known.clone())),
            Some(None) => Ok(Err(Refusal::NotYetKnown)),
            None => {
                if self.mode == Mode::Entry && self.world.follows().len() < self.limits.follows {
                    self.effects.follow(&mut self.world, name, true);
                }
                Ok(Err(Refusal::NotYetKnown))
            }
        }
    }

    fn own_name(&self, name: &str) -> Option<IpnsName> {
        let asked = name.parse().ok()?;
        let name = self.name_of(&asked)?;
        self.grants.write.iter().any(|key| self.keys.name(key).as_ref() == Some(&name)).then_some(name)
    }

    /// The file behind a followed name or an own key.
    pub fn get_document(&mut self, name: &str) -> Answer<(Resolution, Vec<u8>)> {
        let resolution = allowed!(self.resolve(name)?);
        let Some(data) = self.document(&resolution.path)? else {
            return Ok(Err(Refusal::NotADocument(format!("{} is not held here", resolution.path))));
        };
        Ok(Ok((resolution, data)))
    }

    fn document(&self, path: &ContentPath) -> Result<Option<Vec<u8>>, StoreError> {
        let asked = self.effects.layers().flat_map(|batch| batch.names.values()).find_map(|update| {
            match &update.value {
                NameValue::Document { cid, data } if ContentPath::of(cid) == *path => Some(data.to_vec()),
                _ => None,
            }
        });
        match asked {
            Some(data) => Ok(Some(data)),
            // Another plugin's commit may have brought it since the snapshot.
            None => documents::get(&self.store.snapshot()?, path),
        }
    }
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.is_empty() || key.len() > KEY_BYTES {
        return Err(Refusal::KeyLength(KEY_BYTES as u32));
    }
    Ok(())
}

fn word<T: std::str::FromStr<Err = crate::ident::InvalidWord>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|error: crate::ident::InvalidWord| Refusal::Invalid(error.to_string()))
}

/// A page of a scan that is being filled.
struct Page {
    rows: Vec<(Vec<u8>, Vec<u8>)>,
    bytes: usize,
    limit: usize,
}

impl Page {
    fn has_room(&self) -> bool {
        self.rows.len() < self.limit && self.bytes < PAGE_BYTES
    }

    fn push(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes += key.len() + value.len();
        self.rows.push((key, value));
    }
}
