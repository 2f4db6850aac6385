//! Owns what one transaction holds: the effects of batches and the changes of names, as rows.

use cid::Cid;
use redb::WriteTransaction;

use super::NameChange;
use crate::effect::NameUpdate;
use crate::entry::{Event, Kind, Offset, Origin};
use crate::ident::KeyName;
use crate::plugin::{Batch, roster};
use crate::store::names::Changed;
use crate::store::{
    CURSORS, PLUGINS, RETRIES, STATE, StateKey, StoreError, TIMERS, WORLDS, dead, documents, followed, names,
    next_numbers, outbox,
};
use crate::time::Timestamp;

/// Which stages have work after a commit.
#[derive(Clone, Copy, Default)]
pub struct Wakes {
    /// The outbox.
    pub outbox: bool,
    /// The names.
    pub names: bool,
    /// The retries.
    pub retries: bool,
}

impl Wakes {
    /// Adds the stages that have work after a part of the commit.
    pub fn add(&mut self, other: Self) {
        self.outbox |= other.outbox;
        self.names |= other.names;
        self.retries |= other.retries;
    }
}

/// The changes of names in one transaction.
pub struct NameChanges {
    now: Timestamp,
    superseded: Vec<Cid>,
}

impl NameChanges {
    /// None yet; those that follow are made at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self { now, superseded: Vec::new() }
    }

    /// Makes a change; returns what its followers are told.
    pub fn make(
        &mut self,
        write: &WriteTransaction,
        change: &NameChange,
    ) -> Result<Option<Kind>, StoreError> {
        match change {
            NameChange::Own { key, update } => self.set_own(write, key, update),
            NameChange::Followed { known, cid, data } => {
                Ok(Some(self.note(followed::set(write, known, cid, data)?)))
            }
            NameChange::Again { name, key: Some(key) } => {
                let known = names::known_within(write, key)?;
                Ok(known.map(|known| told(known.resolution(name.clone()))))
            }
            NameChange::Again { name, key: None } => {
                Ok(followed::known_within(write, name)?.map(|known| told(known.resolution)))
            }
        }
    }

    /// Gives an own name a new value; returns what its followers are told.
    pub fn set_own(
        &mut self,
        write: &WriteTransaction,
        key: &KeyName,
        update: &NameUpdate,
    ) -> Result<Option<Kind>, StoreError> {
        Ok(names::set(write, key, update, self.now)?.map(|changed| self.note(changed)))
    }

    fn note(&mut self, changed: Changed) -> Kind {
        self.superseded.extend(changed.superseded);
        told(changed.resolution)
    }

    /// Passes the documents that no name points to any more on to the log, whose last entry is at
    /// `last`: no entry before the changes comes after it.
    pub fn settle(self, write: &WriteTransaction, last: Offset) -> Result<(), StoreError> {
        self.superseded.iter().try_for_each(|cid| documents::supersede(write, last, cid))
    }
}

fn told(resolution: crate::entry::Resolution) -> Kind {
    Kind::Event(Event::NameChanged(resolution))
}

/// What a batch adds to the log: its publishes, for the other plugins, its subscriptions, and the
/// limits that struck.
pub fn entries_of(batch: &Batch) -> Vec<Kind> {
    let origin = Origin::Plugin(batch.plugin.clone());
    let messages = batch.publishes.iter().map(|publish| {
        Kind::Event(Event::Message {
            topic: publish.topic.clone(),
            data: publish.data.clone(),
            origin: origin.clone(),
        })
    });
    let subscriptions = batch.subscriptions.iter().map(|(topic, subscribed)| Kind::Subscription {
        plugin: batch.plugin.clone(),
        topic: topic.clone(),
        subscribed: *subscribed,
    });
    messages.chain(subscriptions).chain(batch.struck.iter().cloned()).collect()
}

/// Writes the effects of a batch and its cursor; returns how many old dead letters had to go.
pub fn apply(
    write: &WriteTransaction,
    batch: &Batch,
    now: Timestamp,
    kept: &dead::Quota,
    wakes: &mut Wakes,
) -> Result<u64, StoreError> {
    apply_state(write, batch)?;
    apply_timers(write, batch)?;
    write.open_table(CURSORS)?.insert(batch.id.0, (batch.cursor.0, batch.state_size))?;
    if let Some(world) = &batch.world {
        write.open_table(WORLDS)?.insert(batch.id.0, world.as_slice())?;
    }
    if let Some(handover) = &batch.handover {
        roster::set_code(&mut write.open_table(PLUGINS)?, &batch.plugin, &handover.code)?;
    }
    if let Some(version) = batch.started {
        roster::set_state_version(&mut write.open_table(PLUGINS)?, &batch.plugin, version)?;
    }
    if !batch.publishes.is_empty() {
        outbox::enqueue(write, Some(&batch.plugin), &batch.publishes, now)?;
        wakes.outbox = true;
    }
    wakes.names |= !batch.names.is_empty();
    apply_retries(write, batch, wakes)?;
    if batch.dead.is_empty() { Ok(0) } else { dead::put(write, &batch.dead, kept) }
}

fn apply_state(write: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    if batch.state.is_empty() {
        return Ok(());
    }
    let mut table = write.open_table(STATE)?;
    for (key, value) in &batch.state {
        let key = StateKey::new(batch.id, key);
        match value {
            Some(value) => table.insert(key.as_bytes(), value.as_slice())?,
            None => table.remove(key.as_bytes())?,
        };
    }
    Ok(())
}

fn apply_timers(write: &WriteTransaction, batch: &Batch) -> Result<(), StoreError> {
    if batch.timers.is_empty() {
        return Ok(());
    }
    let mut table = write.open_table(TIMERS)?;
    for (key, at) in &batch.timers {
        let key = StateKey::new(batch.id, key.as_bytes());
        match at {
            Some(at) => table.insert(key.as_bytes(), at.0)?,
            None => table.remove(key.as_bytes())?,
        };
    }
    Ok(())
}

fn apply_retries(write: &WriteTransaction, batch: &Batch, wakes: &mut Wakes) -> Result<(), StoreError> {
    if !batch.retries.is_empty() {
        let first = next_numbers(write, "retries", batch.retries.len() as u64)?;
        let mut table = write.open_table(RETRIES)?;
        for (number, retry) in (first..).zip(&batch.retries) {
            table.insert((retry.at.0, number), retry.to_bytes(&batch.plugin).as_slice())?;
        }
        wakes.retries = true;
    }
    Ok(())
}
