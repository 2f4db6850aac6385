//! Owns the compiled forms of components on the disk. The engine runs them without further checks. So the cache
//! returns one only if a digest under a secret key shows that the host itself wrote the whole file under this
//! name.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, MetadataExt as _};
use dim_store::Store;
use dim_store::components::CACHE_KEY;
use dim_store::owner_only;
use hmac::{Hmac, Mac as _};
use rand::Rng as _;
use sha2::Sha256;

/// The directory of compiled forms in a cache.
const COMPILED: &str = "compiled";

/// Largest size of the shared directory, in bytes. An interpreter has 50 MiB, and each build of a plugin adds
/// another form.
const MOST_SHARED: u64 = 1 << 30;

/// Length of the key in bytes.
const KEY_BYTES: usize = 32;

/// A compiled form that was verified.
pub struct Trusted {
    /// The path of the file.
    pub file: PathBuf,
    /// The content of the file.
    pub bytes: Vec<u8>,
}

/// A directory of compiled forms, with the key that shows their writer.
pub struct Cache {
    dir: Dir,
    path: PathBuf,
    key: [u8; KEY_BYTES],
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Cache {
    /// Opens the cache in a host's state directory.
    pub fn of(store: &Store) -> io::Result<Self> {
        Self::within(store.dir(), store.path())
    }

    /// Opens a cache in a directory of its own, and creates it if it is missing. Returns an error if other
    /// users may write to it.
    pub fn open(path: &Path) -> io::Result<Self> {
        owner_only::create_dir_all(path)?;
        let dir = Dir::open_ambient_dir(path, ambient_authority())?;
        if !is_own(&dir.dir_metadata()?) {
            return Err(io::Error::other(format!("other users may write into {}", path.display())));
        }
        Self::within(&dir, path)
    }

    /// The directory that all programs of this user share: `dim` in `$XDG_CACHE_HOME` or `~/.cache`. `None` if
    /// neither is an absolute path.
    pub fn of_user() -> Option<PathBuf> {
        let own = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let home = || std::env::home_dir().filter(|dir| dir.is_absolute()).map(|home| home.join(".cache"));
        Some(own.or_else(home)?.join("dim"))
    }

    /// Opens the shared directory, and reduces it to its largest size.
    pub fn shared(path: &Path) -> io::Result<Self> {
        let cache = Self::open(path)?;
        cache.keep_within(MOST_SHARED)?;
        Ok(cache)
    }

    fn within(dir: &Dir, path: &Path) -> io::Result<Self> {
        let path = path.join(COMPILED);
        owner_only::create_dir_in(dir, COMPILED)?;
        let dir = dir.open_dir(COMPILED)?;
        let found = dir.dir_metadata()?;
        if !is_own(&found) {
            tracing::warn!(
                path = %path.display(),
                owner = found.uid(),
                mode = %format_args!("{:03o}", found.mode() & 0o777),
                "other users could write compiled components: they are removed and compiled again"
            );
            dir.set_permissions(".", private_directory())?;
            empty(&dir)?;
        } else if found.mode() & 0o077 != 0 {
            dir.set_permissions(".", private_directory())?;
        }
        let key = key_in(&dir)?;
        Ok(Self { dir, path, key })
    }

    /// Whether the cache contains a compiled form with this name.
    pub fn has(&self, name: &str) -> bool {
        self.dir.exists(compiled(name))
    }

    /// Returns a compiled form that the owner of the key wrote under this name. Logs one that cannot be trusted.
    pub fn trusted(&self, name: &str) -> Option<Trusted> {
        let mut file = self.dir.open(compiled(name)).ok()?.into_std();
        let mut bytes = Vec::new();
        // A user who can write to the file could change it after the verification.
        let is_own = file.metadata().is_ok_and(|found| owner_only::is_own(&found));
        let written = self.dir.read(digest(name)).unwrap_or_default();
        let is_trusted = is_own
            && file.read_to_end(&mut bytes).is_ok()
            && self.mac(name, &bytes).verify_slice(&written).is_ok();
        if !is_trusted {
            let file = self.path.join(compiled(name));
            tracing::warn!(file = %file.display(), "compiling again, the cached form is damaged or not the host's own");
            return None;
        }
        Some(Trusted { file: self.path.join(compiled(name)), bytes })
    }

    /// Stores a compiled form.
    pub fn keep(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mac = self.mac(name, bytes).finalize().into_bytes();
        for (name, content) in [(compiled(name), bytes), (digest(name), mac.as_slice())] {
            // Two threads may compile the same component.
            let half = format!("{name}.{}.{:?}.half", std::process::id(), std::thread::current().id());
            owner_only::exchange(&self.dir, Path::new(&name), Path::new(&half), content)?;
        }
        // Earlier versions stored a digest without a key.
        let _ = self.dir.remove_file(format!("{name}.sha256"));
        Ok(())
    }

    /// Removes the oldest compiled forms until the rest has at most `bytes` bytes.
    pub fn keep_within(&self, bytes: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for file in self.dir.entries()? {
            // Another program may be writing or removing the file.
            let Ok((name, known)) = file.and_then(|file| Ok((file.file_name(), file.metadata()?))) else {
                continue;
            };
            if name != CACHE_KEY {
                files.push((known.modified()?, known.len(), name));
            }
        }
        files.sort_by(|one, other| other.cmp(one));
        let mut held = 0;
        for (_, size, file) in files {
            held += size;
            if held > bytes {
                // Another program may have removed it.
                let _ = self.dir.remove_file(file);
            }
        }
        Ok(())
    }

    /// The digest under the key. It includes the name, so that one form cannot replace another.
    fn mac(&self, name: &str, bytes: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("a key of any length will do");
        mac.update(name.as_bytes());
        mac.update(&[0]);
        mac.update(bytes);
        mac
    }
}

fn compiled(name: &str) -> String {
    format!("{name}.cwasm")
}

fn digest(name: &str) -> String {
    format!("{name}.mac")
}

fn is_own(found: &cap_std::fs::Metadata) -> bool {
    found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0
}

fn private_directory() -> cap_std::fs::Permissions {
    cap_std::fs::PermissionsExt::from_mode(0o700)
}

fn empty(dir: &Dir) -> io::Result<()> {
    for entry in dir.entries()? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            entry.open_dir()?.remove_open_dir_all()?;
        } else {
            entry.remove_file()?;
        }
    }
    Ok(())
}

/// The key of a directory; created if there is none that only the owner can read.
fn key_in(dir: &Dir) -> io::Result<[u8; KEY_BYTES]> {
    if let Ok(key) = private_key(dir) {
        return Ok(key);
    }
    let mut key = [0; KEY_BYTES];
    rand::rng().fill_bytes(&mut key);
    let half = format!("{CACHE_KEY}.{}.{:?}.half", std::process::id(), std::thread::current().id());
    owner_only::exchange(dir, Path::new(CACHE_KEY), Path::new(&half), &key)?;
    // Another program may have written its key before or after.
    private_key(dir)
}

fn private_key(dir: &Dir) -> io::Result<[u8; KEY_BYTES]> {
    let unfit = || io::Error::from(io::ErrorKind::InvalidData);
    if dir.symlink_metadata(CACHE_KEY)?.is_symlink() {
        return Err(unfit());
    }
    let mut file = dir.open(CACHE_KEY)?;
    let found = file.metadata()?;
    // Another user could have made a link to a file whose content they know.
    if !is_own(&found) || found.mode() & 0o077 != 0 || found.nlink() != 1 {
        return Err(unfit());
    }
    let mut key = [0; KEY_BYTES];
    file.read_exact(&mut key)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_cache_keeps_what_was_compiled_last_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dim");
        let cache = Cache::open(&path).unwrap();
        cache.keep_within(0).unwrap();
        for (age, name) in ["new", "older", "oldest"].into_iter().enumerate() {
            let file = path.join(COMPILED).join(name);
            std::fs::write(&file, [0; 10]).unwrap();
            let at = SystemTime::now() - Duration::from_secs(60 * age as u64);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(at).unwrap();
        }
        let left = || std::fs::read_dir(path.join(COMPILED)).unwrap().count() - 1;
        cache.keep_within(30).unwrap();
        assert_eq!(left(), 3);
        cache.keep_within(29).unwrap();
        assert!(left() == 2 && !path.join(COMPILED).join("oldest").exists());
        set_mode(&path, 0o777);
        assert!(Cache::open(&path).unwrap_err().to_string().contains("other users may write"));
    }

    #[test]
    fn a_compiled_form_is_trusted_only_under_its_name_and_by_whoever_has_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COMPILED);
        let cache = Cache::open(dir.path()).unwrap();
        cache.keep("one", b"code of one").unwrap();
        cache.keep("two", b"code of two").unwrap();
        assert!(cache.trusted("one").is_some() && cache.trusted("three").is_none());
        assert!(Cache::open(dir.path()).unwrap().trusted("one").is_some(), "by the next host too");
        for ending in ["cwasm", "mac"] {
            std::fs::copy(path.join(format!("two.{ending}")), path.join(format!("one.{ending}"))).unwrap();
        }
        assert!(cache.trusted("one").is_none(), "the form of another component");
        std::fs::write(path.join("two.cwasm"), b"code of tww").unwrap();
        assert!(cache.trusted("two").is_none(), "one that was changed");
        let other = tempfile::tempdir().unwrap();
        let stranger = Cache::open(other.path()).unwrap();
        stranger.keep("one", b"code of a stranger").unwrap();
        for ending in ["cwasm", "mac"] {
            let from = other.path().join(COMPILED).join(format!("one.{ending}"));
            std::fs::copy(from, path.join(format!("one.{ending}"))).unwrap();
        }
        assert!(cache.trusted("one").is_none(), "one of another key");
    }

    #[test]
    fn compiled_forms_are_the_owners_alone_and_are_dropped_where_others_could_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COMPILED);
        let cache = Cache::open(dir.path()).unwrap();
        cache.keep("one", b"code").unwrap();
        assert_eq!(mode(&path), 0o700);
        for file in std::fs::read_dir(&path).unwrap() {
            assert_eq!(mode(&file.unwrap().path()), 0o600);
        }
        set_mode(&path.join("one.cwasm"), 0o666);
        assert!(cache.trusted("one").is_none());
        cache.keep("one", b"code").unwrap();
        let before = std::fs::read(path.join(CACHE_KEY)).unwrap();
        set_mode(&path, 0o777);
        let cache = Cache::open(dir.path()).unwrap();
        assert!(!cache.has("one") && mode(&path) == 0o700);
        assert_ne!(std::fs::read(path.join(CACHE_KEY)).unwrap(), before);
        set_mode(&path.join(CACHE_KEY), 0o644);
        cache.keep("one", b"code").unwrap();
        assert!(Cache::open(dir.path()).unwrap().trusted("one").is_none(), "others could read the key");
    }
}
