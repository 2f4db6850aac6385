//! Owns the plugins that follow IPNS names. It resolves each name at intervals, fetches the component when the name
//! moves, and offers it for installation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dim_model::ident::{ContentPath, PluginName};
use dim_store::StoreError;
use dim_store::change::{Change, State};
use dim_store::plugin_registry::{self, Standing};

use super::fetch::TIMEOUT;
use super::{Errand, Look, offer, refuse};
use crate::host::Host;
use crate::host::assessment::look_at;
use crate::host::replacement::Proposal;

/// The author of installations from a followed name.
const BY: &str = "the name that it follows";

/// The followed names of plugins.
#[derive(Debug, Default)]
pub struct Names {
    known: BTreeMap<PluginName, Known>,
    asking: BTreeMap<PluginName, Errand<Known>>,
}

/// The known state of a plugin's name.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The last target with a final result.
    settled: Option<ContentPath>,
    /// The last target that could not be fetched. The failure is reported once.
    unfetched: Option<ContentPath>,
}

impl Look for Names {
    fn pause(&self, host: &Host) -> Duration {
        host.network.now().follow_every
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        for (name, errand) in std::mem::take(&mut self.asking) {
            if !errand.is_done() {
                self.asking.insert(name, errand);
            } else if let Some(known) = errand.outcome().await {
                self.known.insert(name, known);
            }
        }
        for (name, row) in plugin_registry::rows(&host.storage.store.snapshot()?)? {
            let path = row.follows.as_deref().and_then(|follows| follows.parse::<ContentPath>().ok());
            let Some(path) = path.filter(|_| row.standing != Standing::Removed) else { continue };
            if self.asking.contains_key(&name) {
                continue;
            }
            let known = self.known.get(&name).cloned().unwrap_or_default();
            let (this, whose) = (host.clone(), name.clone());
            let errand = Errand::run(host, async move { ask(&this, whose, path, known).await });
            self.asking.insert(name, errand);
        }
        Ok(())
    }
}

/// Resolves a plugin's name and offers the component there, unless the target has a final result already. Returns the
/// new state of the name.
async fn ask(
    host: &Arc<Host>,
    plugin: PluginName,
    path: ContentPath,
    known: Known,
) -> Result<Known, StoreError> {
    let follows = path.to_string();
    let target = match tokio::time::timeout(TIMEOUT, host.exchange.links.backend.end_of_chain(path)).await {
        Ok(Ok(target)) => target,
        Ok(Err(error)) => {
            tracing::debug!(%plugin, follows, "not resolved: {error}");
            return Ok(known);
        }
        Err(_) => {
            tracing::debug!(%plugin, follows, "not resolved within {TIMEOUT:?}");
            return Ok(known);
        }
    };
    if known.settled.as_ref() == Some(&target) {
        return Ok(known);
    }
    let source = format!("{target} by {follows}");
    let begin = || {
        let change = Change::new(plugin.clone(), State::Fetching, BY.to_owned(), source.clone());
        host.changes().begin(change)
    };
    // A repeated attempt to fetch is silent.
    let under_way = (known.unfetched.as_ref() != Some(&target)).then(begin);
    let component = match host.fetch(&target).await {
        Ok(component) => component,
        Err(error) => {
            if let Some(under_way) = under_way {
                refuse(host, under_way, format!("{error}; it is tried again")).await;
            }
            return Ok(Known { unfetched: Some(target), ..known });
        }
    };
    let under_way = under_way.unwrap_or_else(begin);
    let settled = Known { settled: Some(target), unfetched: None };
    let (digest, comes) = match look_at(component.clone()).await {
        Ok(looked_at) => looked_at,
        Err(error) => {
            refuse(host, under_way, error.to_string()).await;
            return Ok(settled);
        }
    };
    // The signer may have signed other plugins: none of them replaces this one automatically.
    if let (Ok(comes), Some(runs)) = (comes, host.names_itself(&plugin).await?)
        && comes != runs
    {
        let why = format!("it is {comes}, and {runs} runs here: install it by hand if that is meant");
        refuse(host, under_way, why).await;
        return Ok(settled);
    }
    let (by, trust) = (BY.to_owned(), host.trusts(&follows).then_some(digest));
    let proposal = Proposal { plugin, component, source, by, follows: Some(follows), is_named: false, trust };
    let is_settled = offer(host, Some(under_way), proposal, digest).await?;
    Ok(if is_settled { settled } else { known })
}

impl Host {
    /// Returns the name in the manifest of a plugin's code, also if the plugin is not loaded; `None` if the code
    /// cannot be read.
    async fn names_itself(&self, plugin: &PluginName) -> Result<Option<PluginName>, StoreError> {
        if let Some(loaded) = self.plugins.get(plugin) {
            return Ok(Some(loaded.handle.code().prepared.inspection.manifest.name.clone()));
        }
        let Some(row) = plugin_registry::known_row(&self.storage.store.snapshot()?, plugin)? else {
            return Ok(None);
        };
        Ok(self.inspect_kept(&row.code.digest).await.ok().map(|it| it.manifest.name))
    }
}
