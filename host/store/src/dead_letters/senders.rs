//! Owns the index of dead letters by sender, which is a plugin with the origin of its events. A sender that
//! floods a plugin with events that it cannot handle displaces its own letters, not those of other senders.

use dim_model::entry::Event;
use redb::{ReadableTable as _, ReadableTableMetadata as _, Table, WriteTransaction};

use super::{Quota, read};
use crate::effect::DeadLetter;
use crate::{DEAD, DEAD_OF, DEAD_SHARES, StoreError};

/// The inverse of the share of the quota up to which a sender's letters are safe from displacement while other
/// senders exceed theirs.
const SHARE: u128 = 10;

/// A sender of events that a plugin could not handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender(String);

impl Sender {
    fn of(letter: &DeadLetter) -> Self {
        let plugin = &letter.plugin;
        Self(match &letter.event {
            Event::Message { topic, origin, .. } => format!("{plugin} on {topic} from {origin}"),
            Event::Timer { .. } => format!("{plugin}, timers"),
            Event::NameChanged(_) => format!("{plugin}, names"),
            Event::Gap { topic, .. } => format!("{plugin} on {topic}, gaps"),
        })
    }

    /// The text for the operator.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The letters of one sender.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    count: u64,
    bytes: u64,
}

impl Share {
    /// The part of the quota that the letters use, in parts of [`whole`].
    fn of(self, kept: &Quota) -> u128 {
        let part = |held: u64, of: u64| u128::from(held) * u128::from(of);
        part(self.count, kept.max_bytes).max(part(self.bytes, kept.max_count))
    }
}

/// The whole quota.
fn whole(kept: &Quota) -> u128 {
    u128::from(kept.max_count) * u128::from(kept.max_bytes)
}

/// The index, open in a transaction.
pub struct Senders<'a> {
    /// A sender and a letter's number, to the letter's size in bytes.
    letters: Table<'a, (&'static str, u64), u64>,
    shares: Table<'a, &'static str, (u64, u64)>,
}

impl<'a> Senders<'a> {
    /// Opens the index. If the index does not match the letters, as in an older store, it is rebuilt first.
    pub fn open(write: &'a WriteTransaction) -> Result<Self, StoreError> {
        let (letters, shares) = (write.open_table(DEAD_OF)?, write.open_table(DEAD_SHARES)?);
        let mut index = Self { letters, shares };
        let dead = write.open_table(DEAD)?;
        if index.letters.len()? != dead.len()? {
            index.letters.retain(|_, _| false)?;
            index.shares.retain(|_, _| false)?;
            for row in dead.iter()? {
                let (id, letter) = row?;
                let bytes = letter.value();
                index.add(id.value(), &read(bytes)?, bytes.len() as u64)?;
            }
        }
        Ok(index)
    }

    /// Adds a new letter.
    pub fn add(&mut self, id: u64, letter: &DeadLetter, bytes: u64) -> Result<(), StoreError> {
        let sender = Sender::of(letter);
        self.letters.insert((sender.as_str(), id), bytes)?;
        let Share { count, bytes: held } = self.share(&sender)?;
        self.shares.insert(sender.as_str(), (count + 1, held + bytes))?;
        Ok(())
    }

    /// Removes a letter.
    pub fn remove(&mut self, id: u64, letter: &DeadLetter) -> Result<(), StoreError> {
        self.forget(&Sender::of(letter), id)
    }

    /// The number of the letter to drop while there are too many: the oldest of the largest sender, if that
    /// sender exceeds its share. The letter is removed from the index.
    pub fn pop_from_largest(&mut self, kept: &Quota) -> Result<Option<(Sender, u64)>, StoreError> {
        let mut largest: Option<(u128, Sender)> = None;
        for row in self.shares.iter()? {
            let (sender, share) = row?;
            let (count, bytes) = share.value();
            let share = Share { count, bytes }.of(kept);
            if largest.as_ref().is_none_or(|(most, _)| share > *most) {
                largest = Some((share, Sender(sender.value().to_owned())));
            }
        }
        match largest {
            Some((share, sender)) if share * SHARE > whole(kept) => self.pop_of(sender),
            Some(_) | None => Ok(None),
        }
    }

    /// Does the same for a given sender, while it exceeds its share.
    pub fn pop_next_of(&mut self, sender: Sender, kept: &Quota) -> Result<Option<(Sender, u64)>, StoreError> {
        if self.share(&sender)?.of(kept) * SHARE > whole(kept) { self.pop_of(sender) } else { Ok(None) }
    }

    fn pop_of(&mut self, sender: Sender) -> Result<Option<(Sender, u64)>, StoreError> {
        let name = sender.as_str();
        let oldest = self.letters.range((name, 0)..=(name, u64::MAX))?.next().transpose()?;
        let Some(id) = oldest.map(|(key, _)| key.value().1) else { return Ok(None) };
        self.forget(&sender, id)?;
        Ok(Some((sender, id)))
    }

    fn forget(&mut self, sender: &Sender, id: u64) -> Result<(), StoreError> {
        let name = sender.as_str();
        let Some(bytes) = self.letters.remove((name, id))?.map(|bytes| bytes.value()) else { return Ok(()) };
        let Share { count, bytes: held } = self.share(sender)?;
        if count <= 1 {
            self.shares.remove(name)?;
        } else {
            self.shares.insert(name, (count - 1, held.saturating_sub(bytes)))?;
        }
        Ok(())
    }

    fn share(&self, sender: &Sender) -> Result<Share, StoreError> {
        let share = self.shares.get(sender.as_str())?.map(|share| share.value()).unwrap_or_default();
        Ok(Share { count: share.0, bytes: share.1 })
    }
}
