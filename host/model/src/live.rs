//! Owns settings that can be replaced while the host runs. It receives new settings and returns the current ones to
//! all clones.

use std::sync::{Arc, RwLock};

/// The settings in effect. All clones share one value.
#[derive(Clone, Debug)]
pub struct Live<T>(Arc<RwLock<Arc<T>>>);

impl<T> Live<T> {
    /// Makes the settings in effect.
    pub fn new(settings: T) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(settings))))
    }

    /// Returns the current settings. The returned value does not change after a later [`Live::set`].
    pub fn now(&self) -> Arc<T> {
        self.0.read().expect(POISONED).clone()
    }

    /// Replaces the settings.
    pub fn set(&self, settings: T) {
        *self.0.write().expect(POISONED) = Arc::new(settings);
    }
}

const POISONED: &str = "no thread panics while it holds the lock";
