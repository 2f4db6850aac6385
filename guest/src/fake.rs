//! A fake host, so that a plugin can be tried in plain unit tests, natively and without WebAssembly.
//!
//! Each thread has one. What a call asks for shows in it if the call went well, and leaves no trace if not; time
//! passes when the test says so. It takes any text for a topic, a key or a name, and refuses what the test has it refuse:
//! what is [denied](Host::deny), and every effect while a limit is [met](Host::meet).
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
use crate::plugin::Plugin;
use crate::time::Time;

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

/// All that a plugin can see and ask for.
#[derive(Clone, Default)]
struct World {
    now: Time,
    state: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The version of the state, once an instance has started.
    state_version: Option<u32>,
    timers: BTreeMap<String, u64>,
    published: Vec<Published>,
    topics: BTreeSet<String>,
    /// By canonical name.
    followed: BTreeSet<String>,
    /// By key or by name.
    names: BTreeMap<String, Named>,
    /// When was not listened, from and until.
    deaf: Vec<(Time, Time)>,
    lines: Vec<Line>,
    /// A query is answered.
    is_read_only: bool,
    /// The topics, keys and names that are not granted.
    denied: BTreeSet<String>,
    /// The limit that every effect meets.
    met: Option<String>,
}

impl World {
    fn with<R>(look: impl FnOnce(&mut World) -> R) -> R {
        WORLD.with_borrow_mut(look)
    }
}

/// The time of the entry.
pub(crate) fn now() -> Time {
    World::with(|world| world.now)
}

/// What is known of a name.
#[derive(Clone)]
struct Named {
    source: Resolution,
    /// The file, if it is one that is here.
    data: Option<Vec<u8>>,
}

/// A message that a plugin has published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// On which topic.
    pub topic: String,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// A line that a plugin has written to the log.
#[derive(Clone, Debug)]
pub struct Line {
    /// How much it matters.
    pub level: Level,
    /// The line.
    pub message: String,
    /// Its named values.
    pub fields: Vec<(String, String)>,
}

/// The fake host of this thread.
#[derive(Debug)]
pub struct Host {
    /// It is of its thread.
    thread: PhantomData<*const ()>,
}

impl Host {
    /// An empty host at 2026-01-01T00:00:00Z; the one before is gone, with all that it held.
    pub fn new() -> Self {
        World::with(|world| *world = World { now: Time::of_millis(1_767_225_600_000), ..World::default() });
        Self { thread: PhantomData }
    }

    /// Starts an instance with a config in JSON, on the state that is there; `state_version` is what the manifest says.
    /// What a start asks for that fails is dropped.
    pub fn start<P: Plugin>(&self, config: &str, state_version: u32) -> Result<P, String> {
        let from = World::with(|world| world.state_version);
        let started = self.all_or_nothing(|| {
            let config = serde_json::from_str(config).map_err(|error| format!("config: {error}"))?;
            P::start(config, from)
        })?;
        World::with(|world| world.state_version = Some(state_version));
        Ok(started)
    }

    /// Has `plugin` handle an event. If it fails, its effects are dropped; lines of its log are not.
    pub fn handle<P: Plugin>(&self, plugin: &mut P, event: Event) -> Result<(), Failure> {
        self.all_or_nothing(|| plugin.handle(event))
    }

    /// Gives `plugin` an order.
    pub fn command<P: Plugin>(&self, plugin: &mut P, method: &str, body: &str) -> Result<String, Refusal> {
        self.all_or_nothing(|| plugin.command(method, body))
    }

    /// Asks `plugin` a question, for which it can have no effects.
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

    /// Lets time pass; `plugin` handles each timer that falls due, at its time. Those that it sets meanwhile fire,
    /// too, if they fall due.
    pub fn pass<P: Plugin>(&self, plugin: &mut P, time: Duration) -> Result<(), Failure> {
        let until = self.now().after(time);
        while let Some((due, key)) = self.next_timer().filter(|(due, _)| *due <= until.timestamp()) {
            World::with(|world| {
                world.timers.remove(&key);
                // The clock is never before what is due.
                world.now = world.now.max(Time::from_timestamp(due.saturating_add(999_999)));
            });
            self.handle(plugin, Event::Timer(DueTimer { key, due }))?;
        }
        World::with(|world| world.now = until);
        Ok(())
    }

    /// Lets time pass in which nobody looks at the timers, as while a host is down.
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

    /// Has a topic, a key or a name be one that is not granted.
    pub fn deny(&self, word: &str) {
        World::with(|world| world.denied.insert(word.to_owned()));
    }

    /// Has every effect meet a limit from now on, as in `outbox`; none has that end.
    pub fn meet(&self, limit: Option<&str>) {
        World::with(|world| world.met = limit.map(str::to_owned));
    }

    /// The time of the entry.
    pub fn now(&self) -> Time {
        now()
    }

    /// Keeps the last `time` from counting as listened to, on every topic.
    pub fn was_deaf_for(&self, time: Duration) {
        World::with(|world| world.deaf.push((world.now.before(time), world.now)));
    }

    /// Points a name at a file, as if somebody had published it; the event that tells so is the test's to make.
    pub fn set_name(&self, name: &str, data: Vec<u8>) -> Resolution {
        World::with(|world| world.point(name, data))
    }

    /// The state, by key.
    pub fn state(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        World::with(|world| world.state.clone())
    }

    /// The timers that are set, and when they fall due, in nanoseconds since 1970-01-01T00:00:00Z.
    pub fn timers(&self) -> BTreeMap<String, u64> {
        World::with(|world| world.timers.clone())
    }

    /// What was published since this was asked last, in order.
    pub fn take_published(&self) -> Vec<Published> {
        World::with(|world| std::mem::take(&mut world.published))
    }

    /// The lines of the log since this was asked last.
    pub fn take_lines(&self) -> Vec<Line> {
        World::with(|world| std::mem::take(&mut world.lines))
    }

    /// The file that a key or a name points to.
    pub fn document(&self, name: &str) -> Option<Vec<u8>> {
        World::with(|world| world.names.get(name)?.data.clone())
    }

    /// The names that are followed.
    pub fn followed(&self) -> BTreeSet<String> {
        World::with(|world| world.followed.clone())
    }

    /// The topics that were subscribed to.
    pub fn topics(&self) -> BTreeSet<String> {
        World::with(|world| world.topics.clone())
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
        assert!(matches!(Failure::from(refused), Failure::Retry(_)), "there may be room later");
        assert!(
            matches!(state::set(b"k", b"v"), Err(state::Error::LimitExceeded(limit)) if limit == "outbox")
        );
        host.meet(None);
        state::set(b"k", b"v").unwrap();
        assert_eq!(host.take_published().len(), 1);
    }
}
