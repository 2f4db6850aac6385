//! Owns whether there is room for more: looks at the disk and at what the store holds. Where it runs
//! short the intake stops, and goes on by itself when there is room again.
//!
//! What stops is what comes from outside: messages, commands, publishes and names. Plugins go on with
//! what is in the log already, unless the disk is all but full; questions are answered in any case.
//! Messages that are not taken in meanwhile become a gap, for listening is not proven.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cause::chain;
use crate::log::EventLog;
use crate::store::{Snapshot, Store, StoreError, Usage};
use crate::time::Timestamp;

/// How often it is looked.
const EVERY: Duration = Duration::from_millis(100);

/// After so many looks that found the disk short the store gives back what it can.
const PATIENCE: u32 = 50;

/// Plugins stand still when less than this part of what must stay free is free.
const ALL_BUT_FULL: u64 = 4;

/// The intake goes on when there is more room than it stops at, by this part.
const MORE: u64 = 16;

/// By which part of what the store may hold it is trimmed before the intake stops.
const EARLIER: u64 = 8;

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

/// Whether there is room, as every stage may ask. There is until someone has looked.
#[derive(Debug, Default)]
pub struct Room {
    shortage: watch::Sender<Option<Shortage>>,
    /// Something is being removed to make room, or that was the last that a host did.
    pub trimming: AtomicBool,
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

/// How much there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes that the store may hold; none for as many as the disk takes.
    pub max_held: Option<u64>,
    /// Bytes of the disk that must stay free.
    pub min_free: u64,
}

impl Quota {
    /// How many bytes of the disk are missing until the intake goes on.
    fn missing(&self, free: u64) -> u64 {
        self.min_free.saturating_add(self.min_free / MORE).saturating_sub(free)
    }

    /// Whether the disk is short, and the store would give back enough if it were packed.
    pub fn asks_for_packing(&self, store: &Store) -> Result<bool, StoreError> {
        let free = store.free()?;
        let gives = || Ok::<_, StoreError>(store.slack(&Usage::of(&store.snapshot()?)?));
        Ok(free < self.min_free && gives()? >= self.missing(free))
    }

    /// How many bytes of what is only kept for looking back have to go, so that the intake need not
    /// stop: half of what has to stay free is to be there above it, on the disk or in the file.
    pub fn excess(&self, store: &Store, snapshot: &Snapshot) -> Result<u64, StoreError> {
        let usage = Usage::of(snapshot)?;
        let over = self.max_held.map_or(0, |max| usage.total().saturating_sub(max - max / EARLIER));
        let free = store.free()?;
        let wanted = self.min_free.saturating_add(self.min_free / 2).saturating_sub(free);
        Ok(over.max(wanted.saturating_sub(store.slack(&usage))))
    }

    /// What is short, and whether it is all but gone.
    fn judge(&self, free: u64, usage: &Usage, was_short: bool) -> Option<(String, bool)> {
        let more = |bytes: u64| if was_short { bytes / MORE } else { 0 };
        let Self { max_held, min_free } = *self;
        if free < min_free.saturating_add(more(min_free)) {
            let reason = format!("the disk has {free} bytes free, and {min_free} are to stay so");
            return Some((reason, free < min_free / ALL_BUT_FULL));
        }
        let held = usage.total();
        let max_held = max_held.filter(|max| held > max - more(*max))?;
        let most = usage.largest();
        Some((format!("the store holds {held} of {max_held} bytes, {} of them {}", most.1, most.0), false))
    }
}

/// The task that looks.
#[derive(Clone, Debug)]
pub struct Lookout {
    /// What it looks at.
    pub store: Arc<Store>,
    /// Whose time counts.
    pub log: Arc<EventLog>,
    /// Whom it tells.
    pub room: Arc<Room>,
    /// How much there may be.
    pub quota: Quota,
}

impl Lookout {
    /// Looks until `stop` is cancelled. Tells `fail` when the host has to start again, so that the store
    /// can be packed.
    pub async fn run(self, fail: Arc<watch::Sender<Option<String>>>, stop: CancellationToken) {
        let work = async {
            let mut asked = 0;
            loop {
                tokio::time::sleep(EVERY).await;
                let this = self.clone();
                let looked = tokio::task::spawn_blocking(move || this.look()).await;
                asked = match looked.expect("looking does not panic") {
                    Ok(asks_for_packing) => {
                        if asks_for_packing {
                            asked + 1
                        } else {
                            0
                        }
                    }
                    Err(error) => {
                        tracing::error!("cannot see whether there is room: {}", chain(&error));
                        0
                    }
                };
                if asked == PATIENCE {
                    let reason = "the disk is short, and the store takes more of it than it needs";
                    fail.send_replace(Some(reason.to_owned()));
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Looks once; returns whether the store is to be packed. May block for a moment.
    pub fn look(&self) -> Result<bool, StoreError> {
        let free = self.store.free()?;
        let usage = Usage::of(&self.store.snapshot()?)?;
        let was_short = self.room.shortage().is_some();
        self.room.set(self.quota.judge(free, &usage, was_short), self.log.now());
        self.quota.asks_for_packing(&self.store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTA: Quota = Quota { max_held: Some(1_600), min_free: 1_600 };

    fn holding(log: u64) -> Usage {
        Usage { log, ..Usage::default() }
    }

    #[test]
    fn the_intake_stops_at_a_limit_and_goes_on_a_little_above_it() {
        assert_eq!(QUOTA.judge(1_600, &holding(1_600), false), None);
        assert!(QUOTA.judge(1_599, &holding(0), false).is_some());
        assert!(QUOTA.judge(9_999, &holding(1_601), false).is_some());
        assert!(QUOTA.judge(1_699, &holding(0), true).is_some());
        assert!(QUOTA.judge(9_999, &holding(1_501), true).is_some());
        assert_eq!(QUOTA.judge(1_700, &holding(1_500), true), None);
    }

    #[test]
    fn plugins_stand_still_only_when_the_disk_is_all_but_full() {
        assert_eq!(QUOTA.judge(400, &holding(0), false).map(|(_, standstill)| standstill), Some(false));
        assert_eq!(QUOTA.judge(399, &holding(0), false).map(|(_, standstill)| standstill), Some(true));
        assert_eq!(QUOTA.judge(9_999, &holding(9_999), false).map(|(_, standstill)| standstill), Some(false));
    }

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
