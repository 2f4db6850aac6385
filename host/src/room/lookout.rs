//! Owns the looks at the disk and at what the store holds: when the intake stops and goes on, what goes
//! first, and when the store is packed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Room, Slack};
use crate::cause::chain;
use crate::log::EventLog;
use crate::store::{Snapshot, Store, StoreError, Usage};

/// How often it is looked.
const EVERY: Duration = Duration::from_millis(100);

/// How long the disk is short before it is measured how much of the file is free, which may be used again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Plugins stand still when less than this part of what must stay free is free.
const ALL_BUT_FULL: u64 = 4;

/// The intake goes on when there is more room than it stops at, by this part.
const MORE: u64 = 16;

/// By which part of what the store may hold it is trimmed before the intake stops.
const EARLIER: u64 = 8;

/// How much there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes that the store may hold; none for as many as the disk takes.
    pub max_held: Option<u64>,
    /// Bytes of the disk that must stay free.
    pub min_free: u64,
}

impl Quota {
    /// How many bytes of what is only kept for looking back have to go, so that the intake need not
    /// stop: half of what has to stay free is to be there above it, on the disk or in the file.
    pub fn excess(&self, store: &Store, snapshot: &Snapshot, slack: &Slack) -> Result<u64, StoreError> {
        let held = Usage::of(snapshot)?.total();
        let over = self.max_held.map_or(0, |max| held.saturating_sub(max - max / EARLIER));
        let wanted = self.min_free.saturating_add(self.min_free / 2).saturating_sub(store.free()?);
        Ok(over.max(wanted.saturating_sub(slack.estimate(store.file_bytes(), held))))
    }

    /// What is short, and whether it is all but gone. `slack` bytes are free in the store's own file.
    fn judge(&self, free: u64, slack: u64, usage: &Usage, was_short: bool) -> Option<(String, bool)> {
        let more = |bytes: u64| if was_short { bytes / MORE } else { 0 };
        let (max_held, min_free, least) = (self.max_held, self.min_free, self.least());
        if free < least + more(least) || free.saturating_add(slack) < min_free + more(min_free) {
            let in_file =
                if slack > 0 { format!(", and {slack} in the store's file") } else { String::new() };
            let reason = format!("the disk has {free} bytes free{in_file}, and {min_free} are to stay so");
            return Some((reason, free < least + more(least)));
        }
        let held = usage.total();
        let max_held = max_held.filter(|max| held > max - more(*max))?;
        let most = usage.largest();
        Some((format!("the store holds {held} of {max_held} bytes, {} of them {}", most.1, most.0), false))
    }

    /// So much of the disk must be free in any case: the file may grow although there is room in it.
    fn least(&self) -> u64 {
        self.min_free / ALL_BUT_FULL
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
    /// Looks until `stop` is cancelled. Tells `again` when the host has to start again, so that the store
    /// can be packed.
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
                    Ok(Found::Slack) => {
                        let reason = "the disk is all but full, and the store takes more of it than it needs: it is packed";
                        again.send_if_modified(|told| told.replace(reason.to_owned()).is_none());
                        return;
                    }
                    Err(error) => tracing::error!("cannot see whether there is room: {}", chain(&error)),
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Looks once, where it was short before since `short_since`. May block for seconds.
    fn look_for(&self, short_since: Option<Instant>) -> Result<Found, StoreError> {
        let Look { free, file, held } = self.look()?;
        if self.room.shortage().is_none() || free > self.quota.min_free.saturating_mul(2) {
            return Ok(Found::Enough);
        }
        if short_since.is_none_or(|since| since.elapsed() < PATIENCE) {
            return Ok(Found::Short);
        }
        let slack = &self.room.slack;
        if !slack.is_measured() {
            slack.measured(self.store.bytes_in_use()?, held);
        }
        let gives = slack.estimate(file, held);
        let enough = self.quota.min_free.saturating_add(self.quota.min_free / 4);
        let packs = free < self.quota.least() && free.saturating_add(gives) >= enough && slack.ask();
        Ok(if packs { Found::Slack } else { Found::Short })
    }

    /// Looks once. May block for a moment.
    pub fn look(&self) -> Result<Look, StoreError> {
        let (free, file) = (self.store.free()?, self.store.file_bytes());
        let snapshot = self.store.snapshot()?;
        let usage = Usage::of(&snapshot)?;
        let held = usage.total();
        // What is only guessed does not count.
        let slack = &self.room.slack;
        let slack = if slack.is_measured() { slack.estimate(file, held) } else { 0 };
        let was_short = self.room.shortage().is_some();
        let found = match self.store.is_in_place() {
            true => match self.quota.judge(free, slack, &usage, was_short) {
                Some((reason, is_full)) => {
                    Some((format!("{reason}{}", most_state(&snapshot, &usage)?), is_full))
                }
                None => None,
            },
            false => Some((removed(&self.store), true)),
        };
        self.room.set(found, self.log.now());
        Ok(Look { free, file, held })
    }
}

/// Whose state it is, where that is the most of what the store holds.
fn most_state(snapshot: &Snapshot, usage: &Usage) -> Result<String, StoreError> {
    if usage.largest().1 != usage.state {
        return Ok(String::new());
    }
    let most = Usage::most_state(snapshot)?;
    Ok(most.map_or_else(String::new, |(plugin, bytes)| {
        format!("; most of the state, {bytes} bytes, is that of the plugin {plugin}: `dim plugin rm {plugin} --purge` frees it")
    }))
}

/// Why nothing is taken in while the database's file is not in its place.
fn removed(store: &Store) -> String {
    format!(
        "the database {} was removed or replaced while the host runs, and what it accepts would be gone at the next start: write a backup with `dim backup` now, stop the host, and restore the backup into an empty directory",
        Store::file(store.path()).display()
    )
}

/// What a look has seen, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// What the disk has free.
    free: u64,
    /// What the database takes of it.
    file: u64,
    /// What the store holds.
    held: u64,
}

/// What a look has found.
enum Found {
    /// There is enough, of the disk at least.
    Enough,
    /// It is short.
    Short,
    /// It is all but full, and the store gives enough of it back if it is packed.
    Slack,
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
