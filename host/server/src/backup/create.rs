//! Owns the creation of a backup. It receives the store and the keys of a running host, and writes one encrypted
//! file.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};

use dim_ipfs::keys::Keyring;
use dim_model::time::Timestamp;
use dim_store::copy::{RawRow, RowsError};
use dim_store::{FORMAT, Store, components};
use dim_store::{checkpoint, plugin_registry};

use super::record::{Component, Content, End, FORM, FORM_WITHOUT_PRIVATE_FILES, Head, Key, PrivateFile, Row};
use super::{BackupError, Passphrase};
use crate::host::identity;

/// The number of bytes that are encrypted at a time.
const BUFFER: usize = 64 << 10;

/// The maximum number of bytes of a component in one record.
const PART: usize = 16 << 20;

/// Writes a backup of `store` and `keys` as of now. Blocks; the passphrase alone takes about a second.
pub fn write(
    store: &Store,
    keys: &Keyring,
    passphrase: Passphrase,
    out: &mut dyn Write,
) -> Result<(), BackupError> {
    // The keys are read after the snapshot, so every key that the snapshot names exists by then.
    let snapshot = store.snapshot()?;
    let sealed = dim_age::passphrase::encrypt(passphrase.secret(), out)?;
    let mut out = BufWriter::with_capacity(BUFFER, sealed);
    let private_files = private_files(keys)?;
    let head = Head {
        form: if private_files.is_empty() { FORM_WITHOUT_PRIVATE_FILES } else { FORM },
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
    for file in private_files {
        Content::PrivateFile(file).write(&mut out)?;
        end.private_files += 1;
    }
    let installed: BTreeSet<String> =
        plugin_registry::installed(&snapshot)?.into_values().map(|code| code.digest).collect();
    for digest in checkpoint::components(&snapshot)? {
        let component = match components::read(store, &digest) {
            Ok(component) => component,
            // The component comes with the host or from a file of the config.
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
    let copied = snapshot.rows(&mut |row| {
        end.rows += 1;
        let RawRow { table, key, value } = row;
        let row = Row { table: table.to_owned(), key: key.to_vec(), value: value.to_vec() };
        Content::Row(row).write(&mut out)
    });
    copied.map_err(|error| match error {
        RowsError::Store(error) => BackupError::from(error),
        RowsError::Receiver(error) => error.into(),
    })?;
    Content::End(end).write(&mut out)?;
    let sealed = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    sealed.finish()?.flush()?;
    Ok(())
}

/// Reads the secrets that are no keys of IPNS names.
fn private_files(keys: &Keyring) -> std::io::Result<Vec<PrivateFile>> {
    let mut files = Vec::new();
    for directory in keys.private_directories()? {
        for (name, bytes) in keys.private_files(&directory)?.all()? {
            files.push(PrivateFile { directory: directory.clone(), name, bytes });
        }
    }
    Ok(files)
}
