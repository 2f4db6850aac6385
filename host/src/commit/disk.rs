//! Owns how far the disk may be, and is, behind the commits.

use std::time::{Duration, Instant};

use crate::store::Sync;

/// How long what is not worth a sync of its own may wait for the disk. The database frees no page
/// before it is synced.
const TRIFLES: Duration = Duration::from_secs(5);

/// How long anything may wait for the disk with `durability: eventual`.
const EVENTUAL: Duration = Duration::from_millis(500);

/// Whether a commit waits for the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A reply is sent when the effects are on the disk.
    #[default]
    Immediate,
    /// The disk is synced twice a second; a crash of the machine may lose what came since.
    Eventual,
}

impl Durability {
    /// How long the disk may lag behind the commits.
    pub fn most_behind(self) -> Duration {
        match self {
            Self::Immediate => TRIFLES,
            Self::Eventual => EVENTUAL,
        }
    }
}

/// How far the disk is behind the commits.
pub struct Disk {
    /// When it was last up to date.
    pub synced_at: Instant,
    /// Whether something was committed since.
    pub behind: bool,
}

impl Disk {
    /// Notes a commit.
    pub fn committed(&mut self, sync: Sync) {
        self.behind = sync == Sync::Later;
        if sync == Sync::Now {
            self.synced_at = Instant::now();
        }
    }

    /// How long there is nothing to do for the disk.
    pub fn pause(&self, most_behind: Duration) -> Duration {
        if self.behind {
            most_behind.saturating_sub(self.synced_at.elapsed())
        } else {
            Duration::from_secs(1)
        }
    }
}
