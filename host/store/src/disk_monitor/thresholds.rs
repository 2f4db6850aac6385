//! Owns the checks of the disk and of the store's size: when the intake stops and resumes, how much data
//! retention must remove, and when the store is compacted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_model::error_chain::chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{DiskMonitor, ReclaimableSpace};
use crate::event_log::EventLog;
use crate::{Snapshot, Store, StoreError, Usage};

/// The interval of the checks.
const EVERY: Duration = Duration::from_millis(100);

/// The time of a shortage after which the unused space in the file is measured.
const PATIENCE: Duration = Duration::from_secs(5);

/// Plugins stop when less than this part of `min_free` is free.
const ALL_BUT_FULL: u64 = 4;

/// The intake resumes when the free space exceeds the limit by this part.
const MORE: u64 = 16;

/// Retention begins when the store is within this part of its maximum, before the intake stops.
const EARLIER: u64 = 8;

/// The quota of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Most bytes in the store; `None` for no limit but the disk.
    pub max_held: Option<u64>,
    /// Bytes of the disk that must stay free.
    pub min_free: u64,
}

impl Quota {
    /// The number of bytes of history that retention must remove, so that the intake need not stop. One and a
    /// half times `min_free` must be available, on the disk or in the file.
    pub fn excess(
        &self,
        store: &Store,
        snapshot: &Snapshot,
        reclaimable: &ReclaimableSpace,
    ) -> Result<u64, StoreError> {
        let held = Usage::of(snapshot)?.total();
        let over = self.max_held.map_or(0, |max| held.saturating_sub(max - max / EARLIER));
        let wanted = self.min_free.saturating_add(self.min_free / 2).saturating_sub(store.free()?);
        Ok(over.max(wanted.saturating_sub(reclaimable.estimate(store.file_bytes(), held))))
    }

    /// The reason of a shortage, and whether the disk is nearly full. `reclaimable` bytes are free in the
    /// store's own file.
    fn judge(&self, free: u64, reclaimable: u64, usage: &Usage, was_short: bool) -> Option<(String, bool)> {
        let more = |bytes: u64| if was_short { bytes / MORE } else { 0 };
        let (max_held, min_free, least) = (self.max_held, self.min_free, self.least());
        if free < least + more(least) || free.saturating_add(reclaimable) < min_free + more(min_free) {
            let in_file = if reclaimable > 0 {
                format!(", and {reclaimable} in the store's file")
            } else {
                String::new()
            };
            let reason = format!("the disk has {free} bytes free{in_file}, and {min_free} must stay free");
            return Some((reason, free < least + more(least)));
        }
        let held = usage.total();
        let max_held = max_held.filter(|max| held > max - more(*max))?;
        let most = usage.largest();
        Some((format!("the store holds {held} of {max_held} bytes, {} of them {}", most.1, most.0), false))
    }

    /// The bytes of the disk that must be free in any case: the file may grow although it has free pages.
    fn least(&self) -> u64 {
        self.min_free / ALL_BUT_FULL
    }
}

/// The task that checks.
#[derive(Clone, Debug)]
pub struct DiskCheck {
    /// The store to check.
    pub store: Arc<Store>,
    /// The log, for the time.
    pub log: Arc<EventLog>,
    /// The state to update.
    pub disk: Arc<DiskMonitor>,
    /// The quota of the store.
    pub quota: Quota,
}

impl DiskCheck {
    /// Checks until `stop` is cancelled. Sends a reason to `again` when the host must restart so that the store
    /// can be compacted.
    pub async fn run(self, again: Arc<watch::Sender<Option<String>>>, stop: CancellationToken) {
        let work = async {
            let mut short_since = None;
            loop {
                tokio::time::sleep(EVERY).await;
                let this = self.clone();
                let looked = tokio::task::spawn_blocking(move || this.look_for(short_since)).await;
                match looked.expect("looking does not panic") {
                    Ok(Found::Enough) => short_since = None,
                    Ok(Found::Short) => {
                        short_since.get_or_insert_with(Instant::now);
                    }
                    Ok(Found::Reclaimable) => {
                        let reason = "the disk is nearly full, and the store uses more of it than it needs: it must be compacted";
                        again.send_if_modified(|told| told.replace(reason.to_owned()).is_none());
                        return;
                    }
                    Err(error) => tracing::error!("cannot check the disk and the store: {}", chain(&error)),
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Checks once; `short_since` is the time at which a current shortage began. May block for seconds.
    fn look_for(&self, short_since: Option<Instant>) -> Result<Found, StoreError> {
        let Look { free, file, held } = self.look()?;
        if self.disk.shortage().is_none() || free > self.quota.min_free.saturating_mul(2) {
            return Ok(Found::Enough);
        }
        if short_since.is_none_or(|since| since.elapsed() < PATIENCE) {
            return Ok(Found::Short);
        }
        let reclaimable = &self.disk.reclaimable;
        if !reclaimable.is_measured() {
            reclaimable.measured(self.store.bytes_in_use()?, held);
        }
        let gives = reclaimable.estimate(file, held);
        let enough = self.quota.min_free.saturating_add(self.quota.min_free / 4);
        let packs = free < self.quota.least() && free.saturating_add(gives) >= enough && reclaimable.ask();
        Ok(if packs { Found::Reclaimable } else { Found::Short })
    }

    /// Checks once and updates the state. May block briefly.
    pub fn look(&self) -> Result<Look, StoreError> {
        let (free, file) = (self.store.free()?, self.store.file_bytes());
        let snapshot = self.store.snapshot()?;
        let usage = Usage::of(&snapshot)?;
        let held = usage.total();
        // An estimate without a measurement does not count.
        let reclaimable = &self.disk.reclaimable;
        let reclaimable = if reclaimable.is_measured() { reclaimable.estimate(file, held) } else { 0 };
        let was_short = self.disk.shortage().is_some();
        let found = match self.store.is_in_place() {
            true => match self.quota.judge(free, reclaimable, &usage, was_short) {
                Some((reason, is_full)) => {
                    Some((format!("{reason}{}", most_state(&snapshot, &usage)?), is_full))
                }
                None => None,
            },
            false => Some((removed(&self.store), true)),
        };
        self.disk.set(found, self.log.now());
        Ok(Look { free, file, held })
    }
}

/// The plugin with the most state, in words, if state is the largest part of the store.
fn most_state(snapshot: &Snapshot, usage: &Usage) -> Result<String, StoreError> {
    if usage.largest().1 != usage.state {
        return Ok(String::new());
    }
    let most = Usage::most_state(snapshot)?;
    Ok(most.map_or_else(String::new, |(plugin, bytes)| {
        format!("; most of the state, {bytes} bytes, is that of the plugin {plugin}: `dim plugin rm {plugin} --purge` frees it")
    }))
}

/// The reason why the intake is stopped while the database's file is not in its place.
fn removed(store: &Store) -> String {
    format!(
        "the database {} was removed or replaced while the host runs, and what it accepts would be gone at the next start: write a backup with `dim backup` now, stop the host, and restore the backup into an empty directory",
        Store::file(store.path()).display()
    )
}

/// The figures of a check, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// The free space of the disk.
    free: u64,
    /// The disk space of the database.
    file: u64,
    /// The size of the store's content.
    held: u64,
}

/// The result of a check.
enum Found {
    /// No shortage of the disk.
    Enough,
    /// A shortage.
    Short,
    /// The disk is nearly full, and compacting the store would free enough space.
    Reclaimable,
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
        assert_eq!(QUOTA.judge(1_600, 0, &holding(1_600), false), None);
        assert!(QUOTA.judge(1_599, 0, &holding(0), false).is_some());
        assert!(QUOTA.judge(9_999, 0, &holding(1_601), false).is_some());
        assert!(QUOTA.judge(1_699, 0, &holding(0), true).is_some());
        assert!(QUOTA.judge(9_999, 0, &holding(1_501), true).is_some());
        assert_eq!(QUOTA.judge(1_700, 0, &holding(1_500), true), None);
    }

    #[test]
    fn what_is_free_in_the_file_counts_where_the_disk_is_not_all_but_full() {
        assert_eq!(QUOTA.judge(400, 1_200, &holding(0), false), None);
        assert!(QUOTA.judge(400, 1_199, &holding(0), false).is_some());
        assert_eq!(QUOTA.judge(399, 9_999, &holding(0), false).map(|(_, standstill)| standstill), Some(true));
        assert!(QUOTA.judge(424, 9_999, &holding(0), true).is_some());
        assert_eq!(QUOTA.judge(425, 9_999, &holding(0), true), None);
    }

    #[test]
    fn plugins_stand_still_only_when_the_disk_is_all_but_full() {
        assert_eq!(QUOTA.judge(400, 0, &holding(0), false).map(|(_, standstill)| standstill), Some(false));
        assert_eq!(QUOTA.judge(399, 0, &holding(0), false).map(|(_, standstill)| standstill), Some(true));
        assert_eq!(
            QUOTA.judge(9_999, 0, &holding(9_999), false).map(|(_, standstill)| standstill),
            Some(false)
        );
    }
}
