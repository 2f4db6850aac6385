//! Owns the rows of pins: the files that the backend keeps for this host.

use cid::Cid;
use redb::{ReadableTable as _, WriteTransaction};

use crate::{PINS, Snapshot, StoreError};

/// Records that the backend is about to pin a file for this host.
pub fn note(write: &WriteTransaction, cid: &Cid) -> Result<(), StoreError> {
    write.open_table(PINS)?.insert(cid.to_bytes().as_slice(), ())?;
    Ok(())
}

/// Removes the row of a pin.
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
