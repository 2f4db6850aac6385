//! Owns the effects of a plugin that are not committed yet: the batch of the entries that commit together, and
//! the journal that reverts the effects of one failed entry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use dim_model::entry::Resolution;
use dim_model::entry::{Generation, Kind, Offset};
use dim_model::ident::{IpnsName, KeyName, PluginName, Topic};
use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::PluginId;
use crate::disk_monitor::IntakeStopped;
use crate::effect::{Asked, DeadLetter, NameUpdate, NameValue, Publish, Retry};
use crate::entry_context::{EntryContext, OwnName, SubscriptionRequest};
use crate::handover::{Handover, TakeBack};
use crate::plugin_registry::Quarantine;
use crate::probation::{Probation, Rates, Verdict};

/// The effects of consecutive entries of one plugin, which commit together.
#[derive(Debug)]
pub struct Batch {
    /// The plugin's name.
    pub plugin: PluginName,
    /// The plugin's number.
    pub id: PluginId,
    /// The generation of the code that made the effects.
    pub by: Generation,
    /// The number of the batch. Batches of one plugin are numbered from 1.
    pub number: u64,
    /// The cursor after the last entry.
    pub cursor: Offset,
    /// The effects of the entries.
    pub requested: Requested,
    /// The changes of the plugin's code.
    pub code: CodeChanges,
    /// The context after the last entry, if it changed.
    pub context: Option<Vec<u8>>,
    /// Replies to commands, which the writer sends after the commit.
    pub replies: Mutex<Vec<PendingReply>>,
    /// The number of entries and timers that had these effects.
    pub entries: usize,
    /// The size of the effects in bytes.
    pub bytes: usize,
}

/// The effects that the plugin has requested, and the failures of its entries.
#[derive(Debug, Default)]
pub struct Requested {
    /// New values of state keys; `None` deletes a key.
    pub state: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Bytes of the plugin's state after the last entry.
    pub state_size: u64,
    /// New times of timers; `None` clears a timer.
    pub timers: BTreeMap<String, Option<Timestamp>>,
    /// The publishes, in order.
    pub publishes: Vec<Publish>,
    /// The newest value of each name that changed.
    pub names: BTreeMap<KeyName, NameUpdate>,
    /// Requested subscriptions and ends of subscriptions, in order.
    pub subscriptions: Vec<(Topic, SubscriptionRequest)>,
    /// Names to follow (true) or to stop following (false).
    pub follows: BTreeMap<IpnsName, bool>,
    /// New dead letters.
    pub dead: Vec<DeadLetter>,
    /// Events to handle again later.
    pub retries: Vec<Retry>,
    /// The exceeded limits, as entries of the log.
    pub struck: Vec<Kind>,
}

/// The changes of a plugin's code, its probation and its quarantine.
#[derive(Debug, Default)]
pub struct CodeChanges {
    /// The state version, if `start` has changed it.
    pub started: Option<u32>,
    /// The takeover by new code, if the batch contains one.
    pub handover: Option<Handover>,
    /// The rollback to earlier code, if the batch contains one; such a batch has no other effects.
    pub take_back: Option<TakeBack>,
    /// The progress of the probation, if the code is on probation.
    pub probation: Option<Probation>,
    /// The measurements of the code since it was confirmed, from time to time.
    pub rates: Option<Rates>,
    /// The verdict on the code, if the batch contains it.
    pub verdict: Option<Verdict>,
    /// A new quarantine of the plugin, or `Some(None)` at its end; `None` if nothing changed.
    pub quarantine: Option<Option<Quarantine>>,
}

impl Requested {
    /// Whether the entries have no effect. Every field decides: a new one does not compile until it is listed here.
    fn is_empty(&self) -> bool {
        // The size of the state changes only with the state.
        let Self {
            state,
            state_size: _,
            timers,
            publishes,
            names,
            subscriptions,
            follows,
            dead,
            retries,
            struck,
        } = self;
        state.is_empty()
            && timers.is_empty()
            && publishes.is_empty()
            && names.is_empty()
            && subscriptions.is_empty()
            && follows.is_empty()
            && dead.is_empty()
            && retries.is_empty()
            && struck.is_empty()
    }
}

impl CodeChanges {
    /// Whether nothing must be durable at once. Every field decides, as in [`Requested::is_empty`].
    fn is_trifling(&self) -> bool {
        // The probation and the measurements are written again with a later batch.
        let Self { started, handover, take_back, probation: _, rates: _, verdict, quarantine } = self;
        started.is_none()
            && handover.is_none()
            && take_back.is_none()
            && verdict.is_none()
            && quarantine.is_none()
    }
}

/// The result of a command.
pub type Reply = Result<String, ReplyError>;

/// The reason why a command or a query has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "detail")]
pub enum ReplyError {
    /// The plugin has no such method.
    #[error("the plugin has no method {0:?}")]
    UnknownMethod(String),
    /// The body of the request is invalid.
    #[error("invalid body: {0}")]
    Invalid(String),
    /// The object of the request does not exist.
    #[error("not found: {0}")]
    NotFound(String),
    /// The host has stopped the intake.
    #[error(transparent)]
    #[serde(rename = "no-room")]
    IntakeStopped(#[from] IntakeStopped),
    /// The request contradicts the current state.
    #[error("conflict: {0}")]
    Conflict(String),
    /// The plugin refused the request.
    #[error("{0}")]
    Refused(String),
    /// The plugin trapped or exceeded a limit.
    #[error("the plugin failed: {0}")]
    Failed(String),
    /// There is no such plugin.
    #[error("there is no plugin {0:?}")]
    NoPlugin(String),
    /// The plugin is not running, or the host is shutting down.
    #[error("the plugin is not available: {0}")]
    Unavailable(String),
}

/// A reply that is sent after the commit.
#[derive(Debug)]
pub struct PendingReply {
    /// The waiting caller.
    pub to: oneshot::Sender<Reply>,
    /// The offset of the command's entry.
    pub offset: Offset,
    /// The content of the reply.
    pub reply: Reply,
}

impl Batch {
    /// Creates an empty batch of code `by` that starts at `cursor`.
    pub fn new(plugin: PluginName, id: PluginId, by: Generation, number: u64, cursor: Offset) -> Self {
        Self {
            plugin,
            id,
            by,
            number,
            cursor,
            requested: Requested::default(),
            code: CodeChanges::default(),
            context: None,
            replies: Mutex::default(),
            entries: 0,
            bytes: 0,
        }
    }

    /// Whether nothing would be lost if these entries were handled again.
    pub fn is_trifling(&self) -> bool {
        self.requested.is_empty() && self.code.is_trifling()
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.entries == 0 && self.context.is_none() && self.code.started.is_none() && self.is_trifling()
    }

    /// Adds a reply that is sent after the commit.
    pub fn reply(&mut self, to: oneshot::Sender<Reply>, offset: Offset, reply: Reply) {
        self.bytes += reply.as_ref().map_or(0, String::len);
        let replies = self.replies.get_mut().expect("no one panics while holding the replies");
        replies.push(PendingReply { to, offset, reply });
    }

    /// Takes the replies out of a batch that is dropped. Their callers continue to wait.
    pub fn into_replies(self) -> Vec<PendingReply> {
        self.replies.into_inner().expect("no one panics while holding the replies")
    }

    /// Sends the replies. Called once the batch is durable.
    pub fn send_replies(&self) {
        let mut replies = self.replies.lock().expect("no one panics while holding the replies");
        for pending in replies.drain(..) {
            // The caller may have disconnected.
            let _ = pending.to.send(pending.reply);
        }
    }
}

/// The data that reverts one effect.
#[derive(Debug)]
enum Undo {
    State {
        key: Vec<u8>,
        before: Option<Option<Vec<u8>>>,
        size_before: u64,
    },
    Timer {
        key: String,
        before: Option<Option<Timestamp>>,
        due_before: Option<Timestamp>,
    },
    Publish,
    Name {
        key: KeyName,
        before: Option<NameUpdate>,
        name: IpnsName,
        own_before: OwnName,
    },
    /// `roll_back` also truncates the batch's list to its length from before the entry.
    Subscription {
        topic: Topic,
        before: Option<SubscriptionRequest>,
    },
    Follow {
        name: IpnsName,
        before: Option<Option<Resolution>>,
        noted: Option<bool>,
    },
}

/// The effects of the current entry, on top of those of earlier entries.
#[derive(Debug)]
pub struct Effects {
    /// The batch that receives the effects.
    pub batch: Batch,
    /// The submitted batches that are not durable yet, oldest first.
    pub in_flight: Vec<Arc<Batch>>,
    /// The timers of the plugin, committed or not.
    pub timers: Timers,
    /// Bytes of the plugin's state, committed or not.
    pub state_size: u64,
    journal: Vec<Undo>,
    bytes_before: usize,
    /// The number of subscriptions of the batch from before the entry.
    subscriptions_before: usize,
    /// The subscriptions that the entry has changed: their index in the batch, and their state in the context before.
    changed: BTreeMap<Topic, (usize, Option<SubscriptionRequest>)>,
}

impl Effects {
    /// Creates an empty set of effects.
    pub fn new(batch: Batch, timers: Timers, state_size: u64) -> Self {
        Self {
            bytes_before: batch.bytes,
            batch,
            in_flight: Vec::new(),
            timers,
            state_size,
            journal: Vec::new(),
            subscriptions_before: 0,
            changed: BTreeMap::new(),
        }
    }

    /// Begins an entry. The effects of earlier entries stay.
    pub fn begin_entry(&mut self) {
        self.journal.clear();
        self.bytes_before = self.batch.bytes;
        self.subscriptions_before = self.batch.requested.subscriptions.len();
        self.changed.clear();
    }

    /// The number of effects of the entry.
    pub fn count(&self) -> usize {
        self.journal.len()
    }

    /// The size of the entry's effects in bytes.
    pub fn entry_bytes(&self) -> usize {
        self.batch.bytes - self.bytes_before
    }

    /// The net effects of the entry so far.
    pub fn of_entry(&self) -> Asked {
        let mut asked = Asked::default();
        let mut published = 0;
        for undo in &self.journal {
            match undo {
                Undo::State { key, .. } => {
                    asked.state.insert(key.clone(), self.batch.requested.state.get(key).cloned().flatten());
                }
                Undo::Timer { key, .. } => {
                    asked.timers.insert(key.clone(), self.batch.requested.timers.get(key).copied().flatten());
                }
                Undo::Publish => published += 1,
                Undo::Name { key, .. } => {
                    asked.names.extend(
                        self.batch.requested.names.get(key).map(|update| (key.clone(), update.clone())),
                    );
                }
                Undo::Subscription { .. } => {}
                Undo::Follow { name, .. } => {
                    asked
                        .follows
                        .extend(self.batch.requested.follows.get(name).map(|noted| (name.clone(), *noted)));
                }
            }
        }
        asked.publishes = last(&self.batch.requested.publishes, published);
        asked.subscriptions = self.batch.requested.subscriptions[self.subscriptions_before..].to_vec();
        asked
    }

    /// Reverts all effects of the entry.
    pub fn roll_back(&mut self, context: &mut EntryContext) {
        while let Some(undo) = self.journal.pop() {
            self.take_back(undo, context);
        }
        self.batch.requested.subscriptions.truncate(self.subscriptions_before);
        self.changed.clear();
        self.batch.bytes = self.bytes_before;
    }

    fn take_back(&mut self, undo: Undo, context: &mut EntryContext) {
        match undo {
            Undo::State { key, before, size_before } => {
                self.state_size = size_before;
                restore(&mut self.batch.requested.state, key, before);
            }
            Undo::Timer { key, before, due_before } => {
                self.timers.put(&key, due_before);
                restore(&mut self.batch.requested.timers, key, before);
            }
            Undo::Publish => {
                self.batch.requested.publishes.pop();
            }
            Undo::Name { key, before, name, own_before } => {
                restore(&mut self.batch.requested.names, key, before);
                context.restore_own(name, own_before);
            }
            Undo::Subscription { topic, before } => {
                context.restore_subscription(topic, before);
            }
            Undo::Follow { name, before, noted } => {
                restore(&mut self.batch.requested.follows, name.clone(), noted);
                match before {
                    Some(known) => context.follow_known(name, known),
                    None => drop(context.unfollow(&name)),
                }
            }
        }
    }

    /// The uncommitted value of a state key; `None` if only the store knows it.
    pub fn state(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        self.layers().find_map(|batch| batch.requested.state.get(key)).map(Option::as_deref)
    }

    /// The batches, newest first.
    pub fn layers(&self) -> impl Iterator<Item = &Batch> {
        std::iter::once(&self.batch).chain(self.in_flight.iter().rev().map(AsRef::as_ref))
    }

    /// Sets or deletes a state key. `old_len` is the length of its old value in bytes, if it had one.
    pub fn set_state(&mut self, key: Vec<u8>, value: Option<Vec<u8>>, old_len: Option<usize>) {
        let size_before = self.state_size;
        let removed = old_len.map_or(0, |len| (key.len() + len) as u64);
        let added = value.as_ref().map_or(0, |value| (key.len() + value.len()) as u64);
        self.state_size = (self.state_size + added).saturating_sub(removed);
        self.batch.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        let before = self.batch.requested.state.insert(key.clone(), value);
        self.journal.push(Undo::State { key, before, size_before });
    }

    /// Sets or clears a timer.
    pub fn set_timer(&mut self, key: String, at: Option<Timestamp>) {
        let due_before = self.timers.put(&key, at);
        self.batch.bytes += key.len() + 8;
        let before = self.batch.requested.timers.insert(key.clone(), at);
        self.journal.push(Undo::Timer { key, before, due_before });
    }

    /// Adds a publish.
    pub fn publish(&mut self, publish: Publish) {
        self.batch.bytes += publish.topic.as_str().len() + publish.data.len();
        self.batch.requested.publishes.push(publish);
        self.journal.push(Undo::Publish);
    }

    /// Sets a new value of a name.
    pub fn set_name(&mut self, context: &mut EntryContext, key: KeyName, update: NameUpdate) {
        if let NameValue::Document { data, .. } = &update.value {
            self.batch.bytes += data.len();
        }
        let (name, path) = (update.name.clone(), update.value.path());
        let own_before = context.ask_own(&name, path, context.time().after(update.lifetime));
        let before = self.batch.requested.names.insert(key.clone(), update);
        self.journal.push(Undo::Name { key, before, name, own_before });
    }

    /// Whether another change of the subscription to `topic` cancels an earlier change of the same entry.
    pub fn unsays(&self, topic: &Topic) -> bool {
        self.changed.contains_key(topic)
    }

    /// Subscribes or unsubscribes, contrary to the current state. Two changes in one entry cancel each other.
    pub fn subscribe(&mut self, context: &mut EntryContext, topic: Topic, requested: SubscriptionRequest) {
        let before = context.ask_subscription(topic.clone(), requested);
        match self.changed.remove(&topic) {
            None => {
                self.changed.insert(topic.clone(), (self.batch.requested.subscriptions.len(), before));
                self.batch.requested.subscriptions.push((topic.clone(), requested));
            }
            Some((place, at_first)) => {
                context.restore_subscription(topic.clone(), at_first);
                self.batch.requested.subscriptions.swap_remove(place);
                // `swap_remove` has moved the last change, which is also of this entry, to this index.
                if let Some((moved, _)) = self.batch.requested.subscriptions.get(place)
                    && let Some((stands_at, _)) = self.changed.get_mut(moved)
                {
                    *stands_at = place;
                }
            }
        }
        self.journal.push(Undo::Subscription { topic, before });
    }

    /// Follows a name or stops following it.
    pub fn follow(&mut self, context: &mut EntryContext, name: IpnsName, followed: bool) {
        let before = context.follows().get(&name).cloned();
        if before.is_some() == followed {
            return;
        }
        if followed {
            context.follow(name.clone());
        } else {
            context.unfollow(&name);
        }
        let noted = self.batch.requested.follows.insert(name.clone(), followed);
        self.journal.push(Undo::Follow { name, before, noted });
    }
}

fn last<T: Clone>(all: &[T], count: usize) -> Vec<T> {
    all[all.len() - count..].to_vec()
}

fn restore<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, before: Option<V>) {
    match before {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    };
}

/// The timers of one plugin: by key for the plugin, by time for the host.
#[derive(Debug, Default)]
pub struct Timers {
    by_key: BTreeMap<String, Timestamp>,
    by_time: BTreeSet<(Timestamp, String)>,
}

impl Timers {
    /// Sets or clears a timer; returns the time at which it was due.
    pub fn put(&mut self, key: &str, at: Option<Timestamp>) -> Option<Timestamp> {
        let before = match at {
            Some(at) => self.by_key.insert(key.to_owned(), at),
            None => self.by_key.remove(key),
        };
        if let Some(before) = before {
            self.by_time.remove(&(before, key.to_owned()));
        }
        if let Some(at) = at {
            self.by_time.insert((at, key.to_owned()));
        }
        before
    }

    /// The time at which a timer is due.
    pub fn get(&self, key: &str) -> Option<Timestamp> {
        self.by_key.get(key).copied()
    }

    /// The number of timers that are set.
    pub fn count(&self) -> usize {
        self.by_key.len()
    }

    /// The timer that is due first.
    pub fn first(&self) -> Option<(Timestamp, &str)> {
        self.by_time.first().map(|(at, key)| (*at, key.as_str()))
    }
}
