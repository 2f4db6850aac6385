//! The functions of WIT, as the fake host has them.

use super::World;

/// Longest key of state and timers, in bytes, as in the real host.
const KEY_BYTES: u32 = 512;

/// Whether a key of so many bytes is one.
fn fits<E>(bytes: usize, wrong: fn(u32) -> E) -> Result<(), E> {
    if (1..=KEY_BYTES as usize).contains(&bytes) { Ok(()) } else { Err(wrong(KEY_BYTES)) }
}

/// Whether a topic, a key or a name is not denied.
fn granted<E>(word: &str, not_granted: fn(String) -> E) -> Result<(), E> {
    match World::with(|world| world.denied.contains(word)) {
        true => Err(not_granted(word.to_owned())),
        false => Ok(()),
    }
}

/// A page of a scan, as in the real host.
const PAGE_BYTES: usize = 1 << 20;
const PAGE_PAIRS: usize = 10_000;

/// State.
pub mod state {
    use super::{PAGE_BYTES, PAGE_PAIRS, World, fits};
    use crate::bindings::dim::coordination::state::{Error, Pair};

    /// The value of `key`.
    pub fn get(key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        fits(key.len(), Error::KeyLength)?;
        Ok(World::with(|world| world.state.get(key).cloned()))
    }

    /// Sets `key`.
    pub fn set(key: &[u8], value: &[u8]) -> Result<(), Error> {
        fits(key.len(), Error::KeyLength)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.state.insert(key.to_vec(), value.to_vec());
        })
    }

    /// Removes `key`.
    pub fn delete(key: &[u8]) -> Result<(), Error> {
        fits(key.len(), Error::KeyLength)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.state.remove(key);
        })
    }

    /// The next pairs.
    pub fn scan(prefix: &[u8], after: Option<&[u8]>, limit: u32) -> Result<Vec<Pair>, Error> {
        Ok(World::with(|world| {
            let pairs = world.state.range(after.unwrap_or(prefix).max(prefix).to_vec()..);
            let mut left = PAGE_BYTES;
            pairs
                .filter(|(key, _)| after.is_none_or(|after| key.as_slice() > after))
                .take_while(|(key, _)| key.starts_with(prefix))
                .take(PAGE_PAIRS.min(limit as usize))
                .enumerate()
                // There is one at least, whatever its size.
                .take_while(|(index, (key, value))| {
                    let fits = key.len() + value.len() <= left || *index == 0;
                    left = left.saturating_sub(key.len() + value.len());
                    fits
                })
                .map(|(_, (key, value))| Pair { key: key.clone(), value: value.clone() })
                .collect()
        }))
    }
}

/// Timers.
pub mod timers {
    use std::time::Duration;

    use super::{World, fits};
    use crate::bindings::dim::coordination::timers::Error;

    /// What the fake's clock counts in.
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Sets a timer.
    pub fn set(key: &str, at: u64) -> Result<(), Error> {
        fits(key.len(), Error::KeyLength)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            // What is past falls due with the next entry, not within this one.
            world.timers.insert(key.to_owned(), at.max(world.now.after(MILLISECOND).timestamp()));
        })
    }

    /// Clears a timer.
    pub fn clear(key: &str) -> Result<(), Error> {
        fits(key.len(), Error::KeyLength)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.timers.remove(key);
        })
    }

    /// When a timer falls due.
    pub fn get(key: &str) -> Result<Option<u64>, Error> {
        fits(key.len(), Error::KeyLength)?;
        Ok(World::with(|world| world.timers.get(key).copied()))
    }
}

/// Topics.
pub mod pubsub {
    use super::{World, granted};
    use crate::bindings::dim::coordination::pubsub::{Error, Hearing};
    use crate::fake::Published;
    use crate::time::Time;

    /// Publishes.
    pub fn publish(topic: &str, data: &[u8]) -> Result<(), Error> {
        granted(topic, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.published.push(Published { topic: topic.to_owned(), data: data.to_vec() });
        })
    }

    /// Subscribes.
    pub fn subscribe(topic: &str) -> Result<(), Error> {
        granted(topic, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.topics.insert(topic.to_owned());
        })
    }

    /// Ends a subscription.
    pub fn unsubscribe(topic: &str) -> Result<(), Error> {
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.topics.remove(topic);
        })
    }

    /// The topics subscribed to.
    pub fn list_topics() -> Vec<String> {
        World::with(|world| world.topics.iter().cloned().collect())
    }

    /// Nobody else is there.
    pub fn list_peers(_topic: &str) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }

    /// How well was listened.
    pub fn heard(_topic: &str, since: u64) -> Result<Hearing, Error> {
        Ok(World::with(|world| {
            let since = Time::from_timestamp(since);
            let deaf = world.deaf.iter().map(|(from, until)| until.since(since.max(*from)));
            let listened = world.now.since(since).saturating_sub(deaf.sum());
            let listened = u64::try_from(listened.as_nanos()).unwrap_or(u64::MAX);
            Hearing { listened, confirmed_until: world.now.timestamp() }
        }))
    }
}

/// Names. A key's name is the key itself.
pub mod ipns {
    use super::{World, granted};
    use crate::bindings::dim::coordination::ipns::{Document, Error, Resolution};
    use crate::fake::Named;

    /// Points a key's name at a path.
    pub fn publish(key: &str, path: &str, _lifetime: Option<u64>) -> Result<(), Error> {
        granted(key, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            let source = Resolution { path: path.to_owned(), ..world.resolution(key) };
            // The file of one that was published before, if it is there.
            let known = world.names.values().find(|known| known.source.path == path);
            let data = known.and_then(|known| known.data.clone());
            world.names.insert(key.to_owned(), Named { source, data });
        })
    }

    /// Stores a file and points a key's name at it.
    pub fn update_state(key: &str, data: &[u8], _lifetime: Option<u64>) -> Result<(), Error> {
        granted(key, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.point(key, data.to_vec());
        })
    }

    /// A key's name.
    pub fn key_id(key: &str) -> Result<String, Error> {
        granted(key, Error::NotGranted)?;
        Ok(key.to_owned())
    }

    /// Follows a name.
    pub fn follow(name: &str) -> Result<(), Error> {
        granted(name, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.followed.insert(name.to_owned());
        })
    }

    /// Stops following a name.
    pub fn unfollow(name: &str) -> Result<(), Error> {
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.followed.remove(name);
        })
    }

    /// The newest record of a name.
    pub fn resolve(name: &str) -> Result<Resolution, Error> {
        granted(name, Error::NotGranted)?;
        World::with(|world| Ok(world.known(name).ok_or(Error::NotYetKnown)?.source.clone()))
    }

    /// The file that a name points to.
    pub fn get_state(name: &str) -> Result<Document, Error> {
        granted(name, Error::NotGranted)?;
        World::with(|world| {
            let Named { source, data } = world.known(name).ok_or(Error::NotYetKnown)?.clone();
            let data = data.ok_or_else(|| Error::NotADocument(format!("{} is not held", source.path)))?;
            Ok(Document { source, data })
        })
    }
}

/// The log.
pub mod log {
    use super::World;
    use crate::bindings::dim::coordination::log::{Field, Level};
    use crate::fake::Line;

    /// Writes a line.
    pub fn write(level: Level, message: &str, fields: &[Field]) {
        let fields = fields.iter().map(|field| (field.name.clone(), field.value.clone())).collect();
        World::with(|world| world.lines.push(Line { level, message: message.to_owned(), fields }));
    }
}

use super::Named;
use crate::bindings::dim::coordination::ipns::Resolution;

/// How long a record is valid, in nanoseconds: a day.
const LIFETIME: u64 = 86_400_000_000_000;

impl World {
    /// Changes the world, unless a query is answered.
    fn effect<E>(read_only: E, limit: fn(String) -> E, change: impl FnOnce(&mut World)) -> Result<(), E> {
        World::with(|world| {
            if world.is_read_only {
                return Err(read_only);
            }
            if let Some(met) = &world.met {
                return Err(limit(met.clone()));
            }
            change(world);
            Ok(())
        })
    }

    /// What is known of a name, which is followed from then on as in the real host.
    fn known(&mut self, name: &str) -> Option<&Named> {
        if !self.is_read_only {
            self.followed.insert(name.to_owned());
        }
        self.names.get(name)
    }

    /// The next record of a name, without its path.
    fn resolution(&self, name: &str) -> Resolution {
        let sequence = self.names.get(name).map_or(0, |known| known.source.sequence + 1);
        let now = self.now.timestamp();
        let (name, path) = (name.to_owned(), String::new());
        Resolution { name, path, sequence, valid_until: now.saturating_add(LIFETIME), confirmed_at: now }
    }

    /// Points a name at a file.
    pub(super) fn point(&mut self, name: &str, data: Vec<u8>) -> Resolution {
        let resolution = self.resolution(name);
        let path = format!("/ipfs/the-file-{}-of-{name}", resolution.sequence);
        let source = Resolution { path, ..resolution };
        self.names.insert(name.to_owned(), Named { source: source.clone(), data: Some(data) });
        source
    }
}
