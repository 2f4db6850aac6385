//! Owns what a transaction does when a plugin's code changes: the mark from before it, the verdict on it, and
//! the way back to a mark.

use std::collections::BTreeMap;

use redb::{ReadableTable as _, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::apply::NameChanges;
use crate::change::{self, Change, State};
use crate::effect::{NameUpdate, Publish};
use crate::entry::{Event, Kind, Offset, Origin};
use crate::ident::{IpnsName, KeyName};
use crate::plugin::mark::{self, Mark};
use crate::plugin::{Batch, Handover, Probation, TakeBack, Verdict, World, roster};
use crate::store::names::{self, Known};
use crate::store::undo::{Part, Place, Saved, add_bytes, remove_mark};
use crate::store::{
    CURSORS, LOG, STATE, StateKey, StoreError, TIMERS, WORLDS, dead, history, next_numbers, outbox, retries,
};
use crate::time::Timestamp;

/// What is told of changes in one transaction.
#[derive(Default)]
pub struct Told {
    /// Entries of the log.
    pub entries: Vec<Kind>,
    /// The changes, as they stand; each is a publish that joined the outbox.
    pub changes: Vec<Change>,
}

impl Told {
    /// Publishes how a change stands on the topic of changes.
    pub fn tell(
        &mut self,
        write: &WriteTransaction,
        change: &Change,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let topic: crate::ident::Topic = change::TOPIC.parse().expect("a valid topic");
        let data = bytes::Bytes::from(serde_json::to_vec(change).expect("a change is plain data"));
        outbox::enqueue(write, None, &[Publish { topic: topic.clone(), data: data.clone() }], now)?;
        self.changes.push(change.clone());
        self.entries.push(Kind::Event(Event::Message { topic, data, origin: Origin::Host }));
        Ok(())
    }

    /// Puts a change on record, and tells of it; returns its number.
    pub fn record(
        &mut self,
        write: &WriteTransaction,
        change: &Change,
        now: Timestamp,
    ) -> Result<u64, StoreError> {
        let number = history::add(write, change)?;
        self.tell(write, change, now)?;
        Ok(number)
    }

    /// Changes what is on record of a change, and tells how it stands now.
    pub fn amend(
        &mut self,
        write: &WriteTransaction,
        number: u64,
        now: Timestamp,
        amend: impl FnOnce(&mut Change),
    ) -> Result<(), StoreError> {
        match history::amend(write, number, amend)? {
            Some(change) => self.tell(write, &change, now),
            None => Ok(()),
        }
    }
}

/// Looks, before anything of a batch is applied, for the mark whose rows have to be saved: the newest of its
/// plugin. One is made first if other code takes over with the batch.
pub fn begin(
    write: &WriteTransaction,
    batch: &Batch,
    now: Timestamp,
    told: &mut Told,
) -> Result<Option<Place>, StoreError> {
    if let Some(quarantine) = &batch.quarantine {
        let row = roster::row_within(write, &batch.plugin)?;
        if let Some(quarantine) = quarantine {
            let (by, source) = ("the host".to_owned(), row.code.source());
            let mut change = Change::new(batch.plugin.clone(), State::Quarantined, by, source);
            change.after = Some(row.as_version());
            change.reason = Some(quarantine.reason.clone());
            told.record(write, &change, now)?;
        }
        roster::put_within(write, &batch.plugin, &roster::Row { quarantine: quarantine.clone(), ..row })?;
    }
    let newest = mark::newest_within(write, batch.id)?;
    if let Some(handover) = &batch.handover {
        return Ok(Some(hand_over(write, batch, handover, newest, now, told)?));
    }
    let Some((place, mut mark)) = newest else { return Ok(None) };
    if let (Some(probation), true) = (&batch.probation, mark.probation.is_some()) {
        mark.probation = Some(*probation);
        mark.put(write, place)?;
    }
    if let Some(verdict) = &batch.verdict {
        let state = match verdict {
            Verdict::Unproven => State::ConfirmedUnproven,
            Verdict::Confirmed | Verdict::Fails(_) => State::Confirmed,
        };
        mark.probation = None;
        mark.put(write, place)?;
        told.amend(write, mark.change, now, |change| change.ended(state, None, None))?;
    }
    Ok(Some(place))
}

/// Makes a mark, or goes on with the one of code that was not confirmed yet: the way back leads to what was.
fn hand_over(
    write: &WriteTransaction,
    batch: &Batch,
    handover: &Handover,
    newest: Option<(Place, Mark)>,
    now: Timestamp,
    told: &mut Told,
) -> Result<Place, StoreError> {
    let before = roster::row_within(write, &batch.plugin)?;
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
    let row = roster::Row {
        code,
        follows,
        setup,
        claim,
        // What came after it waits on.
        pending: before.pending.clone().filter(|pending| {
            pending.digest != handover.code.digest
                && handover.change.steps.first().is_none_or(|begun| pending.since > begun.at)
        }),
        quarantine: None,
        generation: batch.by,
        ..before.clone()
    };
    roster::put_within(write, &batch.plugin, &row)?;
    let probation = Some(Probation::new(handover.rates));
    if let Some((place, mark)) = newest.filter(|(_, mark)| mark.probation.is_some()) {
        told.amend(write, mark.change, now, |change| change.ended(State::Replaced, None, None))?;
        // Measured against the code that was confirmed last.
        let before = mark.probation.map_or(handover.rates, |probation| probation.before);
        let probation = Some(Probation::new(before));
        Mark { probation, change: number, ..mark }.put(write, place)?;
        return Ok(place);
    }
    let place = Place(batch.id, batch.by);
    let cursor = write.open_table(CURSORS)?.get(batch.id.0)?.map(|cursor| cursor.value());
    let (_, state_size) = cursor.ok_or_else(|| StoreError::corrupt("cursors", "a plugin has none"))?;
    let world = write.open_table(WORLDS)?.get(batch.id.0)?.map(|world| world.value().to_vec());
    let mut saved = Saved::open(write, place)?;
    saved.save(Part::World, b"", world.as_deref())?;
    let mark = Mark {
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
    mark.put(write, place)?;
    Ok(place)
}

/// Counts what was saved for a mark.
pub fn count_saved(write: &WriteTransaction, place: Place, bytes: u64) -> Result<(), StoreError> {
    if bytes == 0 {
        return Ok(());
    }
    add_bytes(write, bytes as i64)?;
    match mark::newest_within(write, place.0)? {
        Some((newest, mark)) if newest == place => {
            Mark { bytes: mark.bytes + bytes, ..mark }.put(write, place)
        }
        _ => Ok(()),
    }
}

/// A name as it was before a mark.
#[derive(Serialize, Deserialize)]
struct SavedName {
    name: IpnsName,
    before: Option<Known>,
    /// The count of the value that the plugin gave it last.
    last: u64,
}

/// Gives an own name the value of a batch, and saves the one from before the mark.
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

/// Goes back to a mark: what the plugin had then, its code from then, its cursor from then. What is in the log
/// since is handled again. Returns the world from then.
pub fn take_back(
    write: &WriteTransaction,
    batch: &Batch,
    order: &TakeBack,
    head: Offset,
    (now, names): (Timestamp, &mut NameChanges),
    told: &mut Told,
) -> Result<Option<World>, StoreError> {
    let row = roster::row_within(write, &batch.plugin)?;
    let marks: Vec<_> =
        mark::marks_within(write, batch.id)?.into_iter().filter(|(place, _)| place.1 >= order.to).collect();
    // A mark that was given up leads nowhere, nor does one that was made since.
    let Some((Place(_, first), target)) = marks.last().filter(|(place, _)| place.1 == order.to).cloned()
    else {
        return Ok(None);
    };
    // Nor does one whose entries the log no longer holds.
    if write.open_table(LOG)?.first()?.is_some_and(|(first, _)| first.value() > target.cursor) {
        return Ok(None);
    }
    let (mut world, mut is_told) = (None, false);
    let mut saved_names = BTreeMap::new();
    let state = if order.is_verdict { State::TakenBack } else { State::RolledBack };
    let replayed = Some(batch.cursor.0.saturating_sub(target.cursor));
    for (place, mark) in &marks {
        world = Some(restore_rows(write, *place, &mut saved_names)?);
        let mut saved = Saved::open(write, *place)?;
        saved.forget()?;
        drop(saved);
        remove_mark(write, *place, mark.bytes)?;
        told.amend(write, mark.change, now, |change| {
            is_told |= change.after.as_ref().is_some_and(|after| after.digest == row.code.digest);
            change.ended(state, Some(order.reason.clone()), replayed);
        })?;
    }
    // What runs may have come without a mark: when the plugin was installed anew.
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
    retries::drop_of(write, &batch.plugin, first)?;
    dead::retract(write, &batch.plugin, target.next_dead, first)?;
    let mut own = BTreeMap::new();
    for (key, name) in &order.own {
        let known = names::known_within(write, key)?;
        own.insert(name.clone(), known.map(|known| known.resolution(name.clone())));
    }
    let world = world.flatten().map(|world| World::from_bytes(&world)).transpose()?;
    let mut world = world.unwrap_or_default();
    world.void((first, batch.by), own, head);
    write.open_table(WORLDS)?.insert(batch.id.0, world.to_bytes().as_slice())?;
    write.open_table(CURSORS)?.insert(batch.id.0, (target.cursor, target.state_size))?;
    let Mark { before, .. } = target;
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
    let row =
        roster::Row { code, state_version, follows, setup, quarantine: None, generation: batch.by, ..row };
    roster::put_within(write, &batch.plugin, &row)?;
    Ok(Some(world))
}

/// Puts back what is saved with a mark, but for names: of each the oldest is what counts. Returns the world.
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
    Ok(saved.get(Part::World, b"")?.flatten())
}

/// Gives up a mark: there is no way back to it any more.
pub fn give_up(write: &WriteTransaction, place: Place, mark: &Mark) -> Result<(), StoreError> {
    let mut saved = Saved::open(write, place)?;
    saved.each(Part::Names, |_, value| {
        let Some(SavedName { before: Some(before), .. }) = value.map(decode).transpose()? else {
            return Ok(());
        };
        names::release_document(write, &before)
    })?;
    saved.forget()?;
    drop(saved);
    remove_mark(write, place, mark.bytes)
}
