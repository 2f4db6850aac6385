//! Owns the rows of topics on which others were heard: silence there may mean that the daemon is cut off.

use redb::{ReadableTable as _, WriteTransaction};

use super::{OTHERS, Snapshot, StoreError};
use crate::ident::Topic;

/// Notes that someone else was heard on a topic.
pub fn note(write: &WriteTransaction, topic: &Topic) -> Result<(), StoreError> {
    write.open_table(OTHERS)?.insert(topic.as_str(), ())?;
    Ok(())
}

/// The topics on which others were heard.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Topic>, StoreError> {
    let rows = snapshot.table(OTHERS)?;
    rows.iter()?
        .map(|row| row?.0.value().parse().map_err(|error| StoreError::corrupt("topics", error)))
        .collect()
}
