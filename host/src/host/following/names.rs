//! Owns the IPNS names from which plugins come: when one moves, what it points to is fetched and offered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;

use super::source::TIMEOUT;
use super::{Look, offer, refuse};
use crate::change::{Change, State};
use crate::host::Host;
use crate::host::replacement::{Proposal, broke_down};
use crate::ident::{ContentPath, Digest, PluginName};
use crate::plugin::roster::{self, Row, Standing};
use crate::store::StoreError;

/// Names that are asked for at a time.
const AT_ONCE: usize = 16;

/// Who installs what a name points to.
const BY: &str = "the name that it follows";

/// The names.
#[derive(Debug, Default)]
pub struct Names {
    /// What each plugin's name pointed to.
    targets: BTreeMap<PluginName, ContentPath>,
}

impl Look for Names {
    fn pause(&self, host: &Host) -> Duration {
        host.config.follow_every()
    }

    async fn look(&mut self, host: &Arc<Host>) -> Result<(), StoreError> {
        let rows = roster::rows(&host.store.snapshot()?)?;
        let followed = rows.into_iter().filter_map(|(name, row)| {
            let path = row.follows.as_deref()?.parse::<ContentPath>().ok()?;
            (row.standing != Standing::Removed).then_some((name, row, path))
        });
        let targets = std::mem::take(&mut self.targets);
        let mut asked = futures::stream::iter(followed)
            .map(|(name, row, path)| {
                let before = targets.get(&name).cloned();
                async move { (name.clone(), ask(host, name, row, path, before).await) }
            })
            .buffer_unordered(AT_ONCE);
        while let Some((name, target)) = asked.next().await {
            if let Some(target) = target? {
                self.targets.insert(name, target);
            }
        }
        Ok(())
    }
}

/// Asks where a plugin's name points to, and offers what is there unless that is `before`; returns what was
/// dealt with.
async fn ask(
    host: &Arc<Host>,
    plugin: PluginName,
    row: Row,
    path: ContentPath,
    before: Option<ContentPath>,
) -> Result<Option<ContentPath>, StoreError> {
    let follows = path.to_string();
    let target = match tokio::time::timeout(TIMEOUT, host.backend.end_of_chain(path)).await {
        Ok(Ok(target)) if before.as_ref() != Some(&target) => target,
        Ok(Ok(_)) => return Ok(before),
        Ok(Err(error)) => {
            tracing::debug!(%plugin, follows, "not resolved: {error}");
            return Ok(before);
        }
        Err(_) => {
            tracing::debug!(%plugin, follows, "not resolved within {TIMEOUT:?}");
            return Ok(before);
        }
    };
    let source = format!("{target} by {follows}");
    let change = Change::new(plugin.clone(), State::Fetching, BY.to_owned(), source.clone());
    let under_way = host.changes().begin(change);
    let component = match host.fetch(&target).await {
        Ok(component) => component,
        Err(error) => {
            tracing::warn!(%plugin, follows, "what the name points to by now is not installed yet: {error}");
            return Ok(before);
        }
    };
    let hashed = tokio::task::spawn_blocking(move || (Digest::of(&component), component)).await;
    let (digest, component) = match hashed.map_err(broke_down) {
        Ok(hashed) => hashed,
        Err(error) => {
            tracing::error!(%plugin, follows, "{error}");
            return Ok(before);
        }
    };
    if !host.trusts(&follows) && row.code.digest != digest.to_string() {
        let why = format!("{source} is {digest}: the config does not trust the name (replacement.trusted)");
        refuse(host, under_way, why).await?;
        return Ok(Some(target));
    }
    let by = BY.to_owned();
    let proposal = Proposal { plugin, component, source, by, follows: Some(follows), is_named: false };
    offer(host, Some(under_way), proposal, digest).await?;
    Ok(Some(target))
}
