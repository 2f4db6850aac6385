//! Owns the size of the store's content by kind, in bytes. Stored counters provide it, because the database
//! would have to read every row. The file is larger by the overhead of its pages, and does not shrink at once.

use dim_model::ident::PluginName;
use redb::ReadableTable as _;
use serde::Serialize;

use crate::plugin_registry;
use crate::{
    CURSORS, META, Snapshot, StoreError, dead_letters, documents, event_log_rows, outbox, rollback_rows,
    topic_rows,
};

/// The size of the store's content in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Usage {
    /// Size of the entries of the log.
    pub log: u64,
    /// Size of the state of plugins.
    pub state: u64,
    /// Size of the documents that names point to, or have pointed to.
    pub documents: u64,
    /// Size of the publishes that wait.
    pub outbox: u64,
    /// Size of the dead letters.
    pub dead_letters: u64,
    /// Size of the rollback data of plugins.
    pub undo: u64,
    /// Size of the own events of reliable topics that are kept.
    pub bundles: u64,
}

impl Usage {
    /// Computes the usage as of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Result<Self, StoreError> {
        let meta = snapshot.table(META)?;
        let mut state = 0;
        for row in snapshot.table(CURSORS)?.iter()? {
            state += row?.1.value().1;
        }
        Ok(Self {
            log: event_log_rows::bytes(&meta)?,
            state,
            documents: documents::bytes(&meta)?,
            outbox: outbox::bytes(&meta)?,
            dead_letters: dead_letters::bytes(&meta)?,
            undo: rollback_rows::bytes(&meta)?,
            bundles: topic_rows::bytes(&meta)?,
        })
    }

    /// The plugin with the most state, and its size in bytes.
    pub fn most_state(snapshot: &Snapshot) -> Result<Option<(PluginName, u64)>, StoreError> {
        let cursors = snapshot.table(CURSORS)?;
        let mut most = None;
        for (plugin, row) in plugin_registry::rows(snapshot)? {
            let bytes = cursors.get(row.id.0)?.map_or(0, |row| row.value().1);
            if most.as_ref().is_none_or(|(_, largest)| bytes > *largest) {
                most = Some((plugin, bytes));
            }
        }
        Ok(most)
    }

    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The name and size of the largest part.
    pub fn largest(&self) -> (&'static str, u64) {
        self.parts().into_iter().max_by_key(|(_, bytes)| *bytes).expect("there are parts")
    }

    /// The name and size of each part.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("log", self.log),
            ("state", self.state),
            ("documents", self.documents),
            ("outbox", self.outbox),
            ("dead letters", self.dead_letters),
            ("undo", self.undo),
            ("bundles", self.bundles),
        ]
    }
}
