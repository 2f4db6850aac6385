//! Owns the rows of mirrors: the logs of other writers whose bundles this host keeps in its daemon. It receives the roots
//! of indexes that the daemon has pinned, with the heads that state them, and returns them after a start.

use bytes::Bytes;
use dim_model::ident::Topic;
use dim_model::time::Timestamp;
use dim_topics::identity::{Digest, WriterId};
use prost::Message as _;
use redb::{ReadableTable as _, WriteTransaction};

use crate::topic_rows::{fixed, parse};
use crate::{MIRRORS, Snapshot, StoreError};

/// The log of another writer that this host keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The topic.
    pub topic: Topic,
    /// The writer.
    pub writer: WriterId,
    /// The root of the index that the daemon has pinned.
    pub root: Digest,
    /// The block of the head that states the root.
    pub head: Bytes,
    /// The hybrid time of this head.
    pub time: Timestamp,
}

/// All mirrors.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Mirror>, StoreError> {
    let mut mirrors = Vec::new();
    for row in snapshot.table(MIRRORS)?.iter()? {
        let (key, row) = row?;
        let (topic, writer) = key.value();
        let MirrorRow { root, head, time } =
            MirrorRow::decode(row.value()).map_err(|error| StoreError::corrupt("mirrors", error))?;
        let (topic, writer, root) = (parse(topic)?, WriterId(fixed(writer)?), Digest(fixed(&root)?));
        mirrors.push(Mirror { topic, writer, root, head, time: Timestamp(time) });
    }
    Ok(mirrors)
}

/// Notes what the daemon has pinned of a log.
pub fn put(write: &WriteTransaction, mirror: &Mirror) -> Result<(), StoreError> {
    let row = MirrorRow { root: mirror.root.0.to_vec(), head: mirror.head.clone(), time: mirror.time.0 };
    let key = (mirror.topic.as_str(), mirror.writer.0.as_slice());
    write.open_table(MIRRORS)?.insert(key, row.encode_to_vec().as_slice())?;
    Ok(())
}

/// Removes a mirror.
pub fn remove(write: &WriteTransaction, topic: &Topic, writer: &WriterId) -> Result<(), StoreError> {
    write.open_table(MIRRORS)?.remove((topic.as_str(), writer.0.as_slice()))?;
    Ok(())
}

/// A mirror. Field numbers are never reused.
#[derive(Clone, PartialEq, prost::Message)]
struct MirrorRow {
    #[prost(bytes = "vec", tag = "1")]
    root: Vec<u8>,
    #[prost(bytes = "bytes", tag = "2")]
    head: Bytes,
    #[prost(fixed64, tag = "3")]
    time: u64,
}
