//! Owns the rows of retries: entries that are appended when they are due.

use redb::WriteTransaction;

use super::{RETRIES, StoreError};
use crate::entry::{Generation, Kind};
use crate::ident::PluginName;

/// Drops the retries of a plugin that codes from `first` on have asked for.
pub fn drop_of(write: &WriteTransaction, plugin: &PluginName, first: Generation) -> Result<(), StoreError> {
    let mut malformed = None;
    write.open_table(RETRIES)?.retain(|_, row| match Kind::from_bytes(row) {
        Ok(Kind::Again { plugin: whose, by, .. }) => whose != *plugin || by < first,
        Ok(_) => true,
        Err(error) => {
            malformed = Some(error);
            true
        }
    })?;
    malformed.map_or(Ok(()), |error| Err(error.into()))
}
