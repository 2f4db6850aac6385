//! Owns the files that the host holds: its own state documents and those behind followed names.
//! A file is kept for as long as something counts on it.

use cid::Cid;
use redb::{ReadableTable, WriteTransaction};

use crate::ident::ContentPath;
use crate::store::{DOCUMENTS, Snapshot, StoreError};

/// Bytes before the file in a row: how many count on it, big-endian.
const COUNT: usize = 4;

/// Keeps a file on behalf of one more.
pub fn keep(write: &WriteTransaction, cid: &Cid, data: &[u8]) -> Result<(), StoreError> {
    let mut table = write.open_table(DOCUMENTS)?;
    let key = cid.to_bytes();
    let count = count(table.get(key.as_slice())?.as_ref().map(|row| row.value()))?;
    let mut row = Vec::with_capacity(COUNT + data.len());
    row.extend_from_slice(&(count + 1).to_be_bytes());
    row.extend_from_slice(data);
    table.insert(key.as_slice(), row.as_slice())?;
    Ok(())
}

/// Lets go of a file on behalf of one; the last one takes it along.
pub fn release(write: &WriteTransaction, cid: &Cid) -> Result<(), StoreError> {
    let mut table = write.open_table(DOCUMENTS)?;
    let key = cid.to_bytes();
    let Some(mut row) = table.get(key.as_slice())?.map(|row| row.value().to_vec()) else { return Ok(()) };
    let left = count(Some(&row))?.saturating_sub(1);
    if left == 0 {
        table.remove(key.as_slice())?;
    } else {
        row[..COUNT].copy_from_slice(&left.to_be_bytes());
        table.insert(key.as_slice(), row.as_slice())?;
    }
    Ok(())
}

fn count(row: Option<&[u8]>) -> Result<u32, StoreError> {
    let Some(row) = row else { return Ok(0) };
    let bytes =
        row.first_chunk::<COUNT>().ok_or_else(|| StoreError::corrupt("documents", "a row is too short"))?;
    Ok(u32::from_be_bytes(*bytes))
}

/// The file at `/ipfs/CID`, if it is held.
pub fn get(snapshot: &Snapshot, path: &ContentPath) -> Result<Option<Vec<u8>>, StoreError> {
    let Some((cid, below)) = path.ipfs() else { return Ok(None) };
    if !below.is_empty() {
        return Ok(None);
    }
    let table = snapshot.table(DOCUMENTS)?;
    let row = table.get(cid.to_bytes().as_slice())?;
    Ok(row.and_then(|row| row.value().get(COUNT..).map(<[u8]>::to_vec)))
}
