//! Owns the state directory around the database: its permissions, its files, and the check that the database
//! belongs to them.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cap_std::ambient_authority;
use cap_std::fs::Dir;

use crate::owner_only;
use crate::{Absent, HALF_RESTORED, LOCK, Store, StoreError, lock};

/// The files that a host writes into its state directory. Compiled components are checked at their use.
const FILES: &[&str] = &["dim.redb", "dim.sums", LOCK, dim_client::TOKEN, "keys", "components"];

/// The files that show that a host has made a database here.
const TRACES: &[&str] = &["keys", "components"];

/// Opens the directory, creates it if it is missing, checks its permissions, and takes its lock.
pub fn take(path: &Path) -> Result<(Dir, lock::Lock), StoreError> {
    let directory = |source| StoreError::of_directory(path, source);
    owner_only::create_dir_all(path).map_err(directory)?;
    let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(directory)?;
    let mode = std::fs::metadata(path).map_err(directory)?.permissions().mode();
    // A user who can write here can run native code in the host: the compiled components are here.
    if mode & 0o022 != 0 {
        return Err(StoreError::Shared { path: path.to_owned(), mode: mode & 0o777 });
    }
    owner_only::settle(path, FILES)?;
    let lock = lock::Lock::take(&dir, path)?;
    Ok((dir, lock))
}

/// Refuses a directory without a database in which a host has run, unless the operator requests a new store.
/// Refuses a directory with a database if the operator requests a new store.
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

/// Refuses a directory in which a host has run, because its database is lost.
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
