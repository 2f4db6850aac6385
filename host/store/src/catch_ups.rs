//! Owns the catch-ups: subscriptions of plugins that begin before the head of a reliable topic, until they have caught
//! up with the events that come to all plugins. The entries of the log begin and end them, in the transaction that
//! appends the entries. The positions in the logs of the writers are rows of their own. The earlier messages of this host
//! are in its event log.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use dim_model::beginning::Beginning;
use dim_model::entry::{Entry, Event, Generation, Kind, Offset, Origin};
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Timestamp;
use dim_topics::action::{Checkpoint, Delivery};
use dim_topics::identity::WriterId;
use dim_topics::reader::Since;
use prost::Message as _;
use redb::{ReadableTable as _, WriteTransaction};

use crate::entry_context::EntryContext;
use crate::grants::TopicPattern;
use crate::rollback_rows::Place;
use crate::topic_rows::row_of;
use crate::{
    CATCH_UP_CHECKPOINTS, CATCH_UPS, Snapshot, StoreError, WORLDS, checkpoint, plugin_registry, topic_rows,
};

/// The topics whose writers keep their events.
#[derive(Clone, Debug)]
pub enum KeptTopics {
    /// All topics, for a trial.
    All,
    /// The topics of the patterns with `true`. The closest pattern decides.
    These(Arc<BTreeMap<TopicPattern, bool>>),
}

impl KeptTopics {
    /// Returns the beginning of a subscription to a topic. Nothing is kept on a plain topic, so a subscription begins at
    /// its head.
    pub fn beginning(&self, topic: &Topic, requested: Beginning) -> Beginning {
        match self {
            Self::All => requested,
            Self::These(patterns) if TopicPattern::closest(patterns, topic) == Some(&true) => requested,
            Self::These(_) => Beginning::Head,
        }
    }
}

/// A subscription that receives earlier events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatchUp {
    /// The entry of the subscription.
    pub subscription: Offset,
    /// The plugin.
    pub plugin: PluginName,
    /// The topic.
    pub topic: Topic,
    /// The place from which on the plugin wants events.
    pub since: Since,
    /// The positions in the logs of the writers.
    pub checkpoints: Vec<(WriterId, Checkpoint)>,
    /// The entry from which on the log is searched for messages of this host. `None` if they come to the plugin at once,
    /// as in catch-ups that an older version began.
    pub own_next: Option<Offset>,
}

impl CatchUp {
    /// Returns the messages of this host among the next `entries` of the log, and a gap for those that the log no longer
    /// contains. Continues after the entries.
    pub fn take_own(&mut self, entries: &VecDeque<Arc<Entry>>) -> Vec<Kind> {
        let (Some(next), Some(first), Some(last)) = (self.own_next, entries.front(), entries.back()) else {
            return Vec::new();
        };
        let since = self.since_time().unwrap_or(Timestamp(0));
        self.own_next = Some(Offset(last.offset.0 + 1).max(next));
        let is_lost = first.offset > next && first.time > since;
        let topic = self.topic.clone();
        let gap = is_lost.then_some(Event::Gap { topic, since, until: first.time, missing: None });
        let message = |entry: &Arc<Entry>| match &entry.kind {
            Kind::Event(event)
                if self.is_own_message(entry) && entry.time >= since && entry.offset >= next =>
            {
                Some(event.clone())
            }
            _ => None,
        };
        let messages = entries.iter().filter_map(message);
        let earlier =
            |event| Kind::Earlier { plugin: self.plugin.clone(), subscription: self.subscription, event };
        gap.into_iter().chain(messages).map(earlier).collect()
    }

    /// The time from which on events are wanted; `None` for the earliest.
    pub fn since_time(&self) -> Option<Timestamp> {
        match self.since {
            Since::Earliest => None,
            Since::Time(time) | Since::Head(time) => Some(time),
        }
    }

    /// Whether an entry has a message of this host on the topic, and not of the plugin itself.
    pub fn is_own_message(&self, entry: &Entry) -> bool {
        let Kind::Event(Event::Message { topic, origin, .. }) = &entry.kind else { return false };
        let is_own = match origin {
            Origin::Host => true,
            Origin::Plugin(sender) => *sender != self.plugin,
            Origin::Member(_) | Origin::Peer(_) => false,
        };
        is_own && *topic == self.topic
    }
}

/// The catch-ups that are under way, oldest first.
pub fn all(snapshot: &Snapshot) -> Result<Vec<CatchUp>, StoreError> {
    let mut all = Vec::new();
    for row in snapshot.table(CATCH_UPS)?.iter()? {
        let (subscription, row) = row?;
        let row = CatchUpRow::read(row.value())?;
        if row.ended_by.is_none() {
            all.push(CatchUp {
                subscription: Offset(subscription.value()),
                since: row.since(),
                plugin: parse(&row.plugin)?,
                topic: parse(&row.topic)?,
                checkpoints: Vec::new(),
                own_next: row.own_too.then_some(Offset(row.own_next)),
            });
        }
    }
    let checkpoints = snapshot.table(CATCH_UP_CHECKPOINTS)?;
    for it in &mut all {
        let of = it.subscription.0;
        for row in checkpoints.range(keys_of(of))? {
            let (key, row) = row?;
            it.checkpoints.push(topic_rows::checkpoint(key.value().1, row.value())?);
        }
    }
    Ok(all)
}

/// The first entry with a message of this host that a catch-up of one of `plugins` perhaps has not appended yet.
pub fn first_deferred(
    snapshot: &Snapshot,
    plugins: &BTreeSet<PluginName>,
) -> Result<Option<Offset>, StoreError> {
    let mut first = None;
    for row in snapshot.table(CATCH_UPS)?.iter()? {
        let (subscription, row) = row?;
        let row = CatchUpRow::read(row.value())?;
        if row.own_too && row.ended_by.is_none() && plugins.contains(row.plugin.as_str()) {
            // Entries before the subscription are not kept for it.
            let next = Offset(row.own_next.max(subscription.value()));
            first = Some(first.map_or(next, |first: Offset| first.min(next)));
        }
    }
    Ok(first)
}

/// Begins and ends catch-ups as `entries` say, which are appended to the log in the same transaction. Returns whether
/// there was one.
pub fn observe<'a>(
    write: &WriteTransaction,
    entries: impl IntoIterator<Item = &'a Entry>,
) -> Result<bool, StoreError> {
    let mut is_changed = false;
    for entry in entries {
        is_changed |= match &entry.kind {
            Kind::Subscription { plugin, topic, subscribed: true, beginning, own_too, by } => {
                begin(write, entry, (plugin, topic), (*beginning, *own_too), *by)?
            }
            Kind::Subscription { plugin, topic, subscribed: false, by, .. } => {
                end(write, plugin, topic, *by)?
            }
            Kind::CaughtUp { subscription, .. } => remove(write, subscription.0)?,
            Kind::Code { plugin, generation, voids, .. } => {
                let is_reverted = voids.map(|first| revert(write, plugin, first, *generation)).transpose()?;
                forget_ended(write, plugin)?;
                is_reverted.unwrap_or(false)
            }
            _ => false,
        };
    }
    Ok(is_changed)
}

/// Writes the position after a delivery to a plugin that catches up.
pub fn advance(write: &WriteTransaction, of: Offset, delivery: &Delivery) -> Result<(), StoreError> {
    if write.open_table(CATCH_UPS)?.get(of.0)?.is_none() {
        // The subscription has ended meanwhile.
        return Ok(());
    }
    let mut table = write.open_table(CATCH_UP_CHECKPOINTS)?;
    for (key, row) in topic_rows::checkpoint_rows(delivery, |key| row_of(table.get((of.0, key))?))? {
        match row {
            Some(row) => table.insert((of.0, key.as_slice()), row.as_slice())?,
            None => table.remove((of.0, key.as_slice()))?,
        };
    }
    Ok(())
}

/// The entry from which on the log is searched for messages of this host, as transactions up to this one have written it.
pub fn own_next(write: &WriteTransaction, of: Offset) -> Result<Option<Offset>, StoreError> {
    let row = write.open_table(CATCH_UPS)?.get(of.0)?.map(|row| CatchUpRow::read(row.value())).transpose()?;
    Ok(row.map(|row| Offset(row.own_next)))
}

/// Writes the entry from which on the log is searched for further messages of this host.
pub fn advance_own(write: &WriteTransaction, catch_up: &CatchUp) -> Result<(), StoreError> {
    let number = catch_up.subscription.0;
    let row =
        write.open_table(CATCH_UPS)?.get(number)?.map(|row| CatchUpRow::read(row.value())).transpose()?;
    // Without a row, the subscription has ended meanwhile.
    if let (Some(row), Some(Offset(own_next))) = (row, catch_up.own_next) {
        put(write, number, &CatchUpRow { own_next, ..row })?;
    }
    Ok(())
}

/// Ends all catch-ups of a plugin that is removed. If it is installed again, it continues with the events that come to
/// all plugins; the time without it is a gap.
pub fn forget_plugin(write: &WriteTransaction, plugin: &PluginName) -> Result<(), StoreError> {
    if let Some(id) = plugin_registry::id_within(write, plugin)? {
        let mut contexts = write.open_table(WORLDS)?;
        let context = contexts.get(id.0)?.map(|row| EntryContext::from_bytes(row.value())).transpose()?;
        if let Some(mut context) = context.filter(|context| context.catching_up().next().is_some()) {
            let topics: Vec<Topic> = context.catching_up().map(|(topic, _)| topic.clone()).collect();
            topics.iter().for_each(|topic| context.stop_catching_up(topic));
            contexts.insert(id.0, context.to_bytes().as_slice())?;
        }
    }
    remove_of(write, plugin, |_| true)?;
    Ok(())
}

fn begin(
    write: &WriteTransaction,
    entry: &Entry,
    (plugin, topic): (&PluginName, &Topic),
    (beginning, own_too): (Beginning, bool),
    by: Generation,
) -> Result<bool, StoreError> {
    let from_time = match beginning {
        Beginning::Head => return Ok(false),
        Beginning::Time(time) => Some(time.0),
        Beginning::Earliest => None,
    };
    let is_same = |row: &CatchUpRow| row.topic == topic.as_str() && row.ended_by.is_none();
    if !select(write, plugin, is_same)?.is_empty() {
        return Ok(false);
    }
    let (plugin, topic) = (plugin.to_string(), topic.to_string());
    let row = CatchUpRow { plugin, topic, from_time, by: by.0, ended_by: None, own_next: 0, own_too };
    put(write, entry.offset.0, &row)?;
    Ok(true)
}

/// Ends the catch-up of a topic. Its positions are kept while a rollback may revert the end.
fn end(
    write: &WriteTransaction,
    plugin: &PluginName,
    topic: &Topic,
    by: Generation,
) -> Result<bool, StoreError> {
    let ended = select(write, plugin, |row| row.topic == topic.as_str() && row.ended_by.is_none())?;
    for (number, row) in &ended {
        if row.by == by.0 {
            // A rollback that reverts the end reverts the beginning, too.
            remove(write, *number)?;
        } else {
            put(write, *number, &CatchUpRow { ended_by: Some(by.0), ..row.clone() })?;
        }
    }
    forget_ended(write, plugin)?;
    Ok(!ended.is_empty())
}

/// Reverts what the generations from `first` to the one before `end` have begun and ended.
fn revert(
    write: &WriteTransaction,
    plugin: &PluginName,
    first: Generation,
    end: Generation,
) -> Result<bool, StoreError> {
    let is_void = |by: u32| (first.0..end.0).contains(&by);
    let is_changed = remove_of(write, plugin, |row| is_void(row.by))?;
    let ended = select(write, plugin, |row| row.ended_by.is_some_and(is_void))?;
    for (number, row) in &ended {
        put(write, *number, &CatchUpRow { ended_by: None, ..row.clone() })?;
    }
    Ok(is_changed || !ended.is_empty())
}

/// Removes catch-ups whose end no rollback can revert.
fn forget_ended(write: &WriteTransaction, plugin: &PluginName) -> Result<(), StoreError> {
    // A plugin that is announced has no row yet, and none that was never replaced has a checkpoint.
    let checkpoints = match plugin_registry::id_within(write, plugin)? {
        Some(id) => checkpoint::checkpoints_within(write, id)?,
        None => Vec::new(),
    };
    let earliest = checkpoints.iter().map(|(Place(_, first), _)| first.0).min().unwrap_or(u32::MAX);
    remove_of(write, plugin, |row| row.ended_by.is_some_and(|by| by < earliest))?;
    Ok(())
}

/// The rows of a plugin for which `wanted` returns true.
fn select(
    write: &WriteTransaction,
    plugin: &PluginName,
    wanted: impl Fn(&CatchUpRow) -> bool,
) -> Result<Vec<(u64, CatchUpRow)>, StoreError> {
    let mut found = Vec::new();
    for row in write.open_table(CATCH_UPS)?.iter()? {
        let (number, row) = row?;
        let row = CatchUpRow::read(row.value())?;
        if row.plugin == plugin.as_str() && wanted(&row) {
            found.push((number.value(), row));
        }
    }
    Ok(found)
}

fn put(write: &WriteTransaction, number: u64, row: &CatchUpRow) -> Result<(), StoreError> {
    write.open_table(CATCH_UPS)?.insert(number, row.encode_to_vec().as_slice())?;
    Ok(())
}

/// Removes the catch-ups of a plugin for which `wanted` returns true. Returns whether there was one.
fn remove_of(
    write: &WriteTransaction,
    plugin: &PluginName,
    wanted: impl Fn(&CatchUpRow) -> bool,
) -> Result<bool, StoreError> {
    let mut is_changed = false;
    for (number, _) in select(write, plugin, wanted)? {
        is_changed |= remove(write, number)?;
    }
    Ok(is_changed)
}

/// Removes a catch-up with its positions. Returns whether there was one.
fn remove(write: &WriteTransaction, number: u64) -> Result<bool, StoreError> {
    write.open_table(CATCH_UP_CHECKPOINTS)?.retain_in(keys_of(number), |_, _| false)?;
    Ok(write.open_table(CATCH_UPS)?.remove(number)?.is_some())
}

/// The keys of all positions of a catch-up.
fn keys_of(number: u64) -> std::ops::RangeInclusive<(u64, &'static [u8])> {
    (number, &[] as &[u8])..=(number, &[u8::MAX; 49])
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|error: T::Err| StoreError::corrupt("catch-ups", error.to_string()))
}

/// A catch-up. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct CatchUpRow {
    #[prost(string, tag = "1")]
    plugin: String,
    #[prost(string, tag = "2")]
    topic: String,
    /// The beginning; `None` for the earliest event that is kept.
    #[prost(fixed64, optional, tag = "3")]
    from_time: Option<u64>,
    /// The generation that subscribed.
    #[prost(uint32, tag = "4")]
    by: u32,
    /// The generation that unsubscribed.
    #[prost(uint32, optional, tag = "5")]
    ended_by: Option<u32>,
    /// The entry from which on the log is searched for messages of this host.
    #[prost(uint64, tag = "6")]
    own_next: u64,
    /// Whether messages of this host come with the earlier events.
    #[prost(bool, tag = "7")]
    own_too: bool,
}

impl CatchUpRow {
    fn read(bytes: &[u8]) -> Result<Self, StoreError> {
        Self::decode(bytes).map_err(|error| StoreError::corrupt("catch-ups", error))
    }

    fn since(&self) -> Since {
        self.from_time.map_or(Since::Earliest, |time| Since::Time(Timestamp(time)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(offset: u64, topic: &str, origin: Origin) -> Arc<Entry> {
        let (topic, data) = (topic.parse().unwrap(), offset.to_string().into());
        let kind = Kind::Event(Event::Message { topic, data, origin });
        Arc::new(Entry { offset: Offset(offset), time: Timestamp(100 + offset), kind })
    }

    fn catch_up(since: Since, own_next: Option<u64>) -> CatchUp {
        let (plugin, topic) = ("late".parse().unwrap(), "jobs".parse().unwrap());
        let own_next = own_next.map(Offset);
        CatchUp { subscription: Offset(9), plugin, topic, since, checkpoints: Vec::new(), own_next }
    }

    /// The offsets of the messages, and the time before which messages are missing.
    fn taken(it: &mut CatchUp, entries: impl IntoIterator<Item = Arc<Entry>>) -> (Vec<u64>, Option<u64>) {
        let (mut messages, mut gap) = (Vec::new(), None);
        for kind in it.take_own(&entries.into_iter().collect()) {
            match kind {
                Kind::Earlier { plugin, subscription: Offset(9), event } if plugin == it.plugin => {
                    match event {
                        Event::Message { data, .. } => {
                            messages.push(std::str::from_utf8(&data).unwrap().parse().unwrap());
                        }
                        Event::Gap { until, missing: None, .. } => gap = Some(until.0),
                        other => panic!("{other:?}"),
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        (messages, gap)
    }

    #[test]
    fn a_plugin_receives_the_earlier_messages_of_its_host_and_of_other_plugins() {
        let plugin = |name: &str| Origin::Plugin(name.parse().unwrap());
        let peer: dim_model::ident::PeerName =
            "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo".parse().unwrap();
        let all = || {
            [
                message(0, "jobs", Origin::Host),
                message(1, "jobs", plugin("early")),
                message(2, "jobs", plugin("late")),
                message(3, "other", Origin::Host),
                message(4, "jobs", Origin::Peer(peer.clone())),
                message(5, "jobs", Origin::Host),
            ]
        };
        let mut it = catch_up(Since::Earliest, Some(0));
        assert_eq!(taken(&mut it, all()), (vec![0, 1, 5], None));
        assert_eq!(it.own_next, Some(Offset(6)));
        assert_eq!(taken(&mut it, []), (vec![], None));
        assert_eq!(taken(&mut it, [message(6, "jobs", Origin::Host)]), (vec![6], None));
    }

    #[test]
    fn earlier_messages_that_the_log_no_longer_contains_are_a_gap() {
        let entries = || (4..7).map(|offset| message(offset, "jobs", Origin::Host));
        assert_eq!(taken(&mut catch_up(Since::Earliest, Some(0)), entries()), (vec![4, 5, 6], Some(104)));
        assert_eq!(taken(&mut catch_up(Since::Earliest, Some(3)), entries()), (vec![4, 5, 6], Some(104)));
        assert_eq!(taken(&mut catch_up(Since::Earliest, Some(5)), entries()), (vec![5, 6], None));
        let since = |time| Since::Time(Timestamp(time));
        assert_eq!(taken(&mut catch_up(since(105), Some(0)), entries()), (vec![5, 6], None));
        assert_eq!(taken(&mut catch_up(since(50), Some(0)), entries()), (vec![4, 5, 6], Some(104)));
        assert_eq!(taken(&mut catch_up(Since::Earliest, None), entries()), (vec![], None));
    }
}
