//! Owns the format of the store: what this host writes, and how what an older one wrote is brought up
//! to it, in one transaction.

use redb::{ReadableTable as _, WriteTransaction};

use super::{
    Absent, DOCUMENTS, META, OUTBOX, Store, StoreError, directory, documents, number, outbox, set_counter,
    tables,
};

/// The format of the store that this host writes.
pub const FORMAT: u64 = 5;

/// The oldest format that can be brought up to it.
const OLDEST: u64 = 2;

/// Makes the tables of a new store, or brings those of an older host up to date. A store that is up to
/// date is left as it is: it may lie on a disk that is full.
pub fn settle(store: &Store, absent: Absent) -> Result<(), StoreError> {
    let found = match store.meta("format") {
        Ok(found) => found,
        // A new database has no tables at all.
        Err(StoreError::Database(error)) if matches!(*error, redb::Error::TableDoesNotExist(_)) => None,
        Err(error) => return Err(error),
    };
    match found.map(|bytes| number(&bytes)).transpose()? {
        Some(FORMAT) => Ok(()),
        Some(found) if found > FORMAT => Err(StoreError::Newer { found }),
        Some(found) if found < OLDEST => Err(StoreError::Older { found }),
        Some(found) => {
            tracing::info!(from = found, to = FORMAT, "bringing the store up to date");
            write(store, |transaction| migrate(transaction, found))
        }
        None => {
            if absent == Absent::Refused {
                directory::refuse_traces(store.path())?;
            }
            write(store, |_| Ok(()))
        }
    }
}

fn write(
    store: &Store,
    migrate: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let write = store.begin()?;
    tables::create_all(&write)?;
    migrate(&write)?;
    write.open_table(META)?.insert("format", FORMAT.to_be_bytes().as_slice())?;
    write.commit()?;
    Ok(())
}

/// From `found` to this format, step by step. No row changes from 3 to 4 (those of plugins may say where a
/// component was installed from) and from 4 to 5 (there are marks, and entries say which code caused them):
/// an older host would pass over that.
fn migrate(write: &WriteTransaction, found: u64) -> Result<(), StoreError> {
    if found < 3 {
        count_bytes(write)?;
    }
    Ok(())
}

/// From 2 to 3: the bytes of the documents and of the outbox are counted along.
fn count_bytes(write: &WriteTransaction) -> Result<(), StoreError> {
    let mut held = 0;
    for row in write.open_table(DOCUMENTS)?.iter()? {
        held += row?.1.value().len() as u64;
    }
    set_counter(write, documents::BYTES, held)?;
    let mut waiting = 0;
    for row in write.open_table(OUTBOX)?.iter()? {
        waiting += row?.1.value().len() as u64;
    }
    set_counter(write, outbox::BYTES, waiting)
}
