//! Owns the rows of followed names: the last known value of each IPNS name of another owner.

use bytes::Bytes;
use cid::Cid;
use dim_model::entry::Resolution;
use dim_model::ident::{ContentPath, IpnsName};
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::names::Changed;
use crate::{FOLLOWED, Snapshot, StoreError, documents};

/// The last known value of a followed name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Followed {
    /// The resolution for followers; its path is that of the document.
    pub resolution: Resolution,
    /// The path in the last record of the chain of names. It is no name, so it always points to the same file;
    /// the host reads the file only when this path changes.
    pub target: ContentPath,
    /// The newest signed record of the name.
    pub record: Vec<u8>,
    /// The path of the published file, if it encrypts the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<ContentPath>,
}

impl Followed {
    /// The path that other programs find under the name.
    pub fn visible_path(&self) -> &ContentPath {
        self.encrypted.as_ref().unwrap_or(&self.resolution.path)
    }
}

/// Sets a new value of a followed name with its file, in the transaction of the commit.
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

/// Updates the row of a name that still points to the same file.
pub fn confirm(write: &WriteTransaction, followed: &Followed) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(followed).expect("what is known of a name is plain data");
    write.open_table(FOLLOWED)?.insert(followed.resolution.name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// The last known value of a followed name.
pub fn known(snapshot: &Snapshot, name: &IpnsName) -> Result<Option<Followed>, StoreError> {
    read(&snapshot.table(FOLLOWED)?, name)
}

/// The last known value within the transaction of the commit.
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
