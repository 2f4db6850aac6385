//! Owns how many bytes the store holds, of what. They are counted along, for the database would have to
//! look at every row; its file is larger by its pages, and does not shrink at once.

use redb::ReadableTable as _;
use serde::Serialize;

use crate::ident::PluginName;
use crate::plugin::roster;

use super::{CURSORS, META, Snapshot, StoreError, dead, documents, log, outbox, undo};

/// Bytes that the store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Usage {
    /// Entries of the log.
    pub log: u64,
    /// The state of plugins.
    pub state: u64,
    /// Documents that names point to, or pointed to.
    pub documents: u64,
    /// Publishes that wait.
    pub outbox: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// What plugins had before other code took over.
    pub undo: u64,
}

impl Usage {
    /// What the store held as of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Result<Self, StoreError> {
        let meta = snapshot.table(META)?;
        let mut state = 0;
        for row in snapshot.table(CURSORS)?.iter()? {
            state += row?.1.value().1;
        }
        Ok(Self {
            log: log::bytes(&meta)?,
            state,
            documents: documents::bytes(&meta)?,
            outbox: outbox::bytes(&meta)?,
            dead_letters: dead::bytes(&meta)?,
            undo: undo::bytes(&meta)?,
        })
    }

    /// The plugin that has the most state, and how many bytes.
    pub fn most_state(snapshot: &Snapshot) -> Result<Option<(PluginName, u64)>, StoreError> {
        let cursors = snapshot.table(CURSORS)?;
        let mut most = None;
        for (plugin, row) in roster::rows(snapshot)? {
            let bytes = cursors.get(row.id.0)?.map_or(0, |row| row.value().1);
            if most.as_ref().is_none_or(|(_, largest)| bytes > *largest) {
                most = Some((plugin, bytes));
            }
        }
        Ok(most)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The largest part, and its name.
    pub fn largest(&self) -> (&'static str, u64) {
        self.parts().into_iter().max_by_key(|(_, bytes)| *bytes).expect("there are parts")
    }

    /// Each part, and its name.
    pub fn parts(&self) -> [(&'static str, u64); 6] {
        [
            ("log", self.log),
            ("state", self.state),
            ("documents", self.documents),
            ("outbox", self.outbox),
            ("dead letters", self.dead_letters),
            ("undo", self.undo),
        ]
    }
}
