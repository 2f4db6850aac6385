//! Owns the description of a plugin's code that can run: a component with its config, its grants and its limits.

use std::sync::Arc;

use dim_model::beginning::Beginning;
use dim_model::ident::{KeyName, Topic};
use dim_model::time::Timestamp;
use dim_store::grants::Reach;
use dim_store::plugin_limits::Limits;
use dim_store::plugin_registry::Code;

use crate::Prepared;

/// A component that can run as a plugin.
#[derive(Clone, Debug)]
pub struct Runnable {
    /// The component.
    pub prepared: Prepared,
    /// The config, a JSON object.
    pub config: String,
    /// The topics that the manifest requests and that are granted.
    pub topics: Vec<Topic>,
    /// All topics that the manifest requests, granted or not.
    pub asked_topics: Vec<Topic>,
    /// The effective grants.
    pub reach: Arc<Reach>,
    /// The limits.
    pub limits: Limits,
    /// The code, as the store records it.
    pub code: Code,
    /// The source of the component.
    pub source: String,
}

impl Runnable {
    /// The version.
    pub fn version(&self) -> &str {
        &self.prepared.inspection.manifest.version
    }

    /// Returns the beginning of a subscription to a topic of the manifest that is made at `now`.
    pub fn beginning(&self, topic: &Topic, now: Timestamp) -> Beginning {
        let beginnings = self.prepared.inspection.manifest.beginnings(&self.config);
        beginnings.get(topic).map_or(Beginning::Head, |from| from.at(now))
    }

    /// Whether the plugin takes over documents of another publisher under a key, by its command `import`.
    pub fn imports(&self, key: &KeyName) -> bool {
        self.prepared.inspection.manifest.imports(&self.config).contains(key)
    }
}
