//! Owns the modes of all files that only the owner of the process may use. Files have mode 0600 and directories
//! 0700 from their creation on, independent of the umask. Modes of existing files are checked and tightened at
//! start.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt};
use std::path::{Path, PathBuf};

use cap_std::fs::{Dir, DirBuilderExt as _, OpenOptionsExt as _};
use thiserror::Error;

/// The mode of a file.
const FILE: u32 = 0o600;

/// The mode of a directory.
const DIRECTORY: u32 = 0o700;

/// The bits of a mode with rights of the group and of others.
const OTHERS: u32 = 0o077;

/// The bits of a mode with the right to write of the group and of others.
const OTHERS_WRITE: u32 = 0o022;

/// A file or directory of another user, which cannot be used.
#[derive(Debug, Error)]
#[error(
    "{path} belongs to user {owner} (mode {mode:03o}) and this process runs as user {user}: run dim as user {owner}, or give it the file with `chown {user} {path}`"
)]
pub struct Foreign {
    /// The path of the file.
    pub path: PathBuf,
    /// The number of its owner.
    pub owner: u32,
    /// Its mode.
    pub mode: u32,
    /// The number of the user of this process.
    pub user: u32,
}

/// The reason why the modes of existing files cannot be ensured.
#[derive(Debug, Error)]
pub enum ModeError {
    /// A file belongs to another user.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// A mode cannot be read or set.
    #[error("cannot check the mode of {path}")]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Creates a directory and its missing parents.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(DIRECTORY).create(path)
}

/// Creates a directory within `dir` unless it exists.
pub fn create_dir_in(dir: &Dir, name: &str) -> io::Result<()> {
    let mut builder = cap_std::fs::DirBuilder::new();
    builder.mode(DIRECTORY);
    match dir.create_dir_with(name, &builder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir(name) => Ok(()),
        created => created,
    }
}

/// Opens a file for reading and writing, and creates an empty one if it is missing. A mode with rights for
/// others is tightened before the function returns.
pub fn open(path: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE).open(path)?;
    if is_open_to_others(&file.metadata()?) {
        file.set_permissions(PermissionsExt::from_mode(FILE))?;
    }
    Ok(file)
}

/// The options that create a file within a [`Dir`].
pub fn options() -> cap_std::fs::OpenOptions {
    let mut options = cap_std::fs::OpenOptions::new();
    options.mode(FILE);
    options
}

/// Writes a whole file within `dir` and renames it to `name`; `half` is its name until it is complete. The
/// content is on the disk when this returns; the name may not be.
pub fn exchange(dir: &Dir, name: &Path, half: &Path, content: &[u8]) -> io::Result<()> {
    // A file left over from an interrupted write may have another mode.
    let _ = dir.remove_file(half);
    let mut file = dir.open_with(half, options().write(true).create_new(true))?;
    file.write_all(content)?;
    file.sync_all()?;
    dir.rename(half, dir, name)
}

/// Whether the file belongs to the user of this process and no other user can write to it.
pub fn is_own(file: &Metadata) -> bool {
    file.uid() == user() && file.mode() & OTHERS_WRITE == 0
}

/// The explanation why the operating system refuses to open a path: it belongs to another user.
pub fn refusal(path: &Path, error: &io::Error) -> Option<Foreign> {
    let found = (error.kind() == io::ErrorKind::PermissionDenied).then(|| std::fs::metadata(path).ok())??;
    (found.uid() != user()).then(|| Foreign::new(path, &found))
}

/// Checks the existing files among `names` in `dir`, directories with their content. Removes the rights of
/// others and logs it. A file of another user is an error, unless this process runs as root.
pub fn settle(dir: &Path, names: &[&str]) -> Result<(), ModeError> {
    let mut tightened = Vec::new();
    for name in names {
        tighten(&dir.join(name), &mut tightened)?;
    }
    if let Some((path, mode)) = tightened.first() {
        tracing::warn!(
            path = %path.display(),
            mode = %format_args!("{mode:03o}"),
            files = tightened.len(),
            "other users could use files of the host: the modes were tightened, only the owner can use them now"
        );
    }
    Ok(())
}

fn tighten(path: &Path, tightened: &mut Vec<(PathBuf, u32)>) -> Result<(), ModeError> {
    let io = |source| ModeError::Io { path: path.to_owned(), source };
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    // The operator placed the link, and the host checks its target when it opens it.
    if found.is_symlink() {
        return Ok(());
    }
    if found.uid() != user() && user() != 0 {
        return Err(Foreign::new(path, &found).into());
    }
    if is_open_to_others(&found) {
        let mode = found.mode() & 0o777;
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode & !OTHERS)).map_err(io)?;
        tightened.push((path.to_owned(), mode));
    }
    if found.is_dir() {
        for entry in std::fs::read_dir(path).map_err(io)? {
            tighten(&entry.map_err(io)?.path(), tightened)?;
        }
    }
    Ok(())
}

fn is_open_to_others(file: &Metadata) -> bool {
    file.mode() & OTHERS != 0
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

impl Foreign {
    fn new(path: &Path, found: &Metadata) -> Self {
        Self { path: path.to_owned(), owner: found.uid(), mode: found.mode() & 0o777, user: user() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn existing_files_that_others_can_use_are_tightened_and_links_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, elsewhere) = (dir.path().join("keys"), dir.path().join("elsewhere"));
        std::fs::create_dir_all(keys.join(".adopted")).unwrap();
        for file in [keys.join("a"), keys.join(".adopted/b"), elsewhere.clone()] {
            std::fs::write(&file, "x").unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
        }
        std::os::unix::fs::symlink(&elsewhere, keys.join("link")).unwrap();
        settle(dir.path(), &["keys", "missing"]).unwrap();
        assert_eq!((mode(&keys), mode(&keys.join(".adopted"))), (0o700, 0o700));
        assert_eq!((mode(&keys.join("a")), mode(&keys.join(".adopted/b"))), (0o600, 0o600));
        assert_eq!(mode(&elsewhere), 0o666);
    }

    #[test]
    fn a_file_is_private_when_it_is_opened_whoever_made_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        drop(open(&file).unwrap());
        assert_eq!(mode(&file), 0o600);
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        drop(open(&file).unwrap());
        assert_eq!(mode(&file), 0o600);
    }
}
