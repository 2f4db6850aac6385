//! Owns the folder from which plugins come: what appears there is installed, what changes replaces, and what
//! goes is unloaded. A folder that is empty, gone or cannot be read says nothing of its plugins: they go on, and
//! the operator is told.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::io::Errno;

use super::{Errand, Look, offer, refuse};
use crate::change::{Change, State};
use crate::host::replacement::{Proposal, ReplaceError};
use crate::host::{Host, UNHURT};
use crate::ident::{Digest, PluginName};
use crate::plugin;
use crate::plugin::roster::{self, Row, Standing};
use crate::store::StoreError;
use crate::time::Timestamp;
use crate::trouble::{Code, Trouble};

/// How often the folder is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// For how long a file must stay as it is, or away: one that is being written is not loaded early, and one that
/// is replaced by removing it first is not taken for gone.
const SETTLE: Duration = Duration::from_secs(1);

/// Who installs and unloads what the folder says.
const BY: &str = "the folder";

/// What is wrong with a folder that has no components.
const EMPTY: &str = "is empty";

/// For how long a file is left alone of which nothing can be made now: the disk may be short.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// The folder.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<PathBuf, File>,
    /// Files of plugins that are missing.
    missing: BTreeMap<PathBuf, Missing>,
    claims: Arc<Claims>,
}

/// What was seen of a file.
#[derive(Debug)]
struct File {
    state: Seen,
    /// When it is taken in, if it stays as it is.
    due: Instant,
    /// Whether it was dealt with as it is.
    is_settled: bool,
    /// It is being taken in, as it was then.
    taking_in: Option<(Seen, Errand<bool>)>,
}

/// A file that is missing.
#[derive(Debug)]
struct Missing {
    since: Instant,
    /// Its plugin is being unloaded.
    unloading: Option<Errand<()>>,
}

/// What tells that a file is another one: when it and its entry were changed, its size, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    modified: (i64, i64),
    changed: (i64, i64),
    size: u64,
    place: (u64, u64),
}

/// A file that holds a plugin.
struct Held {
    name: PluginName,
    component: Bytes,
    digest: Digest,
}

/// Which file each plugin comes from. Two files of one plugin would replace each other for ever.
#[derive(Debug, Default)]
struct Claims(Mutex<BTreeMap<PluginName, PathBuf>>);

impl Look for Folder {
    fn pause(&self, _: &Host) -> Duration {
        LOOK_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        let Some(folder) = host.config.now().plugins_dir.clone() else { return Ok(()) };
        let looked_into = folder.clone();
        let found = tokio::task::spawn_blocking(move || files_of(&looked_into)).await;
        let found = match found.expect("looking does not panic") {
            Ok(found) => found,
            // It may be mounted later; what runs goes on.
            Err(error) => return self.leave_alone(host, &folder, &format!("cannot be read: {error}")),
        };
        self.harvest().await;
        match found.is_empty() {
            true => self.leave_alone(host, &folder, EMPTY)?,
            false => tell(host, None),
        }
        if host.folder_trouble().is_none() {
            self.remove_gone(host, &folder, &found)?;
        }
        self.take_in_settled(host, found);
        if self.files.values().all(|file| file.is_settled) {
            // What is not installed by now is not for this host, or went meanwhile.
            host.loader.withdraw_all(|name| host.plugins.get(name).is_some());
        }
        Ok(())
    }
}

/// The plugins of a folder before anything was installed from it: each with its file and its component. What is no
/// plugin says so when it is taken in.
pub fn plugins_of(folder: &Path) -> Vec<(PluginName, PathBuf, Bytes)> {
    // One that cannot be read is told by its first look.
    let files = files_of(folder).unwrap_or_default().into_keys();
    files.filter_map(|file| held(&file).ok().map(|it| (it.name, file, it.component))).collect()
}

impl Folder {
    /// Tells what is wrong with a folder that says nothing of its plugins, and keeps these: an empty mount point is
    /// no order to unload them.
    fn leave_alone(&mut self, host: &Host, folder: &Path, why: &str) -> Result<(), StoreError> {
        let rows = roster::rows(&host.store.snapshot()?)?;
        let is_kept = |row: &Row| {
            let follows = row.follows.as_ref().is_some_and(|path| Path::new(path).starts_with(folder));
            follows && row.standing != Standing::Removed
        };
        let kept: Vec<_> =
            rows.iter().filter(|(_, row)| is_kept(row)).map(|(name, _)| name.as_str()).collect();
        let shown = folder.display();
        let trouble = match kept.is_empty() {
            false => Trouble::error(
                Code::PluginsFolder,
                format!(
                    "the folder of plugins {shown} {why}, and these plugins came from it and go on: {}; bring its files back, or remove a plugin with `dim plugin rm NAME`",
                    kept.join(", ")
                ),
            ),
            true if why == EMPTY => {
                tell(host, None);
                return Ok(());
            }
            true => Trouble::warning(Code::PluginsFolder, format!("the folder of plugins {shown} {why}")),
        };
        // What was missing before it is not missing any longer than that.
        self.missing.clear();
        tell(host, Some(trouble.about(shown)));
        Ok(())
    }

    /// Takes in what has come of errands.
    async fn harvest(&mut self) {
        for file in self.files.values_mut() {
            let Some((state, errand)) = file.taking_in.take_if(|(_, errand)| errand.is_done()) else {
                continue;
            };
            // It may be another one by now, which is due by itself.
            if file.state == state {
                file.is_settled = errand.outcome().await.unwrap_or(false);
                file.due = Instant::now() + TRY_AGAIN;
            }
        }
    }

    /// Takes in the files that have changed and are as they were a while ago.
    fn take_in_settled(&mut self, host: &Arc<Host>, found: BTreeMap<PathBuf, Seen>) {
        self.files.retain(|path, file| found.contains_key(path) || file.taking_in.is_some());
        for (path, state) in found {
            let due = Instant::now() + SETTLE;
            let new = || File { state, due, is_settled: false, taking_in: None };
            let file = self.files.entry(path.clone()).or_insert_with(new);
            if file.state != state {
                (file.state, file.due, file.is_settled) = (state, due, false);
            }
            if !file.is_settled && file.taking_in.is_none() && file.due <= Instant::now() {
                let (this, claims) = (host.clone(), self.claims.clone());
                let errand = Errand::run(host, async move { claims.take_in(&this, &path).await });
                file.taking_in = Some((state, errand));
            }
        }
    }

    /// Unloads the plugins whose file is gone, also if it went while no host ran.
    fn remove_gone(
        &mut self,
        host: &Arc<Host>,
        folder: &Path,
        found: &BTreeMap<PathBuf, Seen>,
    ) -> Result<(), StoreError> {
        let mut claims = BTreeMap::new();
        let mut missing = BTreeMap::new();
        for (name, row) in roster::rows(&host.store.snapshot()?)? {
            let Some(path) = row.follows.map(PathBuf::from).filter(|path| path.starts_with(folder)) else {
                continue;
            };
            if found.contains_key(&path) {
                claims.insert(name, path);
                continue;
            }
            let before = self.missing.remove(&path);
            let mut gone = before.unwrap_or(Missing { since: Instant::now(), unloading: None });
            gone.unloading.take_if(|errand| errand.is_done());
            if gone.since.elapsed() >= SETTLE && gone.unloading.is_none() {
                let (this, file, is_removed) =
                    (host.clone(), path.clone(), row.standing == Standing::Removed);
                gone.unloading = Some(Errand::run(host, async move {
                    if is_removed { forget(&this, name).await } else { unload(&this, name, &file).await }
                }));
            }
            missing.insert(path, gone);
        }
        self.missing = missing;
        // Those that are being taken in stand in no row yet.
        let taken_in = |path: &PathBuf| self.files.get(path).is_some_and(|file| file.taking_in.is_some());
        let mut claimed = self.claims.0.lock().expect(UNHURT);
        claimed.retain(|_, path| taken_in(path));
        for (name, path) in claims {
            claimed.entry(name).or_insert(path);
        }
        Ok(())
    }
}

impl Claims {
    /// Installs the plugin of a file; returns whether that is settled, or to be tried again.
    async fn take_in(&self, host: &Arc<Host>, path: &Path) -> Result<bool, StoreError> {
        let Some(shown) = path.to_str().map(str::to_owned) else {
            tracing::warn!(file = %path.display(), "not installed: its name is not UTF-8");
            return Ok(true);
        };
        let file = path.to_owned();
        let held = tokio::task::spawn_blocking(move || held(&file)).await;
        let held = held.unwrap_or_else(|error| Err(error.to_string()));
        let was = self.claimed_by(path);
        let Held { name, component, digest } = match held {
            Ok(held) => held,
            Err(why) => {
                refuse_file(host, path, was, why).await;
                return Ok(true);
            }
        };
        if let Some(other) = self.claim(&name, path) {
            let why = format!("{} holds {name} already", other.display());
            refuse_file(host, path, Some(name), why).await;
            return Ok(true);
        }
        for gone in was.into_iter().filter(|was| *was != name) {
            unload(host, gone, path).await?;
        }
        let (source, by) = (shown.clone(), BY.to_owned());
        let proposal = Proposal {
            plugin: name,
            component,
            source,
            by,
            follows: Some(shown),
            is_named: false,
            trust: None,
        };
        offer(host, None, proposal, digest).await
    }

    /// The plugin that comes from a file.
    fn claimed_by(&self, path: &Path) -> Option<PluginName> {
        let claims = self.0.lock().expect(UNHURT);
        claims.iter().find(|(_, claimed)| *claimed == path).map(|(name, _)| name.clone())
    }

    /// Takes a plugin for a file; returns which other file has it.
    fn claim(&self, name: &PluginName, path: &Path) -> Option<PathBuf> {
        let mut claims = self.0.lock().expect(UNHURT);
        let claimed = claims.entry(name.clone()).or_insert_with(|| path.to_owned());
        (claimed != path).then(|| claimed.clone())
    }
}

/// Sets what is wrong with the folder; what was wrong before keeps its time.
fn tell(host: &Host, trouble: Option<Trouble>) {
    let mut told = host.folder_trouble.lock().expect(UNHURT);
    let Some(trouble) = trouble else {
        *told = None;
        return;
    };
    let before = told.take();
    if before.as_ref().is_none_or(|before| before.message != trouble.message) {
        tracing::warn!("{}", trouble.message);
    }
    *told = Some(trouble.since(before.and_then(|before| before.since).unwrap_or_else(Timestamp::wall)));
}

/// Puts on record that a file is no plugin, as far as it can be told which one it would be.
async fn refuse_file(host: &Arc<Host>, path: &Path, plugin: Option<PluginName>, why: String) {
    let file = path.display().to_string();
    let named = || path.file_stem()?.to_str()?.parse().ok();
    let Some(plugin) = plugin.or_else(named) else {
        tracing::warn!(file, "not installed: {why}");
        return;
    };
    let change = Change::new(plugin, State::Judging, BY.to_owned(), file.clone());
    refuse(host, host.changes().begin(change), format!("{file}: {why}")).await;
}

/// Unloads a plugin whose file is gone, or holds another one.
async fn unload(host: &Arc<Host>, name: PluginName, file: &Path) -> Result<(), StoreError> {
    tracing::info!(plugin = %name, file = %file.display(), "its file is gone");
    match host.remove(&name, false, BY).await {
        Ok(_) | Err(ReplaceError::NoPlugin(_)) => forget(host, name).await,
        Err(ReplaceError::Store(error)) => Err(error),
        Err(error) => {
            tracing::warn!(plugin = %name, "not unloaded: {error}");
            Ok(())
        }
    }
}

/// Forgets which file a plugin came from that is not there any more: when that comes back it is installed.
async fn forget(host: &Arc<Host>, name: PluginName) -> Result<(), StoreError> {
    let forgotten = host.commit.write(move |write| {
        let row = roster::row_within(write, &name)?;
        roster::put_within(write, &name, &Row { follows: None, ..row })
    });
    match forgotten.await {
        Err(crate::commit::CommitError::Store(error)) => Err(error),
        // The host ends, or has no room: it is done next time.
        _ => Ok(()),
    }
}

fn held(file: &Path) -> Result<Held, String> {
    let component = plugin::read(file).map_err(|error| error.to_string())?;
    let inspection = plugin::inspect(&component).map_err(|error| crate::cause::chain(&error))?;
    Ok(Held { name: inspection.manifest.name, component: component.into(), digest: inspection.digest })
}

/// The components of a folder. Hidden files are none: programs write them on the way to another name.
fn files_of(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Seen>> {
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if is_hidden || path.extension().is_none_or(|kind| kind != "wasm") {
            continue;
        }
        let known = match std::fs::metadata(&path) {
            Ok(known) => known,
            // One that goes while it is looked at is seen next time.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            // It leads nowhere, and holds up no other file.
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => continue,
            // It is there, and not gone.
            Err(error) => {
                return Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())));
            }
        };
        if known.is_file() {
            let state = Seen {
                modified: (known.mtime(), known.mtime_nsec()),
                changed: (known.ctime(), known.ctime_nsec()),
                size: known.len(),
                place: (known.dev(), known.ino()),
            };
            found.insert(path, state);
        }
    }
    Ok(found)
}
