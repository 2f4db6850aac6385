//! Owns the lines that plugins log, for whoever listens while they are written.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::ToSchema;

use crate::ident::PluginName;
use crate::time::Timestamp;

/// Lines that wait for one listener; a slower one is told how many it missed.
const LISTENER: usize = 512;

/// A line of a plugin's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Line {
    /// Which plugin.
    pub plugin: PluginName,
    /// Its version.
    pub version: String,
    /// When it was written.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// What it says.
    pub text: String,
}

/// Where the lines of all plugins of a host go by.
#[derive(Clone, Debug)]
pub struct Lines(Arc<broadcast::Sender<Line>>);

impl Default for Lines {
    fn default() -> Self {
        Self(Arc::new(broadcast::channel(LISTENER).0))
    }
}

impl Lines {
    /// Every line from now on.
    pub fn listen(&self) -> broadcast::Receiver<Line> {
        self.0.subscribe()
    }

    /// Whether anyone listens.
    pub fn has_listeners(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// Tells a line.
    pub fn tell(&self, line: Line) {
        // No one listening any more is no error.
        let _ = self.0.send(line);
    }
}
