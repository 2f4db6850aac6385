//! Owns how long there is a way back to what plugins were before other code took over: by time and size, and
//! no longer than the log is kept; not at all where there is no room.

use std::collections::BTreeSet;

use redb::ReadableTable as _;

use super::Retention;
use crate::change::State;
use crate::commit::{CommitError, give_up};
use crate::entry::Offset;
use crate::ident::PluginName;
use crate::plugin::mark::{self, Mark};
use crate::plugin::roster;
use crate::store::undo::{self, Place};
use crate::store::{LOG, Snapshot, StoreError};
use crate::time::Timestamp;

/// A way back that is given up, and why.
pub struct GivenUp {
    place: Place,
    mark: Mark,
    why: &'static str,
}

/// Every mark, oldest first.
fn all(snapshot: &Snapshot) -> Result<Vec<(Place, Mark)>, StoreError> {
    let mut all = Vec::new();
    for row in roster::rows(snapshot)?.into_values() {
        all.extend(mark::marks(snapshot, row.id)?);
    }
    all.sort_by_key(|(_, mark)| mark.since);
    Ok(all)
}

/// The first entry that code on probation may have to be handled again by the code before it.
pub fn held_by_probations(snapshot: &Snapshot, awaited: &BTreeSet<PluginName>) -> Result<Offset, StoreError> {
    let on_probation = mark::on_probation(snapshot)?;
    let held = on_probation.iter().filter(|(name, _)| awaited.contains(*name));
    Ok(held.map(|(_, mark)| mark.cursor()).min().unwrap_or(Offset(u64::MAX)))
}

impl Retention {
    pub(super) async fn trim_marks(&self) -> Result<(), CommitError> {
        let gone = self.look(|this, snapshot| this.expendable_marks(snapshot, Timestamp::wall())).await?;
        if gone.is_empty() {
            return Ok(());
        }
        for GivenUp { place, why, .. } in &gone {
            tracing::info!(plugin = place.0.0, "a way back is given up: {why}");
        }
        let now = Timestamp::wall();
        self.commit
            .change(move |write, told| {
                for GivenUp { place, mark: seen, why } in &gone {
                    // It may have been gone back to meanwhile, or confirmed, or more was saved.
                    let now_there =
                        mark::marks_within(write, place.0)?.into_iter().find(|(it, _)| it == place);
                    let Some((_, mark)) = now_there else { continue };
                    if (mark.change, mark.probation.is_some()) != (seen.change, seen.probation.is_some()) {
                        continue;
                    }
                    give_up(write, *place, &mark)?;
                    if mark.probation.is_some() {
                        let reason = format!("its probation is over, for there is no way back: {why}");
                        told.amend(write, mark.change, now, |change| {
                            change.ended(State::ConfirmedUnproven, Some(reason), None);
                        })?;
                    }
                }
                Ok(())
            })
            .await
    }

    /// The ways back that are too old or too much, oldest first.
    fn expendable_marks(&self, snapshot: &Snapshot, now: Timestamp) -> Result<Vec<GivenUp>, StoreError> {
        let log_start = snapshot.table(LOG)?.first()?.map_or(0, |(first, _)| first.value());
        let mut excess = undo::bytes_of(snapshot)?.saturating_sub(self.undo.bytes);
        let mut short = self.excess(snapshot)?;
        let mut gone = Vec::new();
        for (place, mark) in all(snapshot)? {
            let is_confirmed = mark.probation.is_none();
            let why = if is_confirmed && now.since(mark.since) > self.undo.time {
                "its time is over (replacement.undo_hours)"
            } else if is_confirmed && mark.cursor < log_start {
                "the log is not kept that long (store.log)"
            } else if is_confirmed && excess > 0 {
                "more has changed since than may be kept (replacement.undo_bytes)"
            } else if short > 0 {
                "the store has no room for it"
            } else {
                continue;
            };
            excess = excess.saturating_sub(mark.bytes);
            short = short.saturating_sub(mark.bytes.max(1));
            gone.push(GivenUp { place, mark, why });
        }
        Ok(gone)
    }
}
