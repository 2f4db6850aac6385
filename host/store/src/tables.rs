//! Owns the tables of the database and the layout of their keys. The layout of a value is defined here or in
//! the file of the stage that writes it.

use redb::{TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::StoreError;

/// Values of the host itself: the format, its identity, its secret.
pub const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// The first offset of a chunk of entries, to the chunk.
pub const LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("log");
/// A plugin's name, to its row.
pub const PLUGINS: TableDefinition<&str, &[u8]> = TableDefinition::new("plugins");
/// A plugin's number, to its cursor and the bytes of its state.
pub const CURSORS: TableDefinition<u32, (u64, u64)> = TableDefinition::new("cursors");
/// A plugin's number, to the entry context as of its cursor.
pub const WORLDS: TableDefinition<u32, &[u8]> = TableDefinition::new("worlds");
/// A plugin's number and key, to the value.
pub const STATE: TableDefinition<&[u8], &[u8]> = TableDefinition::new("state");
/// A plugin's number and the timer's key, to the time it is due.
pub const TIMERS: TableDefinition<&[u8], u64> = TableDefinition::new("timers");
/// Publishes in the order of their commits.
pub const OUTBOX: TableDefinition<u64, &[u8]> = TableDefinition::new("outbox");
/// A key's name, to the published state of its name.
pub const NAMES: TableDefinition<&str, &[u8]> = TableDefinition::new("names");
/// A followed name, to its last known resolution and document.
pub const FOLLOWED: TableDefinition<&str, &[u8]> = TableDefinition::new("followed");
/// A CID, to the whole file.
pub const DOCUMENTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("documents");
/// A CID, to the number of references to the file.
pub const HOLDS: TableDefinition<&[u8], u64> = TableDefinition::new("holds");
/// The offset from which on no name points to a file, and the file's CID, to the file's size in bytes.
pub const SUPERSEDED: TableDefinition<(u64, &[u8]), u64> = TableDefinition::new("superseded");
/// The CIDs of the files that the backend has pinned for this host.
pub const PINS: TableDefinition<&[u8], ()> = TableDefinition::new("pins");
/// Dead letters in the order of their creation.
pub const DEAD: TableDefinition<u64, &[u8]> = TableDefinition::new("dead");
/// The sender of a dead letter's event, and the letter's number, to the letter's size in bytes.
pub const DEAD_OF: TableDefinition<(&str, u64), u64> = TableDefinition::new("dead-of");
/// The sender of dead letters' events, to the number of letters and their size in bytes.
pub const DEAD_SHARES: TableDefinition<&str, (u64, u64)> = TableDefinition::new("dead-shares");
/// Events to handle again, by the time at which they are due and a running number.
pub const RETRIES: TableDefinition<(u64, u64), &[u8]> = TableDefinition::new("retries");

/// A plugin's number and the first generation that a rollback to the checkpoint reverts, to the checkpoint.
pub const MARKS: TableDefinition<(u32, u32), &[u8]> = TableDefinition::new("marks");
/// A checkpoint, and a part and a key of it, to the value from before the checkpoint.
pub const UNDO: TableDefinition<&[u8], Option<&[u8]>> = TableDefinition::new("undo");
/// Changes of plugins' code in the order in which they began.
pub const HISTORY: TableDefinition<u64, &[u8]> = TableDefinition::new("history");

/// The topics on which the host has received messages of other peers from the network.
pub const OTHERS: TableDefinition<&str, ()> = TableDefinition::new("others");

/// The incarnations of this host on reliable topics, to the hybrid times of their process starts.
pub const INCARNATIONS: TableDefinition<&[u8], u64> = TableDefinition::new("incarnations");
/// Own bundles of reliable topics in the order of their commits.
pub const BUNDLES: TableDefinition<u64, &[u8]> = TableDefinition::new("bundles");
/// The number of an own bundle, to its topic, its place and its size.
pub const PLACES: TableDefinition<u64, &[u8]> = TableDefinition::new("places");
/// The digest of an own bundle, to its number.
pub const BUNDLE_DIGESTS: TableDefinition<&[u8], u64> = TableDefinition::new("bundle-digests");
/// The numbers of own bundles that were perhaps not published.
pub const UNSENT_BUNDLES: TableDefinition<u64, ()> = TableDefinition::new("unsent-bundles");
/// A reliable topic, to the end of the own log.
pub const LOG_ENDS: TableDefinition<&str, &[u8]> = TableDefinition::new("log-ends");
/// A reliable topic, and a writer and an incarnation, to the position of this host in it.
pub const CHECKPOINTS: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("checkpoints");
/// The entry of a subscription that receives earlier events, to its plugin, its topic and its beginning.
pub const CATCH_UPS: TableDefinition<u64, &[u8]> = TableDefinition::new("catch-ups");
/// The entry of such a subscription, and a writer and an incarnation, to its position in it.
pub const CATCH_UP_CHECKPOINTS: TableDefinition<(u64, &[u8]), &[u8]> =
    TableDefinition::new("catch-up-checkpoints");
/// A subscribed reliable topic, to the kind and the time of its beginning.
pub const SUBSCRIBED: TableDefinition<&str, (u8, u64)> = TableDefinition::new("subscribed");

/// A reliable topic, to the hybrid time before which its own bundles were removed.
pub const KEPT_SINCE: TableDefinition<&str, u64> = TableDefinition::new("kept-since");

/// A reliable topic, to the digest of the root of the index that the daemon has pinned last.
pub const INDEX_PINS: TableDefinition<&str, &[u8]> = TableDefinition::new("index-pins");

/// A reliable topic and a writer, to the log that this host keeps for the writer in its daemon.
pub const MIRRORS: TableDefinition<(&str, &[u8]), &[u8]> = TableDefinition::new("mirrors");

/// Alarms about writers of reliable topics, in the order in which they were raised.
pub const ALARMS: TableDefinition<u64, &[u8]> = TableDefinition::new("alarms");

/// Passes all tables to a macro.
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
            INCARNATIONS,
            BUNDLES,
            PLACES,
            BUNDLE_DIGESTS,
            UNSENT_BUNDLES,
            LOG_ENDS,
            CHECKPOINTS,
            CATCH_UPS,
            CATCH_UP_CHECKPOINTS,
            SUBSCRIBED,
            KEPT_SINCE,
            INDEX_PINS,
            ALARMS,
            MIRRORS,
        )
    };
}
pub(super) use all;

/// Opens each table once, so that every read finds all tables.
pub fn create_all(write: &WriteTransaction) -> Result<(), StoreError> {
    macro_rules! each {
        ($($table:ident),* $(,)?) => { $(write.open_table($table)?;)* };
    }
    all!(each);
    Ok(())
}

/// The number that represents a plugin's name in keys. Numbers are never reused.
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

    /// The stored form of the key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The plugin's part of a stored key, if it is a key of `plugin`.
    pub fn strip(plugin: PluginId, stored: &[u8]) -> Option<&[u8]> {
        stored.strip_prefix(plugin.0.to_be_bytes().as_slice())
    }
}
