//! Owns the state of the intake. It receives the checks of the disk and of the store's size, and tells every
//! stage whether the intake is stopped. The intake resumes by itself when there is enough space again.
//!
//! Only the intake stops: messages, commands, publishes and new values of names. Plugins continue with the
//! entries in the log, unless the disk is nearly full. Queries are always answered. Messages that the host
//! drops meanwhile become a gap, because listening is not proven.

mod thresholds;
mod reclaimable;

use std::sync::atomic::{AtomicBool, Ordering};

use dim_model::time::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

pub use reclaimable::ReclaimableSpace;
pub use thresholds::{DiskCheck, Quota};

/// The error of a stopped intake, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("the intake is stopped: {0}")]
pub struct IntakeStopped(pub String);

/// A shortage of space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Shortage {
    /// The resource that is short, with figures.
    pub reason: String,
    /// The time at which the shortage began.
    pub since: Timestamp,
    /// Whether plugins are stopped as well: the rest of the disk is for the host itself.
    pub standstill: bool,
}

/// The shared state of the intake, which every stage may query. The intake runs until the first check. The
/// value survives a restart of the host in the same process.
#[derive(Debug, Default)]
pub struct DiskMonitor {
    shortage: watch::Sender<Option<Shortage>>,
    /// A removal of data is in progress, or a host has failed at it.
    removing: AtomicBool,
    /// The estimate of the unused space in the database's file.
    pub reclaimable: ReclaimableSpace,
}

impl DiskMonitor {
    /// The shortage, if there is one.
    pub fn shortage(&self) -> Option<Shortage> {
        self.shortage.borrow().clone()
    }

    /// Returns an error while there is a shortage. Called before anything is accepted from outside.
    pub fn check(&self) -> Result<(), IntakeStopped> {
        match &*self.shortage.borrow() {
            Some(shortage) => Err(IntakeStopped(shortage.reason.clone())),
            None => Ok(()),
        }
    }

    /// Whether plugins are stopped.
    pub fn is_at_standstill(&self) -> bool {
        self.shortage.borrow().as_ref().is_some_and(|shortage| shortage.standstill)
    }

    /// Whether a host has failed at removing data. On a full disk it would fail again.
    pub fn has_failed_at_removing(&self) -> bool {
        self.removing.load(Ordering::Relaxed)
    }

    /// Sets whether a removal of data is in progress.
    pub fn set_removing(&self, removing: bool) {
        self.removing.store(removing, Ordering::Relaxed);
    }

    /// Waits for a shortage and returns it. Cancel safe.
    pub async fn short(&self) -> IntakeStopped {
        let mut disk = self.shortage.subscribe();
        match disk.wait_for(Option::is_some).await.map(|shortage| shortage.clone()) {
            Ok(shortage) => IntakeStopped(shortage.map(|shortage| shortage.reason).unwrap_or_default()),
            // This value owns the sender, so the channel stays open.
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until there is no shortage. Cancel safe.
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
                (Some(_), None) => tracing::info!("there is enough space again: the intake resumes"),
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
        let disk = DiskMonitor::default();
        disk.check().unwrap();
        disk.set(Some(("full".to_owned(), false)), Timestamp(7));
        assert_eq!(disk.short().await, IntakeStopped("full".to_owned()));
        disk.set(Some(("fuller".to_owned(), true)), Timestamp(9));
        assert_eq!(disk.shortage().unwrap().since, Timestamp(7), "it is one shortage");
        tokio::join!(disk.enough(), async { disk.set(None, Timestamp(9)) });
        disk.check().unwrap();
    }
}
