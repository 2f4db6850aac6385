//! Owns the feed of log lines of plugins. It receives lines from calls, and returns them to readers while they
//! are written.

use std::sync::Arc;

use dim_model::feed::Feed;
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most lines that are kept for readers; a slower reader receives the number of lines that it missed.
const KEPT: usize = 512;

/// A line of a plugin's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Line {
    /// The plugin.
    pub plugin: PluginName,
    /// The plugin's version.
    pub version: String,
    /// The time at which it was written.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// The text.
    pub text: String,
}

/// The feed of the log lines of all plugins of a host.
#[derive(Clone, Debug)]
pub struct Lines(Arc<Feed<Line>>);

impl Default for Lines {
    fn default() -> Self {
        Self(Arc::new(Feed::new(KEPT)))
    }
}

impl Lines {
    /// The feed of the newest and the following lines.
    pub fn feed(&self) -> &Arc<Feed<Line>> {
        &self.0
    }
}
