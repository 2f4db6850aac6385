//! Owns the rows of pins: the files that the backend holds on behalf of this host, and of no one else.

use cid::Cid;
use redb::{ReadableTable as _, WriteTransaction};

use super::{PINS, Snapshot, StoreError};

/// Notes that a file is about to be pinned for this host.
pub fn note(write: &WriteTransaction, cid: &Cid) -> Result<(), StoreError> {
    write.open_table(PINS)?.insert(cid.to_bytes().as_slice(), ())?;
    Ok(())
}

/// Forgets a pin that is gone.
pub fn forget(write: &WriteTransaction, cid: &Cid) -> Result<(), StoreError> {
    write.open_table(PINS)?.remove(cid.to_bytes().as_slice())?;
    Ok(())
}

/// Whether a file is pinned for this host.
pub fn is_noted(snapshot: &Snapshot, cid: &Cid) -> Result<bool, StoreError> {
    Ok(snapshot.table(PINS)?.get(cid.to_bytes().as_slice())?.is_some())
}

/// All files that are pinned for this host.
pub fn all(snapshot: &Snapshot) -> Result<Vec<Cid>, StoreError> {
    let rows = snapshot.table(PINS)?;
    rows.iter()?
        .map(|row| Cid::try_from(row?.0.value()).map_err(|error| StoreError::corrupt("pins", error)))
        .collect()
}
