//! Owns what a plugin asked for and the commit has not yet made real: the batch of the entries
//! that are committed together, and the journal that takes back those of one failed entry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::effect::{Asked, DeadLetter, NameUpdate, NameValue, Publish, Retry};
use crate::entry::Resolution;
use crate::entry::{Generation, Kind, Offset};
use crate::ident::{IpnsName, KeyName, PluginName, Topic};
use crate::plugin::actor::{Handover, TakeBack};
use crate::plugin::probation::{Probation, Rates, Verdict};
use crate::plugin::roster::Quarantine;
use crate::plugin::world::{OwnName, World};
use crate::room::NoRoom;
use crate::store::PluginId;
use crate::time::Timestamp;

/// The effects of consecutive entries of one plugin, which become real together.
#[derive(Debug)]
pub struct Batch {
    /// Whose.
    pub plugin: PluginName,
    /// Its number.
    pub id: PluginId,
    /// Which code's.
    pub by: Generation,
    /// Batches of one plugin are numbered from 1.
    pub number: u64,
    /// The cursor after the last entry.
    pub cursor: Offset,
    /// New values of state keys; none for a deleted one.
    pub state: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Bytes of the plugin's state after the last entry.
    pub state_size: u64,
    /// New times of timers; none for a cleared one.
    pub timers: BTreeMap<String, Option<Timestamp>>,
    /// What is to be published, in order.
    pub publishes: Vec<Publish>,
    /// The newest value of each name that changed.
    pub names: BTreeMap<KeyName, NameUpdate>,
    /// Topics to subscribe to (true) and to unsubscribe from, in order.
    pub subscriptions: Vec<(Topic, bool)>,
    /// Names that are followed from now on (true) or no longer.
    pub follows: BTreeMap<IpnsName, bool>,
    /// Events that are set aside.
    pub dead: Vec<DeadLetter>,
    /// Events that are to be handled again.
    pub retries: Vec<Retry>,
    /// The limits that struck, as entries of the log.
    pub struck: Vec<Kind>,
    /// The world after the last entry, if it changed.
    pub world: Option<Vec<u8>>,
    /// The state version, if a start has changed it.
    pub started: Option<u32>,
    /// The code that takes over with these effects, if other code does.
    pub handover: Option<Handover>,
    /// The code that goes on in place of what failed, if one does; then there is nothing else.
    pub take_back: Option<TakeBack>,
    /// How the probation stands, if the code is on one.
    pub probation: Option<Probation>,
    /// What the code has handled since it was confirmed, now and then.
    pub rates: Option<Rates>,
    /// The verdict on the code, if there is one by now.
    pub verdict: Option<Verdict>,
    /// Why the plugin is not started any more, or that it is again, if that has changed.
    pub quarantine: Option<Option<Quarantine>>,
    /// Replies to commands, sent after the commit.
    pub replies: Mutex<Vec<PendingReply>>,
    /// How many entries and timers these are the effects of.
    pub entries: usize,
    /// Bytes that the effects hold.
    pub bytes: usize,
}

/// The answer to a command.
pub type Reply = Result<String, ReplyError>;

/// Why a command or a query has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "detail")]
pub enum ReplyError {
    /// The plugin has no such method.
    #[error("the plugin has no method {0:?}")]
    UnknownMethod(String),
    /// The body is wrong.
    #[error("invalid body: {0}")]
    Invalid(String),
    /// What it is about does not exist.
    #[error("not found: {0}")]
    NotFound(String),
    /// The host takes in nothing for now.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It cannot be done as things stand.
    #[error("conflict: {0}")]
    Conflict(String),
    /// The plugin says so.
    #[error("{0}")]
    Refused(String),
    /// The plugin trapped or met a limit.
    #[error("the plugin failed: {0}")]
    Failed(String),
    /// There is no such plugin.
    #[error("there is no plugin {0:?}")]
    NoPlugin(String),
    /// The plugin is not running, or the host is going down.
    #[error("the plugin is not available: {0}")]
    Unavailable(String),
}

/// A reply that waits for the commit.
#[derive(Debug)]
pub struct PendingReply {
    /// Who waits for it.
    pub to: oneshot::Sender<Reply>,
    /// The command's entry.
    pub offset: Offset,
    /// What it says.
    pub reply: Reply,
}

impl Batch {
    /// An empty batch of code `by` that starts at `cursor`.
    pub fn new(plugin: PluginName, id: PluginId, by: Generation, number: u64, cursor: Offset) -> Self {
        Self {
            plugin,
            id,
            by,
            number,
            cursor,
            state: BTreeMap::new(),
            state_size: 0,
            timers: BTreeMap::new(),
            publishes: Vec::new(),
            names: BTreeMap::new(),
            subscriptions: Vec::new(),
            follows: BTreeMap::new(),
            dead: Vec::new(),
            retries: Vec::new(),
            struck: Vec::new(),
            world: None,
            started: None,
            handover: None,
            take_back: None,
            probation: None,
            rates: None,
            verdict: None,
            quarantine: None,
            replies: Mutex::default(),
            entries: 0,
            bytes: 0,
        }
    }

    /// Whether nothing would be lost if these entries were handled again.
    pub fn is_trifling(&self) -> bool {
        self.state.is_empty()
            && self.timers.is_empty()
            && self.publishes.is_empty()
            && self.names.is_empty()
            && self.subscriptions.is_empty()
            && self.follows.is_empty()
            && self.dead.is_empty()
            && self.retries.is_empty()
            && self.struck.is_empty()
            && self.started.is_none()
            && self.handover.is_none()
            && self.take_back.is_none()
            && self.verdict.is_none()
            && self.quarantine.is_none()
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.entries == 0 && self.world.is_none() && self.started.is_none() && self.is_trifling()
    }

    /// Keeps a reply for after the commit.
    pub fn reply(&mut self, to: oneshot::Sender<Reply>, offset: Offset, reply: Reply) {
        self.bytes += reply.as_ref().map_or(0, String::len);
        let replies = self.replies.get_mut().expect("no one panics while holding the replies");
        replies.push(PendingReply { to, offset, reply });
    }

    /// The replies of a batch that is dropped: who waits for them waits on.
    pub fn into_replies(self) -> Vec<PendingReply> {
        self.replies.into_inner().expect("no one panics while holding the replies")
    }

    /// Sends the replies; called once the batch is durable.
    pub fn send_replies(&self) {
        let mut replies = self.replies.lock().expect("no one panics while holding the replies");
        for pending in replies.drain(..) {
            // Whoever asked may have gone away.
            let _ = pending.to.send(pending.reply);
        }
    }
}

/// Takes back one effect.
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
    /// The batch's list is cut back to what stood there before the entry.
    Subscription {
        topic: Topic,
        before: Option<bool>,
    },
    Follow {
        name: IpnsName,
        before: Option<Option<Resolution>>,
        noted: Option<bool>,
    },
}

/// The effects of the entry that is being handled, on top of those before it.
#[derive(Debug)]
pub struct Effects {
    /// The batch that is being filled.
    pub batch: Batch,
    /// The batches that are on their way to the store, oldest first.
    pub in_flight: Vec<Arc<Batch>>,
    /// Timers that are set, committed or not.
    pub timers: Timers,
    /// Bytes of the plugin's state, committed or not.
    pub state_size: u64,
    journal: Vec<Undo>,
    bytes_before: usize,
    /// Subscriptions of the batch that were asked for before the entry.
    subscriptions_before: usize,
    /// Those that the entry has changed: where they stand in the batch, and what the world said before.
    changed: BTreeMap<Topic, (usize, Option<bool>)>,
}

impl Effects {
    /// No effects yet.
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

    /// Begins an entry: what was asked for before it stays.
    pub fn begin_entry(&mut self) {
        self.journal.clear();
        self.bytes_before = self.batch.bytes;
        self.subscriptions_before = self.batch.subscriptions.len();
        self.changed.clear();
    }

    /// How many effects the entry has had.
    pub fn count(&self) -> usize {
        self.journal.len()
    }

    /// The bytes that the entry's effects hold.
    pub fn entry_bytes(&self) -> usize {
        self.batch.bytes - self.bytes_before
    }

    /// What the entry has asked for, as it stands now.
    pub fn of_entry(&self) -> Asked {
        let mut asked = Asked::default();
        let mut published = 0;
        for undo in &self.journal {
            match undo {
                Undo::State { key, .. } => {
                    asked.state.insert(key.clone(), self.batch.state.get(key).cloned().flatten());
                }
                Undo::Timer { key, .. } => {
                    asked.timers.insert(key.clone(), self.batch.timers.get(key).copied().flatten());
                }
                Undo::Publish => published += 1,
                Undo::Name { key, .. } => {
                    asked.names.extend(self.batch.names.get(key).map(|update| (key.clone(), update.clone())));
                }
                Undo::Subscription { .. } => {}
                Undo::Follow { name, .. } => {
                    asked.follows.extend(self.batch.follows.get(name).map(|noted| (name.clone(), *noted)));
                }
            }
        }
        asked.publishes = last(&self.batch.publishes, published);
        asked.subscriptions = self.batch.subscriptions[self.subscriptions_before..].to_vec();
        asked
    }

    /// Takes back all effects of the entry.
    pub fn roll_back(&mut self, world: &mut World) {
        while let Some(undo) = self.journal.pop() {
            self.take_back(undo, world);
        }
        self.batch.subscriptions.truncate(self.subscriptions_before);
        self.changed.clear();
        self.batch.bytes = self.bytes_before;
    }

    fn take_back(&mut self, undo: Undo, world: &mut World) {
        match undo {
            Undo::State { key, before, size_before } => {
                self.state_size = size_before;
                restore(&mut self.batch.state, key, before);
            }
            Undo::Timer { key, before, due_before } => {
                self.timers.put(&key, due_before);
                restore(&mut self.batch.timers, key, before);
            }
            Undo::Publish => {
                self.batch.publishes.pop();
            }
            Undo::Name { key, before, name, own_before } => {
                restore(&mut self.batch.names, key, before);
                world.restore_own(name, own_before);
            }
            Undo::Subscription { topic, before } => {
                world.restore_subscription(topic, before);
            }
            Undo::Follow { name, before, noted } => {
                restore(&mut self.batch.follows, name.clone(), noted);
                match before {
                    Some(known) => world.follow_known(name, known),
                    None => drop(world.unfollow(&name)),
                }
            }
        }
    }

    /// What is known of a state key before the store is asked.
    pub fn state(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        self.layers().find_map(|batch| batch.state.get(key)).map(Option::as_deref)
    }

    /// The batches, newest first.
    pub fn layers(&self) -> impl Iterator<Item = &Batch> {
        std::iter::once(&self.batch).chain(self.in_flight.iter().rev().map(AsRef::as_ref))
    }

    /// Sets or deletes a state key whose value had `old_len` bytes, if it had one.
    pub fn set_state(&mut self, key: Vec<u8>, value: Option<Vec<u8>>, old_len: Option<usize>) {
        let size_before = self.state_size;
        let removed = old_len.map_or(0, |len| (key.len() + len) as u64);
        let added = value.as_ref().map_or(0, |value| (key.len() + value.len()) as u64);
        self.state_size = (self.state_size + added).saturating_sub(removed);
        self.batch.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
        let before = self.batch.state.insert(key.clone(), value);
        self.journal.push(Undo::State { key, before, size_before });
    }

    /// Sets or clears a timer.
    pub fn set_timer(&mut self, key: String, at: Option<Timestamp>) {
        let due_before = self.timers.put(&key, at);
        self.batch.bytes += key.len() + 8;
        let before = self.batch.timers.insert(key.clone(), at);
        self.journal.push(Undo::Timer { key, before, due_before });
    }

    /// Publishes.
    pub fn publish(&mut self, publish: Publish) {
        self.batch.bytes += publish.topic.as_str().len() + publish.data.len();
        self.batch.publishes.push(publish);
        self.journal.push(Undo::Publish);
    }

    /// Gives a name a new value.
    pub fn set_name(&mut self, world: &mut World, key: KeyName, update: NameUpdate) {
        if let NameValue::Document { data, .. } = &update.value {
            self.batch.bytes += data.len();
        }
        let (name, path) = (update.name.clone(), update.value.path());
        let own_before = world.ask_own(&name, path, world.time().after(update.lifetime));
        let before = self.batch.names.insert(key.clone(), update);
        self.journal.push(Undo::Name { key, before, name, own_before });
    }

    /// Whether another change of the subscription to `topic` takes back what the entry has asked for.
    pub fn unsays(&self, topic: &Topic) -> bool {
        self.changed.contains_key(topic)
    }

    /// Subscribes or unsubscribes, other than the plugin does by now. Twice in one entry is nothing.
    pub fn subscribe(&mut self, world: &mut World, topic: Topic, subscribed: bool) {
        let before = world.ask_subscription(topic.clone(), subscribed);
        match self.changed.remove(&topic) {
            None => {
                self.changed.insert(topic.clone(), (self.batch.subscriptions.len(), before));
                self.batch.subscriptions.push((topic.clone(), subscribed));
            }
            Some((place, at_first)) => {
                world.restore_subscription(topic.clone(), at_first);
                self.batch.subscriptions.swap_remove(place);
                // What stood last is the entry's, too, and stands there now.
                if let Some((moved, _)) = self.batch.subscriptions.get(place)
                    && let Some((stands_at, _)) = self.changed.get_mut(moved)
                {
                    *stands_at = place;
                }
            }
        }
        self.journal.push(Undo::Subscription { topic, before });
    }

    /// Follows a name or stops doing so.
    pub fn follow(&mut self, world: &mut World, name: IpnsName, followed: bool) {
        let before = world.follows().get(&name).cloned();
        if before.is_some() == followed {
            return;
        }
        if followed {
            world.follow(name.clone());
        } else {
            world.unfollow(&name);
        }
        let noted = self.batch.follows.insert(name.clone(), followed);
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
    /// Sets or clears a timer; returns when it was due.
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

    /// When a timer is due.
    pub fn get(&self, key: &str) -> Option<Timestamp> {
        self.by_key.get(key).copied()
    }

    /// How many are set.
    pub fn count(&self) -> usize {
        self.by_key.len()
    }

    /// The timer that is due first.
    pub fn first(&self) -> Option<(Timestamp, &str)> {
        self.by_time.first().map(|(at, key)| (*at, key.as_str()))
    }
}
