//! Owns the records of exceeded limits: the actor writes them at the first handling of an entry, and applies
//! them when a recorded log is handled again.

use std::collections::BTreeMap;

use dim_model::entry::{Entry, Kind, Offset, StruckLimit};
use dim_model::ident::PluginName;
use dim_store::entry_context::Void;
use dim_store::plugin_limits::LimitName;

use super::Actor;
use crate::session::Room;

/// The limits that were exceeded at the first handling of a recorded log.
#[derive(Debug)]
pub struct LimitRecords {
    calls: BTreeMap<Try, (String, Vec<String>)>,
    room: BTreeMap<Try, Room>,
}

/// An entry, its part, and the number of the attempt.
type Try = (Offset, u64, u32);

/// The part of an entry for a start before it.
const START: u64 = u64::MAX;

/// The successful starts since the last entry for which the plugin was called: one after each trap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starts {
    /// The offset after that entry.
    after: Offset,
    count: u32,
}

impl Starts {
    /// The next start, after the entry before `offset`.
    pub fn next(self, offset: Offset) -> Self {
        let count = if self.after == offset { self.count + 1 } else { 0 };
        Self { after: offset, count }
    }
}

impl LimitRecords {
    /// Collects the limits that `plugin` exceeded, from the log.
    pub fn new(plugin: &PluginName, entries: &[Entry]) -> Self {
        let void = Void::of(plugin, entries);
        let mut recorded = Self { calls: BTreeMap::new(), room: BTreeMap::new() };
        for entry in entries {
            let Kind::Struck { plugin: whose, offset, part, by, limit } = &entry.kind else { continue };
            match limit {
                _ if whose != plugin || void.contains(*by) => {}
                StruckLimit::Call { again, reason, log } => {
                    recorded.calls.insert((*offset, *part, *again), (reason.clone(), log.clone()));
                }
                StruckLimit::Outgoing { again, limit, count, bytes, document_bytes } => {
                    let size = |size: &u64| usize::try_from(*size).unwrap_or(usize::MAX);
                    let count_limit = limit.parse::<LimitName>().unwrap_or(LimitName::OUTBOX);
                    let (count, bytes, document_bytes) = (size(count), size(bytes), size(document_bytes));
                    let rate =
                        if count_limit == LimitName::PUBLISHES_PER_SECOND { count } else { usize::MAX };
                    let room = Room { count, bytes, rate, document_bytes, count_limit, ..Room::ENDLESS };
                    recorded.room.insert((*offset, *part, *again), room);
                }
            }
        }
        recorded
    }

    /// The allowance of a call for publishes.
    pub fn room(&self, offset: Offset, part: u64, again: u32) -> Room {
        self.room.get(&(offset, part, again)).copied().unwrap_or(Room::ENDLESS)
    }

    /// The allowance of a start for publishes. Earlier hosts recorded a start at the cursor, which is at most `cursor`.
    pub fn room_of_start(&self, start: Starts, cursor: Offset) -> Room {
        let Starts { after, count } = start;
        let recorded = self.room.range((after, START, count)..=(cursor.max(after), START, count));
        let mut starts = recorded.filter(|((_, part, again), _)| (*part, *again) == (START, count));
        starts.next().map_or(Room::ENDLESS, |(_, room)| *room)
    }
}

impl Actor {
    /// The limit that ended the call at its first handling, and the plugin's log lines from then.
    pub(super) fn struck_then(&self, entry: &Entry, part: u64, again: u32) -> Option<(String, Vec<String>)> {
        self.attempts.recorded.as_ref()?.calls.get(&(entry.offset, part, again)).cloned()
    }

    /// Records that a limit ended a call.
    pub(super) fn note_limit(&mut self, entry: &Entry, part: u64, again: u32, reason: &str, log: &[String]) {
        let limit = StruckLimit::Call { again, reason: reason.to_owned(), log: log.to_vec() };
        self.note(entry.offset, part, limit);
    }

    /// Records the allowance if the last call exceeded it.
    pub(super) fn note_outbox(&mut self, entry: &Entry, part: u64, again: u32) {
        self.note_room(entry.offset, part, again);
    }

    /// Records a successful start, and its allowance if it exceeded that.
    pub(super) fn note_start(&mut self) {
        self.attempts.starts = self.attempts.starts.next(self.attempts.after);
        self.note_room(self.attempts.starts.after, START, self.attempts.starts.count);
    }

    fn note_room(&mut self, offset: Offset, part: u64, again: u32) {
        let room = self.session().publishing.outgoing;
        if room.struck.is_some() {
            let (limit, count) = room.met();
            let (limit, count, bytes) = (limit.to_string(), count as u64, room.bytes as u64);
            let document_bytes = room.document_bytes as u64;
            self.note(offset, part, StruckLimit::Outgoing { again, limit, count, bytes, document_bytes });
        }
    }

    fn note(&mut self, offset: Offset, part: u64, limit: StruckLimit) {
        if self.attempts.recorded.is_none() {
            let (plugin, by) = (self.plugin.clone(), self.generation());
            let struck = Kind::Struck { plugin, offset, part, by, limit };
            self.session_mut().effects.batch.requested.struck.push(struck);
        }
    }
}
