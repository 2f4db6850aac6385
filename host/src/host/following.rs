//! Owns the plugins that come from somewhere that changes: from files of the folder `plugins_dir`, and from
//! IPNS names. What appears there is installed, what changes replaces, and what goes is unloaded.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::replacement::{Proposal, ReplaceError, broke_down};
use super::{Grant, Host};
use crate::change::{Change, State, Step};
use crate::ident::{ContentPath, Digest, PluginName};
use crate::plugin::roster::{self, Standing};
use crate::plugin::{self, MAX_COMPONENT};
use crate::store::{StoreError, history};
use crate::time::Timestamp;

/// How often the folder is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// For how long a file must stay as it is: one that is being written is not loaded early.
const SETTLE: Duration = Duration::from_secs(1);

/// How long a name and what it points to may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Changes on record that are looked through for a component that has failed.
const LOOK_BACK: usize = 100;

/// How often files of components that no one needs are removed.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// The task that follows.
#[derive(Debug)]
pub struct Following {
    host: Weak<Host>,
    /// What was seen of each file of the folder.
    files: BTreeMap<PathBuf, File>,
    /// What each followed name pointed to.
    paths: BTreeMap<PluginName, ContentPath>,
    asked_at: Option<Instant>,
    tidied_at: Instant,
}

/// A file of the folder.
#[derive(Debug)]
struct File {
    modified: SystemTime,
    size: u64,
    since: Instant,
    /// Whether it was dealt with as it is.
    is_done: bool,
    /// The plugin that it is.
    plugin: Option<PluginName>,
}

impl Following {
    /// Follows what `host` has; it ends with the host.
    pub fn new(host: &Arc<Host>) -> Self {
        Self {
            host: Arc::downgrade(host),
            files: BTreeMap::new(),
            paths: BTreeMap::new(),
            asked_at: None,
            tidied_at: Instant::now(),
        }
    }

    /// Follows until the host ends.
    pub async fn run(mut self) {
        loop {
            let Some(ended) = self.host.upgrade().map(|host| host.ended.clone()) else { return };
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let Some(host) = self.host.upgrade() else { return };
            let look = async {
                self.look_at_folder(&host).await?;
                self.ask_for_names(&host).await?;
                self.tidy(&host).await
            };
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                looked = look => if let Err(error) = looked {
                    tracing::error!("cannot follow the plugins' sources: {error}");
                },
            }
        }
    }

    async fn look_at_folder(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        let Some(folder) = host.config.plugins_dir.clone() else { return Ok(()) };
        let found = tokio::task::spawn_blocking(move || files_of(&folder)).await;
        let found = match found.expect("looking does not panic") {
            Ok(found) => found,
            // It may be mounted later; what runs goes on.
            Err(error) => {
                tracing::debug!("cannot look into the plugins' folder: {error}");
                return Ok(());
            }
        };
        self.remove_gone(host, &found).await?;
        for (path, (modified, size)) in found {
            let seen = self.files.get(&path);
            if seen.is_none_or(|seen| (seen.modified, seen.size) != (modified, size)) {
                let plugin = self.files.remove(&path).and_then(|seen| seen.plugin);
                let file = File { modified, size, since: Instant::now(), is_done: false, plugin };
                self.files.insert(path, file);
                continue;
            }
            if seen.is_some_and(|seen| !seen.is_done && seen.since.elapsed() >= SETTLE) {
                let plugin = self.take_in(host, &path).await?;
                if let Some(seen) = self.files.get_mut(&path) {
                    seen.is_done = true;
                    seen.plugin = plugin.or(seen.plugin.take());
                }
            }
        }
        Ok(())
    }

    /// Unloads the plugins whose file is gone, also if it went while no host ran.
    async fn remove_gone(
        &mut self,
        host: &Arc<Host>,
        found: &BTreeMap<PathBuf, (SystemTime, u64)>,
    ) -> Result<(), StoreError> {
        self.files.retain(|path, _| found.contains_key(path));
        let Some(folder) = &host.config.plugins_dir else { return Ok(()) };
        for (name, row) in roster::rows(&host.store.snapshot()?)? {
            let Some(file) = row.follows.filter(|_| row.standing != Standing::Removed) else { continue };
            let path = PathBuf::from(&file);
            if path.starts_with(folder) && !found.contains_key(&path) {
                tracing::info!(plugin = %name, file, "its file is gone");
                if let Err(error) = host.remove(&name, false, "the folder").await {
                    tracing::warn!(plugin = %name, "not unloaded: {error}");
                }
            }
        }
        Ok(())
    }

    /// Installs a file of the folder; returns which plugin it is.
    async fn take_in(&self, host: &Arc<Host>, path: &Path) -> Result<Option<PluginName>, StoreError> {
        let (file, shown) = (path.to_owned(), path.display().to_string());
        let read = tokio::task::spawn_blocking(move || {
            let component = plugin::read(&file).map_err(|error| error.to_string())?;
            let inspection = plugin::inspect(&component).map_err(|error| crate::cause::chain(&error))?;
            Ok::<_, String>((component, inspection))
        });
        let (component, inspection) = match read.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(read) => read,
            Err(why) => {
                tracing::warn!(file = shown, "not installed: {why}");
                return Ok(None);
            }
        };
        let name = inspection.manifest.name;
        let other = self
            .files
            .iter()
            .find(|(other, file)| other.as_path() != path && file.plugin.as_ref() == Some(&name));
        if let Some((other, _)) = other {
            tracing::warn!(file = shown, "not installed: {} is plugin {name} already", other.display());
            return Ok(None);
        }
        let whence = Whence { follows: shown.clone(), source: shown, by: "the folder" };
        self.offer(host, name.clone(), component, inspection.digest, whence).await?;
        Ok(Some(name))
    }

    async fn ask_for_names(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        let every = host.config.follow_every();
        if self.asked_at.is_some_and(|at| at.elapsed() < every) {
            return Ok(());
        }
        self.asked_at = Some(Instant::now());
        for (name, row) in roster::rows(&host.store.snapshot()?)? {
            let Some(follows) = row.follows.filter(|_| row.standing != Standing::Removed) else { continue };
            let Ok(path) = follows.parse::<ContentPath>() else { continue };
            let Ok(target) = tokio::time::timeout(TIMEOUT, host.backend.end_of_chain(path)).await else {
                continue;
            };
            let target = match target {
                Ok(target) if self.paths.get(&name) != Some(&target) => target,
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(plugin = %name, follows, "not resolved: {error}");
                    continue;
                }
            };
            let (component, source) = match host.fetch(&target).await {
                Ok(component) => (component, format!("{target} by {follows}")),
                Err(error) => {
                    tracing::debug!(plugin = %name, follows, "not fetched: {error}");
                    continue;
                }
            };
            let digest = Digest::of(&component);
            let whence = Whence { follows: follows.clone(), source, by: "the name that it follows" };
            if !host.trusts(&follows) && row.code.digest != digest.to_string() {
                tracing::warn!(plugin = %name, follows, %digest, "not installed: the config does not trust the name (replacement.trusted)");
            } else {
                self.offer(host, name.clone(), component, digest, whence).await?;
            }
            self.paths.insert(name, target);
        }
        Ok(())
    }

    /// Installs a component, unless it runs, or has failed here before: what is followed has not changed then.
    async fn offer(
        &self,
        host: &Arc<Host>,
        plugin: PluginName,
        component: Vec<u8>,
        digest: Digest,
        whence: Whence,
    ) -> Result<(), StoreError> {
        let Whence { follows, source, by } = whence;
        host.loaded(plugin.as_str()).await;
        let digest = digest.to_string();
        let row = roster::known_row(&host.store.snapshot()?, &plugin)?;
        let runs = row.is_some_and(|row| row.standing != Standing::Removed && row.code.digest == digest);
        if runs && host.plugins.get(&plugin).is_some() {
            return Ok(());
        }
        if has_failed(host, &plugin, &digest)? {
            tracing::warn!(%plugin, source, digest, "not installed: it has failed here before; install it by hand to try again");
            return Ok(());
        }
        let by = by.to_owned();
        let proposal = Proposal {
            plugin,
            component,
            source,
            by,
            follows: Some(follows),
            fetching: None,
            is_named: false,
        };
        match host.install(proposal, Grant::AsBefore).await {
            // A refusal is on record.
            Ok(_) | Err(ReplaceError::Refused(_) | ReplaceError::DoesNotStart(_)) => Ok(()),
            Err(ReplaceError::Store(error)) => Err(error),
            Err(error) => {
                tracing::warn!("not installed: {}", crate::cause::chain(&error));
                Ok(())
            }
        }
    }

    async fn tidy(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        if self.tidied_at.elapsed() < TIDY_EVERY {
            return Ok(());
        }
        self.tidied_at = Instant::now();
        host.tidy().await
    }
}

/// Where a component came from, and who brought it.
struct Whence {
    follows: String,
    source: String,
    by: &'static str,
}

/// Whether the last that is on record of a component is that it failed.
fn has_failed(host: &Host, plugin: &PluginName, digest: &str) -> Result<bool, StoreError> {
    let changes = history::of(&host.store.snapshot()?, plugin, LOOK_BACK)?;
    let last = changes.iter().find(|change| change.after.as_ref().is_some_and(|it| it.digest == digest));
    let failed = [State::TakenBack, State::RolledBack];
    Ok(last.is_some_and(|change| failed.contains(&change.state)))
}

/// The components of a folder, each with when it was changed and its size.
fn files_of(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, (SystemTime, u64)>> {
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

impl Host {
    /// Whether the config trusts what comes from `source`, however it changes.
    pub fn trusts(&self, source: &str) -> bool {
        self.config.replacement.trusted.iter().any(|trusted| trusted == source)
    }

    /// Reads the component at a path.
    pub async fn fetch(&self, path: &ContentPath) -> Result<Vec<u8>, ReplaceError> {
        let fetched = tokio::time::timeout(TIMEOUT, async {
            let target = self.backend.end_of_chain(path.clone()).await?;
            self.backend.content.file(&target, MAX_COMPONENT).await
        });
        let unfetched = |why: String| ReplaceError::Refused(format!("cannot fetch {path}: {why}"));
        let fetched = fetched.await.map_err(|_| unfetched(format!("no answer within {TIMEOUT:?}")))?;
        let (_, component) = fetched.map_err(|error| unfetched(error.to_string()))?;
        Ok(component.into())
    }

    /// Fetches the component at a path and installs it. It must be what `trust` says, or the config trusts the
    /// path.
    pub async fn install_from(
        self: &Arc<Self>,
        from: ContentPath,
        trust: Option<Digest>,
        name: Option<PluginName>,
        grant: Grant,
        by: String,
    ) -> Result<Change, ReplaceError> {
        let fetching = Some(Step { state: State::Fetching, at: Timestamp::wall() });
        let component = self.fetch(&from).await?;
        let judged = tokio::task::spawn_blocking(move || {
            let digest = Digest::of(&component);
            (plugin::inspect(&component).map_err(|error| crate::cause::chain(&error)), digest, component)
        });
        let (inspection, digest, component) = judged.await.map_err(broke_down)?;
        let source = from.to_string();
        if trust != Some(digest) && !self.trusts(&source) {
            return Err(ReplaceError::Refused(match trust {
                Some(trust) => format!("{source} is {digest}, not {trust}"),
                None => format!(
                    "{source} is {digest}: install it with --trust {digest}, or name it in the config under replacement.trusted"
                ),
            }));
        }
        let inspection = inspection.map_err(|why| ReplaceError::Refused(format!("{source}: {why}")))?;
        let plugin = name.unwrap_or(inspection.manifest.name);
        let follows = from.ipns().is_some().then(|| source.clone());
        let proposal = Proposal { plugin, component, source, by, follows, fetching, is_named: false };
        self.install(proposal, grant).await
    }

    /// Removes the files of components that nothing goes back to.
    pub(super) async fn tidy(self: &Arc<Self>) -> Result<(), StoreError> {
        let host = self.clone();
        let tidied = tokio::task::spawn_blocking(move || {
            let mut needed: BTreeSet<String> =
                host.plugins.all().values().map(|it| it.version().digest).collect();
            needed.extend(crate::plugin::mark::components(&host.store.snapshot()?)?);
            crate::store::components::tidy(&host.store, &needed);
            Ok(())
        });
        tidied.await.expect("tidying does not panic")
    }
}
