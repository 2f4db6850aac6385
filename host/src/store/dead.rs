//! Owns the rows of dead letters: events that a plugin could not handle, in the order in which they
//! were set aside.

mod senders;

use std::ops::ControlFlow;
use std::time::Duration;

use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};
use serde::{Deserialize, Serialize};

use super::{DEAD, META, Snapshot, Store, StoreError, add_to_counter, counter, next_numbers, set_counter};
use crate::effect::DeadLetter;
use crate::entry::Generation;
use crate::ident::{PluginName, Topic};
use crate::time::Timestamp;

use senders::{Sender, Senders};

/// How many letters are kept, and for how long.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// How many, default 10,000.
    pub max_count: u64,
    /// Bytes, default 256 MiB.
    pub max_bytes: u64,
    /// Hours since an event was set aside, default 720.
    pub max_age_hours: u64,
}

/// Which letters are meant.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Those of this plugin.
    pub plugin: Option<PluginName>,
    /// Those of events on this topic.
    pub topic: Option<Topic>,
    /// Those that were set aside at this time or later.
    pub since: Option<Timestamp>,
}

impl Filter {
    fn means(&self, letter: &DeadLetter) -> bool {
        self.plugin.as_ref().is_none_or(|plugin| *plugin == letter.plugin)
            && self.topic.as_ref().is_none_or(|topic| letter.event.topic() == Some(topic))
            && self.since.is_none_or(|since| letter.time >= since.0)
    }
}

impl Default for Quota {
    fn default() -> Self {
        Self { max_count: 10_000, max_bytes: 256 << 20, max_age_hours: 720 }
    }
}

/// Counted along: the table would have to be read.
const BYTES: &str = "dead-bytes";

/// How many were dropped for want of room or because of their age.
const DROPPED: &str = "dead-dropped";

/// Whether a letter is older than letters are kept.
fn is_over(letter: &[u8], kept: &Quota, now: Timestamp) -> bool {
    let age = Duration::from_secs(kept.max_age_hours.saturating_mul(3_600));
    read(letter).is_ok_and(|letter| now.since(Timestamp(letter.time)) > age)
}

/// Sets events aside, in the transaction of the commit.
/// Beyond what may be kept letters are dropped, with a warning, and counted: first the oldest of the sender that has most,
/// if it has more than a tenth of what may be kept, else the oldest of all.
pub fn put(
    write: &WriteTransaction,
    letters: &[DeadLetter],
    kept: &Quota,
    now: Timestamp,
) -> Result<(), StoreError> {
    let first = next_numbers(write, "dead", letters.len() as u64)?;
    let mut senders = Senders::open(write)?;
    let mut table = write.open_table(DEAD)?;
    let mut held = counter(&write.open_table(META)?, BYTES)?;
    for (id, letter) in (first..).zip(letters) {
        let bytes = serde_json::to_vec(letter).expect("a dead letter is plain data");
        table.insert(id, bytes.as_slice())?;
        senders.add(id, letter, bytes.len() as u64)?;
        held += bytes.len() as u64;
    }
    let mut dropped = Dropped::default();
    loop {
        let is_old = table.first()?.is_some_and(|(_, letter)| is_over(letter.value(), kept, now));
        let is_much = table.len()? > kept.max_count || held > kept.max_bytes;
        let found = match (is_old, is_much) {
            (false, false) => break,
            (false, true) => dropped.next_of_a_sender(&mut senders, kept)?,
            (true, _) => None,
        };
        let letter = match found {
            Some(id) => table.remove(id)?.map(|letter| letter.value().to_vec()),
            None => {
                let Some((id, letter)) = table.pop_first()? else { break };
                let bytes = letter.value().to_vec();
                senders.remove(id.value(), &read(&bytes)?)?;
                Some(bytes)
            }
        };
        held = held.saturating_sub(letter.map_or(0, |letter| letter.len() as u64));
        dropped.count += 1;
    }
    dropped.tell();
    if dropped.count > 0 {
        add_to_counter(write, DROPPED, i64::try_from(dropped.count).unwrap_or(i64::MAX))?;
    }
    set_counter(write, BYTES, held)
}

/// What one commit drops.
#[derive(Default)]
struct Dropped {
    count: u64,
    /// How many of them a sender has lost that has more than its share, and which one.
    of_sender: u64,
    sender: Option<Sender>,
}

impl Dropped {
    /// The oldest letter of the sender that has most, if that is more than its share.
    fn next_of_a_sender(
        &mut self,
        senders: &mut Senders<'_>,
        kept: &Quota,
    ) -> Result<Option<u64>, StoreError> {
        // To find the one that has most, all are looked at: it is kept to.
        let next = match self.sender.take() {
            Some(sender) => senders.pop_next_of(sender, kept)?,
            None => None,
        };
        let next = if next.is_some() { next } else { senders.pop_from_largest(kept)? };
        let Some((sender, id)) = next else { return Ok(None) };
        self.sender = Some(sender);
        self.of_sender += 1;
        Ok(Some(id))
    }

    fn tell(&self) {
        let others = self.count - self.of_sender;
        if let Some(sender) = &self.sender {
            let (dropped, sender) = (self.of_sender, sender.as_str());
            tracing::warn!(
                dropped,
                sender,
                "the oldest dead letters of the sender that has most are dropped"
            );
        }
        if others > 0 {
            tracing::warn!(
                dropped = others,
                "the oldest dead letters are dropped: there are too many, or they are too old"
            );
        }
    }
}

/// Whether there is a letter that is older than letters are kept.
pub fn has_old(snapshot: &Snapshot, kept: &Quota, now: Timestamp) -> Result<bool, StoreError> {
    let table = snapshot.table(DEAD)?;
    Ok(table.first()?.is_some_and(|(_, letter)| is_over(letter.value(), kept, now)))
}

/// The bytes of all letters.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// Takes a letter away, if there is one.
pub fn take(write: &WriteTransaction, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    // Opened while it agrees with the letters.
    let mut senders = Senders::open(write)?;
    let Some(bytes) = write.open_table(DEAD)?.remove(id)?.map(|bytes| bytes.value().to_vec()) else {
        return Ok(None);
    };
    add_to_counter(write, BYTES, -(bytes.len() as i64))?;
    let letter = read(&bytes)?;
    senders.remove(id, &letter)?;
    Ok(Some(letter))
}

/// Takes away the letters of a plugin from number `from` on that codes from `first` on have set aside.
pub fn retract(
    write: &WriteTransaction,
    plugin: &PluginName,
    from: u64,
    first: Generation,
) -> Result<(), StoreError> {
    let mut gone = Vec::new();
    for row in write.open_table(DEAD)?.range(from..)? {
        let (id, letter) = row?;
        let letter = read(letter.value())?;
        if letter.plugin == *plugin && letter.by >= first {
            gone.push(id.value());
        }
    }
    gone.into_iter().try_for_each(|id| take(write, id).map(drop))
}

/// How many were ever dropped for want of room or because of their age.
pub fn dropped(store: &Store) -> Result<u64, StoreError> {
    counter(&store.snapshot()?.table(META)?, DROPPED)
}

/// The dead letters that are meant, after the one with number `after`, at most `limit`.
pub fn list(
    store: &Store,
    filter: &Filter,
    after: Option<u64>,
    limit: usize,
) -> Result<Vec<(u64, DeadLetter)>, StoreError> {
    let mut letters = Vec::new();
    let room = |letters: &Vec<_>| match letters.len() < limit {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    };
    if room(&letters).is_continue() {
        walk(store, filter, after, |id, letter| {
            letters.push((id, letter));
            room(&letters)
        })?;
    }
    Ok(letters)
}

/// Goes through the dead letters that are meant, after the one with number `after`, until `each` breaks. They are read
/// one by one: each may hold a message of 1 MiB.
pub fn walk(
    store: &Store,
    filter: &Filter,
    after: Option<u64>,
    mut each: impl FnMut(u64, DeadLetter) -> ControlFlow<()>,
) -> Result<(), StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    for row in table.range(after.map_or(0, |id| id.saturating_add(1))..)? {
        let (id, bytes) = row?;
        let letter = read(bytes.value())?;
        if filter.means(&letter) && each(id.value(), letter).is_break() {
            break;
        }
    }
    Ok(())
}

/// The number of the newest letter.
pub fn last(store: &Store) -> Result<Option<u64>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    Ok(table.last()?.map(|(id, _)| id.value()))
}

/// One dead letter.
pub fn get(store: &Store, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    table.get(id)?.map(|bytes| read(bytes.value())).transpose()
}

/// How many dead letters there are.
pub fn count(store: &Store) -> Result<u64, StoreError> {
    Ok(store.snapshot()?.table(DEAD)?.len()?)
}

fn read(bytes: &[u8]) -> Result<DeadLetter, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("dead letter", error))
}
