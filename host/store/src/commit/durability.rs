//! Owns the lag of the disk behind the commits: how large it may be, and how large it is.

use std::time::{Duration, Instant};

use crate::Sync;

/// How long a commit that needs no sync of its own may wait for the disk. The database frees no page before a sync.
const TRIFLES: Duration = Duration::from_secs(5);

/// How long any commit may wait for the disk with `durability: eventual`.
const EVENTUAL: Duration = Duration::from_millis(500);

/// Whether a reply waits for the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// A reply is sent when the effects are on the disk.
    #[default]
    Immediate,
    /// The disk is synced twice a second; a crash of the machine can lose the commits since the last sync.
    Eventual,
}

impl Durability {
    /// The longest lag of the disk behind the commits.
    pub fn most_behind(self) -> Duration {
        match self {
            Self::Immediate => TRIFLES,
            Self::Eventual => EVENTUAL,
        }
    }
}

/// The lag of the disk behind the commits.
pub struct Disk {
    /// The time of the last sync.
    pub synced_at: Instant,
    /// Whether something was committed since the last sync.
    pub behind: bool,
}

impl Disk {
    /// Records a commit.
    pub fn committed(&mut self, sync: Sync) {
        self.behind = sync == Sync::Later;
        if sync == Sync::Now {
            self.synced_at = Instant::now();
        }
    }

    /// The time until the next sync is necessary.
    pub fn pause(&self, most_behind: Duration) -> Duration {
        if self.behind {
            most_behind.saturating_sub(self.synced_at.elapsed())
        } else {
            Duration::from_secs(1)
        }
    }
}
