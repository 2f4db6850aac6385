//! Owns the folder of plugins. It lists the folder at intervals, installs new files, replaces changed ones, and
//! unloads plugins whose files are gone. If the folder is empty, missing or unreadable, its plugins continue and the
//! operator gets a health finding.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dim_model::error_chain::chain;
use dim_model::health::{Code, HealthFinding};
use dim_model::ident::{Digest, PluginName};
use dim_model::time::Timestamp;
use dim_store::StoreError;
use dim_store::change::{Change, State};
use dim_store::plugin_registry::{self, Row, Standing};
use rustix::io::Errno;

use super::{Errand, Look, offer, refuse};
use crate::host::assessment::InspectionError;
use crate::host::replacement::{Proposal, ReplaceError};
use crate::host::{Host, UNHURT};

/// The interval between two listings of the folder.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The time for which a file must stay unchanged, or missing. A file that is being written is not loaded too early,
/// and a file that is removed and written again does not count as gone.
const SETTLE: Duration = Duration::from_secs(1);

/// The author of installations and removals by the folder.
const BY: &str = "the folder";

/// The problem of a folder without components.
const EMPTY: &str = "is empty";

/// The time before a file is tried again that could not be installed, for example because the disk is full.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// The state of the folder.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<PathBuf, File>,
    /// The files of plugins that are missing.
    missing: BTreeMap<PathBuf, Missing>,
    claims: Arc<Claims>,
}

/// The known state of a file.
#[derive(Debug)]
struct File {
    state: Seen,
    /// The time at which it is installed, if it stays unchanged.
    due: Instant,
    /// Whether this version of the file has a final result.
    is_settled: bool,
    /// The running installation, with the version of the file.
    taking_in: Option<(Seen, Errand<bool>)>,
}

/// A file that is missing.
#[derive(Debug)]
struct Missing {
    since: Instant,
    /// The running removal of its plugin.
    unloading: Option<Errand<()>>,
}

/// The version of a file: the times of its last change and of its inode's, its size, and its device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    modified: (i64, i64),
    changed: (i64, i64),
    size: u64,
    place: (u64, u64),
}

/// A component that was read from a file.
struct Held {
    name: PluginName,
    component: Bytes,
    digest: Digest,
}

/// The file of each plugin. Two files with the same plugin would otherwise replace each other endlessly.
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
            // The folder may be mounted later; running plugins continue.
            Err(error) => return self.leave_alone(host, &folder, &format!("cannot be read: {error}")),
        };
        self.harvest(host.storage.log.clock().monotonic()).await;
        match found.is_empty() {
            true => self.leave_alone(host, &folder, EMPTY)?,
            false => tell(host, None),
        }
        if host.folder_trouble().is_none() {
            self.remove_gone(host, &folder, &found)?;
        }
        self.take_in_settled(host, found);
        if self.files.values().all(|file| file.is_settled) {
            // An announced plugin that is not installed by now was refused or removed.
            host.deployment.loader.withdraw_all(|name| host.plugins.get(name).is_some());
        }
        Ok(())
    }
}

/// Returns the plugins of a folder before any is installed, each with its file and its component. Files without a
/// plugin are skipped; their installation reports them.
pub fn plugins_of(folder: &Path) -> Vec<(PluginName, PathBuf, Bytes)> {
    // The first listing reports a folder that cannot be read.
    let files = files_of(folder).unwrap_or_default().into_keys();
    files.filter_map(|file| held(&file).ok().map(|it| (it.name, file, it.component))).collect()
}

impl Folder {
    /// Reports an unusable folder and keeps its plugins: an empty mount point is no order to unload them.
    fn leave_alone(&mut self, host: &Host, folder: &Path, why: &str) -> Result<(), StoreError> {
        let rows = plugin_registry::rows(&host.storage.store.snapshot()?)?;
        let is_kept = |row: &Row| {
            let follows = row.follows.as_ref().is_some_and(|path| Path::new(path).starts_with(folder));
            follows && row.standing != Standing::Removed
        };
        let kept: Vec<_> =
            rows.iter().filter(|(_, row)| is_kept(row)).map(|(name, _)| name.as_str()).collect();
        let shown = folder.display();
        let trouble = match kept.is_empty() {
            false => HealthFinding::error(
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
            true => {
                HealthFinding::warning(Code::PluginsFolder, format!("the folder of plugins {shown} {why}"))
            }
        };
        // The time without the folder does not count as missing.
        self.missing.clear();
        tell(host, Some(trouble.about(shown)));
        Ok(())
    }

    /// Collects the results of finished tasks.
    async fn harvest(&mut self, now: Instant) {
        for file in self.files.values_mut() {
            let Some((state, errand)) = file.taking_in.take_if(|(_, errand)| errand.is_done()) else {
                continue;
            };
            // A changed file is due again by itself.
            if file.state == state {
                file.is_settled = errand.outcome().await.unwrap_or(false);
                file.due = now + TRY_AGAIN;
            }
        }
    }

    /// Starts the installation of files that changed and then stayed unchanged.
    fn take_in_settled(&mut self, host: &Arc<Host>, found: BTreeMap<PathBuf, Seen>) {
        self.files.retain(|path, file| found.contains_key(path) || file.taking_in.is_some());
        let now = host.storage.log.clock().monotonic();
        for (path, state) in found {
            let due = now + SETTLE;
            let new = || File { state, due, is_settled: false, taking_in: None };
            let file = self.files.entry(path.clone()).or_insert_with(new);
            if file.state != state {
                (file.state, file.due, file.is_settled) = (state, due, false);
            }
            if !file.is_settled && file.taking_in.is_none() && file.due <= now {
                let (this, claims) = (host.clone(), self.claims.clone());
                let errand = Errand::run(host, async move { claims.take_in(&this, &path).await });
                file.taking_in = Some((state, errand));
            }
        }
    }

    /// Unloads the plugins whose files are gone, including those that went while no host ran.
    fn remove_gone(
        &mut self,
        host: &Arc<Host>,
        folder: &Path,
        found: &BTreeMap<PathBuf, Seen>,
    ) -> Result<(), StoreError> {
        let mut claims = BTreeMap::new();
        let mut missing = BTreeMap::new();
        let now = host.storage.log.clock().monotonic();
        for (name, row) in plugin_registry::rows(&host.storage.store.snapshot()?)? {
            let Some(path) = row.follows.map(PathBuf::from).filter(|path| path.starts_with(folder)) else {
                continue;
            };
            if found.contains_key(&path) {
                claims.insert(name, path);
                continue;
            }
            let before = self.missing.remove(&path);
            let mut gone = before.unwrap_or(Missing { since: now, unloading: None });
            gone.unloading.take_if(|errand| errand.is_done());
            if now.saturating_duration_since(gone.since) >= SETTLE && gone.unloading.is_none() {
                let (this, file, is_removed) =
                    (host.clone(), path.clone(), row.standing == Standing::Removed);
                gone.unloading = Some(Errand::run(host, async move {
                    if is_removed { forget(&this, name).await } else { unload(&this, name, &file).await }
                }));
            }
            missing.insert(path, gone);
        }
        self.missing = missing;
        // Plugins that are being installed have no row yet.
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
    /// Installs the plugin of a file. Returns true if the result is final, false if the caller should try again.
    async fn take_in(&self, host: &Arc<Host>, path: &Path) -> Result<bool, StoreError> {
        let Some(shown) = path.to_str().map(str::to_owned) else {
            tracing::warn!(file = %path.display(), "not installed: its name is not UTF-8");
            return Ok(true);
        };
        let file = path.to_owned();
        let held = tokio::task::spawn_blocking(move || held(&file)).await;
        let held =
            held.map_err(|error| error.to_string()).and_then(|held| held.map_err(|error| chain(&error)));
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

    /// Returns the plugin that comes from a file.
    fn claimed_by(&self, path: &Path) -> Option<PluginName> {
        let claims = self.0.lock().expect(UNHURT);
        claims.iter().find(|(_, claimed)| *claimed == path).map(|(name, _)| name.clone())
    }

    /// Assigns a plugin to a file. Returns the other file if the plugin has one already.
    fn claim(&self, name: &PluginName, path: &Path) -> Option<PathBuf> {
        let mut claims = self.0.lock().expect(UNHURT);
        let claimed = claims.entry(name.clone()).or_insert_with(|| path.to_owned());
        (claimed != path).then(|| claimed.clone())
    }
}

/// Sets the health finding about the folder. A repeated finding keeps its start time.
fn tell(host: &Host, trouble: Option<HealthFinding>) {
    let mut told = host.deployment.folder_trouble.lock().expect(UNHURT);
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

/// Records that a file is not installed, if the plugin is known or follows from the file name.
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

/// Unloads a plugin whose file is gone or contains another plugin.
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

/// Forgets the file of a plugin, so that the plugin is installed again when the file comes back.
async fn forget(host: &Arc<Host>, name: PluginName) -> Result<(), StoreError> {
    let forgotten = host.storage.commit.write(move |write| {
        let row = plugin_registry::row_within(write, &name)?;
        plugin_registry::put_within(write, &name, &Row { follows: None, ..row })
    });
    match forgotten.await {
        Err(dim_store::commit::CommitError::Store(error)) => Err(error),
        // The host ends or the disk is full: the next check tries again.
        _ => Ok(()),
    }
}

fn held(file: &Path) -> Result<Held, InspectionError> {
    let component = dim_runtime::read(file)?;
    let inspection = dim_runtime::inspect(&component)?;
    Ok(Held { name: inspection.manifest.name, component: component.into(), digest: inspection.digest })
}

/// Lists the components of a folder. Hidden files are skipped, because programs write them before they rename them.
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
            // The file was removed during the listing.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            // A symlink loop must not block the other files.
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => continue,
            // The file exists, so its plugin must not be unloaded.
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
