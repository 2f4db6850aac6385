//! Owns what a plugin runs: a component with its config, what it may reach and what it may take.

use std::sync::Arc;

use super::roster::Code;
use super::{Limits, Prepared, Reach};
use crate::ident::{KeyName, Topic};

/// A component that can run as a plugin.
#[derive(Clone, Debug)]
pub struct Runnable {
    /// The component.
    pub prepared: Prepared,
    /// Its config, a JSON object.
    pub config: String,
    /// The topics that its manifest asks for and that it may subscribe to.
    pub topics: Vec<Topic>,
    /// All topics that its manifest asks for, granted or not.
    pub asked_topics: Vec<Topic>,
    /// What it may reach.
    pub reach: Arc<Reach>,
    /// What it may take.
    pub limits: Limits,
    /// What the store says of it.
    pub code: Code,
    /// Where it came from.
    pub source: String,
}

impl Runnable {
    /// Its version.
    pub fn version(&self) -> &str {
        &self.prepared.inspection.manifest.version
    }

    /// Whether it takes over what others have published under a key, by its command `import`.
    pub fn imports(&self, key: &KeyName) -> bool {
        self.prepared.inspection.manifest.imports(&self.config).contains(key)
    }
}
