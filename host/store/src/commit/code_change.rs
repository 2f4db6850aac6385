//! Owns the part of a transaction that changes a plugin's code: the checkpoint before the change, the verdict
//! on it, and the rollback to a checkpoint.

use std::collections::BTreeMap;

use dim_model::entry::{Event, Kind, Offset, Origin};
use dim_model::ident::{IpnsName, KeyName};
use dim_model::time::Timestamp;
use redb::{ReadableTable as _, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::apply::NameChanges;
use crate::batch::Batch;
use crate::change::{self, Change, State};
use crate::checkpoint::{self, Checkpoint};
use crate::effect::{NameUpdate, Publish};
use crate::entry_context::EntryContext;
use crate::handover::{Handover, TakeBack};
use crate::names::{self, Known};
use crate::plugin_registry;
use crate::probation::{Probation, Verdict};
use crate::rollback_rows::{Part, Place, Saved, add_bytes, remove_checkpoint};
use crate::{
    CURSORS, LOG, STATE, StateKey, StoreError, TIMERS, WORLDS, change_history, dead_letters, next_numbers,
    outbox, retry_rows,
};

/// The announcements of changes in one transaction.
#[derive(Default)]
pub struct Announcements {
    /// Entries of the log.
    pub entries: Vec<Kind>,
    /// The changes in their current state; each is also a publish in the outbox.
    pub changes: Vec<Change>,
}

impl Announcements {
    /// Publishes the current state of a change on the topic of changes.
    pub fn tell(
        &mut self,
        write: &WriteTransaction,
        change: &Change,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let topic: dim_model::ident::Topic = change::TOPIC.parse().expect("a valid topic");
        let data = bytes::Bytes::from(serde_json::to_vec(change).expect("a change is plain data"));
        outbox::enqueue(write, None, &[Publish { topic: topic.clone(), data: data.clone() }], now)?;
        self.changes.push(change.clone());
        self.entries.push(Kind::Event(Event::Message { topic, data, origin: Origin::Host }));
        Ok(())
    }

    /// Records a change and announces it; returns its number.
    pub fn record(
        &mut self,
        write: &WriteTransaction,
        change: &Change,
        now: Timestamp,
    ) -> Result<u64, StoreError> {
        let number = change_history::add(write, change)?;
        self.tell(write, change, now)?;
        Ok(number)
    }

    /// Updates the record of a change and announces its new state.
    pub fn amend(
        &mut self,
        write: &WriteTransaction,
        number: u64,
        now: Timestamp,
        amend: impl FnOnce(&mut Change),
    ) -> Result<(), StoreError> {
        match change_history::amend(write, number, amend)? {
            Some(change) => self.tell(write, &change, now),
            None => Ok(()),
        }
    }
}

/// Finds the checkpoint that receives the old values of the batch's rows, which is the plugin's newest; runs
/// before anything of the batch is applied. If new code takes over with the batch, it makes the checkpoint
/// first.
pub fn begin(
    write: &WriteTransaction,
    batch: &Batch,
    now: Timestamp,
    told: &mut Announcements,
) -> Result<Option<Place>, StoreError> {
    if let Some(quarantine) = &batch.code.quarantine {
        let row = plugin_registry::row_within(write, &batch.plugin)?;
        if let Some(quarantine) = quarantine {
            let (by, source) = ("the host".to_owned(), row.code.source());
            let mut change = Change::new(batch.plugin.clone(), State::Quarantined, by, source);
            change.after = Some(row.as_version());
            change.reason = Some(quarantine.reason.clone());
            told.record(write, &change, now)?;
        }
        plugin_registry::put_within(
            write,
            &batch.plugin,
            &plugin_registry::Row { quarantine: quarantine.clone(), ..row },
        )?;
    }
    let newest = checkpoint::newest_within(write, batch.id)?;
    if let Some(handover) = &batch.code.handover {
        return Ok(Some(hand_over(write, batch, handover, newest, now, told)?));
    }
    let Some((place, mut checkpoint)) = newest else { return Ok(None) };
    if let (Some(probation), true) = (&batch.code.probation, checkpoint.probation.is_some()) {
        checkpoint.probation = Some(*probation);
        checkpoint.put(write, place)?;
    }
    if let Some(verdict) = &batch.code.verdict {
        let state = match verdict {
            Verdict::Unproven => State::ConfirmedUnproven,
            Verdict::Confirmed | Verdict::Fails(_) => State::Confirmed,
        };
        checkpoint.probation = None;
        checkpoint.put(write, place)?;
        told.amend(write, checkpoint.change, now, |change| change.ended(state, None, None))?;
    }
    Ok(Some(place))
}

/// Makes a checkpoint, or keeps that of unconfirmed code: a rollback must lead to the code that was confirmed last.
fn hand_over(
    write: &WriteTransaction,
    batch: &Batch,
    handover: &Handover,
    newest: Option<(Place, Checkpoint)>,
    now: Timestamp,
    told: &mut Announcements,
) -> Result<Place, StoreError> {
    let before = plugin_registry::row_within(write, &batch.plugin)?;
    let (at, pause) = (handover.taken_over.at, handover.taken_over.pause);
    let mut change = handover.change.clone();
    change.taken_over(before.as_version(), at, pause);
    let number = told.record(write, &change, now)?;
    told.entries.push(Kind::Code {
        plugin: batch.plugin.clone(),
        generation: batch.by,
        digest: handover.code.digest.clone(),
        at,
        voids: None,
    });
    let (code, follows) = (handover.code.clone(), handover.follows.clone());
    let (setup, claim) = (handover.setup.clone(), handover.claim.clone());
    let row = plugin_registry::Row {
        code,
        follows,
        setup,
        claim,
        // A pending component stays if it arrived after this change began.
        pending: before.pending.clone().filter(|pending| {
            pending.digest != handover.code.digest
                && handover.change.steps.first().is_none_or(|begun| pending.since > begun.at)
        }),
        quarantine: None,
        generation: batch.by,
        ..before.clone()
    };
    plugin_registry::put_within(write, &batch.plugin, &row)?;
    let probation = Some(Probation::new(handover.rates));
    if let Some((place, checkpoint)) = newest.filter(|(_, checkpoint)| checkpoint.probation.is_some()) {
        told.amend(write, checkpoint.change, now, |change| change.ended(State::Replaced, None, None))?;
        // Code is measured against the code that was confirmed last.
        let before = checkpoint.probation.map_or(handover.rates, |probation| probation.before);
        let probation = Some(Probation::new(before));
        Checkpoint { probation, change: number, ..checkpoint }.put(write, place)?;
        return Ok(place);
    }
    let place = Place(batch.id, batch.by);
    let cursor = write.open_table(CURSORS)?.get(batch.id.0)?.map(|cursor| cursor.value());
    let (_, state_size) = cursor.ok_or_else(|| StoreError::corrupt("cursors", "a plugin has none"))?;
    let context = write.open_table(WORLDS)?.get(batch.id.0)?.map(|context| context.value().to_vec());
    let mut saved = Saved::open(write, place)?;
    saved.save(Part::EntryContext, b"", context.as_deref())?;
    let checkpoint = Checkpoint {
        before,
        cursor: at.0,
        state_size,
        next_dead: next_numbers(write, "dead", 0)?,
        next_outbox: next_numbers(write, "outbox", 0)?,
        since: now,
        probation,
        change: number,
        bytes: saved.bytes,
    };
    add_bytes(write, saved.bytes as i64)?;
    checkpoint.put(write, place)?;
    Ok(place)
}

/// Adds the size of saved values to that of a checkpoint.
pub fn count_saved(write: &WriteTransaction, place: Place, bytes: u64) -> Result<(), StoreError> {
    if bytes == 0 {
        return Ok(());
    }
    add_bytes(write, bytes as i64)?;
    match checkpoint::newest_within(write, place.0)? {
        Some((newest, checkpoint)) if newest == place => {
            Checkpoint { bytes: checkpoint.bytes + bytes, ..checkpoint }.put(write, place)
        }
        _ => Ok(()),
    }
}

/// The value of a name from before a checkpoint.
#[derive(Serialize, Deserialize)]
struct SavedName {
    name: IpnsName,
    before: Option<Known>,
    /// The sequence of the last value that the plugin has set.
    last: u64,
}

/// Sets the value of an own name from a batch, and saves the value from before the checkpoint.
pub fn set_name(
    write: &WriteTransaction,
    place: Option<Place>,
    key: &KeyName,
    update: &NameUpdate,
    names: &mut NameChanges,
) -> Result<Option<Kind>, StoreError> {
    let before = match place {
        Some(_) => names::known_within(write, key)?,
        None => None,
    };
    let told = names.set_own(write, key, update)?;
    let Some(place) = place else { return Ok(told) };
    let last = names::known_within(write, key)?.map_or(0, |known| known.sequence);
    let row = key.as_str().as_bytes();
    let mut saved = Saved::open(write, place)?;
    let older = saved.get(Part::Names, row)?.flatten();
    let now = match older {
        Some(older) => SavedName { last, ..decode(&older)? },
        None => {
            if let Some(before) = &before {
                names::hold_document(write, before)?;
            }
            SavedName { name: update.name.clone(), before, last }
        }
    };
    let bytes = serde_json::to_vec(&now).expect("a name is plain data");
    if saved.save(Part::Names, row, Some(&bytes))? {
        let added = saved.bytes;
        drop(saved);
        count_saved(write, place, added)?;
    } else {
        saved.replace(Part::Names, row, &bytes)?;
    }
    Ok(told)
}

fn decode(bytes: &[u8]) -> Result<SavedName, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("undo", error))
}

/// Rolls back to a checkpoint: restores the plugin's rows, code and cursor from then. The plugin handles the
/// entries since then again. Returns the context from then, or `None` if the checkpoint cannot be used.
pub fn take_back(
    write: &WriteTransaction,
    batch: &Batch,
    order: &TakeBack,
    head: Offset,
    (now, names): (Timestamp, &mut NameChanges),
    told: &mut Announcements,
) -> Result<Option<EntryContext>, StoreError> {
    let row = plugin_registry::row_within(write, &batch.plugin)?;
    let checkpoints: Vec<_> = checkpoint::checkpoints_within(write, batch.id)?
        .into_iter()
        .filter(|(place, _)| place.1 >= order.to)
        .collect();
    // The checkpoint was dropped, or made only after the order.
    let Some((Place(_, first), target)) =
        checkpoints.last().filter(|(place, _)| place.1 == order.to).cloned()
    else {
        return Ok(None);
    };
    // The log no longer contains the entries after the checkpoint.
    if write.open_table(LOG)?.first()?.is_some_and(|(first, _)| first.value() > target.cursor) {
        return Ok(None);
    }
    let (mut context, mut is_told) = (None, false);
    let mut saved_names = BTreeMap::new();
    let state = if order.is_verdict { State::TakenBack } else { State::RolledBack };
    let replayed = Some(batch.cursor.0.saturating_sub(target.cursor));
    for (place, checkpoint) in &checkpoints {
        context = Some(restore_rows(write, *place, &mut saved_names)?);
        let mut saved = Saved::open(write, *place)?;
        saved.forget()?;
        drop(saved);
        remove_checkpoint(write, *place, checkpoint.bytes)?;
        told.amend(write, checkpoint.change, now, |change| {
            is_told |= change.after.as_ref().is_some_and(|after| after.digest == row.code.digest);
            change.ended(state, Some(order.reason.clone()), replayed);
        })?;
    }
    // The running code has no checkpoint if the plugin was installed anew.
    if !is_told {
        let by = order.reason.clone();
        let mut change = Change::new(batch.plugin.clone(), state, by, row.code.source());
        change.before = Some(target.before.as_version());
        change.after = Some(row.as_version());
        change.because(order.reason.clone());
        change.replayed = replayed;
        told.record(write, &change, now)?;
    }
    for (key, SavedName { name, before, last }) in saved_names {
        told.entries.extend(names.restore_own(write, &key, (name, before), last)?);
    }
    outbox::void_since(write, &batch.plugin, target.next_outbox)?;
    retry_rows::drop_of(write, &batch.plugin, first)?;
    dead_letters::retract(write, &batch.plugin, target.next_dead, first)?;
    let mut own = BTreeMap::new();
    for (key, name) in &order.own {
        let known = names::known_within(write, key)?;
        own.insert(name.clone(), known.map(|known| known.resolution(name.clone())));
    }
    let context = context.flatten().map(|context| EntryContext::from_bytes(&context)).transpose()?;
    let mut context = context.unwrap_or_default();
    context.void((first, batch.by), own, head);
    write.open_table(WORLDS)?.insert(batch.id.0, context.to_bytes().as_slice())?;
    write.open_table(CURSORS)?.insert(batch.id.0, (target.cursor, target.state_size))?;
    let Checkpoint { before, .. } = target;
    told.entries.push(Kind::Code {
        plugin: batch.plugin.clone(),
        generation: batch.by,
        digest: order.code.digest.clone(),
        at: Offset(target.cursor),
        voids: Some(first),
    });
    let (code, state_version) = (order.code.clone(), before.state_version);
    let follows = row.follows.clone().or(before.follows);
    let setup = row.setup.going_back(&before.setup);
    let row = plugin_registry::Row {
        code,
        state_version,
        follows,
        setup,
        quarantine: None,
        generation: batch.by,
        ..row
    };
    plugin_registry::put_within(write, &batch.plugin, &row)?;
    Ok(Some(context))
}

/// Restores the rows that a checkpoint has saved, except names: it collects these, and the oldest value of each
/// counts. Returns the context.
fn restore_rows(
    write: &WriteTransaction,
    place: Place,
    saved_names: &mut BTreeMap<KeyName, SavedName>,
) -> Result<Option<Vec<u8>>, StoreError> {
    let saved = Saved::open(write, place)?;
    let id = place.0;
    let mut state = write.open_table(STATE)?;
    saved.each(Part::State, |key, value| {
        let key = StateKey::new(id, key);
        match value {
            Some(value) => state.insert(key.as_bytes(), value)?,
            None => state.remove(key.as_bytes())?,
        };
        Ok(())
    })?;
    let mut timers = write.open_table(TIMERS)?;
    saved.each(Part::Timers, |key, value| {
        let key = StateKey::new(id, key);
        match value.map(<[u8; 8]>::try_from) {
            Some(Ok(at)) => timers.insert(key.as_bytes(), u64::from_be_bytes(at))?,
            Some(Err(_)) => return Err(StoreError::corrupt("undo", "not a time")),
            None => timers.remove(key.as_bytes())?,
        };
        Ok(())
    })?;
    saved.each(Part::Names, |key, value| {
        let (Ok(key), Some(value)) = (std::str::from_utf8(key), value) else { return Ok(()) };
        let key: KeyName = key.parse().map_err(|error| StoreError::corrupt("undo", error))?;
        let older = decode(value)?;
        let Some(newer) = saved_names.remove(&key) else {
            saved_names.insert(key, older);
            return Ok(());
        };
        saved_names.insert(key, SavedName { last: newer.last, ..older });
        newer.before.map_or(Ok(()), |before| names::release_document(write, &before))
    })?;
    Ok(saved.get(Part::EntryContext, b"")?.flatten())
}

/// Drops a checkpoint: a rollback to it is no longer possible.
pub fn give_up(write: &WriteTransaction, place: Place, checkpoint: &Checkpoint) -> Result<(), StoreError> {
    let mut saved = Saved::open(write, place)?;
    saved.each(Part::Names, |_, value| {
        let Some(SavedName { before: Some(before), .. }) = value.map(decode).transpose()? else {
            return Ok(());
        };
        names::release_document(write, &before)
    })?;
    saved.forget()?;
    drop(saved);
    remove_checkpoint(write, place, checkpoint.bytes)
}
