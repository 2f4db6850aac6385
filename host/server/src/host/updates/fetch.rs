//! Owns the download of components through IPFS. It receives a path and returns the bytes, which can come from
//! anyone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dim_model::ident::{ContentPath, Digest, PluginName};
use dim_model::time::Timestamp;
use dim_store::change::{Change, State, Step};

use crate::host::assessment::look_at;
use crate::host::candidate::CandidateError;
use crate::host::replacement::{Proposal, ReplaceError};
use crate::host::{Grant, Host};

/// The maximum time for resolving a name and fetching the content.
pub const TIMEOUT: Duration = Duration::from_secs(60);

impl Host {
    /// Returns whether the config trusts all components from `source`.
    pub fn trusts(&self, source: &str) -> bool {
        self.config.now().replacement.trusted.iter().any(|trusted| trusted == source)
    }

    /// Fetches the component at a path.
    pub async fn fetch(&self, path: &ContentPath) -> Result<Bytes, ReplaceError> {
        let fetched = tokio::time::timeout(TIMEOUT, async {
            let target = self.exchange.links.backend.end_of_chain(path.clone()).await?;
            self.exchange.links.backend.content.file(&target, self.config.now().limits.component_bytes).await
        });
        let unfetched = |why: String| ReplaceError::Refused(format!("cannot fetch {path}: {why}"));
        let fetched = fetched.await.map_err(|_| unfetched(format!("no answer within {TIMEOUT:?}")))?;
        let (_, component) = fetched.map_err(|error| unfetched(error.to_string()))?;
        Ok(component)
    }

    /// Fetches the component at a path and installs it. Its digest must be `trust`, or the config must trust the path
    /// or the signer. A refusal is recorded, unless the name of the plugin is unknown.
    pub async fn install_from(
        self: &Arc<Self>,
        from: ContentPath,
        trust: Option<Digest>,
        name: Option<PluginName>,
        grant: Grant,
        by: String,
    ) -> Result<Change, ReplaceError> {
        let (source, at) = (from.to_string(), Timestamp::wall());
        let begin = |plugin: PluginName| {
            let change = Change::new(plugin, State::Fetching, by.clone(), source.clone());
            self.changes().begin(Change { steps: vec![Step { state: State::Fetching, at }], ..change })
        };
        // Without `name` the manifest names the plugin, so its change begins after the download.
        let named = name.clone().map(&begin);
        let component = match self.fetch(&from).await {
            Ok(component) => component,
            Err(error) => {
                let Some(under_way) = named else { return Err(error) };
                return self.conclude(under_way, Err(error)).await;
            }
        };
        let (digest, says) = look_at(component.clone()).await?;
        let plugin = match (name, says) {
            (Some(name), _) | (None, Ok(name)) => name,
            (None, Err(error)) => {
                return Err(CandidateError::Invalid { from: source, error: error.into() }.into());
            }
        };
        let under_way = named.unwrap_or_else(|| begin(plugin.clone()));
        let trust = trust.or_else(|| self.trusts(&source).then_some(digest));
        let follows = from.is_mutable().then(|| source.clone());
        let proposal = Proposal { plugin, component, source, by, follows, is_named: false, trust };
        self.install_under_way(under_way, proposal, grant).await
    }
}
