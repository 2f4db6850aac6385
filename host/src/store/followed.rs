//! Owns the rows of followed names: what is known of the names of others.

use bytes::Bytes;
use cid::Cid;
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::names::Changed;
use super::{FOLLOWED, Snapshot, StoreError, documents};
use crate::entry::Resolution;
use crate::ident::{ContentPath, IpnsName};

/// What is known of a followed name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Followed {
    /// What its followers are told; the path is that of the file.
    pub resolution: Resolution,
    /// What the last record of the chain says. It never points to another file than before, for
    /// it is no name; so a file is read only when this changes.
    pub target: ContentPath,
    /// The newest record of the name, as it was signed.
    pub record: Vec<u8>,
}

/// Gives a followed name a new value with its file, in the transaction of the commit.
pub fn set(
    write: &WriteTransaction,
    followed: &Followed,
    cid: &Cid,
    data: &Bytes,
) -> Result<Changed, StoreError> {
    let resolution = followed.resolution.clone();
    documents::keep(write, cid, data)?;
    let before = read(&write.open_table(FOLLOWED)?, &resolution.name)?;
    let superseded = before.and_then(|before| Some(before.resolution.path.ipfs()?.0));
    confirm(write, followed)?;
    Ok(Changed { resolution, superseded })
}

/// Notes what is known by now of a name that still points to the same file.
pub fn confirm(write: &WriteTransaction, followed: &Followed) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(followed).expect("what is known of a name is plain data");
    write.open_table(FOLLOWED)?.insert(followed.resolution.name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// What is known of a name of someone else.
pub fn known(snapshot: &Snapshot, name: &IpnsName) -> Result<Option<Followed>, StoreError> {
    read(&snapshot.table(FOLLOWED)?, name)
}

/// What is known by now, within the transaction of the commit.
pub fn known_within(write: &WriteTransaction, name: &IpnsName) -> Result<Option<Followed>, StoreError> {
    read(&write.open_table(FOLLOWED)?, name)
}

fn read(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &IpnsName,
) -> Result<Option<Followed>, StoreError> {
    let Some(row) = table.get(name.as_str())? else { return Ok(None) };
    serde_json::from_slice(row.value()).map(Some).map_err(|error| StoreError::corrupt("followed", error))
}
