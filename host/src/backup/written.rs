//! Owns the making of a backup from a host that goes on meanwhile.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};

use age::Encryptor;

use super::record::{Component, Content, End, FORM, Head, Key, Row};
use super::{BackupError, Passphrase};
use crate::host::identity;
use crate::keys::Keyring;
use crate::plugin::{mark, roster};
use crate::store::copy::RawRow;
use crate::store::{FORMAT, Store, components};
use crate::time::Timestamp;

/// Bytes that are encrypted at a time.
const BUFFER: usize = 64 << 10;

/// Bytes of a component in one record.
const PART: usize = 16 << 20;

/// Writes a backup of `store` and `keys`, as of now. Takes a second for the passphrase alone, and blocks.
pub fn write(
    store: &Store,
    keys: &Keyring,
    passphrase: Passphrase,
    out: impl Write,
) -> Result<(), BackupError> {
    // The keys after it: a key that the snapshot knows of is there by then.
    let snapshot = store.snapshot()?;
    let sealed = Encryptor::with_user_passphrase(passphrase.0).wrap_output(out)?;
    let mut out = BufWriter::with_capacity(BUFFER, sealed);
    let head = Head {
        form: FORM,
        store_format: FORMAT,
        host: identity(store)?,
        time: Timestamp::wall().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Content::Head(head).write(&mut out)?;
    let mut end = End::default();
    for (name, _) in keys.all() {
        let Some(file) = keys.export(&name) else { continue };
        let key = Key { name: name.to_string(), is_adopted: file.is_adopted, bytes: file.bytes };
        Content::Key(key).write(&mut out)?;
        end.keys += 1;
    }
    let installed: BTreeSet<String> =
        roster::installed(&snapshot)?.into_values().map(|code| code.digest).collect();
    for digest in mark::components(&snapshot)? {
        let component = match components::read(store, &digest) {
            Ok(component) => component,
            // It comes with the host, or from a file of the config.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !installed.contains(&digest) => {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let mut parts = component.chunks(PART).peekable();
        while let Some(part) = parts.next() {
            let part = Component { bytes: part.to_vec(), is_last: parts.peek().is_none() };
            Content::Component(part).write(&mut out)?;
            end.components += 1;
        }
    }
    snapshot.rows(&mut |row: RawRow<'_>| -> Result<(), BackupError> {
        end.rows += 1;
        let RawRow { table, key, value } = row;
        let row = Row { table: table.to_owned(), key: key.to_vec(), value: value.to_vec() };
        Ok(Content::Row(row).write(&mut out)?)
    })?;
    Content::End(end).write(&mut out)?;
    let sealed = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    sealed.finish()?.flush()?;
    Ok(())
}
