//! Owns whether there is room for more: looks at the disk and at what the store holds. Where it runs
//! short the intake stops, and goes on by itself when there is room again.
//!
//! What stops is what comes from outside: messages, commands, publishes and names. Plugins go on with
//! what is in the log already, unless the disk is all but full; questions are answered in any case.
//! Messages that are not taken in meanwhile become a gap, for listening is not proven.

mod lookout;
mod slack;

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use crate::time::Timestamp;

pub use lookout::{Lookout, Quota};
pub use slack::Slack;

/// The intake is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("the intake is stopped: {0}")]
pub struct NoRoom(pub String);

/// What the host is short of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Shortage {
    /// What is short, with figures.
    pub reason: String,
    /// Since when.
    pub since: Timestamp,
    /// Whether plugins stand still too: what is left is for the host itself.
    pub standstill: bool,
}

/// Whether there is room, as every stage may ask. There is until someone has looked. It outlives a host that
/// is started again.
#[derive(Debug, Default)]
pub struct Room {
    shortage: watch::Sender<Option<Shortage>>,
    /// Something is being removed to make room, or that is what a host failed at.
    removing: AtomicBool,
    /// What the file takes beyond what it holds.
    pub slack: Slack,
}

impl Room {
    /// What is short, if anything is.
    pub fn shortage(&self) -> Option<Shortage> {
        self.shortage.borrow().clone()
    }

    /// Refuses what comes from outside while something is short.
    pub fn check(&self) -> Result<(), NoRoom> {
        match &*self.shortage.borrow() {
            Some(shortage) => Err(NoRoom(shortage.reason.clone())),
            None => Ok(()),
        }
    }

    /// Whether plugins stand still.
    pub fn is_at_standstill(&self) -> bool {
        self.shortage.borrow().as_ref().is_some_and(|shortage| shortage.standstill)
    }

    /// Whether a host has failed at removing something: on a disk that has nothing left it would again.
    pub fn has_failed_at_removing(&self) -> bool {
        self.removing.load(Ordering::Relaxed)
    }

    /// Says that something is being removed, or that it is gone.
    pub fn set_removing(&self, removing: bool) {
        self.removing.store(removing, Ordering::Relaxed);
    }

    /// Resolves with what is short once something is. Cancel safe.
    pub async fn short(&self) -> NoRoom {
        let mut room = self.shortage.subscribe();
        match room.wait_for(Option::is_some).await.map(|shortage| shortage.clone()) {
            Ok(shortage) => NoRoom(shortage.map(|shortage| shortage.reason).unwrap_or_default()),
            // The sender is this value itself.
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves once there is room. Cancel safe.
    pub async fn enough(&self) {
        if self.shortage.subscribe().wait_for(Option::is_none).await.is_err() {
            std::future::pending().await
        }
    }

    fn set(&self, found: Option<(String, bool)>, now: Timestamp) {
        self.shortage.send_if_modified(|shortage| {
            let since = shortage.as_ref().map_or(now, |before| before.since);
            let next = found.map(|(reason, standstill)| Shortage { reason, since, standstill });
            match (&shortage, &next) {
                (None, Some(short)) => tracing::error!("the intake stops: {}", short.reason),
                (Some(_), None) => tracing::info!("there is room again: the intake goes on"),
                _ => {}
            }
            let changed = *shortage != next;
            *shortage = next;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_for_room_goes_on_when_there_is_some() {
        let room = Room::default();
        room.check().unwrap();
        room.set(Some(("full".to_owned(), false)), Timestamp(7));
        assert_eq!(room.short().await, NoRoom("full".to_owned()));
        room.set(Some(("fuller".to_owned(), true)), Timestamp(9));
        assert_eq!(room.shortage().unwrap().since, Timestamp(7), "it is one shortage");
        tokio::join!(room.enough(), async { room.set(None, Timestamp(9)) });
        room.check().unwrap();
    }
}
