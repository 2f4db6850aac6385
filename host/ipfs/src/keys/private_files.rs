//! Owns files beside the keys: secrets that are no keys of IPNS names. Like keys they have mode 0600.

use std::io::{self, Read as _};

use cap_std::fs::{Dir, DirBuilder, DirBuilderExt as _, Permissions, PermissionsExt as _};

use super::write_synced;

/// The maximum size of a file, in bytes.
const MAX_FILE: u64 = 2 << 20;

/// A directory of files that only the host may read.
#[derive(Debug)]
pub struct PrivateFiles {
    dir: Dir,
}

impl PrivateFiles {
    /// Opens the directory `name` in `parent`, or makes it.
    pub(super) fn open(parent: &Dir, name: &str) -> io::Result<Self> {
        if !parent.is_dir(name) {
            let mut builder = DirBuilder::new();
            builder.mode(0o700);
            parent.create_dir_with(name, &builder)?;
            parent.open(".")?.sync_all()?;
        }
        Ok(Self { dir: parent.open_dir(name)? })
    }

    /// Reads all files, by name. Files that were not written to their end are not among them.
    pub fn all(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        for entry in self.dir.entries()? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') || !entry.file_type()?.is_file() {
                continue;
            }
            // A file that was restored from elsewhere may have another mode.
            self.dir.set_permissions(&name, Permissions::from_mode(0o600))?;
            if let Some(bytes) = self.read(&name)? {
                files.push((name, bytes));
            }
        }
        Ok(files)
    }

    /// Reads a file, if there is one.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.dir.open(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::other(format!("{name} has more than {MAX_FILE} bytes")));
        }
        Ok(Some(bytes))
    }

    /// Writes a file. It is on the disk when the function returns.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        write_synced(&self.dir, name, bytes)
    }

    /// Deletes a file, if there is one. It is gone from the directory on the disk when the function returns.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match self.dir.remove_file(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.dir.open(".")?.sync_all(),
        }
    }
}

#[cfg(test)]
mod tests {
    use cap_std::ambient_authority;
    use cap_std::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn files_come_back_and_only_the_owner_can_read_them() {
        let place = tempfile::tempdir().unwrap();
        let parent = Dir::open_ambient_dir(place.path(), ambient_authority()).unwrap();
        let files = PrivateFiles::open(&parent, ".fleet").unwrap();
        files.write("roster", b"one").unwrap();
        files.write("roster", b"two").unwrap();
        let again = PrivateFiles::open(&parent, ".fleet").unwrap();
        assert_eq!(again.all().unwrap(), [("roster".to_owned(), b"two".to_vec())]);
        assert_eq!(parent.metadata(".fleet/roster").unwrap().mode() & 0o777, 0o600);
        assert_eq!(parent.metadata(".fleet").unwrap().mode() & 0o777, 0o700);
        assert_eq!(again.read("roster").unwrap().as_deref(), Some(&b"two"[..]));
        files.remove("roster").unwrap();
        files.remove("roster").unwrap();
        assert_eq!(again.read("roster").unwrap(), None);
        assert_eq!(again.all().unwrap(), []);
    }
}
