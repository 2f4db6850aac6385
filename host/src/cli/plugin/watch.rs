//! Owns the look at a plugin's source: whether there is a change to build.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};

use super::super::output::note;
use crate::ident::Digest;

/// How often the source is looked at.
pub const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Directories that a build writes into, or that are no source.
const NO_SOURCE: [&str; 5] = ["target", "node_modules", "__pycache__", "dist", "build"];

/// Files, each with when it was written and what it holds.
type Files = BTreeMap<PathBuf, (SystemTime, Digest)>;

/// A source that is looked at over and over.
#[derive(Debug)]
pub struct Source {
    paths: Vec<PathBuf>,
    seen: Files,
}

impl Source {
    /// The files that lie at, or below, these paths.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, seen: Files::new() }
    }

    /// Whether there is something else than at the last look; at the first there is.
    pub fn has_changed(&mut self) -> anyhow::Result<bool> {
        let mut found = Files::new();
        for path in &self.paths {
            let looked = if path.is_dir() { look(path, &self.seen) } else { look_at(path, &self.seen) };
            match looked {
                // One that is being replaced is there at the next look.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !self.seen.is_empty() => {}
                looked => {
                    found.extend(looked.with_context(|| format!("cannot look into {}", path.display()))?)
                }
            }
        }
        if found.is_empty() && self.seen.is_empty() {
            let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
            bail!("there is nothing in {}", paths.join(", "));
        }
        let is_same = is_same(&self.seen, &found);
        self.seen = found;
        Ok(!is_same)
    }

    /// Does something at once, and again after each change, for ever.
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

/// Whether two looks have found the same: a build that writes what was there already changes nothing.
fn is_same(before: &Files, after: &Files) -> bool {
    let mut pairs = before.iter().zip(after);
    before.len() == after.len() && pairs.all(|((one, (_, was)), (other, (_, is)))| one == other && was == is)
}

/// The source files below a directory, each with the digest of what it holds.
pub fn files_in(dir: &Path) -> std::io::Result<BTreeMap<PathBuf, Digest>> {
    Ok(look(dir, &Files::new())?.into_iter().map(|(path, (_, digest))| (path, digest)).collect())
}

/// One file.
fn look_at(file: &Path, before: &Files) -> std::io::Result<Files> {
    let modified = std::fs::metadata(file)?.modified()?;
    let digest = match before.get(file) {
        Some((at, digest)) if *at == modified => *digest,
        _ => Digest::of(&std::fs::read(file)?),
    };
    Ok([(file.to_owned(), (modified, digest))].into())
}

/// The files below a directory; `before` is what was found last.
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
        // One that goes while it is looked at is seen next time.
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
