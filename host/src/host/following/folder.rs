//! Owns the folder from which plugins come: what appears there is installed, what changes replaces, and what
//! goes is unloaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt as _;

use super::{Look, offer, refuse};
use crate::change::{Change, State};
use crate::host::replacement::{Proposal, ReplaceError};
use crate::host::{Host, UNHURT};
use crate::ident::{Digest, PluginName};
use crate::plugin;
use crate::plugin::roster::{self, Row, Standing};
use crate::store::StoreError;

/// How often the folder is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// For how long a file must stay as it is, or away: one that is being written is not loaded early, and one that
/// is replaced by removing it first is not taken for gone.
const SETTLE: Duration = Duration::from_secs(1);

/// Who installs and unloads what the folder says.
const BY: &str = "the folder";

/// The folder.
#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<PathBuf, File>,
    /// Since when files of plugins are missing.
    missing: BTreeMap<PathBuf, Instant>,
    /// Which file each plugin comes from. Two files of one plugin would replace each other for ever.
    claims: Mutex<BTreeMap<PluginName, PathBuf>>,
}

/// What was seen of a file.
#[derive(Debug)]
struct File {
    state: Seen,
    since: Instant,
    /// Whether it was dealt with as it is.
    is_done: bool,
}

/// When a file was changed, and its size.
type Seen = (SystemTime, u64);

/// A file that holds a plugin.
struct Held {
    name: PluginName,
    component: Vec<u8>,
    digest: Digest,
}

impl Look for Folder {
    fn pause(&self, _: &Host) -> Duration {
        LOOK_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        let Some(folder) = host.config.plugins_dir.clone() else { return Ok(()) };
        let looked_into = folder.clone();
        let found = tokio::task::spawn_blocking(move || files_of(&looked_into)).await;
        let found = match found.expect("looking does not panic") {
            Ok(found) => found,
            // It may be mounted later; what runs goes on.
            Err(error) => {
                tracing::debug!("cannot look into the plugins' folder: {error}");
                return Ok(());
            }
        };
        self.remove_gone(host, &folder, &found).await?;
        let settled = self.settled(found);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let this = &*self;
        let mut taken_in = futures::stream::iter(settled)
            .map(|path| async move { (this.take_in(host, &path).await, path) })
            .buffer_unordered(cores);
        let mut done = Vec::new();
        while let Some((taken, path)) = taken_in.next().await {
            taken?;
            done.push(path);
        }
        drop(taken_in);
        for path in done {
            if let Some(file) = self.files.get_mut(&path) {
                file.is_done = true;
            }
        }
        Ok(())
    }
}

impl Folder {
    /// The files that have changed and are as they were a while ago.
    fn settled(&mut self, found: BTreeMap<PathBuf, Seen>) -> Vec<PathBuf> {
        self.files.retain(|path, _| found.contains_key(path));
        let mut settled = Vec::new();
        for (path, state) in found {
            match self.files.get(&path) {
                Some(file) if file.state == state => {
                    if !file.is_done && file.since.elapsed() >= SETTLE {
                        settled.push(path);
                    }
                }
                _ => {
                    self.files.insert(path, File { state, since: Instant::now(), is_done: false });
                }
            }
        }
        settled
    }

    /// Unloads the plugins whose file is gone, also if it went while no host ran.
    async fn remove_gone(
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
            let since = self.missing.get(&path).copied().unwrap_or_else(Instant::now);
            if since.elapsed() < SETTLE {
                missing.insert(path, since);
            } else if row.standing == Standing::Removed {
                forget(host, name).await?;
            } else {
                unload(host, name, &path).await?;
            }
        }
        self.missing = missing;
        *self.claims.get_mut().expect(UNHURT) = claims;
        Ok(())
    }

    /// Installs the plugin of a file.
    async fn take_in(&self, host: &Arc<Host>, path: &Path) -> Result<(), StoreError> {
        let Some(shown) = path.to_str().map(str::to_owned) else {
            tracing::warn!(file = %path.display(), "not installed: its name is not UTF-8");
            return Ok(());
        };
        let file = path.to_owned();
        let held = tokio::task::spawn_blocking(move || held(&file)).await;
        let held = held.unwrap_or_else(|error| Err(error.to_string()));
        let was = self.claimed_by(path);
        let Held { name, component, digest } = match held {
            Ok(held) => held,
            Err(why) => return self.refuse_file(host, path, was, why).await,
        };
        if let Some(other) = self.claim(&name, path) {
            let why = format!("{} holds {name} already", other.display());
            return self.refuse_file(host, path, Some(name), why).await;
        }
        for gone in was.into_iter().filter(|was| *was != name) {
            unload(host, gone, path).await?;
        }
        let (source, by) = (shown.clone(), BY.to_owned());
        let proposal =
            Proposal { plugin: name, component, source, by, follows: Some(shown), is_named: false };
        offer(host, None, proposal, digest).await
    }

    /// The plugin that comes from a file.
    fn claimed_by(&self, path: &Path) -> Option<PluginName> {
        let claims = self.claims.lock().expect(UNHURT);
        claims.iter().find(|(_, claimed)| *claimed == path).map(|(name, _)| name.clone())
    }

    /// Takes a plugin for a file; returns which other file has it.
    fn claim(&self, name: &PluginName, path: &Path) -> Option<PathBuf> {
        let mut claims = self.claims.lock().expect(UNHURT);
        let claimed = claims.entry(name.clone()).or_insert_with(|| path.to_owned());
        (claimed != path).then(|| claimed.clone())
    }

    /// Puts on record that a file is no plugin, as far as it can be told which one it would be.
    async fn refuse_file(
        &self,
        host: &Arc<Host>,
        path: &Path,
        plugin: Option<PluginName>,
        why: String,
    ) -> Result<(), StoreError> {
        let file = path.display().to_string();
        let named = || path.file_stem()?.to_str()?.parse().ok();
        let Some(plugin) = plugin.or_else(named) else {
            tracing::warn!(file, "not installed: {why}");
            return Ok(());
        };
        let change = Change::new(plugin, State::Judging, BY.to_owned(), file.clone());
        refuse(host, host.changes().begin(change), format!("{file}: {why}")).await
    }
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
    Ok(Held { name: inspection.manifest.name, component, digest: inspection.digest })
}

/// The components of a folder, each with when it was changed and its size.
fn files_of(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Seen>> {
    let mut found = BTreeMap::new();
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        // One that goes while it is looked at is seen next time.
        let Ok(known) = std::fs::metadata(&path) else { continue };
        if known.is_file() && path.extension().is_some_and(|kind| kind == "wasm") {
            found.insert(path, (known.modified()?, known.len()));
        }
    }
    Ok(found)
}
