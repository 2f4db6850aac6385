//! Owns the format of the store: the number that this host writes, and the migration of an older store in one
//! transaction.

use redb::{ReadableTable as _, WriteTransaction};

use crate::{
    Absent, DOCUMENTS, META, OUTBOX, Store, StoreError, directory, documents, number, outbox, set_counter,
    tables, topic_rows,
};

/// The format of the store that this host writes.
pub const FORMAT: u64 = 9;

/// The oldest format that this host can migrate.
const OLDEST: u64 = 2;

/// Creates the tables of a new store, or migrates an older one. It writes nothing to a store with the current
/// format, because the disk may be full.
pub fn settle(store: &Store, absent: Absent) -> Result<(), StoreError> {
    let found = match store.meta("format") {
        Ok(found) => found,
        // A new database has no tables.
        Err(StoreError::Database(error)) if matches!(*error, redb::Error::TableDoesNotExist(_)) => None,
        Err(error) => return Err(error),
    };
    match found.map(|bytes| number(&bytes)).transpose()? {
        Some(FORMAT) => Ok(()),
        Some(found) if found > FORMAT => Err(StoreError::Newer { found }),
        Some(found) if found < OLDEST => Err(StoreError::Older { found }),
        Some(found) => {
            tracing::info!(from = found, to = FORMAT, "migrating the store to the current format");
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

/// Migrates from `found` to this format, step by step. No row changes from 3 to 4, where rows of plugins may
/// contain the source of an installed component. No row changes from 4 to 5, which adds checkpoints and the
/// generation in entries. No row changes from 5 to 6, which adds the tables of reliable topics and members as senders
/// of messages. An older host would ignore these. From 6 to 7 the places of own bundles get a table of their own. No row
/// changes from 7 to 8, which adds the tables of catch-ups and entries for one plugin. No row changes from 8 to 9, which
/// adds the table of mirrors.
fn migrate(write: &WriteTransaction, found: u64) -> Result<(), StoreError> {
    if found < 3 {
        count_bytes(write)?;
    }
    if found < 7 {
        topic_rows::add_places(write)?;
    }
    Ok(())
}

/// Migrates from 2 to 3: adds counters of the bytes of the documents and of the outbox.
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
