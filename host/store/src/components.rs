//! Owns the components that were installed while a host ran: files beside the database, named by their digest.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dim_model::ident::Digest;

use crate::Store;
use crate::owner_only;

const DIRECTORY: &str = "components";

/// The name of the file with the key of the compiled forms, in their directory.
pub const CACHE_KEY: &str = "key";

/// The number of the next temporary file.
static HALVES: AtomicU64 = AtomicU64::new(0);

fn file(digest: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(digest).with_extension("wasm")
}

/// Stores a component with the digest `digest`. It is on the disk when this returns.
pub fn keep(store: &Store, digest: Digest, component: &[u8]) -> io::Result<()> {
    let dir = store.dir();
    let name = file(&digest.to_string());
    if read(store, &digest.to_string()).is_ok() {
        // Its age counts from now on, because it is about to be needed.
        std::fs::File::open(store.path().join(&name))?.set_modified(SystemTime::now())?;
        return Ok(());
    }
    owner_only::create_dir_in(dir, DIRECTORY)?;
    // Two tasks may store the same component at the same time.
    let half = name.with_extension(format!("half-{}", HALVES.fetch_add(1, Ordering::Relaxed)));
    owner_only::exchange(dir, &name, &half, component)?;
    std::fs::File::open(store.path().join(DIRECTORY))?.sync_all()
}

/// Reads a component; returns an error if it does not match its digest.
pub fn read(store: &Store, digest: &str) -> io::Result<Vec<u8>> {
    let component = store.dir().read(file(digest))?;
    if Digest::of(&component).to_string() != digest {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is damaged"));
    }
    Ok(component)
}

/// Most compiled forms that are kept although no plugin needs them now.
const SPARE: usize = 32;

/// The age up to which a file is kept in any case, because it may be about to be needed.
const FRESH: Duration = Duration::from_secs(600);

/// Removes the components that are not needed, and all but the newest of their compiled forms. Files that
/// cannot be removed stay.
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
    // Each compiled form has a file with its keyed digest beside it.
    let spare = compiled.len().saturating_sub(2 * SPARE);
    for path in old(DIRECTORY).chain(compiled.into_iter().take(spare)) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(file = %path.display(), "cannot remove a component that is not needed any more: {error}");
        }
    }
}
