//! Implements the WIT functions of the fake host.

use super::World;

/// Maximum length of a key of state and timers in bytes, as in the real host.
const KEY_BYTES: u32 = 512;

/// Checks the length of a key, in bytes.
fn fits<E>(bytes: usize, wrong: fn(u32) -> E) -> Result<(), E> {
    if (1..=KEY_BYTES as usize).contains(&bytes) { Ok(()) } else { Err(wrong(KEY_BYTES)) }
}

/// Checks that a topic, a key or a name is not denied.
fn granted<E>(word: &str, not_granted: fn(String) -> E) -> Result<(), E> {
    match World::with(|world| world.denied.contains(word)) {
        true => Err(not_granted(word.to_owned())),
        false => Ok(()),
    }
}

/// Maximum size of a page of a scan in bytes, as in the real host.
const PAGE_BYTES: usize = 1 << 20;
/// Maximum number of pairs of a page of a scan, as in the real host.
const PAGE_PAIRS: usize = 10_000;

/// Implements `state`.
pub mod state {
    use super::{PAGE_BYTES, PAGE_PAIRS, World, fits};
    use crate::bindings::dim::coordination::state::{Error, Pair};

    /// Returns the value of `key`.
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

    /// Returns the next page of pairs.
    pub fn scan(prefix: &[u8], after: Option<&[u8]>, limit: u32) -> Result<Vec<Pair>, Error> {
        Ok(World::with(|world| {
            let pairs = world.state.range(after.unwrap_or(prefix).max(prefix).to_vec()..);
            let mut left = PAGE_BYTES;
            pairs
                .filter(|(key, _)| after.is_none_or(|after| key.as_slice() > after))
                .take_while(|(key, _)| key.starts_with(prefix))
                .take(PAGE_PAIRS.min(limit as usize))
                .enumerate()
                // A page has at least one pair, of any size.
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

/// Implements `timers`.
pub mod timers {
    use std::time::Duration;

    use super::{World, fits};
    use crate::bindings::dim::coordination::timers::Error;

    /// The resolution of the fake's clock.
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Sets a timer.
    pub fn set(key: &str, at: u64) -> Result<(), Error> {
        fits(key.len(), Error::KeyLength)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            // A past time is due with the next entry, not within this one.
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

    /// Returns the due time of a timer.
    pub fn get(key: &str) -> Result<Option<u64>, Error> {
        fits(key.len(), Error::KeyLength)?;
        Ok(World::with(|world| world.timers.get(key).copied()))
    }
}

/// Implements `pubsub`.
pub mod pubsub {
    use super::{World, granted};
    use crate::bindings::dim::coordination::pubsub::{Beginning, Error, Hearing};
    use crate::fake::Published;
    use crate::time::Time;

    /// Publishes a message.
    pub fn publish(topic: &str, data: &[u8]) -> Result<(), Error> {
        granted(topic, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.published.push(Published { topic: topic.to_owned(), data: data.to_vec() });
        })
    }

    /// Subscribes to a topic. A topic that is subscribed keeps its beginning.
    pub fn subscribe(topic: &str, beginning: Beginning) -> Result<(), Error> {
        granted(topic, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.topics.entry(topic.to_owned()).or_insert(beginning);
        })
    }

    /// Ends a subscription.
    pub fn unsubscribe(topic: &str) -> Result<(), Error> {
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            world.topics.remove(topic);
        })
    }

    /// Returns the subscribed topics.
    pub fn list_topics() -> Vec<String> {
        World::with(|world| world.topics.keys().cloned().collect())
    }

    /// Returns no peers: a fake host has none.
    pub fn list_peers(_topic: &str) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }

    /// Returns for how long since `since` the fake host could receive messages.
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

/// Implements `ipns`. The name of a key is the key itself.
pub mod ipns {
    use super::{World, granted};
    use crate::bindings::dim::coordination::ipns::{Document, Error, Resolution};
    use crate::fake::Named;

    /// Points a key's name at a path.
    pub fn publish(key: &str, path: &str, _lifetime: Option<u64>) -> Result<(), Error> {
        granted(key, Error::NotGranted)?;
        World::effect(Error::ReadOnly, Error::LimitExceeded, |world| {
            let source = Resolution { path: path.to_owned(), ..world.resolution(key) };
            // A path that another name already has keeps its file.
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

    /// Returns the name of a key.
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

    /// Returns the newest record of a name.
    pub fn resolve(name: &str) -> Result<Resolution, Error> {
        granted(name, Error::NotGranted)?;
        World::with(|world| Ok(world.known(name).ok_or(Error::NotYetKnown)?.source.clone()))
    }

    /// Returns the file of a name.
    pub fn get_state(name: &str) -> Result<Document, Error> {
        granted(name, Error::NotGranted)?;
        World::with(|world| {
            let Named { source, data } = world.known(name).ok_or(Error::NotYetKnown)?.clone();
            let data = data.ok_or_else(|| Error::NotADocument(format!("{} is not held", source.path)))?;
            Ok(Document { source, data })
        })
    }
}

/// Implements `log`.
pub mod log {
    use super::World;
    use crate::bindings::dim::coordination::log::{Field, Level};
    use crate::fake::Line;

    /// Writes a log line.
    pub fn write(level: Level, message: &str, fields: &[Field]) {
        let fields = fields.iter().map(|field| (field.name.clone(), field.value.clone())).collect();
        World::with(|world| world.lines.push(Line { level, message: message.to_owned(), fields }));
    }
}

use super::Named;
use crate::bindings::dim::coordination::ipns::Resolution;

/// Lifetime of a record, in nanoseconds: 24 h.
const LIFETIME: u64 = 86_400_000_000_000;

impl World {
    /// Applies an effect. Refuses it during a query and while a limit is exceeded.
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

    /// Returns the record and file of a name. As in the real host, the plugin now follows the name, except in a query.
    fn known(&mut self, name: &str) -> Option<&Named> {
        if !self.is_read_only {
            self.followed.insert(name.to_owned());
        }
        self.names.get(name)
    }

    /// Creates the next record of a name, with an empty path.
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
