//! Owns the lines that plugins log, for whoever listens while they are written.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::feed::Feed;
use crate::ident::PluginName;
use crate::time::Timestamp;

/// Lines that are kept for those who listen; a slower one is told how many it missed.
const KEPT: usize = 512;

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
pub struct Lines(Arc<Feed<Line>>);

impl Default for Lines {
    fn default() -> Self {
        Self(Arc::new(Feed::new(KEPT)))
    }
}

impl Lines {
    /// The newest lines, and those to come.
    pub fn feed(&self) -> &Arc<Feed<Line>> {
        &self.0
    }
}
