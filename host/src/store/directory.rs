//! Owns the state directory around the database: who may write there, which files exist, and whether the
//! database belongs to them.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cap_std::ambient_authority;
use cap_std::fs::Dir;

use super::{Absent, HALF_RESTORED, LOCK, Store, StoreError, lock};
use crate::owner_only;

/// What a host writes into its state directory. Compiled components are checked where they are used.
const FILES: &[&str] = &["dim.redb", "dim.sums", LOCK, dim_client::TOKEN, "keys", "components"];

/// What a host leaves behind that has made a database.
const TRACES: &[&str] = &["keys", "components"];

/// Opens the directory, created if it is missing, checks who can use its files, and takes its lock.
pub fn take(path: &Path) -> Result<(Dir, lock::Lock), StoreError> {
    let directory = |source| StoreError::of_directory(path, source);
    owner_only::create_dir_all(path).map_err(directory)?;
    let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(directory)?;
    let mode = std::fs::metadata(path).map_err(directory)?.permissions().mode();
    // Whoever can write here has native code run in the host, for it lies here compiled.
    if mode & 0o022 != 0 {
        return Err(StoreError::Shared { path: path.to_owned(), mode: mode & 0o777 });
    }
    owner_only::settle(path, FILES)?;
    let lock = lock::Lock::take(&dir, path)?;
    Ok((dir, lock))
}

/// Refuses a directory whose database is missing although a host has run there, unless the operator wants a new
/// one; and one where a new store is asked for although there is a database.
pub fn expect_database(path: &Path, is_new: bool, absent: Absent) -> Result<(), StoreError> {
    match (is_new, absent) {
        (false, Absent::Created) => Err(StoreError::Present { path: Store::file(path) }),
        (false, Absent::Refused) => Ok(()),
        (true, _) if holds_half_a_restore(path).map_err(|error| StoreError::of_directory(path, error))? => {
            Err(StoreError::HalfRestored { path: path.to_owned() })
        }
        (true, Absent::Created) => Ok(()),
        (true, Absent::Refused) => refuse_traces(path),
    }
}

/// Refuses a directory in which a host has run: what it had in its database is gone.
pub fn refuse_traces(path: &Path) -> Result<(), StoreError> {
    match TRACES.iter().find(|trace| path.join(trace).exists()) {
        Some(trace) => Err(StoreError::Lost { path: Store::file(path), trace: path.join(trace) }),
        None => Ok(()),
    }
}

fn holds_half_a_restore(path: &Path) -> io::Result<bool> {
    let files: Vec<_> = std::fs::read_dir(path)?.collect::<Result<_, _>>()?;
    Ok(files.iter().any(|file| file.file_name().to_string_lossy().starts_with(HALF_RESTORED)))
}
