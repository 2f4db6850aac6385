//! Owns the rows of topics on which others were heard: silence there may mean that the daemon is cut off.

use redb::{ReadableTable as _, ReadableTableMetadata as _, WriteTransaction};

use super::{OTHERS, Snapshot, StoreError};
use crate::ident::Topic;

/// Most topics that are noted; a plugin may listen to ever new ones.
const MOST: u64 = 16_384;

/// Notes that someone else was heard on a topic. Beyond what is kept some other topic is forgotten.
pub fn note(write: &WriteTransaction, topic: &Topic) -> Result<(), StoreError> {
    let mut table = write.open_table(OTHERS)?;
    if table.len()? >= MOST && table.get(topic.as_str())?.is_none() {
        table.pop_first()?;
    }
    table.insert(topic.as_str(), ())?;
    Ok(())
}

/// The topics on which others were heard.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Topic>, StoreError> {
    let rows = snapshot.table(OTHERS)?;
    rows.iter()?
        .map(|row| row?.0.value().parse().map_err(|error| StoreError::corrupt("topics", error)))
        .collect()
}
