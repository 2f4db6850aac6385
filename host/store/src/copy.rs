//! Owns the copy of whole rows as bytes, out of a store and into a new one, for backups.

use std::io;

use redb::{Key, ReadTransaction, ReadableTable as _, TableDefinition, Value, WriteTransaction};
use thiserror::Error;

use crate::{Snapshot, Store, StoreError, tables};

/// The reason why a row cannot be written to a store.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The table does not exist, or the row does not fit into it.
    #[error("a row of table {0:?} is invalid")]
    Row(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A row as bytes.
#[derive(Clone, Copy, Debug)]
pub struct RawRow<'a> {
    /// The name of the table.
    pub table: &'a str,
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
}

/// A callback that receives one row. An error of it ends the copy.
pub type Take<'a> = dyn FnMut(RawRow<'_>) -> io::Result<()> + 'a;

/// The reason why a copy out of a store ended early.
#[derive(Debug, Error)]
pub enum RowsError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The receiver of the rows failed.
    #[error(transparent)]
    Receiver(#[from] io::Error),
}

impl Snapshot {
    /// Calls `take` with every row of every table, table by table, in order.
    pub fn rows(&self, take: &mut Take<'_>) -> Result<(), RowsError> {
        macro_rules! each {
            ($($table:ident),* $(,)?) => { $(give(&self.read, tables::$table, take)?;)* };
        }
        tables::all!(each);
        Ok(())
    }
}

fn give<K: Key + 'static, V: Value + 'static>(
    read: &ReadTransaction,
    table: TableDefinition<'_, K, V>,
    take: &mut Take<'_>,
) -> Result<(), RowsError> {
    let name = redb::TableHandle::name(&table).to_owned();
    let rows = read.open_table(table).map_err(StoreError::from)?;
    for row in rows.iter().map_err(StoreError::from)? {
        let (key, value) = row.map_err(StoreError::from)?;
        let (key, value) = (key.value(), value.value());
        take(RawRow { table: &name, key: K::as_bytes(&key).as_ref(), value: V::as_bytes(&value).as_ref() })?;
    }
    Ok(())
}

/// A transaction that writes rows into a store.
pub struct Filling(WriteTransaction);

impl Store {
    /// Begins a transaction that writes rows.
    pub fn fill(&self) -> Result<Filling, StoreError> {
        Ok(Filling(self.begin()?))
    }
}

impl Filling {
    /// Writes a row. The database panics at bytes that are no key or value of the table. A caller with input
    /// that may be damaged must catch the panic.
    pub fn put(&self, row: RawRow<'_>) -> Result<(), CopyError> {
        macro_rules! each {
            ($($table:ident),* $(,)?) => {
                $(if redb::TableHandle::name(&tables::$table) == row.table {
                    return put(&self.0, tables::$table, row);
                })*
            };
        }
        tables::all!(each);
        Err(CopyError::Row(row.table.to_owned()))
    }

    /// The transaction, for changes before the commit.
    pub fn transaction(&self) -> &WriteTransaction {
        &self.0
    }

    /// Makes the rows durable.
    pub fn commit(self) -> Result<(), StoreError> {
        Ok(self.0.commit()?)
    }
}

fn put<K: Key + 'static, V: Value + 'static>(
    write: &WriteTransaction,
    table: TableDefinition<'_, K, V>,
    row: RawRow<'_>,
) -> Result<(), CopyError> {
    let fits = |width: Option<usize>, bytes: &[u8]| width.is_none_or(|width| width == bytes.len());
    if !fits(K::fixed_width(), row.key) || !fits(V::fixed_width(), row.value) {
        return Err(CopyError::Row(row.table.to_owned()));
    }
    let mut open = write.open_table(table).map_err(StoreError::from)?;
    open.insert(K::from_bytes(row.key), V::from_bytes(row.value)).map_err(StoreError::from)?;
    Ok(())
}
