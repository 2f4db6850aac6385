//! Owns the rows of the event log: chunks of consecutive entries, keyed by the offset of the first entry.

use bytes::{Bytes, BytesMut};
use dim_model::entry::{Entry, Offset, decode_chunk, encode_into};
use dim_model::time::Timestamp;
use redb::{ReadableDatabase as _, ReadableTable, WriteTransaction};

use crate::{LOG, Store, StoreError, add_to_counter, counter};

/// Largest chunk of more than one entry, in bytes. Entries that are committed together share rows. With its key
/// such a chunk fits into pages of 64 KiB; a slightly larger one would occupy 128 KiB.
const CHUNK_BYTES: usize = (64 << 10) - 256;

/// Bytes of the log that one read returns; a larger row is returned alone.
const READ_BYTES: usize = 4 << 20;

impl Store {
    /// The offset after the last entry of the log, and the time of that entry.
    pub fn log_end(&self) -> Result<(Offset, Timestamp), StoreError> {
        let read = self.database.begin_read()?;
        let table = read.open_table(LOG)?;
        let Some((_, chunk)) = table.last()? else {
            return Ok((Offset(0), Timestamp(0)));
        };
        let entries = decode_chunk(Bytes::copy_from_slice(chunk.value()))?;
        let last = entries.last().ok_or_else(|| StoreError::corrupt("event log", "an empty chunk"))?;
        Ok((Offset(last.offset.0 + 1), last.time))
    }

    /// The first offset that the log still contains.
    pub fn log_start(&self) -> Result<Option<Offset>, StoreError> {
        let read = self.database.begin_read()?;
        let table = read.open_table(LOG)?;
        Ok(table.first()?.map(|(first, _)| Offset(first.value())))
    }

    /// The offset of the first entry that was appended at `time` or later, among those that the log still contains.
    pub fn log_offset_at(&self, time: Timestamp) -> Result<Offset, StoreError> {
        let (mut lowest, mut highest) = (self.log_start()?.unwrap_or_default().0, self.log_end()?.0.0);
        // The times of entries do not fall.
        while lowest < highest {
            let middle = lowest + (highest - lowest) / 2;
            match self.read_log(Offset(middle), 1)?.first() {
                Some(entry) if entry.time < time => lowest = entry.offset.0 + 1,
                _ => highest = middle,
            }
        }
        Ok(Offset(lowest))
    }

    /// Reads at least one and at most `limit` entries from `from` on; none if there are no more.
    pub fn read_log(&self, from: Offset, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let read = self.database.begin_read()?;
        let table = read.open_table(LOG)?;
        let first = match table.range(..=from.0)?.next_back() {
            Some(row) => row?.0.value(),
            None => from.0,
        };
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for row in table.range(first..)? {
            let row = row?.1;
            bytes += row.value().len();
            let chunk = decode_chunk(Bytes::copy_from_slice(row.value()))?;
            entries.extend(chunk.into_iter().filter(|entry| entry.offset >= from));
            // A plugin that lags far behind must not fill the memory with large messages.
            if entries.len() >= limit || (bytes >= READ_BYTES && !entries.is_empty()) {
                break;
            }
        }
        entries.truncate(limit);
        Ok(entries)
    }
}

/// Writes entries to the log in rows of many entries each, keyed by the offset of the first entry.
pub fn append<'a>(
    write: &WriteTransaction,
    entries: impl Iterator<Item = &'a Entry>,
) -> Result<(), StoreError> {
    let mut table = write.open_table(LOG)?;
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    let (mut first, mut written) = (None, 0_u64);
    let mut put = |first: Option<Offset>, chunk: &[u8]| -> Result<(), StoreError> {
        let Some(first) = first else { return Ok(()) };
        written += chunk.len() as u64;
        table.insert(first.0, chunk)?;
        Ok(())
    };
    for entry in entries {
        let before = chunk.len();
        encode_into(entry, &mut chunk);
        if before > 0 && chunk.len() > CHUNK_BYTES {
            let rest = chunk.split_off(before);
            put(first.replace(entry.offset), &chunk)?;
            chunk = rest;
        }
        first.get_or_insert(entry.offset);
    }
    put(first, &chunk)?;
    if written > 0 {
        add_to_counter(write, BYTES, written as i64)?;
    }
    Ok(())
}

/// Removes rows of the log by their first offsets.
pub fn trim(write: &WriteTransaction, rows: &[u64]) -> Result<(), StoreError> {
    let mut table = write.open_table(LOG)?;
    let mut removed: u64 = 0;
    for row in rows {
        removed += table.remove(row)?.map_or(0, |chunk| chunk.value().len() as u64);
    }
    add_to_counter(write, BYTES, -(removed as i64))
}

/// The name of the stored counter of the log's bytes.
const BYTES: &str = "log-bytes";

/// The size of the log in bytes.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}
