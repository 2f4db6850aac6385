//! A fake host for unit tests of a plugin in a native build, without WebAssembly.
//!
//! Each thread has its own fake host. The effects of a successful call become visible in it; those of a failed call
//! are dropped. Time passes only when the test advances it. The fake accepts any text as a topic, a key or a name. It
//! refuses [denied](Host::deny) topics, keys and names, and every effect while a limit is [exceeded](Host::meet).
//!
//! ```
//! use dim_guest::fake::Host;
//! use dim_guest::{Event, Failure, Message, NoConfig, Origin, Plugin, state};
//!
//! struct Counter;
//!
//! impl Plugin for Counter {
//!     type Config = NoConfig;
//!
//!     fn start(_: NoConfig, _: Option<u32>) -> Result<Self, String> {
//!         Ok(Counter)
//!     }
//!
//!     fn handle(&mut self, event: Event) -> Result<(), Failure> {
//!         let Event::Message(message) = event else { return Ok(()) };
//!         let seen: u64 = state::get_json(message.topic.as_bytes())?.unwrap_or(0);
//!         Ok(state::set_json(message.topic.as_bytes(), &(seen + 1))?)
//!     }
//! }
//!
//! let host = Host::new();
//! let mut counter: Counter = host.start("{}", 1)?;
//! for _ in 0..2 {
//!     let message = Message { topic: "ticks".into(), data: Vec::new(), origin: Origin::Host };
//!     host.handle(&mut counter, Event::Message(message)).expect("it is counted");
//! }
//! assert_eq!(host.state()[b"ticks".as_slice()], b"2");
//! # Ok::<(), String>(())
//! ```

pub(crate) mod functions;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::time::Duration;

use crate::bindings::dim::coordination::event::{DueTimer, Event, Failure, Refusal};
use crate::bindings::dim::coordination::ipns::Resolution;
use crate::bindings::dim::coordination::log::Level;
use crate::bindings::dim::coordination::pubsub::Beginning;
use crate::plugin::Plugin;
use crate::time::Time;

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

/// The data of the fake host: everything that a plugin can read and change.
#[derive(Clone, Default)]
struct World {
    now: Time,
    state: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The version of the state; none until an instance has started.
    state_version: Option<u32>,
    timers: BTreeMap<String, u64>,
    published: Vec<Published>,
    /// The subscribed topics, with the beginnings of the subscriptions.
    topics: BTreeMap<String, Beginning>,
    /// The followed names, as the plugin wrote them.
    followed: BTreeSet<String>,
    /// The published and known names, by key or name.
    names: BTreeMap<String, Named>,
    /// The spans in which the host could not receive messages: start and end.
    deaf: Vec<(Time, Time)>,
    lines: Vec<Line>,
    /// Whether the plugin is answering a query.
    is_read_only: bool,
    /// The topics, keys and names that are not granted.
    denied: BTreeSet<String>,
    /// The limit that every effect exceeds; none if effects succeed.
    met: Option<String>,
}

impl World {
    fn with<R>(look: impl FnOnce(&mut World) -> R) -> R {
        WORLD.with_borrow_mut(look)
    }
}

/// Returns the time of the entry.
pub(crate) fn now() -> Time {
    World::with(|world| world.now)
}

/// The record and the file of a name.
#[derive(Clone)]
struct Named {
    source: Resolution,
    /// The file; none if the fake host does not hold it.
    data: Option<Vec<u8>>,
}

/// A message that the plugin published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The topic.
    pub topic: String,
    /// The data.
    pub data: Vec<u8>,
}

/// A log line that the plugin wrote.
#[derive(Clone, Debug)]
pub struct Line {
    /// The severity.
    pub level: Level,
    /// The message.
    pub message: String,
    /// The named values.
    pub fields: Vec<(String, String)>,
}

/// The fake host of this thread.
#[derive(Debug)]
pub struct Host {
    /// Keeps the handle on its thread, because the data is thread-local.
    thread: PhantomData<*const ()>,
}

impl Host {
    /// Creates an empty host at 2026-01-01T00:00:00Z. It replaces the thread's previous host and its data.
    pub fn new() -> Self {
        World::with(|world| *world = World { now: Time::of_millis(1_767_225_600_000), ..World::default() });
        Self { thread: PhantomData }
    }

    /// Starts an instance with a config in JSON, on the existing state. `state_version` is the one of the manifest.
    ///
    /// # Errors
    ///
    /// Returns the plugin's error, or a text if the config does not fit. The effects of a failed start are dropped.
    pub fn start<P: Plugin>(&self, config: &str, state_version: u32) -> Result<P, String> {
        let from = World::with(|world| world.state_version);
        let started = self.all_or_nothing(|| {
            let config = serde_json::from_str(config).map_err(|error| format!("config: {error}"))?;
            P::start(config, from)
        })?;
        World::with(|world| world.state_version = Some(state_version));
        Ok(started)
    }

    /// Calls `plugin` with an event. If it fails, its effects are dropped, but not its log lines.
    pub fn handle<P: Plugin>(&self, plugin: &mut P, event: Event) -> Result<(), Failure> {
        self.all_or_nothing(|| plugin.handle(event))
    }

    /// Sends a command to `plugin`. If it refuses, its effects are dropped, but not its log lines.
    pub fn command<P: Plugin>(&self, plugin: &mut P, method: &str, body: &str) -> Result<String, Refusal> {
        self.all_or_nothing(|| plugin.command(method, body))
    }

    /// Sends a query to `plugin`. Every effect returns an error meanwhile.
    pub fn query<P: Plugin>(&self, plugin: &P, method: &str, body: &str) -> Result<String, Refusal> {
        struct Reading;
        impl Drop for Reading {
            fn drop(&mut self) {
                World::with(|world| world.is_read_only = false);
            }
        }
        World::with(|world| world.is_read_only = true);
        let _reading = Reading;
        plugin.query(method, body)
    }

    /// Advances the time. `plugin` handles each timer that is due, at its time. This includes timers that it sets
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// Returns the first failure of `plugin`. The time then stays at the timer that failed.
    pub fn pass<P: Plugin>(&self, plugin: &mut P, time: Duration) -> Result<(), Failure> {
        let until = self.now().after(time);
        while let Some((due, key)) = self.next_timer().filter(|(due, _)| *due <= until.timestamp()) {
            World::with(|world| {
                world.timers.remove(&key);
                // A timestamp in nanoseconds is rounded up, so that the clock is not before the due time.
                world.now = world.now.max(Time::from_timestamp(due.saturating_add(999_999)));
            });
            self.handle(plugin, Event::Timer(DueTimer { key, due }))?;
        }
        World::with(|world| world.now = until);
        Ok(())
    }

    /// Advances the time without firing timers, as if the host were down.
    pub fn skip(&self, time: Duration) {
        World::with(|world| world.now = world.now.after(time));
    }

    fn next_timer(&self) -> Option<(u64, String)> {
        World::with(|world| world.timers.iter().map(|(key, due)| (*due, key.clone())).min())
    }

    fn all_or_nothing<T, E>(&self, call: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let before = World::with(|world| world.clone());
        let result = call();
        if result.is_err() {
            World::with(|world| {
                let lines = std::mem::take(&mut world.lines);
                *world = World { lines, ..before };
            });
        }
        result
    }

    /// Denies a topic, a key or a name: calls with it return `not-granted`.
    pub fn deny(&self, word: &str) {
        World::with(|world| world.denied.insert(word.to_owned()));
    }

    /// Makes every effect exceed a limit from now on, for example `outbox`. None ends this.
    pub fn meet(&self, limit: Option<&str>) {
        World::with(|world| world.met = limit.map(str::to_owned));
    }

    /// Returns the time of the entry.
    pub fn now(&self) -> Time {
        now()
    }

    /// Excludes the last `time` from the time in which the host could receive messages, on every topic.
    pub fn was_deaf_for(&self, time: Duration) {
        World::with(|world| world.deaf.push((world.now.before(time), world.now)));
    }

    /// Points a name at a file, as if its owner had published it. The test itself must send the event
    /// [`Event::NameChanged`].
    pub fn set_name(&self, name: &str, data: Vec<u8>) -> Resolution {
        World::with(|world| world.point(name, data))
    }

    /// Returns the state, by key.
    pub fn state(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        World::with(|world| world.state.clone())
    }

    /// Returns the timers by key, with their due times in nanoseconds since 1970-01-01T00:00:00Z.
    pub fn timers(&self) -> BTreeMap<String, u64> {
        World::with(|world| world.timers.clone())
    }

    /// Returns the messages that were published since the last call, in order.
    pub fn take_published(&self) -> Vec<Published> {
        World::with(|world| std::mem::take(&mut world.published))
    }

    /// Returns the log lines since the last call.
    pub fn take_lines(&self) -> Vec<Line> {
        World::with(|world| std::mem::take(&mut world.lines))
    }

    /// Returns the file of a key or a name.
    pub fn document(&self, name: &str) -> Option<Vec<u8>> {
        World::with(|world| world.names.get(name)?.data.clone())
    }

    /// Returns the followed names.
    pub fn followed(&self) -> BTreeSet<String> {
        World::with(|world| world.followed.clone())
    }

    /// Returns the topics that the plugin subscribed to.
    pub fn topics(&self) -> BTreeSet<String> {
        World::with(|world| world.topics.keys().cloned().collect())
    }

    /// Returns the event with which the subscription to a topic begins; none without a subscription.
    pub fn beginning(&self, topic: &str) -> Option<Beginning> {
        World::with(|world| world.topics.get(topic).copied())
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ipns, pubsub, state};

    #[test]
    fn what_is_denied_and_what_meets_a_limit_is_refused() {
        let host = Host::new();
        host.deny("secret");
        assert!(
            matches!(pubsub::publish("secret", b""), Err(pubsub::Error::NotGranted(topic)) if topic == "secret")
        );
        assert!(matches!(ipns::get_state("secret"), Err(ipns::Error::NotGranted(_))));
        pubsub::publish("open", b"").unwrap();
        host.meet(Some("outbox"));
        let refused = pubsub::publish("open", b"").unwrap_err();
        assert!(matches!(Failure::from(refused), Failure::Retry(_)), "the outbox may be shorter later");
        assert!(
            matches!(state::set(b"k", b"v"), Err(state::Error::LimitExceeded(limit)) if limit == "outbox")
        );
        host.meet(None);
        state::set(b"k", b"v").unwrap();
        assert_eq!(host.take_published().len(), 1);
    }
}
