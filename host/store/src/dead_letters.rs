//! Owns the rows of dead letters: events that a plugin could not handle, in the order of their creation. It
//! receives letters from the commit and returns them to the operator.

mod senders;

use std::ops::ControlFlow;
use std::time::Duration;

use dim_model::entry::Generation;
use dim_model::ident::{PluginName, Topic};
use dim_model::time::Timestamp;
use redb::{ReadableTable, ReadableTableMetadata as _, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::effect::DeadLetter;
use crate::{DEAD, META, Snapshot, Store, StoreError, add_to_counter, counter, next_numbers, set_counter};
use senders::{Sender, Senders};

/// The quota of dead letters: their number, size and age. The section `store.dead_letters` of the config.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Most letters, default 10,000.
    pub max_count: u64,
    /// Most bytes, default 256 MiB.
    pub max_bytes: u64,
    /// Time that a letter is kept, default 30 days; a bare number is in hours.
    #[serde(alias = "max_age_hours", with = "dim_model::time::in_hours")]
    pub max_age: Duration,
}

/// A selection of letters.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only letters of this plugin.
    pub plugin: Option<PluginName>,
    /// Only letters of events on this topic.
    pub topic: Option<Topic>,
    /// Only letters from this time or later.
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
        Self { max_count: 10_000, max_bytes: 256 << 20, max_age: Duration::from_secs(720 * 3_600) }
    }
}

/// The name of the stored counter of the letters' bytes; without it the host would read the whole table.
const BYTES: &str = "dead-bytes";

/// The name of the stored counter of letters that the quota has dropped.
const DROPPED: &str = "dead-dropped";

/// Whether a letter exceeds the maximum age.
fn is_over(letter: &[u8], kept: &Quota, now: Timestamp) -> bool {
    read(letter).is_ok_and(|letter| now.since(Timestamp(letter.time)) > kept.max_age)
}

/// Adds dead letters, in the transaction of the commit. Letters beyond the quota are dropped, counted and
/// logged as a warning: first the oldest of the largest sender, if it uses more than a tenth of the quota, else
/// the oldest of all.
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

/// The letters that one commit drops.
#[derive(Default)]
struct Dropped {
    count: u64,
    /// The number of letters of senders that exceed their share.
    of_sender: u64,
    sender: Option<Sender>,
}

impl Dropped {
    /// Takes the number of the oldest letter of the largest sender, if that sender exceeds its share.
    fn next_of_a_sender(
        &mut self,
        senders: &mut Senders<'_>,
        kept: &Quota,
    ) -> Result<Option<u64>, StoreError> {
        // Finding the largest sender reads the whole index, so the search continues with the same sender.
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
            tracing::warn!(dropped, sender, "the oldest dead letters of the largest sender are dropped");
        }
        if others > 0 {
            tracing::warn!(
                dropped = others,
                "the oldest dead letters are dropped: there are too many, or they are too old"
            );
        }
    }
}

/// Whether a letter exceeds the maximum age.
pub fn has_old(snapshot: &Snapshot, kept: &Quota, now: Timestamp) -> Result<bool, StoreError> {
    let table = snapshot.table(DEAD)?;
    Ok(table.first()?.is_some_and(|(_, letter)| is_over(letter.value(), kept, now)))
}

/// The size of all letters in bytes.
pub fn bytes(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<u64, StoreError> {
    counter(meta, BYTES)
}

/// Removes and returns a letter, if it exists.
pub fn take(write: &WriteTransaction, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    // Opened before the removal: the index is rebuilt if it does not match the letters.
    let mut senders = Senders::open(write)?;
    let Some(bytes) = write.open_table(DEAD)?.remove(id)?.map(|bytes| bytes.value().to_vec()) else {
        return Ok(None);
    };
    add_to_counter(write, BYTES, -(bytes.len() as i64))?;
    let letter = read(&bytes)?;
    senders.remove(id, &letter)?;
    Ok(Some(letter))
}

/// Removes the letters of a plugin from number `from` on that generations from `first` on have caused.
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

/// The number of letters that the quota has dropped so far.
pub fn dropped(store: &Store) -> Result<u64, StoreError> {
    counter(&store.snapshot()?.table(META)?, DROPPED)
}

/// The selected dead letters after number `after`, at most `limit`.
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

/// Visits the selected dead letters after number `after`, until `each` breaks. It reads them one by one,
/// because each may contain a message of 1 MiB.
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

/// The dead letter with a number.
pub fn get(store: &Store, id: u64) -> Result<Option<DeadLetter>, StoreError> {
    let table = store.snapshot()?.table(DEAD)?;
    table.get(id)?.map(|bytes| read(bytes.value())).transpose()
}

/// The number of dead letters.
pub fn count(store: &Store) -> Result<u64, StoreError> {
    Ok(store.snapshot()?.table(DEAD)?.len()?)
}

fn read(bytes: &[u8]) -> Result<DeadLetter, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("dead letter", error))
}
