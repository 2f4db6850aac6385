//! Owns the verification and the restoration of a backup. It receives the file and the passphrase, and returns the
//! head; a restoration also makes the state directory.

use std::io::{self, BufReader, Read};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use dim_ipfs::keys::{KeyFile, Keyring};
use dim_model::ident::Digest;
use dim_runtime::MAX_COMPONENT;
use dim_store::copy::{CopyError, Filling, RawRow};
use dim_store::owner_only;
use dim_store::{FORMAT, HALF_RESTORED, LOCK, Lock, Store, StoreError, components, names};
use tempfile::TempDir;

use super::record::{Content, End, FORM, Head, PrivateFile};
use super::{BackupError, Passphrase};
use crate::host::HostError;

/// The number of bytes of rows that one transaction writes.
const TOGETHER: usize = 64 << 20;

/// Reads a backup to its end without changing anything, and returns its head. Blocks.
pub fn verify(input: impl Read, passphrase: Passphrase) -> Result<Head, BackupError> {
    read(input, passphrase, &mut |_| Ok(()))
}

/// Makes the state directory `state_dir` from a backup and returns the head of the backup. The directory must be
/// empty or absent. It appears complete or not at all. The host that starts on it has the same identity, keys and
/// names. It publishes the names again, with sequence numbers above those that were published since the backup.
/// Blocks.
pub fn restore(input: impl Read, passphrase: Passphrase, state_dir: &Path) -> Result<Head, BackupError> {
    let place = Place::of(state_dir)?;
    let half = place.make_half()?;
    // The database panics on rows that are inconsistent.
    let filled = catch_unwind(AssertUnwindSafe(|| fill(input, passphrase, half.path())));
    let head = filled.unwrap_or_else(|_| Err(BackupError::Damaged("a row that is none".to_owned())))?;
    place.take(half)?;
    Ok(head)
}

/// The place of a new state directory.
#[derive(Debug)]
enum Place {
    /// An absent path: a directory is made beside it and renamed to it.
    New(PathBuf),
    /// An empty directory, which may be a volume: a directory is made in it and its content is moved up. The lock of
    /// the directory is held meanwhile.
    Empty(PathBuf, #[expect(dead_code, reason = "held, not read")] Lock),
}

impl Place {
    fn of(path: &Path) -> Result<Self, BackupError> {
        let path = std::path::absolute(path)?;
        let unfit = |why| BackupError::Unfit { path: path.clone(), why };
        let is_link = match std::fs::symlink_metadata(&path) {
            Ok(found) => found.is_symlink(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::New(path)),
            Err(error) => return Err(error.into()),
        };
        let real = match std::fs::canonicalize(&path) {
            Err(error) if is_link && error.kind() == io::ErrorKind::NotFound => {
                return Err(unfit("is a symlink to nothing"));
            }
            real => real?,
        };
        match is_empty(&real) {
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(unfit("is no directory"));
            }
            Err(error) => return Err(error.into()),
            Ok(false) => return Err(unfit("is not empty")),
            Ok(true) => {}
        }
        if std::fs::metadata(&real)?.mode() & 0o022 != 0 {
            return Err(unfit("can be written into by others (chmod go-w it)"));
        }
        let dir = Dir::open_ambient_dir(&real, ambient_authority())?;
        let lock = Lock::take(&dir, &real).map_err(StoreError::from)?;
        // A host may have started in it before the lock was taken.
        if is_empty(&real)? { Ok(Self::Empty(real, lock)) } else { Err(unfit("is not empty")) }
    }

    /// Makes the directory to fill, readable for the owner only. It is removed when the value is dropped.
    fn make_half(&self) -> io::Result<TempDir> {
        let place = match self {
            Self::New(path) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                owner_only::create_dir_all(parent)?;
                parent
            }
            Self::Empty(path, _) => path,
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(HALF_RESTORED).permissions(std::fs::Permissions::from_mode(0o700)).tempdir_in(place)
    }

    /// Moves the filled directory to its place. No host starts on it if this is interrupted.
    fn take(&self, half: TempDir) -> io::Result<()> {
        match self {
            Self::New(path) => {
                std::fs::rename(half.path(), path)?;
                let _ = half.keep();
                // The new name must survive a crash.
                sync(path.parent().unwrap_or(Path::new("/")))
            }
            Self::Empty(path, _) => {
                // The half-restored directory stays until the database is moved: without the database it marks the
                // restoration as incomplete.
                let half = half.keep();
                let database = Store::file(&half);
                for file in std::fs::read_dir(&half)? {
                    let file = file?;
                    if file.path() != database && file.file_name() != LOCK {
                        std::fs::rename(file.path(), path.join(file.file_name()))?;
                    }
                }
                sync(path)?;
                std::fs::rename(database, Store::file(path))?;
                sync(path)?;
                if let Err(error) = std::fs::remove_dir_all(&half) {
                    tracing::warn!("cannot remove {}: {error}", half.display());
                }
                Ok(())
            }
        }
    }
}

/// Returns whether a directory is empty, apart from `lost+found` of a new volume and the lock.
fn is_empty(directory: &Path) -> io::Result<bool> {
    for file in std::fs::read_dir(directory)? {
        let name = file?.file_name();
        if name != "lost+found" && name != LOCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn sync(directory: &Path) -> io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

fn fill(input: impl Read, passphrase: Passphrase, dir: &Path) -> Result<Head, BackupError> {
    let store = Arc::new(Store::open(dir)?);
    let keys = Keyring::open(store.dir()).map_err(HostError::from)?;
    // Only one transaction can be open at a time.
    let mut filling = Some(store.fill()?);
    let (mut filled, mut component) = (0, Vec::new());
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
            Content::PrivateFile(file) => write_private(&keys, &file)?,
            Content::Component(part) => {
                component.extend(part.bytes);
                if component.len() > MAX_COMPONENT {
                    return Err(BackupError::Damaged("a component that is too large".to_owned()));
                }
                if part.is_last {
                    let whole = std::mem::take(&mut component);
                    components::keep(&store, Digest::of(&whole), &whole)?;
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

/// Writes a secret. Its place must be a name that this host gives.
fn write_private(keys: &Keyring, file: &PrivateFile) -> Result<(), BackupError> {
    let is_plain = |name: &str| !name.contains('/') && !name.contains('\0') && name != "." && name != "..";
    let is_hidden = file.directory.starts_with('.');
    if !is_hidden || file.name.starts_with('.') || !is_plain(&file.directory) || !is_plain(&file.name) {
        return Err(BackupError::Damaged("a secret with an invalid name".to_owned()));
    }
    Ok(keys.private_files(&file.directory)?.write(&file.name, &file.bytes)?)
}

fn put(filling: &Filling, row: &RawRow<'_>) -> Result<(), BackupError> {
    filling.put(*row).map_err(|error| match error {
        CopyError::Row(_) => BackupError::Damaged(error.to_string()),
        CopyError::Store(error) => error.into(),
    })
}

/// Reads a complete backup, and passes each record after the head to `take`.
fn read(
    input: impl Read,
    passphrase: Passphrase,
    take: &mut dyn FnMut(Content) -> Result<(), BackupError>,
) -> Result<Head, BackupError> {
    let decrypted = dim_age::passphrase::decrypt(passphrase.secret(), BufReader::new(input))
        .map_err(BackupError::Closed)?;
    let mut input = BufReader::new(decrypted);
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
            Content::PrivateFile(_) => seen.private_files += 1,
            Content::Row(_) => seen.rows += 1,
            Content::Component(_) => seen.components += 1,
            Content::End(end) if *end == seen => return Ok(head),
            Content::End(_) => return Err(BackupError::Damaged("records are missing".to_owned())),
        }
        take(content)?;
    }
}
