//! Owns the files that the host stores: its own state documents and those of followed names.
//!
//! The store keeps a file while it has a hold: from a name that points to it, from the last accepted record of
//! a name, or from the log. The log holds a file that a name pointed to before, because a plugin that handles
//! an entry from that time late or again must find the same file.

use cid::Cid;
use dim_model::entry::Offset;
use dim_model::ident::ContentPath;
use redb::{ReadableTable, WriteTransaction};

use crate::{DOCUMENTS, HOLDS, META, SUPERSEDED, Snapshot, StoreError, add_to_counter, counter};

/// Adds a hold on a file, and stores the file with its first hold.
pub fn keep(write: &WriteTransaction, cid: &Cid, data: &[u8]) -> Result<(), StoreError> {
    if add_hold(write, cid)? == 1 {
        write.open_table(DOCUMENTS)?.insert(cid.to_bytes().as_slice(), data)?;
        add_to_counter(write, BYTES, data.len() as i64)?;
    }
    Ok(())
}

/// Adds a hold on a file that has one already; returns whether it has.
pub fn hold(write: &WriteTransaction, cid: &Cid) -> Result<bool, StoreError> {
    let is_held = write.open_table(HOLDS)?.get(cid.to_bytes().as_slice())?.is_some();
    if is_held {
        add_hold(write, cid)?;
    }
    Ok(is_held)
}

fn add_hold(write: &WriteTransaction, cid: &Cid) -> Result<u64, StoreError> {
    let (mut holds, key) = (write.open_table(HOLDS)?, cid.to_bytes());
    let count = holds.get(key.as_slice())?.map_or(0, |count| count.value()) + 1;
    holds.insert(key.as_slice(), count)?;
    Ok(count)
}

/// Removes a hold on a file; with the last hold the file is removed.
pub fn release(write: &WriteTransaction, cid: &Cid) -> Result<(), StoreError> {
    let (mut holds, key) = (write.open_table(HOLDS)?, cid.to_bytes());
    let count = holds.get(key.as_slice())?.map_or(0, |count| count.value());
    if count > 1 {
        holds.insert(key.as_slice(), count - 1)?;
    } else {
        holds.remove(key.as_slice())?;
        let gone = write.open_table(DOCUMENTS)?.remove(key.as_slice())?.map_or(0, |data| data.value().len());
        add_to_counter(write, BYTES, -(gone as i64))?;
    }
    Ok(())
}

/// Passes a hold to the log: from the entry at `at` on, no name points to the file.
pub fn supersede(write: &WriteTransaction, at: Offset, cid: &Cid) -> Result<(), StoreError> {
    let key = cid.to_bytes();
    let len = write.open_table(DOCUMENTS)?.get(key.as_slice())?.map_or(0, |data| data.value().len());
    let before = write.open_table(SUPERSEDED)?.insert((at.0, key.as_slice()), len as u64)?.is_some();
    // The log has at most one hold on a file for each entry.
    if before {
        return release(write, cid);
    }
    add_to_counter(write, SUPERSEDED_BYTES, len as i64)
}

/// The name of the stored counter of the bytes of all files.
pub(super) const BYTES: &str = "document-bytes";

/// The name of the stored counter of the bytes of all superseded files.
const SUPERSEDED_BYTES: &str = "superseded-bytes";

/// The size of all files in bytes.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// A file that no name points to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superseded {
    /// The first entry from which on no name points to the file.
    pub at: Offset,
    /// The CID of the file.
    pub cid: Cid,
    /// The size of the file in bytes.
    pub bytes: u64,
}

/// The files that only the log holds, oldest first.
pub fn superseded(
    snapshot: &Snapshot,
) -> Result<impl Iterator<Item = Result<Superseded, StoreError>> + use<>, StoreError> {
    let rows = snapshot.table(SUPERSEDED)?.range::<(u64, &[u8])>(..)?;
    Ok(rows.map(|row| {
        let (key, bytes) = row?;
        let (at, cid) = key.value();
        let cid = Cid::try_from(cid).map_err(|error| StoreError::corrupt("documents", error))?;
        Ok(Superseded { at: Offset(at), cid, bytes: bytes.value() })
    }))
}

/// The size of the superseded files in bytes.
pub fn superseded_bytes(snapshot: &Snapshot) -> Result<u64, StoreError> {
    counter(&snapshot.table(META)?, SUPERSEDED_BYTES)
}

/// Removes the log's holds on files.
pub fn forget(write: &WriteTransaction, gone: &[Superseded]) -> Result<(), StoreError> {
    for Superseded { at, cid, .. } in gone {
        write.open_table(SUPERSEDED)?.remove((at.0, cid.to_bytes().as_slice()))?;
        release(write, cid)?;
    }
    let freed: u64 = gone.iter().map(|file| file.bytes).sum();
    add_to_counter(write, SUPERSEDED_BYTES, -(freed as i64))
}

/// The file at `/ipfs/CID`, if it is stored.
pub fn get(snapshot: &Snapshot, path: &ContentPath) -> Result<Option<Vec<u8>>, StoreError> {
    let Some((cid, below)) = path.ipfs() else { return Ok(None) };
    if !below.is_empty() {
        return Ok(None);
    }
    let data = snapshot.table(DOCUMENTS)?.get(cid.to_bytes().as_slice())?;
    Ok(data.map(|data| data.value().to_vec()))
}
