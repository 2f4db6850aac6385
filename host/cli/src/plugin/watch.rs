//! Owns the detection of changes in a plugin's source. Receives paths; returns whether the content of a file has
//! changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use dim_model::ident::Digest;

use crate::output::note;

/// Interval between two scans of the source.
pub const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Directories with build output or dependencies instead of source.
const NO_SOURCE: [&str; 5] = ["target", "node_modules", "__pycache__", "dist", "build"];

/// Files, each with its modification time and the digest of its content.
type Files = BTreeMap<PathBuf, (SystemTime, Digest)>;

/// The source of a plugin, which is scanned repeatedly.
#[derive(Debug)]
pub struct Source {
    paths: Vec<PathBuf>,
    seen: Files,
}

impl Source {
    /// The files at or below these paths.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, seen: Files::new() }
    }

    /// Scans the source. Returns whether it has changed since the last scan; the first scan counts as a change. Fails
    /// if the first scan finds no file.
    pub fn has_changed(&mut self) -> anyhow::Result<bool> {
        let mut found = Files::new();
        for path in &self.paths {
            let looked = if path.is_dir() { look(path, &self.seen) } else { look_at(path, &self.seen) };
            match looked {
                // A file that is being replaced exists again at the next scan.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !self.seen.is_empty() => {}
                looked => found.extend(looked.with_context(|| format!("cannot read {}", path.display()))?),
            }
        }
        if found.is_empty() && self.seen.is_empty() {
            let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
            bail!("there are no source files in {}", paths.join(", "));
        }
        let is_same = is_same(&self.seen, &found);
        self.seen = found;
        Ok(!is_same)
    }

    /// Calls `does` immediately, and again after each change. Returns only on an error of the scan.
    pub fn watch(paths: &[PathBuf], mut does: impl FnMut()) -> anyhow::Result<()> {
        let mut source = Self::new(paths.to_vec());
        loop {
            if source.has_changed()? {
                does();
                note("waiting for a change; stop with Ctrl-C");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Whether two scans have found the same content. A build that writes a file with its old content is no change.
fn is_same(before: &Files, after: &Files) -> bool {
    let mut pairs = before.iter().zip(after);
    before.len() == after.len() && pairs.all(|((one, (_, was)), (other, (_, is)))| one == other && was == is)
}

/// The source files below a directory, each with the digest of its content.
pub fn files_in(dir: &Path) -> std::io::Result<BTreeMap<PathBuf, Digest>> {
    Ok(look(dir, &Files::new())?.into_iter().map(|(path, (_, digest))| (path, digest)).collect())
}

/// Scans one file.
fn look_at(file: &Path, before: &Files) -> std::io::Result<Files> {
    let modified = std::fs::metadata(file)?.modified()?;
    let digest = match before.get(file) {
        Some((at, digest)) if *at == modified => *digest,
        _ => Digest::of(&std::fs::read(file)?),
    };
    Ok([(file.to_owned(), (modified, digest))].into())
}

/// Scans the files below a directory. `before` is the last scan: a file with an unchanged modification time is not
/// read.
fn look(dir: &Path, before: &Files) -> std::io::Result<Files> {
    let mut found = Files::new();
    for file in std::fs::read_dir(dir)? {
        let path = file?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with('.')
            || NO_SOURCE.contains(&name)
            || name.ends_with(".wasm")
            || name == "Cargo.lock"
        {
            continue;
        }
        // The file was removed during the scan. The next scan sees that.
        let Ok(known) = std::fs::metadata(&path) else { continue };
        if known.is_dir() {
            found.extend(look(&path, before)?);
            continue;
        }
        let modified = known.modified()?;
        let digest = match before.get(&path) {
            Some((at, digest)) if *at == modified => *digest,
            _ => match std::fs::read(&path) {
                Ok(contents) => Digest::of(&contents),
                Err(_) => continue,
            },
        };
        found.insert(path, (modified, digest));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_written_as_it_was_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("main.py");
        let look = |before: &Files| look(dir.path(), before).unwrap();
        std::fs::write(&file, "one").unwrap();
        std::fs::write(dir.path().join("made.wasm"), "no source").unwrap();
        let first = look(&Files::new());
        assert_eq!(first.keys().collect::<Vec<_>>(), [&file]);
        let write = |text: &str| {
            std::fs::write(&file, text).unwrap();
            let later = SystemTime::now() + Duration::from_secs(1);
            std::fs::File::open(&file).unwrap().set_modified(later).unwrap();
        };
        write("one");
        let second = look(&first);
        assert!(is_same(&first, &second));
        write("two");
        assert!(!is_same(&second, &look(&first)));
    }
}
