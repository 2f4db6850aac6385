//! Owns the periodic checks of a running host: components from a folder or from IPNS names, names on hold that the
//! config decides, and component files that are no longer needed. It receives the host and installs what it finds.

mod folder;
mod ipns_names;
mod fetch;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use dim_model::ident::{Digest, PluginName};
use dim_store::change::{State, UnderWay};
use dim_store::{StoreError, change_history, components};
use dim_store::{checkpoint, plugin_registry};
use tokio::task::JoinHandle;

use super::replacement::{Proposal, ReplaceError};
use super::{Grant, Host};
use folder::Folder;
pub use folder::plugins_of;
use ipns_names::Names;

/// The number of recorded changes that are searched for an earlier failure of a component.
const LOOK_BACK: usize = 100;

/// The interval between two removals of component files that are no longer needed.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// A periodic check.
trait Look: Send {
    /// Returns the pause between two checks.
    fn pause(&self, host: &Host) -> Duration;

    /// Checks once and acts on the result.
    fn look(&mut self, host: &Arc<Host>) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// The check of the component files.
struct Files;

impl Look for Files {
    fn pause(&self, _: &Host) -> Duration {
        TIDY_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        host.tidy().await
    }
}

/// The interval between two checks for names on hold, if the config decides about them.
const ADOPT_EVERY: Duration = Duration::from_secs(2);

/// The check for names on hold since the start.
struct Held;

impl Look for Held {
    fn pause(&self, _: &Host) -> Duration {
        ADOPT_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        host.adopt_at_start().await
    }
}

/// Runs all checks until the host ends. The checks do not wait for each other.
pub async fn follow(host: Weak<Host>) {
    if let Some(host) = host.upgrade() {
        let ended = host.life.ended.clone();
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            taken_up = host.take_up_pending() => if let Err(error) = taken_up {
                tracing::error!("cannot install the pending components: {error}");
            },
        }
    }
    tokio::join!(
        keep_looking(&host, Folder::default()),
        keep_looking(&host, Names::default()),
        keep_looking(&host, Files),
        keep_looking(&host, Held),
    );
}

async fn keep_looking(host: &Weak<Host>, mut what: impl Look) {
    loop {
        let Some(host) = host.upgrade() else { return };
        let (ended, pause) = (host.life.ended.clone(), what.pause(&host));
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            looked = what.look(&host) => if let Err(error) = looked {
                tracing::error!("cannot follow the plugins' sources: {error}");
            },
        }
        let clock = host.storage.log.clock().clone();
        drop(host);
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            () = clock.sleep(pause) => {}
        }
    }
}

/// Installs a component from a followed source. It does nothing if the component runs already, was removed by the
/// operator, or has failed on this host: the source has not changed then. Returns true if the result is final, false
/// if the caller should try again.
async fn offer(
    host: &Arc<Host>,
    mut under_way: Option<UnderWay>,
    proposal: Proposal,
    digest: Digest,
) -> Result<bool, StoreError> {
    let (plugin, digest) = (proposal.plugin.clone(), digest.to_string());
    host.loaded(plugin.as_str()).await;
    let row = plugin_registry::known_row(&host.storage.store.snapshot()?, &plugin)?;
    let mut nothing_to_do = || {
        if let Some(under_way) = &mut under_way {
            under_way.reach(State::Unchanged);
        }
        Ok(true)
    };
    if let Some(row) = row.filter(|row| row.code.digest == digest) {
        let is_removed = row.standing == plugin_registry::Standing::Removed;
        if is_removed && row.follows == proposal.follows {
            tracing::info!(%plugin, source = proposal.source, "not installed: it was removed; install it by hand, or bring another version");
            return nothing_to_do();
        }
        if !is_removed && host.plugins.get(&plugin).is_some() {
            return nothing_to_do();
        }
    }
    if has_failed(host, &plugin, &digest)? {
        tracing::warn!(%plugin, source = proposal.source, digest, "not installed: it has failed here before; install it by hand to try again");
        return nothing_to_do();
    }
    let under_way = under_way.unwrap_or_else(|| host.propose(&proposal));
    match host.install_under_way(under_way, proposal, Grant::AsBefore).await {
        Ok(_) => Ok(true),
        Err(ReplaceError::Store(error)) => Err(error),
        // The refusal is recorded.
        Err(error) => Ok(error.is_lasting()),
    }
}

/// Records that a component from a followed source is not installed, with the reason.
async fn refuse(host: &Host, under_way: UnderWay, why: String) {
    let _ = host.conclude(under_way, Err(ReplaceError::Refused(why))).await;
}

/// A task about one plugin. The tasks of other plugins do not wait for it.
#[derive(Debug)]
struct Errand<T>(JoinHandle<Option<T>>);

impl<T: Send + 'static> Errand<T> {
    /// Runs `errand` until it ends or the host ends; an error is logged.
    fn run(host: &Arc<Host>, errand: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Self {
        let ended = host.life.ended.clone();
        Self(tokio::spawn(async move {
            tokio::select! {
                biased;
                () = ended.cancelled() => None,
                done = errand => match done {
                    Ok(done) => Some(done),
                    Err(error) => {
                        tracing::error!("cannot follow the plugins' sources: {error}");
                        None
                    }
                },
            }
        }))
    }

    fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    /// Returns the result of a finished task; `None` after an error.
    async fn outcome(self) -> Option<T> {
        self.0.await.ok().flatten()
    }
}

/// Returns whether the newest recorded change of a component is a failure.
fn has_failed(host: &Host, plugin: &PluginName, digest: &str) -> Result<bool, StoreError> {
    let changes = change_history::of(&host.storage.store.snapshot()?, plugin, LOOK_BACK)?;
    let last = changes.iter().find(|change| change.after.as_ref().is_some_and(|it| it.digest == digest));
    let failed = [State::TakenBack, State::RolledBack];
    Ok(last.is_some_and(|change| failed.contains(&change.state)))
}

impl Host {
    /// Removes the component files that no rollback and no pending component needs.
    pub(super) async fn tidy(self: &Arc<Self>) -> Result<(), StoreError> {
        let host = self.clone();
        let tidied = tokio::task::spawn_blocking(move || {
            let mut needed: BTreeSet<String> =
                host.plugins.all().values().map(|it| it.version().digest).collect();
            let snapshot = host.storage.store.snapshot()?;
            needed.extend(checkpoint::components(&snapshot)?);
            let rows = plugin_registry::rows(&snapshot)?.into_values();
            needed.extend(rows.filter_map(|row| Some(row.pending?.digest)));
            components::tidy(&host.storage.store, &needed);
            Ok(())
        });
        tidied.await.expect("tidying does not panic")
    }
}
