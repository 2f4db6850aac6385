//! Owns the components that were installed while a host ran: files beside the database, by their digest.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::Store;
use crate::ident::Digest;
use crate::owner_only;

const DIRECTORY: &str = "components";

/// The name of the key of the compiled forms, in their directory.
pub(crate) const CACHE_KEY: &str = "key";

/// Counts the files that are being written.
static HALVES: AtomicU64 = AtomicU64::new(0);

fn file(digest: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(digest).with_extension("wasm")
}

/// Keeps a component, whose digest is `digest`; it is on the disk when this returns.
pub fn keep(store: &Store, digest: Digest, component: &[u8]) -> io::Result<()> {
    let dir = store.dir();
    let name = file(&digest.to_string());
    if read(store, &digest.to_string()).is_ok() {
        // It is about to be needed.
        std::fs::File::open(store.path().join(&name))?.set_modified(SystemTime::now())?;
        return Ok(());
    }
    owner_only::create_dir_in(dir, DIRECTORY)?;
    // Two may keep one at the same time.
    let half = name.with_extension(format!("half-{}", HALVES.fetch_add(1, Ordering::Relaxed)));
    owner_only::exchange(dir, &name, &half, component)?;
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

/// Compiled forms that are kept beside those that are needed, for the next time.
const SPARE: usize = 32;

/// For how long a file stays in any case, for it may be about to be needed.
const FRESH: Duration = Duration::from_secs(600);

/// Removes the components that are not needed, and all but the newest of their compiled forms. What cannot be
/// removed stays.
pub fn tidy(store: &Store, needed: &BTreeSet<String>) {
    let digest_of = |path: &Path| {
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        name.split('-').next().unwrap_or_default().to_owned()
    };
    let old = |directory: &str| {
        let mut old: Vec<_> = std::fs::read_dir(store.path().join(directory))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path())))
            .filter(|(modified, path)| {
                modified.elapsed().is_ok_and(|age| age > FRESH) && !needed.contains(&digest_of(path))
            })
            .collect();
        old.sort();
        old.into_iter().map(|(_, path)| path)
    };
    let compiled: Vec<_> = old("compiled").filter(|path| !path.ends_with(CACHE_KEY)).collect();
    // Each has a keyed digest beside it.
    let spare = compiled.len().saturating_sub(2 * SPARE);
    for path in old(DIRECTORY).chain(compiled.into_iter().take(spare)) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(file = %path.display(), "cannot remove what is not needed any more: {error}");
        }
    }
}
