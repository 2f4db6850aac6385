//! The parsed content of a heartbeat.

use std::time::Duration;

use dim_guest::heartbeat::{self, Heartbeat, check_id};
use dim_guest::member::Members;
use dim_guest::time::Time;
use dim_guest::{Failure, id};
use serde::Deserialize;

use crate::resources::Resources;

/// Maximum lead of a node's clock over the host's clock. A timestamp further ahead is ignored.
const AHEAD: Duration = Duration::from_secs(300);

/// The members of a heartbeat. Absent and unreadable members are none.
#[derive(Debug, Deserialize)]
pub struct Said {
    pub node_id: String,
    #[serde(default)]
    pub timestamp: Option<Time>,
    #[serde(default)]
    pub status: Option<String>,
    #[serde(default)]
    pub resources: Option<Resources>,
    #[serde(default)]
    pub cached_models: Option<Vec<String>>,
    #[serde(default)]
    pub instance: Option<String>,
    #[serde(default)]
    pub every_ms: Option<u64>,
    /// The unreadable members, with the reasons.
    #[serde(skip)]
    pub ignored: Vec<String>,
}

impl Said {
    /// Reads a message that arrives at `now`. A message without a valid `node_id` is rejected.
    pub fn read(data: &[u8], now: Time) -> Result<Self, Failure> {
        let text = heartbeat::text(data)?;
        // A valid heartbeat is parsed in one step, which is fast; any other one member by member.
        let said: Option<Self> = serde_json::from_str(text).ok();
        let mut said = match said.filter(|said| check_id(&said.node_id).is_ok()) {
            Some(said) => said,
            None => Self::of(Heartbeat::read(text)?),
        };
        said.check(now);
        Ok(said)
    }

    fn of(heartbeat: Heartbeat<'_>) -> Self {
        let mut of = Members::default();
        Self {
            timestamp: of.read("timestamp", heartbeat.timestamp),
            status: of.read("status", heartbeat.status),
            resources: of.read("resources", heartbeat.resources),
            cached_models: of.read("cached_models", heartbeat.cached_models),
            instance: of.read("instance", heartbeat.instance),
            every_ms: of.read("every_ms", heartbeat.every_ms),
            ignored: of.into_reasons(),
            node_id: heartbeat.node_id,
        }
    }

    /// Drops a timestamp that is too far ahead and an invalid instance, with the reasons.
    fn check(&mut self, now: Time) {
        if let Some(ahead) = self.timestamp.map(|sent| sent.since(now)).filter(|ahead| *ahead > AHEAD) {
            self.timestamp = None;
            self.ignored.push(format!("timestamp: it is {} s ahead of this host's clock", ahead.as_secs()));
        }
        if let Some(Err(why)) =
            self.instance.as_deref().map(|instance| id::check("an instance", instance, 64))
        {
            self.instance = None;
            self.ignored.push(format!("instance: {why}"));
        }
    }
}
