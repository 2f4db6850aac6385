//! Owns the rows of retries. Each contains the entry that is appended when the retry is due.

use dim_model::entry::{Generation, Kind};
use dim_model::ident::PluginName;
use redb::WriteTransaction;

use crate::{RETRIES, StoreError};

/// Removes the retries of a plugin that generations from `first` on have requested.
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
