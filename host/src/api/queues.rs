//! Owns how far each quota of the outbox is used.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::Serialize;
use utoipa::ToSchema;

use crate::host::{Host, Loaded};
use crate::ident::PluginName;
use crate::outbox::API_QUOTA;

/// The publishes of one owner that wait.
#[derive(Debug, Serialize, ToSchema)]
pub struct Queue {
    /// The plugin; `api` for callers of the API.
    pub owner: String,
    /// How many wait.
    pub waiting: usize,
    /// How many may; one more is refused.
    pub limit: usize,
}

/// How far each quota of the outbox is used.
pub fn queues(host: &Host) -> Vec<Queue> {
    let waiting = |owner: Option<&PluginName>| host.backlog.length(owner).load(Ordering::Relaxed);
    let of_plugin = |(name, plugin): (PluginName, Arc<Loaded>)| Queue {
        owner: name.to_string(),
        waiting: waiting(Some(&name)),
        limit: plugin.handle.code().limits.outbox,
    };
    let api = Queue { owner: "api".to_owned(), waiting: waiting(None), limit: API_QUOTA };
    std::iter::once(api).chain(host.plugins.all().into_iter().map(of_plugin)).collect()
}
