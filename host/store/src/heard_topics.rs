//! Owns the rows of topics on which the host has received messages of other peers: silence on these may mean
//! that the daemon is disconnected.

use dim_model::ident::Topic;
use redb::{ReadableTable as _, ReadableTableMetadata as _, WriteTransaction};

use crate::{OTHERS, Snapshot, StoreError};

/// Most topics that are recorded; a plugin may subscribe to an unbounded number over time.
const MOST: u64 = 16_384;

/// Records that the host has received a message of another peer on a topic. At the limit, one other topic is removed.
pub fn note(write: &WriteTransaction, topic: &Topic) -> Result<(), StoreError> {
    let mut table = write.open_table(OTHERS)?;
    if table.len()? >= MOST && table.get(topic.as_str())?.is_none() {
        table.pop_first()?;
    }
    table.insert(topic.as_str(), ())?;
    Ok(())
}

/// The topics on which the host has received messages of other peers.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Topic>, StoreError> {
    let rows = snapshot.table(OTHERS)?;
    rows.iter()?
        .map(|row| row?.0.value().parse().map_err(|error| StoreError::corrupt("topics", error)))
        .collect()
}
