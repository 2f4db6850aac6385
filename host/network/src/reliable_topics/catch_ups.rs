//! Owns the catch-ups of plugins: when they begin and end, the size of the earlier events that a plugin has not handled
//! yet, and the earlier messages of this host. The protocol reads the logs of other writers for them; the messages of
//! this host are in its event log, and come first. From then on they come in turn, until the plugin has caught up.
//!
//! A catch-up waits while its plugin has much to do. Otherwise a slow plugin would receive a gap once its queue is full.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dim_model::entry::{Entry, Event, Kind, Offset};
use dim_model::ident::{PluginName, Topic};
use dim_store::catch_ups::{self as stored, CatchUp};
use dim_store::commit::{Commit, CommitError};
use dim_store::event_log::EventLog;
use dim_store::{Snapshot, Store, StoreError, plugin_registry};
use dim_topics::time::Now;
use redb::WriteTransaction;

use super::channel::{Input, Reliable};
use super::intake::Outcome;
use super::{Parts, ReliableTopics};

/// The maximum size of the earlier events that wait for a plugin, in bytes. It is half of `limits.queue-bytes` if that is
/// less. The catch-ups of the plugin wait at this size.
const QUEUED: u64 = 64 << 20;

/// The maximum size of the messages of this host that are appended in one transaction, in bytes.
const BATCH: u64 = 4 << 20;

/// The number of entries of the log after which a search ends, so that it does not hold up the end of the host.
const SEARCHED: usize = 1 << 20;

/// The pause after the log could not be read.
const RETRY: Duration = Duration::from_secs(5);

/// The pause between looks at the queues and at the messages of this host.
const CHECK: Duration = Duration::from_millis(250);

/// The number of entries of the log that are read at once.
const ENTRIES: usize = 1_024;

/// The catch-ups that are under way.
#[derive(Debug)]
pub struct CatchUps {
    /// The plugins, by the entries of their subscriptions.
    receivers: BTreeMap<u64, Receiver>,
    /// The maximum size of the earlier events that wait for a plugin, in bytes.
    limit: u64,
    is_check_planned: bool,
    /// Whether the catch-ups that were under way before the start of the host are known.
    is_begun: bool,
}

/// A plugin that catches up.
#[derive(Debug)]
struct Receiver {
    catch_up: CatchUp,
    /// The sizes of the earlier events that it has not handled yet, in bytes, with the places in the log after them.
    unhandled: VecDeque<(Offset, u64)>,
    /// The size of the messages that the search which is under way may append, in bytes.
    reserved: u64,
    /// After a start of the host: the place in the log up to which the plugin first reads, because earlier events may
    /// wait for it before that place.
    reads_first: Option<Offset>,
    /// Whether the messages of this host up to the present were appended.
    has_own: bool,
    /// Whether the log is being searched for messages of this host.
    is_reading_own: bool,
}

/// The result of a search of the log for messages of this host.
#[derive(Debug)]
pub struct OwnMessages {
    catch_up: CatchUp,
    /// The place in the log after the messages and their size in bytes, if there are any.
    appended: Option<(Offset, u64)>,
    /// Whether the log has no further entries.
    is_at_end: bool,
}

impl CatchUps {
    /// No catch-ups. The queue of a plugin may have `queue_bytes` bytes.
    pub fn new(queue_bytes: u64) -> Self {
        let limit = QUEUED.min(queue_bytes / 2).max(1);
        Self { receivers: BTreeMap::new(), limit, is_check_planned: false, is_begun: false }
    }

    /// The catch-ups of some results.
    pub fn of(&self, outcomes: &[Outcome]) -> BTreeMap<u64, CatchUp> {
        let numbers = outcomes.iter().filter_map(|outcome| outcome.stream().catch_up);
        let known = numbers.filter_map(|number| Some((number, self.receivers.get(&number)?)));
        known.map(|(number, receiver)| (number, receiver.catch_up.clone())).collect()
    }

    /// Notes earlier events that were appended to the log before the place `end`.
    pub fn appended(&mut self, number: u64, end: Offset, bytes: u64) {
        if let Some(receiver) = self.receivers.get_mut(&number) {
            receiver.unhandled.push_back((end, bytes));
        }
    }

    /// The size of the earlier events that may be appended for each catch-up of a plugin, in bytes.
    fn rooms(&self) -> BTreeMap<u64, u64> {
        let mut waiting: BTreeMap<&PluginName, (u64, u64)> = BTreeMap::new();
        for receiver in self.receivers.values() {
            let (count, bytes) = waiting.entry(&receiver.catch_up.plugin).or_default();
            *count += 1;
            *bytes += receiver.waiting();
        }
        let room = |receiver: &Receiver| {
            let (count, bytes) = waiting[&receiver.catch_up.plugin];
            let room = self.limit.saturating_sub(bytes).div_ceil(count);
            if receiver.reads_first.is_some() { 0 } else { room }
        };
        self.receivers.iter().map(|(number, receiver)| (*number, room(receiver))).collect()
    }

    /// Ends a catch-up. Returns its plugin.
    pub fn end(&mut self, number: u64) -> Option<PluginName> {
        self.receivers.remove(&number).map(|receiver| receiver.catch_up.plugin)
    }
}

impl Receiver {
    fn new(catch_up: CatchUp, reads_first: Option<Offset>) -> Self {
        let (has_own, unhandled) = (catch_up.own_next.is_none(), VecDeque::new());
        Self { catch_up, unhandled, reserved: 0, reads_first, has_own, is_reading_own: false }
    }

    /// Forgets the events that the plugin has handled: it has read the log up to `cursor`, and `is_idle` if no further entry
    /// concerns it.
    fn forget_handled(&mut self, cursor: Offset, is_idle: bool) {
        let is_handled = |end: Offset| is_idle || end <= cursor;
        self.reads_first = self.reads_first.filter(|end| !is_handled(*end));
        while self.unhandled.pop_front_if(|(end, _)| is_handled(*end)).is_some() {}
    }

    /// The size of the earlier events that wait for the plugin or may be appended soon, in bytes.
    fn waiting(&self) -> u64 {
        self.reserved + self.unhandled.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// The size of the events of other writers that may be appended now, in bytes, of the `room` for all.
    fn allowance(&mut self, room: u64) -> u64 {
        if room == 0 {
            // The next messages of this host come first afterwards.
            self.has_own = self.catch_up.own_next.is_none();
        }
        if self.has_own { room } else { 0 }
    }

    /// The search of the log that is due, if one is, and the size of the messages that it may append, in bytes.
    fn next_search(&mut self, room: u64) -> Option<(CatchUp, u64)> {
        if self.catch_up.own_next.is_none() || room == 0 || self.is_reading_own {
            return None;
        }
        let room = room.min(BATCH);
        (self.is_reading_own, self.reserved) = (true, room);
        Some((self.catch_up.clone(), room))
    }
}

/// The entries with the last messages of this host before the end of a catch-up. It is called in the transaction that
/// appends the end. Only the writer appends messages of this host, so nothing comes between.
pub(super) fn rest_of_own(
    log: &EventLog,
    write: &WriteTransaction,
    mut catch_up: CatchUp,
) -> Result<Vec<Kind>, StoreError> {
    // A search that was under way has perhaps appended more.
    let written = stored::own_next(write, catch_up.subscription)?;
    catch_up.own_next = catch_up.own_next.map(|next| written.map_or(next, |written| next.max(written)));
    let (head, mut kinds, mut entries) = (log.head(), Vec::new(), VecDeque::new());
    while let Some(next) = catch_up.own_next.filter(|next| *next < head) {
        log.read(next, ENTRIES, &mut entries)?;
        if entries.is_empty() {
            break;
        }
        kinds.extend(catch_up.take_own(&entries));
        entries.clear();
    }
    Ok(kinds)
}

/// Reads the log. Returns the entries with messages of this host, of about `room` bytes at most, and whether there were no
/// more entries at the beginning of the call.
fn search(parts: &Parts, catch_up: &mut CatchUp, room: u64) -> Result<(Vec<Kind>, bool), StoreError> {
    if let (Some(Offset(0)), Some(time)) = (catch_up.own_next, catch_up.since_time()) {
        let (start, first) = (parts.store.log_start()?, parts.store.log_offset_at(time)?);
        // Messages that are older than the log are missing.
        if start.is_some_and(|start| start < first) {
            catch_up.own_next = Some(first);
        }
    }
    let (head, mut kinds, mut left, mut searched) = (parts.log.head(), Vec::new(), room, 0);
    while let Some(next) = catch_up.own_next.filter(|next| *next < head) {
        let mut entries = VecDeque::new();
        parts.log.read(next, ENTRIES, &mut entries)?;
        if entries.is_empty() {
            break;
        }
        let fits = |entry: &&Arc<Entry>| {
            let has_room = left > 0;
            left =
                left.saturating_sub(if catch_up.is_own_message(entry) { bytes_of(&entry.kind) } else { 0 });
            has_room
        };
        let count = entries.iter().take_while(fits).count();
        entries.truncate(count);
        searched += count;
        kinds.extend(catch_up.take_own(&entries));
        if left == 0 || searched >= SEARCHED {
            return Ok((kinds, false));
        }
    }
    Ok((kinds, true))
}

/// Ends the catch-ups of topics that are not reliable any more: no other host is heard there, and the plugins receive the
/// messages of this host at once again.
pub async fn end_catch_ups_of_plain_topics(
    store: &Store,
    commit: &Commit,
    log: Arc<EventLog>,
    reliable: &Reliable,
) -> Result<(), CommitError> {
    let all = stored::all(&store.snapshot()?)?.into_iter();
    let ended: Vec<CatchUp> = all.filter(|catch_up| !reliable.is_reliable(&catch_up.topic)).collect();
    if ended.is_empty() {
        return Ok(());
    }
    let write = move |write: &WriteTransaction| {
        let mut kinds = Vec::new();
        for catch_up in ended {
            let CatchUp { plugin, subscription, topic, .. } = catch_up.clone();
            tracing::info!(%plugin, %topic, "the topic is not reliable any more: its plugin receives no earlier events");
            kinds.extend(rest_of_own(&log, write, catch_up)?);
            kinds.push(Kind::CaughtUp { plugin, subscription, topic });
        }
        Ok((kinds, ()))
    };
    commit.write_and_append(write).await
}

impl ReliableTopics {
    /// Updates the catch-ups whenever subscriptions begin or end.
    pub(super) fn watch_catch_ups(&self) {
        let (commit, sender) = (self.parts.commit.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            while sender.send(Input::CatchUpsChanged).await.is_ok() {
                commit.catch_ups.notified().await;
            }
        });
    }

    /// Begins and ends catch-ups as the store says.
    pub(super) fn update_catch_ups(&mut self) {
        let all = match self.parts.store.snapshot().and_then(|snapshot| stored::all(&snapshot)) {
            Ok(all) => all,
            Err(error) => {
                tracing::error!("cannot read the subscriptions that catch up: {error}");
                return;
            }
        };
        let now = self.now();
        let ended: Vec<u64> = self.catch_ups.receivers.keys().copied().collect();
        let is_stored = |number: u64| all.iter().any(|it| it.subscription.0 == number);
        for number in ended.into_iter().filter(|number| !is_stored(*number)) {
            self.catch_ups.end(number);
            self.member.end_catch_up(number);
            self.drop_outcomes(|stream| stream.catch_up == Some(number), now);
        }
        let reads_first =
            (!std::mem::replace(&mut self.catch_ups.is_begun, true)).then(|| self.parts.log.head());
        for mut catch_up in all {
            let number = catch_up.subscription.0;
            if self.catch_ups.receivers.contains_key(&number) {
                continue;
            }
            let CatchUp { plugin, topic, since, .. } = &catch_up;
            tracing::debug!(%plugin, %topic, "a plugin receives earlier events");
            let (topic, since) = (topic.clone(), *since);
            let checkpoints = std::mem::take(&mut catch_up.checkpoints);
            let receiver = Receiver::new(catch_up, reads_first);
            // The next check allows more.
            self.member.catch_up(number, topic.clone(), since, checkpoints, 0, now);
            self.catch_ups.receivers.insert(number, receiver);
            self.write_since(topic);
        }
        self.check_catch_ups();
    }

    /// Ends the catch-ups of a topic.
    pub(super) fn end_catch_ups(&mut self, topic: &Topic) {
        self.catch_ups.receivers.retain(|_, receiver| receiver.catch_up.topic != *topic);
    }

    /// Lets each catch-up wait or continue, and looks for messages of this host.
    pub(super) fn check_catch_ups(&mut self) {
        if self.catch_ups.receivers.is_empty() {
            return;
        }
        let now = self.now();
        match self.parts.store.snapshot() {
            Ok(snapshot) => self.check_each(&snapshot, now),
            Err(error) => tracing::error!("cannot read the state of plugins that catch up: {error}"),
        }
        if !std::mem::replace(&mut self.catch_ups.is_check_planned, true) {
            let (clock, sender) = (self.parts.log.clock().clone(), self.parts.reliable.sender());
            self.spawn_until_stop(async move {
                clock.sleep(CHECK).await;
                let _ = sender.send(Input::CatchUpsDue).await;
            });
        }
    }

    /// Continues after the pause between checks.
    pub(super) fn catch_ups_due(&mut self) {
        self.catch_ups.is_check_planned = false;
        self.check_catch_ups();
    }

    fn check_each(&mut self, snapshot: &Snapshot, now: Now) {
        for receiver in self.catch_ups.receivers.values_mut() {
            let plugin = &receiver.catch_up.plugin;
            match plugin_registry::known(snapshot, plugin) {
                Ok(Some((_, cursor))) => {
                    let is_idle = self.parts.log.waiting(plugin, cursor) == 0;
                    receiver.forget_handled(cursor, is_idle);
                }
                // It has handled nothing yet.
                Ok(None) => {}
                Err(error) => tracing::error!(%plugin, "cannot read the position of a plugin: {error}"),
            }
        }
        for (number, room) in self.catch_ups.rooms() {
            let receiver = self.catch_ups.receivers.get_mut(&number).expect("it has a room");
            let search = receiver.next_search(if receiver.has_own { room / 2 } else { room });
            let allowance = receiver.allowance(room.saturating_sub(search.as_ref().map_or(0, |it| it.1)));
            self.member.allow(number, allowance, now);
            if let Some((catch_up, room)) = search {
                self.search_own(catch_up, room);
            }
        }
    }

    /// Appends the next messages of this host for a plugin that catches up.
    fn search_own(&self, catch_up: CatchUp, room: u64) {
        let (parts, sender) = (self.parts.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let found = match append_own(&parts, catch_up.clone(), room).await {
                Ok(found) => found,
                Err(CommitError::Closed) => return,
                Err(error) => {
                    let plugin = &catch_up.plugin;
                    tracing::error!(%plugin, "cannot append earlier messages of this host: {error}");
                    parts.log.clock().sleep(RETRY).await;
                    OwnMessages { catch_up, appended: None, is_at_end: false }
                }
            };
            let _ = sender.send(Input::OwnMessages(Box::new(found))).await;
        });
    }

    /// Continues after a search of the log.
    pub(super) fn searched_own(&mut self, found: OwnMessages) {
        let OwnMessages { catch_up, appended, is_at_end } = found;
        let Some(receiver) = self.catch_ups.receivers.get_mut(&catch_up.subscription.0) else { return };
        (receiver.is_reading_own, receiver.reserved) = (false, 0);
        receiver.catch_up.own_next = catch_up.own_next;
        receiver.has_own = is_at_end;
        receiver.unhandled.extend(appended);
        if is_at_end {
            // The next search follows after a pause.
            let room = self.catch_ups.rooms()[&catch_up.subscription.0];
            let receiver = self.catch_ups.receivers.get_mut(&catch_up.subscription.0).expect("it was there");
            let allowance = receiver.allowance(room);
            self.member.allow(catch_up.subscription.0, allowance, self.now());
        } else {
            self.check_catch_ups();
        }
    }
}

/// Searches the log and appends the messages.
async fn append_own(parts: &Parts, mut catch_up: CatchUp, room: u64) -> Result<OwnMessages, CommitError> {
    let (read, begun) = (parts.clone(), catch_up.own_next);
    let work = move || search(&read, &mut catch_up, room).map(|found| (catch_up, found));
    let found = tokio::task::spawn_blocking(work).await.map_err(|_| CommitError::Closed)?;
    let (catch_up, (kinds, is_at_end)) = found?;
    if kinds.is_empty() {
        return Ok(OwnMessages { catch_up, appended: None, is_at_end });
    }
    parts.room().await;
    let bytes = kinds.iter().map(bytes_of).sum();
    let (log, reached) = (parts.log.clone(), catch_up.clone());
    let write = move |write: &WriteTransaction| {
        // The subscription may have ended and begun again meanwhile, and another search may have been faster.
        let is_current =
            stored::own_next(write, reached.subscription)?.is_some_and(|next| Some(next) <= begun);
        if !is_current {
            return Ok((Vec::new(), None));
        }
        stored::advance_own(write, &reached)?;
        let end = Offset(log.head().0 + kinds.len() as u64);
        Ok((kinds, Some((end, bytes))))
    };
    let appended = parts.commit.write_and_append(write).await?;
    Ok(OwnMessages { catch_up, appended, is_at_end })
}

/// The size of an entry with a message, in bytes.
fn bytes_of(kind: &Kind) -> u64 {
    match kind {
        Kind::Event(Event::Message { data, .. })
        | Kind::Earlier { event: Event::Message { data, .. }, .. } => data.len() as u64 + 64,
        _ => 64,
    }
}

impl Parts {
    /// Waits until the log takes more entries.
    pub(super) async fn room(&self) {
        while !self.log.has_room() || self.disk.check().is_err() {
            tokio::time::sleep(super::intake::ROOM_POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use dim_model::time::Timestamp;
    use dim_topics::reader::Since;

    use super::*;

    fn receiver(own_next: Option<Offset>) -> Receiver {
        let catch_up = CatchUp {
            subscription: Offset(7),
            plugin: "late".parse().unwrap(),
            topic: "jobs".parse().unwrap(),
            since: Since::Time(Timestamp(5)),
            checkpoints: Vec::new(),
            own_next,
        };
        Receiver::new(catch_up, None)
    }

    /// Catch-ups of one plugin.
    fn catch_ups(receivers: Vec<Receiver>) -> CatchUps {
        let mut it = CatchUps::new(2_000);
        it.receivers = (0..).zip(receivers).collect();
        it
    }

    #[test]
    fn the_catch_ups_of_a_plugin_wait_while_it_has_much_to_do() {
        let mut it = catch_ups(vec![receiver(None), receiver(None)]);
        assert_eq!(it.rooms(), BTreeMap::from([(0, 500), (1, 500)]));
        for (number, end, bytes) in [(0, 10, 600), (1, 11, 300), (0, 20, 400)] {
            it.appended(number, Offset(end), bytes);
        }
        assert_eq!(it.rooms(), BTreeMap::from([(0, 0), (1, 0)]));
        let forget = |it: &mut CatchUps, cursor, is_idle| {
            it.receivers.values_mut().for_each(|receiver| receiver.forget_handled(Offset(cursor), is_idle));
        };
        forget(&mut it, 10, false);
        assert_eq!(it.rooms(), BTreeMap::from([(0, 150), (1, 150)]));
        forget(&mut it, 10, true);
        assert_eq!(it.rooms(), BTreeMap::from([(0, 500), (1, 500)]));
        assert_eq!(CatchUps::new(0).limit, 1, "one event at a time");
    }

    #[test]
    fn after_a_start_the_plugin_first_reads_what_the_log_has() {
        let mut it = catch_ups(vec![Receiver { reads_first: Some(Offset(50)), ..receiver(None) }]);
        assert_eq!(it.rooms()[&0], 0);
        it.receivers.get_mut(&0).unwrap().forget_handled(Offset(49), false);
        assert_eq!(it.rooms()[&0], 0);
        it.receivers.get_mut(&0).unwrap().forget_handled(Offset(50), false);
        assert_eq!(it.rooms()[&0], 1_000);
    }

    #[test]
    fn the_messages_of_the_host_come_first_also_after_a_wait() {
        let mut it = receiver(Some(Offset(0)));
        assert_eq!(it.allowance(1_000), 0);
        assert_eq!(it.next_search(1_000).unwrap().1, 1_000);
        assert_eq!(it.waiting(), 1_000, "they are on their way");
        assert!(it.next_search(1_000).is_none(), "one at a time");
        (it.has_own, it.is_reading_own, it.reserved) = (true, false, 0);
        assert_eq!(it.allowance(1_000), 1_000);
        assert!(it.next_search(0).is_none());
        assert_eq!(it.allowance(0), 0);
        assert_eq!(it.allowance(1_000), 0, "they are looked for again");
        assert!(it.next_search(1_000).is_some());
    }
}
