//! Owns the rows of one transaction: the effects of batches and the changes of names.

use cid::Cid;
use dim_model::entry::{Event, Kind, Offset, Origin};
use dim_model::ident::{IpnsName, KeyName};
use dim_model::time::Timestamp;
use redb::{AccessGuard, WriteTransaction};

use super::{NameChange, code_change};
use crate::batch::Batch;
use crate::effect::NameUpdate;
use crate::entry_context::SubscriptionRequest;
use crate::names::{Changed, Known};
use crate::plugin_registry;
use crate::rollback_rows::{Part, Place, Saved};
use crate::{
    CURSORS, PLUGINS, RETRIES, STATE, StateKey, StoreError, TIMERS, WORLDS, dead_letters, documents,
    followed_names, names, next_numbers, outbox,
};

/// The stages that have work after a commit.
#[derive(Clone, Copy, Default)]
pub struct Wakes {
    /// The outbox.
    pub outbox: bool,
    /// The publisher of names.
    pub names: bool,
    /// The scheduler of retries.
    pub retries: bool,
}

impl Wakes {
    /// Adds the stages that have work after another part of the commit.
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
    /// Creates an empty set of changes, which are made at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self { now, superseded: Vec::new() }
    }

    /// Applies a change; returns the event for the name's followers.
    pub fn make(
        &mut self,
        write: &WriteTransaction,
        change: &NameChange,
    ) -> Result<Option<Kind>, StoreError> {
        match change {
            NameChange::Own { key, update } => self.set_own(write, key, update),
            NameChange::Found { key, value } => {
                Ok(names::find(write, key, value, self.now)?.map(|changed| self.note(changed)))
            }
            NameChange::TakenOver { key, value } => {
                let changed = names::take_over(write, key, value, self.now)?;
                Ok(changed.map(|changed| self.note(changed)))
            }
            NameChange::Followed { known, cid, data } => {
                Ok(Some(self.note(followed_names::set(write, known, cid, data)?)))
            }
            NameChange::Again { name, key: Some(key) } => {
                let known = names::known_within(write, key)?;
                Ok(known.map(|known| told(known.resolution(name.clone()))))
            }
            NameChange::Again { name, key: None } => {
                Ok(followed_names::known_within(write, name)?.map(|known| told(known.resolution)))
            }
        }
    }

    /// Sets a new value of an own name; returns the event for its followers.
    pub fn set_own(
        &mut self,
        write: &WriteTransaction,
        key: &KeyName,
        update: &NameUpdate,
    ) -> Result<Option<Kind>, StoreError> {
        Ok(names::set(write, key, update, self.now)?.map(|changed| self.note(changed)))
    }

    /// Restores the earlier value of an own name; returns the event for its followers.
    pub fn restore_own(
        &mut self,
        write: &WriteTransaction,
        key: &KeyName,
        before: (IpnsName, Option<Known>),
        last: u64,
    ) -> Result<Option<Kind>, StoreError> {
        Ok(names::restore(write, key, before, last, self.now)?.map(|changed| self.note(changed)))
    }

    fn note(&mut self, changed: Changed) -> Kind {
        self.superseded.extend(changed.superseded);
        told(changed.resolution)
    }

    /// Passes the documents that no name points to any more to the log, whose last entry is at `last`. All
    /// entries from before the changes have offsets up to `last`.
    pub fn settle(self, write: &WriteTransaction, last: Offset) -> Result<(), StoreError> {
        self.superseded.iter().try_for_each(|cid| documents::supersede(write, last, cid))
    }
}

fn told(resolution: dim_model::entry::Resolution) -> Kind {
    Kind::Event(Event::NameChanged(resolution))
}

/// The entries that a batch adds to the log: its publishes, for the other plugins, its subscriptions, and its
/// exceeded limits.
pub fn entries_of(batch: &Batch) -> Vec<Kind> {
    let origin = Origin::Plugin(batch.plugin.clone());
    let messages = batch.requested.publishes.iter().map(|publish| {
        Kind::Event(Event::Message {
            topic: publish.topic.clone(),
            data: publish.data.clone(),
            origin: origin.clone(),
        })
    });
    let subscriptions =
        batch.requested.subscriptions.iter().map(|(topic, SubscriptionRequest(beginning))| {
            Kind::Subscription {
                plugin: batch.plugin.clone(),
                topic: topic.clone(),
                subscribed: beginning.is_some(),
                beginning: beginning.unwrap_or_default(),
                own_too: beginning.is_some(),
                by: batch.by,
            }
        });
    messages.chain(subscriptions).chain(batch.requested.struck.iter().cloned()).collect()
}

/// Writes the effects of a batch and its cursor.
pub fn apply(
    write: &WriteTransaction,
    batch: &Batch,
    now: Timestamp,
    kept: &dead_letters::Quota,
    undo: Option<Place>,
    wakes: &mut Wakes,
) -> Result<(), StoreError> {
    if let Some(place) = undo {
        let mut saved = Saved::open(write, place)?;
        apply_state(write, batch, Some(&mut saved))?;
        apply_timers(write, batch, Some(&mut saved))?;
        let bytes = saved.bytes;
        drop(saved);
        code_change::count_saved(write, place, bytes)?;
    } else {
        apply_state(write, batch, None)?;
        apply_timers(write, batch, None)?;
    }
    write.open_table(CURSORS)?.insert(batch.id.0, (batch.cursor.0, batch.requested.state_size))?;
    if let Some(context) = &batch.context {
        write.open_table(WORLDS)?.insert(batch.id.0, context.as_slice())?;
    }
    if let Some(rates) = batch.code.rates {
        plugin_registry::set_rates(write, &batch.plugin, rates)?;
    }
    if let Some(version) = batch.code.started {
        plugin_registry::set_state_version(&mut write.open_table(PLUGINS)?, &batch.plugin, version)?;
    }
    if !batch.requested.publishes.is_empty() {
        outbox::enqueue(write, Some(&batch.plugin), &batch.requested.publishes, now)?;
        wakes.outbox = true;
    }
    wakes.names |= !batch.requested.names.is_empty();
    apply_retries(write, batch, wakes)?;
    if batch.requested.dead.is_empty() {
        Ok(())
    } else {
        dead_letters::put(write, &batch.requested.dead, kept, now)
    }
}

fn apply_state(
    write: &WriteTransaction,
    batch: &Batch,
    mut undo: Option<&mut Saved<'_>>,
) -> Result<(), StoreError> {
    if batch.requested.state.is_empty() {
        return Ok(());
    }
    let mut table = write.open_table(STATE)?;
    for (key, value) in &batch.requested.state {
        let stored = StateKey::new(batch.id, key);
        let before = match value {
            Some(value) => table.insert(stored.as_bytes(), value.as_slice())?,
            None => table.remove(stored.as_bytes())?,
        };
        if let Some(undo) = &mut undo {
            undo.save(Part::State, key, before.as_ref().map(AccessGuard::value))?;
        }
    }
    Ok(())
}

fn apply_timers(
    write: &WriteTransaction,
    batch: &Batch,
    mut undo: Option<&mut Saved<'_>>,
) -> Result<(), StoreError> {
    if batch.requested.timers.is_empty() {
        return Ok(());
    }
    let mut table = write.open_table(TIMERS)?;
    for (key, at) in &batch.requested.timers {
        let stored = StateKey::new(batch.id, key.as_bytes());
        let before = match at {
            Some(at) => table.insert(stored.as_bytes(), at.0)?,
            None => table.remove(stored.as_bytes())?,
        };
        if let Some(undo) = &mut undo {
            let before = before.map(|at| at.value().to_be_bytes());
            undo.save(Part::Timers, key.as_bytes(), before.as_ref().map(<[u8; 8]>::as_slice))?;
        }
    }
    Ok(())
}

fn apply_retries(write: &WriteTransaction, batch: &Batch, wakes: &mut Wakes) -> Result<(), StoreError> {
    if !batch.requested.retries.is_empty() {
        let first = next_numbers(write, "retries", batch.requested.retries.len() as u64)?;
        let mut table = write.open_table(RETRIES)?;
        for (number, retry) in (first..).zip(&batch.requested.retries) {
            table.insert((retry.at.0, number), retry.to_bytes(&batch.plugin, batch.by).as_slice())?;
        }
        wakes.retries = true;
    }
    Ok(())
}
