//! Owns the way back: a backup that is checked, and one that becomes a state directory.

use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use age::{Decryptor, scrypt};

use super::record::{Content, End, FORM, Head};
use super::{BackupError, Passphrase};
use crate::host::HostError;
use crate::keys::{KeyFile, Keyring};
use crate::store::copy::{CopyError, Filling, RawRow};
use crate::store::{FORMAT, Store, names};

/// Bytes of rows that are put into the store in one transaction.
const TOGETHER: usize = 64 << 20;

/// Reads a backup to its end and changes nothing; returns what it is of. Blocks.
pub fn verify(input: impl Read, passphrase: Passphrase) -> Result<Head, BackupError> {
    read(input, passphrase, &mut |_| Ok(()))
}

/// Makes the state directory `state_dir` of a backup; it must be empty or not there. It appears whole or
/// not at all. The host that is started on it has the same identity, keys and names; it publishes what
/// they pointed to anew, with sequences above those that were published since the backup. Blocks.
pub fn restore(input: impl Read, passphrase: Passphrase, state_dir: &Path) -> Result<Head, BackupError> {
    // It is moved there as a whole, which the name `.` has no place for.
    let state_dir = std::path::absolute(state_dir)?;
    if std::fs::read_dir(&state_dir).is_ok_and(|mut files| files.next().is_some()) {
        return Err(BackupError::Occupied(state_dir));
    }
    let half = half_of(&state_dir);
    // One that was broken off is worth nothing.
    match std::fs::remove_dir_all(&half) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    // The database panics at rows that make no sense to it.
    let filled = catch_unwind(AssertUnwindSafe(|| fill(input, passphrase, &half)));
    let filled = filled.unwrap_or_else(|_| Err(BackupError::Damaged("a row that is none".to_owned())));
    let finished = filled.and_then(|head| {
        std::fs::rename(&half, &state_dir)?;
        // Its new name must survive a crash, too.
        std::fs::File::open(state_dir.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(head)
    });
    if finished.is_err() {
        let _ = std::fs::remove_dir_all(&half);
    }
    finished
}

/// Beside the state directory, so that it can be moved there in one step.
fn half_of(state_dir: &Path) -> PathBuf {
    let mut name = state_dir.file_name().unwrap_or_default().to_owned();
    name.push(".restoring");
    state_dir.with_file_name(name)
}

fn fill(input: impl Read, passphrase: Passphrase, dir: &Path) -> Result<Head, BackupError> {
    let store = Arc::new(Store::open(dir)?);
    let keys = Keyring::open(&store).map_err(HostError::from)?;
    // One transaction at a time.
    let mut filling = Some(store.fill()?);
    let mut filled = 0;
    let head = read(input, passphrase, &mut |content| {
        match content {
            Content::Key(key) => {
                let name = key.name.parse().map_err(HostError::from)?;
                let file = KeyFile { is_adopted: key.is_adopted, bytes: key.bytes };
                keys.import(&name, &file).map_err(HostError::from)?;
            }
            Content::Row(row) => {
                filled += row.key.len() + row.value.len();
                let open = filling.as_ref().expect("one is always begun");
                put(open, &RawRow { table: &row.table, key: &row.key, value: &row.value })?;
                if filled > TOGETHER {
                    filling.take().expect("one is always begun").commit()?;
                    filling = Some(store.fill()?);
                    filled = 0;
                }
            }
            Content::Head(_) | Content::End(_) => {}
        }
        Ok(())
    })?;
    let last = filling.expect("one is always begun");
    names::overtake(last.transaction())?;
    last.commit()?;
    Ok(head)
}

fn put(filling: &Filling, row: &RawRow<'_>) -> Result<(), BackupError> {
    filling.put(*row).map_err(|error| match error {
        CopyError::Row(_) => BackupError::Damaged(error.to_string()),
        CopyError::Store(error) => error.into(),
    })
}

/// Reads a whole backup; `take` gets its keys and rows.
fn read(
    input: impl Read,
    passphrase: Passphrase,
    take: &mut dyn FnMut(Content) -> Result<(), BackupError>,
) -> Result<Head, BackupError> {
    let sealed = Decryptor::new_buffered(BufReader::new(input)).map_err(BackupError::Closed)?;
    let identity = scrypt::Identity::new(passphrase.0);
    let opened = sealed.decrypt(std::iter::once(&identity as _)).map_err(BackupError::Closed)?;
    let mut input = BufReader::new(opened);
    let Content::Head(head) = Content::read(&mut input)? else {
        return Err(BackupError::Damaged("it does not begin with a head".to_owned()));
    };
    if head.form > FORM || head.store_format > FORMAT {
        return Err(BackupError::Newer { found: head.store_format, known: FORMAT });
    }
    let mut seen = End::default();
    loop {
        let content = Content::read(&mut input)?;
        match &content {
            Content::Head(_) => return Err(BackupError::Damaged("it has two heads".to_owned())),
            Content::Key(_) => seen.keys += 1,
            Content::Row(_) => seen.rows += 1,
            Content::End(end) if *end == seen => return Ok(head),
            Content::End(_) => return Err(BackupError::Damaged("records are missing".to_owned())),
        }
        take(content)?;
    }
}
