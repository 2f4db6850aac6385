//! Owns the retention of checkpoints: by age and size, at most as long as the log, and not at all when space is
//! short.

use std::collections::BTreeSet;

use dim_model::entry::Offset;
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use redb::ReadableTable as _;

use super::Retention;
use crate::change::State;
use crate::checkpoint::{self, Checkpoint};
use crate::commit::{CommitError, give_up};
use crate::plugin_registry;
use crate::rollback_rows::{self, Place};
use crate::{LOG, Snapshot, StoreError};

/// A checkpoint to drop, with the reason.
pub struct GivenUp {
    place: Place,
    checkpoint: Checkpoint,
    why: &'static str,
}

/// All checkpoints, oldest first.
fn all(snapshot: &Snapshot) -> Result<Vec<(Place, Checkpoint)>, StoreError> {
    let mut all = Vec::new();
    for row in plugin_registry::rows(snapshot)?.into_values() {
        all.extend(checkpoint::checkpoints(snapshot, row.id)?);
    }
    all.sort_by_key(|(_, checkpoint)| checkpoint.since);
    Ok(all)
}

/// The first entry that the code before may have to handle again if a probation fails.
pub fn held_by_probations(snapshot: &Snapshot, awaited: &BTreeSet<PluginName>) -> Result<Offset, StoreError> {
    let on_probation = checkpoint::on_probation(snapshot)?;
    let held = on_probation.iter().filter(|(name, _)| awaited.contains(*name));
    Ok(held.map(|(_, checkpoint)| checkpoint.cursor()).min().unwrap_or(Offset(u64::MAX)))
}

impl Retention {
    pub(super) async fn trim_marks(&self) -> Result<(), CommitError> {
        let gone = self.look(|this, snapshot| this.expendable_marks(snapshot, Timestamp::wall())).await?;
        if gone.is_empty() {
            return Ok(());
        }
        for GivenUp { place, why, .. } in &gone {
            tracing::info!(plugin = place.0.0, "a checkpoint is dropped: {why}");
        }
        let now = Timestamp::wall();
        self.commit
            .change(move |write, told| {
                for GivenUp { place, checkpoint: seen, why } in &gone {
                    // Meanwhile the code may have been rolled back or confirmed, or more rows may have been saved.
                    let now_there = checkpoint::checkpoints_within(write, place.0)?
                        .into_iter()
                        .find(|(it, _)| it == place);
                    let Some((_, checkpoint)) = now_there else { continue };
                    if (checkpoint.change, checkpoint.probation.is_some())
                        != (seen.change, seen.probation.is_some())
                    {
                        continue;
                    }
                    give_up(write, *place, &checkpoint)?;
                    if checkpoint.probation.is_some() {
                        let reason = format!("its probation is over, for there is no way back: {why}");
                        told.amend(write, checkpoint.change, now, |change| {
                            change.ended(State::ConfirmedUnproven, Some(reason), None);
                        })?;
                    }
                }
                Ok(())
            })
            .await
    }

    /// The checkpoints that are too old or too large, oldest first.
    fn expendable_marks(&self, snapshot: &Snapshot, now: Timestamp) -> Result<Vec<GivenUp>, StoreError> {
        let log_start = snapshot.table(LOG)?.first()?.map_or(0, |(first, _)| first.value());
        let mut excess = rollback_rows::bytes_of(snapshot)?.saturating_sub(self.undo.bytes);
        let mut short = self.excess(snapshot)?;
        let mut gone = Vec::new();
        for (place, checkpoint) in all(snapshot)? {
            let is_confirmed = checkpoint.probation.is_none();
            let why = if is_confirmed && now.since(checkpoint.since) > self.undo.time {
                "its time is over (replacement.undo_time)"
            } else if is_confirmed && checkpoint.cursor < log_start {
                "the log is not kept that long (store.log)"
            } else if is_confirmed && excess > 0 {
                "more has changed since than may be kept (replacement.undo_bytes)"
            } else if short > 0 {
                "the store has no room for it"
            } else {
                continue;
            };
            excess = excess.saturating_sub(checkpoint.bytes);
            short = short.saturating_sub(checkpoint.bytes.max(1));
            gone.push(GivenUp { place, checkpoint, why });
        }
        Ok(gone)
    }
}
