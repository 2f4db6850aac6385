//! Owns the config that is in effect: a reload exchanges it while the host runs.

use std::sync::{Arc, RwLock};

use super::Config;

/// The config in effect. Its clones are one and the same.
#[derive(Clone, Debug)]
pub struct Live(Arc<RwLock<Arc<Config>>>);

impl Live {
    /// A config that is in effect from the start.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(config))))
    }

    /// The config as it is now; it stays as it is for whoever holds it.
    pub fn now(&self) -> Arc<Config> {
        self.0.read().expect(UNHURT).clone()
    }

    /// Exchanges it.
    pub fn set(&self, config: Config) {
        *self.0.write().expect(UNHURT) = Arc::new(config);
    }
}

const UNHURT: &str = "no one panics while holding the config";
