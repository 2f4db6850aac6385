//! Owns how the file of the database is made smaller: what was removed leaves pages that only the database
//! itself can use again, until the pages behind them are moved there and the file is cut.

use redb::{CompactionError, Error};

use super::{Store, StoreError, Usage};

/// What the file takes for what it holds, as it was right after packing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    file: u64,
    held: u64,
}

impl Packed {
    /// Pages are not full to the last byte: until it was measured, half as much again.
    const UNKNOWN: Self = Self { file: 3, held: 2 };

    fn file_for(self, held: u64) -> u64 {
        let bytes = u128::from(held) * u128::from(self.file) / u128::from(self.held.max(1));
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

impl Store {
    /// About how many bytes packing would give back to the disk.
    pub fn slack(&self, usage: &Usage) -> u64 {
        let packed = self.packed.unwrap_or(Packed::UNKNOWN);
        self.file_bytes().saturating_sub(packed.file_for(usage.total()))
    }

    /// Makes the file as small as what it holds allows. Reads and writes much of it: seconds for each
    /// gigabyte. After an error the store has to be opened again.
    pub fn pack(&mut self) -> Result<(), StoreError> {
        let (before, begun) = (self.file_bytes(), std::time::Instant::now());
        tracing::info!(bytes = before, "the disk runs short: the store is packed");
        self.database.compact().map_err(|error| match error {
            CompactionError::Storage(error) => StoreError::from(error),
            error => StoreError::Database(Box::new(Error::from(error))),
        })?;
        self.settle_for_now()?;
        tracing::info!(bytes = self.file_bytes(), before, took = ?begun.elapsed(), "the store is packed");
        Ok(())
    }

    /// Takes it that the file cannot be any smaller for what it holds now.
    pub fn settle_for_now(&mut self) -> Result<(), StoreError> {
        let held = Usage::of(&self.snapshot()?)?.total();
        self.packed = Some(Packed { file: self.file_bytes(), held });
        Ok(())
    }
}
