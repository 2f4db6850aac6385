//! Owns what keeps looking while a host runs: whether plugins come from elsewhere than the config, and whether
//! files of components are still needed.

mod folder;
mod names;
mod source;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinHandle;

use super::replacement::{Proposal, ReplaceError};
use super::{Grant, Host};
use crate::change::{State, UnderWay};
use crate::ident::{Digest, PluginName};
use crate::plugin::{mark, roster};
use crate::store::{StoreError, components, history};

use folder::Folder;
pub use folder::plugins_of;
use names::Names;

/// Changes on record that are looked through for a component that has failed.
const LOOK_BACK: usize = 100;

/// How often files of components that no one needs are removed.
const TIDY_EVERY: Duration = Duration::from_secs(60);

/// Something that is looked at again and again.
trait Look: Send {
    /// How long it is left alone in between.
    fn pause(&self, host: &Host) -> Duration;

    /// Looks once, and does what is to be done.
    fn look(&mut self, host: &Arc<Host>) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// The files of components.
struct Files;

impl Look for Files {
    fn pause(&self, _: &Host) -> Duration {
        TIDY_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        host.tidy().await
    }
}

/// How often it is looked for names that are on hold, where the config says what becomes of them.
const ADOPT_EVERY: Duration = Duration::from_secs(2);

/// The names that are on hold since the host began.
struct Held;

impl Look for Held {
    fn pause(&self, _: &Host) -> Duration {
        ADOPT_EVERY
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        host.adopt_at_start().await
    }
}

/// Looks at everything until the host ends. No look waits for another.
pub async fn follow(host: Weak<Host>) {
    if let Some(host) = host.upgrade() {
        let ended = host.ended.clone();
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            taken_up = host.take_up_pending() => if let Err(error) = taken_up {
                tracing::error!("cannot look after the components that wait: {error}");
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
        let (ended, pause) = (host.ended.clone(), what.pause(&host));
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            looked = what.look(&host) => if let Err(error) = looked {
                tracing::error!("cannot follow the plugins' sources: {error}");
            },
        }
        drop(host);
        tokio::select! {
            biased;
            () = ended.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Installs a component of something that is followed, unless it runs, was removed by hand, or has failed here
/// before: what is followed has not changed then. Returns whether that is settled, or to be tried again.
async fn offer(
    host: &Arc<Host>,
    mut under_way: Option<UnderWay>,
    proposal: Proposal,
    digest: Digest,
) -> Result<bool, StoreError> {
    let (plugin, digest) = (proposal.plugin.clone(), digest.to_string());
    host.loaded(plugin.as_str()).await;
    let row = roster::known_row(&host.store.snapshot()?, &plugin)?;
    let mut nothing_to_do = || {
        if let Some(under_way) = &mut under_way {
            under_way.reach(State::Unchanged);
        }
        Ok(true)
    };
    if let Some(row) = row.filter(|row| row.code.digest == digest) {
        let is_removed = row.standing == roster::Standing::Removed;
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
        // It is on record.
        Err(error) => Ok(error.is_lasting()),
    }
}

/// Puts on record that something that is followed is not installed, and why.
async fn refuse(host: &Host, under_way: UnderWay, why: String) {
    let _ = host.conclude(under_way, Err(ReplaceError::Refused(why))).await;
}

/// A task of one plugin, for which no other waits.
#[derive(Debug)]
struct Errand<T>(JoinHandle<Option<T>>);

impl<T: Send + 'static> Errand<T> {
    /// Runs `errand` until it is done or the host ends; an error is told.
    fn run(host: &Arc<Host>, errand: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Self {
        let ended = host.ended.clone();
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

    /// What has come of one that is done; none if that was an error.
    async fn outcome(self) -> Option<T> {
        self.0.await.ok().flatten()
    }
}

/// Whether the last that is on record of a component is that it failed.
fn has_failed(host: &Host, plugin: &PluginName, digest: &str) -> Result<bool, StoreError> {
    let changes = history::of(&host.store.snapshot()?, plugin, LOOK_BACK)?;
    let last = changes.iter().find(|change| change.after.as_ref().is_some_and(|it| it.digest == digest));
    let failed = [State::TakenBack, State::RolledBack];
    Ok(last.is_some_and(|change| failed.contains(&change.state)))
}

impl Host {
    /// Removes the files of components that nothing goes back to.
    pub(super) async fn tidy(self: &Arc<Self>) -> Result<(), StoreError> {
        let host = self.clone();
        let tidied = tokio::task::spawn_blocking(move || {
            let mut needed: BTreeSet<String> =
                host.plugins.all().values().map(|it| it.version().digest).collect();
            let snapshot = host.store.snapshot()?;
            needed.extend(mark::components(&snapshot)?);
            let rows = roster::rows(&snapshot)?.into_values();
            needed.extend(rows.filter_map(|row| Some(row.pending?.digest)));
            components::tidy(&host.store, &needed);
            Ok(())
        });
        tidied.await.expect("tidying does not panic")
    }
}
