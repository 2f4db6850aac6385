//! Owns the limits that struck: noted with the entry when it is handled first, and kept to when a
//! recorded log is handled again.

use std::collections::BTreeMap;

use super::Actor;
use crate::entry::{Entry, Kind, Offset, StruckLimit};
use crate::ident::PluginName;
use crate::plugin::limits::LimitName;
use crate::plugin::session::{OUTBOX, RATE, Room};
use crate::plugin::world::Void;

/// What struck while a recorded log was handled first.
#[derive(Debug)]
pub struct Recorded {
    calls: BTreeMap<Try, (String, Vec<String>)>,
    room: BTreeMap<Try, Room>,
}

/// An entry, its part, and the how manyth try it was.
type Try = (Offset, u64, u32);

/// The part of an entry that is a start before it.
const START: u64 = u64::MAX;

/// The starts that went well before the entry that is to be handled: one after each trap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starts {
    before: Offset,
    count: u32,
}

impl Starts {
    /// The next one, before the entry at `offset`.
    pub fn next(self, offset: Offset) -> Self {
        let count = if self.before == offset { self.count + 1 } else { 0 };
        Self { before: offset, count }
    }
}

impl Recorded {
    /// What struck `plugin`, by the log.
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
                    let count_limit = limit.parse::<LimitName>().map_or(OUTBOX, LimitName::as_str);
                    let (count, bytes, document_bytes) = (size(count), size(bytes), size(document_bytes));
                    let rate = if count_limit == RATE { count } else { usize::MAX };
                    let room = Room { count, bytes, rate, document_bytes, count_limit, ..Room::ENDLESS };
                    recorded.room.insert((*offset, *part, *again), room);
                }
            }
        }
        recorded
    }

    /// How much the plugin could publish.
    pub fn room(&self, offset: Offset, part: u64, again: u32) -> Room {
        self.room.get(&(offset, part, again)).copied().unwrap_or(Room::ENDLESS)
    }

    /// How much a start could publish.
    pub fn room_of_start(&self, start: Starts) -> Room {
        self.room(start.before, START, start.count)
    }
}

impl Actor {
    /// Which limit ended the call when it was made first, and what the plugin logged then.
    pub(super) fn struck_then(&self, entry: &Entry, part: u64, again: u32) -> Option<(String, Vec<String>)> {
        self.recorded.as_ref()?.calls.get(&(entry.offset, part, again)).cloned()
    }

    /// Notes that a limit ended a call.
    pub(super) fn note_limit(&mut self, entry: &Entry, part: u64, again: u32, reason: &str, log: &[String]) {
        let limit = StruckLimit::Call { again, reason: reason.to_owned(), log: log.to_vec() };
        self.note(entry.offset, part, limit);
    }

    /// Notes that the call that has ended found no room for its publishes, if so.
    pub(super) fn note_outbox(&mut self, entry: &Entry, part: u64, again: u32) {
        self.note_room(entry.offset, part, again);
    }

    /// Notes that a start has gone well, and whether it found room for all its publishes.
    pub(super) fn note_start(&mut self) {
        self.starts = self.starts.next(self.cursor());
        self.note_room(self.starts.before, START, self.starts.count);
    }

    fn note_room(&mut self, offset: Offset, part: u64, again: u32) {
        let room = self.session().outgoing;
        if room.struck.is_some() {
            let (limit, count) = room.met();
            let (limit, count, bytes) = (limit.to_owned(), count as u64, room.bytes as u64);
            let document_bytes = room.document_bytes as u64;
            self.note(offset, part, StruckLimit::Outgoing { again, limit, count, bytes, document_bytes });
        }
    }

    fn note(&mut self, offset: Offset, part: u64, limit: StruckLimit) {
        if self.recorded.is_none() {
            let (plugin, by) = (self.plugin.clone(), self.generation());
            let struck = Kind::Struck { plugin, offset, part, by, limit };
            self.session_mut().effects.batch.struck.push(struck);
        }
    }
}
