//! Owns the limits that struck: noted with the entry when it is handled first, and kept to when a
//! recorded log is handled again.

use std::collections::BTreeMap;

use super::Actor;
use crate::entry::{Entry, Kind, Offset, StruckLimit};
use crate::ident::PluginName;

/// What struck while a recorded log was handled first.
#[derive(Debug)]
pub struct Recorded {
    late: BTreeMap<(Offset, u64, u32), (String, Vec<String>)>,
    room: BTreeMap<(Offset, u64), usize>,
}

impl Recorded {
    /// What struck `plugin`, by the log.
    pub fn new(plugin: &PluginName, entries: &[Entry]) -> Self {
        let mut recorded = Self { late: BTreeMap::new(), room: BTreeMap::new() };
        for entry in entries {
            let Kind::Struck { plugin: whose, offset, part, limit } = &entry.kind else { continue };
            match limit {
                _ if whose != plugin => {}
                StruckLimit::Cpu { again, reason, log } => {
                    recorded.late.insert((*offset, *part, *again), (reason.clone(), log.clone()));
                }
                StruckLimit::Outbox { room } => {
                    let room = usize::try_from(*room).unwrap_or(usize::MAX);
                    recorded.room.insert((*offset, *part), room);
                }
            }
        }
        recorded
    }

    /// How many publishes the plugin could ask for.
    pub fn room(&self, offset: Offset, part: u64) -> usize {
        self.room.get(&(offset, part)).copied().unwrap_or(usize::MAX)
    }
}

impl Actor {
    /// Why the call took too long when it was made first, and what the plugin logged then.
    pub(super) fn was_late(&self, entry: &Entry, part: u64, again: u32) -> Option<(String, Vec<String>)> {
        self.recorded.as_ref()?.late.get(&(entry.offset, part, again)).cloned()
    }

    /// Notes that a call took too long.
    pub(super) fn note_late(&mut self, entry: &Entry, part: u64, again: u32, reason: &str, log: &[String]) {
        let limit = StruckLimit::Cpu { again, reason: reason.to_owned(), log: log.to_vec() };
        self.note(entry, part, limit);
    }

    /// Notes that the call that has ended found no room for its publishes, if so.
    pub(super) fn note_outbox(&mut self, entry: &Entry, part: u64) {
        let outbox = self.session().outbox;
        if outbox.struck {
            self.note(entry, part, StruckLimit::Outbox { room: outbox.room as u64 });
        }
    }

    fn note(&mut self, entry: &Entry, part: u64, limit: StruckLimit) {
        if self.recorded.is_none() {
            let plugin = self.plugin.clone();
            let struck = Kind::Struck { plugin, offset: entry.offset, part, limit };
            self.session_mut().effects.batch.struck.push(struck);
        }
    }
}
