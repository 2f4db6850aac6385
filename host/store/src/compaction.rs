//! Owns the compaction of the database's file. Removed rows leave pages that only the database itself can use
//! again. A compaction moves later pages into them and truncates the file.

use std::time::Instant;

use redb::{CompactionError, Error};

use crate::{Store, StoreError};

impl Store {
    /// The number of bytes in use in the file. Reads the whole file and blocks commits meanwhile: seconds for
    /// each gigabyte.
    pub fn bytes_in_use(&self) -> Result<u64, StoreError> {
        let write = self.begin()?;
        let stats = write.stats()?;
        write.abort()?;
        Ok(stats.allocated_pages().saturating_mul(stats.page_size() as u64))
    }

    /// Compacts the file as far as its content allows. Reads and writes much of it: seconds for each gigabyte.
    /// After an error the store must be opened again.
    pub fn pack(&mut self) -> Result<(), StoreError> {
        let (before, begun) = (self.file_bytes(), Instant::now());
        tracing::info!(bytes = before, "compacting the store");
        self.database.compact().map_err(|error| match error {
            CompactionError::Storage(error) => StoreError::from(error),
            error => StoreError::Database(Box::new(Error::from(error))),
        })?;
        tracing::info!(bytes = self.file_bytes(), before, took = ?begun.elapsed(), "compacted the store");
        Ok(())
    }
}
