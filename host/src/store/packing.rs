//! Owns how the file of the database is made smaller: what was removed leaves pages that only the database
//! itself can use again, until those behind them are moved there and the file is cut.

use std::time::Instant;

use redb::{CompactionError, Error};

use super::{Store, StoreError};

impl Store {
    /// How many bytes of the file are in use. Reads all of it, and nothing is committed meanwhile: seconds
    /// for each gigabyte.
    pub fn bytes_in_use(&self) -> Result<u64, StoreError> {
        let write = self.begin()?;
        let stats = write.stats()?;
        write.abort()?;
        Ok(stats.allocated_pages().saturating_mul(stats.page_size() as u64))
    }

    /// Makes the file as small as what it holds allows. Reads and writes much of it: seconds for each
    /// gigabyte. After an error the store has to be opened again.
    pub fn pack(&mut self) -> Result<(), StoreError> {
        let (before, begun) = (self.file_bytes(), Instant::now());
        tracing::info!(bytes = before, "packing the store");
        self.database.compact().map_err(|error| match error {
            CompactionError::Storage(error) => StoreError::from(error),
            error => StoreError::Database(Box::new(Error::from(error))),
        })?;
        tracing::info!(bytes = self.file_bytes(), before, took = ?begun.elapsed(), "packed the store");
        Ok(())
    }
}
