//! Owns the catch-ups of plugins: when they begin and end, how much of what they have appended the plugin has yet to
//! handle, and the earlier messages of this host. The protocol reads the logs of other writers for them; the messages of
//! this host are in its event log, and come first. From then on they come in turn, until the plugin has caught up.
//!
//! A catch-up waits while its plugin has much to do. Otherwise a slow plugin would receive a gap once its queue is full.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dim_model::entry::{Entry, Event, Kind, Offset};
use dim_model::ident::{PluginName, Topic};
use dim_store::catch_ups::{self as stored, CatchUp};
use dim_store::commit::CommitError;
use dim_store::event_log::EventLog;
use dim_store::{Snapshot, StoreError, plugin_registry};
use dim_topics::action::Stream;
use dim_topics::time::Now;
use redb::WriteTransaction;

use super::channel::Input;
use super::intake::Outcome;
use super::{Parts, ReliableTopics};

/// The size of the earlier events that a plugin may have yet to handle, in bytes. At it the catch-up waits. It is less if
/// a queue may be less than twice as large.
const QUEUED: u64 = 64 << 20;

/// The pause between looks at the queues and at the messages of this host.
const CHECK: Duration = Duration::from_millis(250);

/// The number of entries of the log that are read at once.
const ENTRIES: usize = 1_024;

/// The catch-ups that are under way.
#[derive(Debug)]
pub struct CatchUps {
    /// The plugins, by the entries of their subscriptions.
    receivers: BTreeMap<u64, Receiver>,
    /// The size of the earlier events that a plugin may have yet to handle, in bytes.
    limit: u64,
    is_check_planned: bool,
    /// Whether the catch-ups that were under way before the start of the host are known.
    is_begun: bool,
}

/// A plugin that catches up.
#[derive(Debug)]
struct Receiver {
    catch_up: CatchUp,
    /// The numbers and sizes, in bytes, of the earlier events that it has yet to handle, oldest first.
    unhandled: VecDeque<(u64, u64)>,
    /// After a start of the host: the entry up to which the plugin must have read the log, because earlier events that
    /// it has yet to handle may be there.
    left_before: Option<Offset>,
    /// Whether the messages of this host up to the present were appended.
    has_own: bool,
    /// Whether the log is being searched for messages of this host.
    is_reading_own: bool,
}

/// The result of a search of the log for messages of this host.
#[derive(Debug)]
pub struct OwnMessages {
    catch_up: CatchUp,
    /// The number of the messages and their size in bytes.
    appended: (u64, u64),
    /// Whether the log has no further entries.
    is_at_end: bool,
}

impl CatchUps {
    /// No catch-ups. The queue of a plugin may have `queue_bytes` bytes.
    pub fn new(queue_bytes: u64) -> Self {
        let limit = QUEUED.min(queue_bytes / 2);
        Self { receivers: BTreeMap::new(), limit, is_check_planned: false, is_begun: false }
    }

    /// The catch-ups of some results.
    pub fn of(&self, outcomes: &[Outcome]) -> BTreeMap<u64, CatchUp> {
        let numbers = outcomes.iter().filter_map(|outcome| outcome.stream().catch_up);
        let known = numbers.filter_map(|number| Some((number, self.receivers.get(&number)?)));
        known.map(|(number, receiver)| (number, receiver.catch_up.clone())).collect()
    }

    /// Notes earlier events that were appended to the log.
    pub fn appended(&mut self, stream: &Stream, count: u64, bytes: u64) {
        if let Some(receiver) = stream.catch_up.and_then(|number| self.receivers.get_mut(&number)) {
            receiver.unhandled.push_back((count, bytes));
        }
    }

    /// Ends a catch-up. Returns its plugin.
    pub fn end(&mut self, number: u64) -> Option<PluginName> {
        self.receivers.remove(&number).map(|receiver| receiver.catch_up.plugin)
    }
}

impl Receiver {
    fn new(catch_up: CatchUp, left_before: Option<Offset>) -> Self {
        let has_own = catch_up.own_next.is_none();
        Self { catch_up, unhandled: VecDeque::new(), left_before, has_own, is_reading_own: false }
    }

    /// Forgets what the plugin has handled: it has read the log up to `cursor`, and has at most `waiting` entries to read.
    fn look_at_queue(&mut self, cursor: Offset, waiting: u64) {
        self.left_before = self.left_before.filter(|before| waiting > 0 && cursor < *before);
        let mut count: u64 = self.unhandled.iter().map(|(count, _)| count).sum();
        while let Some((oldest, _)) = self.unhandled.front()
            && count - oldest >= waiting
        {
            count -= oldest;
            self.unhandled.pop_front();
        }
    }

    /// The size of the earlier events that may be appended, in bytes, if the plugin may have `limit` bytes to handle.
    fn room(&self, limit: u64) -> u64 {
        let unhandled: u64 = self.unhandled.iter().map(|(_, bytes)| bytes).sum();
        if self.left_before.is_some() { 0 } else { limit.saturating_sub(unhandled) }
    }

    /// The size of the events of other writers that may be appended now, in bytes.
    fn allowance(&mut self, limit: u64) -> u64 {
        let room = self.room(limit);
        if room == 0 {
            // What this host publishes meanwhile comes first afterwards.
            self.has_own = self.catch_up.own_next.is_none();
        }
        if self.has_own { room } else { 0 }
    }

    /// The search of the log that is due, if one is, and the size of the messages that it may append, in bytes.
    fn next_search(&mut self, limit: u64) -> Option<(CatchUp, u64)> {
        let room = self.room(limit);
        let is_due = self.catch_up.own_next.is_some() && room > 0 && !self.is_reading_own;
        self.is_reading_own |= is_due;
        is_due.then(|| (self.catch_up.clone(), room))
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

/// Reads the next entries of the log. Returns the entries with messages of this host, of about `room` bytes at most, and
/// whether there were no more entries at the beginning of the call.
fn search(parts: &Parts, catch_up: &mut CatchUp, room: u64) -> Result<(Vec<Kind>, bool), StoreError> {
    if let (Some(Offset(0)), Some(time)) = (catch_up.own_next, catch_up.since_time()) {
        let (start, first) = (parts.store.log_start()?, parts.store.log_offset_at(time)?);
        // What is older than the log is missing.
        if start.is_some_and(|start| start < first) {
            catch_up.own_next = Some(first);
        }
    }
    let (head, mut entries) = (parts.log.head(), VecDeque::new());
    let Some(next) = catch_up.own_next else { return Ok((Vec::new(), true)) };
    parts.log.read(next, ENTRIES, &mut entries)?;
    let mut left = room;
    let fits = |entry: &&Arc<Entry>| {
        let has_room = left > 0;
        left = left.saturating_sub(if catch_up.has_own(entry) { bytes_of(&entry.kind) } else { 0 });
        has_room
    };
    let count = entries.iter().take_while(fits).count();
    entries.truncate(count);
    let kinds = catch_up.take_own(&entries);
    Ok((kinds, entries.is_empty() || catch_up.own_next >= Some(head)))
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
        let left_before =
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
            let receiver = Receiver::new(catch_up, left_before);
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
        let limit = self.catch_ups.limit;
        let mut searches = Vec::new();
        for (number, receiver) in &mut self.catch_ups.receivers {
            let plugin = &receiver.catch_up.plugin;
            match plugin_registry::known(snapshot, plugin) {
                Ok(Some((_, cursor))) => {
                    let waiting = self.parts.log.waiting(plugin, cursor);
                    receiver.look_at_queue(cursor, waiting);
                }
                // It has handled nothing yet.
                Ok(None) => {}
                Err(error) => tracing::error!(%plugin, "cannot read the position of a plugin: {error}"),
            }
            searches.extend(receiver.next_search(limit));
            self.member.allow(*number, receiver.allowance(limit), now);
        }
        for (catch_up, room) in searches {
            self.search_own(catch_up, room);
        }
    }

    /// Appends the next messages of this host for a plugin that catches up.
    fn search_own(&self, mut catch_up: CatchUp, room: u64) {
        let (parts, sender) = (self.parts.clone(), self.parts.reliable.sender());
        self.spawn_until_stop(async move {
            let read = parts.clone();
            let work = move || search(&read, &mut catch_up, room).map(|found| (catch_up, found));
            let (catch_up, (kinds, is_at_end)) = match tokio::task::spawn_blocking(work).await {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => {
                    tracing::error!("cannot read earlier messages of this host: {error}");
                    return;
                }
                // The program ends.
                Err(_) => return,
            };
            let appended = (kinds.len() as u64, kinds.iter().map(bytes_of).sum());
            if !kinds.is_empty() {
                parts.room().await;
                let reached = catch_up.clone();
                let write = move |write: &WriteTransaction| stored::advance_own(write, &reached);
                match parts.commit.append_and_write(kinds, write).await {
                    Ok(()) => {}
                    Err(CommitError::Closed) => return,
                    Err(error) => {
                        tracing::error!("cannot append earlier messages of this host: {error}");
                        return;
                    }
                }
            }
            let found = Box::new(OwnMessages { catch_up, appended, is_at_end });
            let _ = sender.send(Input::OwnMessages(found)).await;
        });
    }

    /// Continues after a search of the log.
    pub(super) fn searched_own(&mut self, found: OwnMessages) {
        let OwnMessages { catch_up, appended: (count, bytes), is_at_end } = found;
        let number = catch_up.subscription.0;
        let Some(receiver) = self.catch_ups.receivers.get_mut(&number) else { return };
        receiver.is_reading_own = false;
        receiver.catch_up.own_next = catch_up.own_next;
        receiver.has_own |= is_at_end;
        if count > 0 {
            receiver.unhandled.push_back((count, bytes));
        }
        if is_at_end {
            let allowance = receiver.allowance(self.catch_ups.limit);
            self.member.allow(number, allowance, self.now());
        } else {
            self.check_catch_ups();
        }
    }
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

    #[test]
    fn a_catch_up_waits_for_a_plugin_that_has_much_to_do() {
        let mut it = receiver(None);
        assert_eq!(it.allowance(1_000), 1_000);
        it.unhandled.extend([(10, 600), (1, 500), (10, 100)]);
        it.look_at_queue(Offset(0), 21);
        assert_eq!(it.allowance(1_000), 0);
        it.look_at_queue(Offset(0), 12);
        assert_eq!(it.allowance(1_000), 0, "a part of the oldest is not handled");
        it.look_at_queue(Offset(0), 11);
        assert_eq!(it.allowance(1_000), 400);
        it.look_at_queue(Offset(0), 10);
        assert_eq!(it.allowance(1_000), 900);
        it.look_at_queue(Offset(0), 0);
        assert!(it.unhandled.is_empty());
    }

    #[test]
    fn after_a_start_the_plugin_first_handles_what_the_log_has_for_it() {
        let mut it = Receiver { left_before: Some(Offset(50)), ..receiver(None) };
        assert_eq!(it.allowance(1_000), 0);
        it.look_at_queue(Offset(49), 1);
        assert_eq!(it.allowance(1_000), 0);
        it.look_at_queue(Offset(50), 1);
        assert_eq!(it.allowance(1_000), 1_000);
        let mut idle = Receiver { left_before: Some(Offset(50)), ..receiver(None) };
        idle.look_at_queue(Offset(9), 0);
        assert_eq!(idle.allowance(1_000), 1_000, "nothing there concerns it");
    }

    #[test]
    fn the_messages_of_the_host_come_first_also_after_a_wait() {
        let mut it = receiver(Some(Offset(0)));
        assert_eq!(it.allowance(1_000), 0);
        assert_eq!(it.next_search(1_000).unwrap().1, 1_000);
        assert!(it.next_search(1_000).is_none(), "one at a time");
        (it.has_own, it.is_reading_own) = (true, false);
        it.unhandled.push_back((1, 2_000));
        assert!(it.next_search(1_000).is_none());
        assert_eq!(it.allowance(1_000), 0);
        it.look_at_queue(Offset(0), 0);
        assert_eq!(it.allowance(1_000), 0, "they are looked for again");
        assert!(it.next_search(1_000).is_some());
    }
}
