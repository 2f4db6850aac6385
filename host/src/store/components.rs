//! Owns the components that were installed while a host ran: files beside the database, by their digest.

use std::io::{self, Write as _};
use std::path::PathBuf;

use cap_std::fs::OpenOptions;

use super::Store;
use crate::ident::Digest;

const DIRECTORY: &str = "components";

fn file(digest: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(digest).with_extension("wasm")
}

/// Keeps a component, whose digest is `digest`; it is on the disk when this returns.
pub fn keep(store: &Store, digest: Digest, component: &[u8]) -> io::Result<()> {
    let dir = store.dir();
    let name = file(&digest.to_string());
    if dir.is_file(&name) {
        return Ok(());
    }
    dir.create_dir_all(DIRECTORY)?;
    let half = name.with_extension("half");
    let mut written = dir.open_with(&half, OpenOptions::new().write(true).create(true).truncate(true))?;
    written.write_all(component)?;
    written.sync_all()?;
    dir.rename(&half, dir, &name)?;
    std::fs::File::open(store.path().join(DIRECTORY))?.sync_all()
}

/// Reads a component; one that is not what its digest says is an error.
pub fn read(store: &Store, digest: &str) -> io::Result<Vec<u8>> {
    let component = store.dir().read(file(digest))?;
    if Digest::of(&component).to_string() != digest {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is damaged"));
    }
    Ok(component)
}
