//! Owns the tables of the database and the form of their keys. Values whose form is not said here
//! belong to the stage that writes them.

use redb::{TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::StoreError;

/// The host's own: the format, its identity, its secret.
pub const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// First offset of a chunk of entries, to the chunk.
pub const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// A plugin's name, to its row.
pub const PLUGINS: TableDefinition<&str, &[u8]> = TableDefinition::new("plugins");
/// A plugin's number, to its cursor and the bytes of its state.
pub const CURSORS: TableDefinition<u32, (u64, u64)> = TableDefinition::new("cursors");
/// A plugin's number, to the world as of its cursor.
pub const WORLDS: TableDefinition<u32, &[u8]> = TableDefinition::new("worlds");
/// A plugin's number and key, to the value.
pub const STATE: TableDefinition<&[u8], &[u8]> = TableDefinition::new("state");
/// A plugin's number and the timer's key, to the time it is due.
pub const TIMERS: TableDefinition<&[u8], u64> = TableDefinition::new("timers");
/// Publishes in the order of their commits.
pub const OUTBOX: TableDefinition<u64, &[u8]> = TableDefinition::new("outbox");
/// A key's name, to what is published under it.
pub const NAMES: TableDefinition<&str, &[u8]> = TableDefinition::new("names");
/// A followed name, to what is known of it.
pub const FOLLOWED: TableDefinition<&str, &[u8]> = TableDefinition::new("followed");
/// A CID, to the whole file.
pub const DOCUMENTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("documents");
/// A CID, to how many count on the file.
pub const HOLDS: TableDefinition<&[u8], u64> = TableDefinition::new("holds");
/// The offset from which on no name points to a file, and its CID, to its bytes.
pub const SUPERSEDED: TableDefinition<(u64, &[u8]), u64> = TableDefinition::new("superseded");
/// The CIDs of the files that the backend has pinned for this host.
pub const PINS: TableDefinition<&[u8], ()> = TableDefinition::new("pins");
/// Dead letters in the order in which they were set aside.
pub const DEAD: TableDefinition<u64, &[u8]> = TableDefinition::new("dead");
/// Who sent a dead letter's event, and the letter's number, to the letter's bytes.
pub const DEAD_OF: TableDefinition<(&str, u64), u64> = TableDefinition::new("dead-of");
/// Who sent events of dead letters, to how many letters there are and their bytes.
pub const DEAD_SHARES: TableDefinition<&str, (u64, u64)> = TableDefinition::new("dead-shares");
/// Events that are to be handled again, by the time they are due and a running number.
pub const RETRIES: TableDefinition<(u64, u64), &[u8]> = TableDefinition::new("retries");

/// A plugin's number and the first code that can be taken back, to the mark from before it.
pub const MARKS: TableDefinition<(u32, u32), &[u8]> = TableDefinition::new("marks");
/// A mark, a part and a key of it, to the value from before the mark.
pub const UNDO: TableDefinition<&[u8], Option<&[u8]>> = TableDefinition::new("undo");
/// Changes of plugins' code in the order in which they began.
pub const HISTORY: TableDefinition<u64, &[u8]> = TableDefinition::new("history");

/// The topics on which others were heard through the network.
pub const OTHERS: TableDefinition<&str, ()> = TableDefinition::new("others");

/// Hands all tables to a macro.
macro_rules! all {
    ($each:ident) => {
        $each!(
            META,
            LOG,
            PLUGINS,
            CURSORS,
            WORLDS,
            STATE,
            TIMERS,
            OUTBOX,
            NAMES,
            FOLLOWED,
            DOCUMENTS,
            HOLDS,
            SUPERSEDED,
            PINS,
            DEAD,
            DEAD_OF,
            DEAD_SHARES,
            RETRIES,
            OTHERS,
            MARKS,
            UNDO,
            HISTORY,
        )
    };
}
pub(super) use all;

/// Opens each table once, so that a read finds them all.
pub fn create_all(write: &WriteTransaction) -> Result<(), StoreError> {
    macro_rules! each {
        ($($table:ident),* $(,)?) => { $(write.open_table($table)?;)* };
    }
    all!(each);
    Ok(())
}

/// The number that stands for a plugin's name in keys. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PluginId(pub u32);

/// A key of [`STATE`] or [`TIMERS`]: the plugin's number, big-endian, and the plugin's key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StateKey(Vec<u8>);

impl StateKey {
    /// The key of `key` in the space of `plugin`.
    pub fn new(plugin: PluginId, key: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(4 + key.len());
        bytes.extend_from_slice(&plugin.0.to_be_bytes());
        bytes.extend_from_slice(key);
        Self(bytes)
    }

    /// The key as it is stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The plugin's part of a stored key, if it is a key of `plugin`.
    pub fn strip(plugin: PluginId, stored: &[u8]) -> Option<&[u8]> {
        stored.strip_prefix(plugin.0.to_be_bytes().as_slice())
    }
}
