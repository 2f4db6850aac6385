//! Owns the report on the quotas of the outbox: the waiting publishes of each plugin and of the API.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dim_model::ident::PluginName;
use dim_network::outbox::API_QUOTA;
use dim_server::host::{Host, Loaded};
use serde::Serialize;
use utoipa::ToSchema;

/// The waiting publishes of one owner.
#[derive(Debug, Serialize, ToSchema)]
pub struct Queue {
    /// The plugin, or `api` for callers of the API.
    pub owner: String,
    /// The number of waiting publishes.
    pub waiting: usize,
    /// The maximum number; further publishes are refused.
    pub limit: usize,
}

/// Returns the use of each quota of the outbox.
pub fn queues(host: &Host) -> Vec<Queue> {
    let waiting =
        |owner: Option<&PluginName>| host.exchange.links.backlog.length(owner).load(Ordering::Relaxed);
    let of_plugin = |(name, plugin): (PluginName, Arc<Loaded>)| Queue {
        owner: name.to_string(),
        waiting: waiting(Some(&name)),
        limit: plugin.handle.code().limits.outbox,
    };
    let api = Queue { owner: "api".to_owned(), waiting: waiting(None), limit: API_QUOTA };
    std::iter::once(api).chain(host.plugins.all().into_iter().map(of_plugin)).collect()
}
