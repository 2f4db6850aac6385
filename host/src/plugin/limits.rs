//! Owns the limits of a plugin: how much of the machine it may take. Each is on by default. What a manifest asks
//! for beyond the default is granted like anything else, and the operator's ceiling stands above all.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

/// Longest key of state and timers, in bytes.
pub const KEY_BYTES: usize = 512;

/// Largest page of a scan, in bytes.
pub const PAGE_BYTES: usize = 1 << 20;

/// Longest reason that a plugin gives for a failure, in bytes; what is longer is cut.
pub const REASON_BYTES: usize = 4096;

/// Longest line of a plugin's log, in bytes; what is longer is cut.
pub const LINE_BYTES: usize = 4096;

/// Largest document that both backends can hold, in bytes: the limit on one, too.
pub const DOCUMENT_BYTES: usize = 16 << 20;

/// Largest message that is sent with confidence, in bytes.
pub const MESSAGE_BYTES: usize = 60 << 10;

/// Largest linear memory that a plugin can be allowed, in bytes.
pub const MEMORY_BYTES: usize = 1 << 30;

/// Declares the limits, each with its name in config and manifest, its default, its ceiling unless the operator
/// sets another, and its words.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $field:ident: $type:ty = $name:literal, $default:expr, $ceiling:expr, $what:literal;)+) => {
        /// What one plugin may take.
        #[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
        #[serde(rename_all = "kebab-case")]
        pub struct Limits {
            $($(#[doc = $doc])+ pub $field: $type,)+
        }

        /// All limits.
        pub const LIMITS: &[Limit] = &[$(Limit {
            name: $name,
            default: $default,
            ceiling: $ceiling,
            what: $what,
            set: |limits, value| limits.$field = <$type>::try_from(value).unwrap_or(<$type>::MAX),
        },)+];

        impl Default for Limits {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }
    };
}

limits! {
    /// All linear memories and tables together, in bytes, the initial size included. A component in Python asks for
    /// 256 MiB.
    memory: usize = "memory", 64 << 20, MEMORY_BYTES as u64, "bytes of memory";
    /// CPU time of one event, command or query, in milliseconds.
    call_cpu_ms: u64 = "call-cpu-ms", 1_000, 10_000, "ms of CPU a call";
    /// CPU time of `start`, in milliseconds. Interpreters start slowly.
    start_cpu_ms: u64 = "start-cpu-ms", 10_000, 60_000, "ms of CPU a start";
    /// Calls of the host's functions in one event, command, query or start; those of WASI are not counted, they
    /// cost CPU time.
    host_calls: u64 = "host-calls", 1_000_000, 100_000_000, "host calls a call";
    /// Bytes that go over the border in one call of a host's function, or as the result of a call: judged before
    /// anything is copied.
    border_bytes: usize = "border-bytes", 24 << 20, 64 << 20, "bytes over the border at once";
    /// Bytes that the effects of one entry may hold. They become real in one transaction, for which all others wait.
    effect_bytes: usize = "effect-bytes", 4 << 20, 64 << 20, "bytes of effects an entry";
    /// Number of effects of one entry.
    effects: usize = "effects", 200_000, 2_000_000, "effects an entry";
    /// The plugin's whole state, in bytes of keys and values.
    state_bytes: u64 = "state-bytes", 1 << 30, 64 << 30, "bytes of state";
    /// One state value, in bytes.
    value_bytes: usize = "value-bytes", 1 << 20, 16 << 20, "bytes a state value";
    /// One published message, in bytes. Kubo never sends what is over 1 MiB and loses much of what is large; the
    /// design keeps messages under 60 KiB.
    message_bytes: usize = "message-bytes", 60 << 10, 1 << 20, "bytes a message";
    /// Messages that one entry publishes.
    publishes: usize = "publishes", 10_000, 1_000_000, "publishes an entry";
    /// Bytes of the messages that one entry publishes.
    publish_bytes: usize = "publish-bytes", 4 << 20, 64 << 20, "bytes of publishes an entry";
    /// Messages published a second, on average over ten seconds.
    publishes_per_second: u64 = "publishes-per-second", 1_000, 1_000_000, "publishes a second";
    /// Bytes of messages published a second, on average over ten seconds.
    publish_bytes_per_second: u64 = "publish-bytes-per-second", 4 << 20, 1 << 30, "bytes of publishes a second";
    /// One document, in bytes.
    document_bytes: usize = "document-bytes", 3 << 20, DOCUMENT_BYTES as u64, "bytes a document";
    /// Bytes of documents that names are given a second, on average over ten seconds. Each is written to the store,
    /// and handed to the backend.
    document_bytes_per_second: u64 = "document-bytes-per-second", 8 << 20, 1 << 30, "bytes of documents a second";
    /// Timers that are set at one time.
    timers: usize = "timers", 200_000, 2_000_000, "timers";
    /// Names followed at one time.
    follows: usize = "follows", 64, 1_024, "followed names";
    /// Topics subscribed to at one time.
    topics: usize = "topics", 64, 1_024, "topics subscribed to";
    /// Log lines of one call; more are counted and dropped.
    log_lines: usize = "log-lines", 100, 10_000, "log lines a call";
    /// Log lines a second, on average over ten seconds; more are counted and not told. Dead letters have them.
    log_lines_per_second: u64 = "log-lines-per-second", 100, 100_000, "log lines a second";
    /// Publishes that wait to be sent; an entry that would add to more is refused the publish.
    outbox: usize = "outbox", 10_000, 1_000_000, "publishes waiting";
    /// How often an event is tried again before it is set aside.
    retries: u32 = "retries", 5, 100, "retries of an event";
    /// How often in a row the plugin may fail to start before it is quarantined.
    restarts: u32 = "restarts", 8, 100, "failed starts in a row";
}

/// One of the limits.
pub struct Limit {
    /// Its name in config and manifest.
    pub name: &'static str,
    /// What a plugin has that asks for nothing.
    pub default: u64,
    /// The most that it can be granted, unless the operator sets another ceiling.
    pub ceiling: u64,
    /// What it counts.
    pub what: &'static str,
    set: fn(&mut Limits, u64),
}

/// The name of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LimitName(&'static str);

impl LimitName {
    /// The text.
    pub fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for LimitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl FromStr for LimitName {
    type Err = NoLimit;

    fn from_str(text: &str) -> Result<Self, NoLimit> {
        let found = LIMITS.iter().find(|limit| limit.name == text);
        found.map(|limit| Self(limit.name)).ok_or_else(|| NoLimit(text.chars().take(80).collect()))
    }
}

impl<'de> Deserialize<'de> for LimitName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// There is no limit of that name.
#[derive(Debug, Error)]
#[error("there is no limit {0:?}; there are {known}", known = names())]
pub struct NoLimit(String);

fn names() -> String {
    LIMITS.iter().map(|limit| limit.name).collect::<Vec<_>>().join(", ")
}

/// Some of the limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = BTreeMap<String, u64>)]
pub struct SomeLimits(BTreeMap<LimitName, u64>);

impl SomeLimits {
    /// Whether none is named.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, limit: &Limit) -> Option<u64> {
        self.0.get(&LimitName(limit.name)).copied()
    }

    /// Those of `other` that are not here, or less.
    pub fn lacking(&self, other: &Self) -> impl Iterator<Item = (&'static Limit, u64)> {
        LIMITS.iter().filter_map(|limit| {
            let asked = other.get(limit)?;
            (self.get(limit).is_none_or(|granted| granted < asked)).then_some((limit, asked))
        })
    }

    /// Takes in those of `other`; of each the larger counts.
    pub fn add(&mut self, other: &Self) {
        for (limit, value) in &other.0 {
            let own = self.0.entry(*limit).or_default();
            *own = (*own).max(*value);
        }
    }

    /// Gives up those that `other` names, whatever it says of them.
    pub fn take(&mut self, other: &Self) {
        self.0.retain(|limit, _| !other.0.contains_key(limit));
    }
}

/// What the operator says of the limits of all plugins. The section `limits` of the config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitPolicy {
    /// What a plugin has that asks for nothing; absent ones are as in the table of `docs/limits.md`.
    pub default: SomeLimits,
    /// What no plugin can have more of, whatever it asks for and is granted; absent ones are as in that table.
    pub ceiling: SomeLimits,
    /// How many plugins there may be, default 200. One more is not loaded. At most 900: address space is reserved
    /// for each.
    pub plugins: usize,
    /// Bytes of one component, default 128 MiB, at most 256 MiB. A larger one is refused before it is looked at.
    pub component_bytes: usize,
    /// Seconds of CPU time that compiling one component may take, default 300, at most 3,600.
    pub compile_seconds: u64,
    /// Bytes of memory that compiling one component may take, default 4 GiB.
    pub compile_memory: u64,
    /// Bytes of the log that wait for a plugin, default 4 GiB, and never more than half of what the store may hold:
    /// for one that is further behind the log does not wait any more, if it is larger than it is to be.
    pub queue_bytes: u64,
}

impl Default for LimitPolicy {
    fn default() -> Self {
        let (default, ceiling) = (SomeLimits::default(), SomeLimits::default());
        Self {
            default,
            ceiling,
            plugins: 200,
            component_bytes: 128 << 20,
            compile_seconds: 300,
            compile_memory: 4 << 30,
            queue_bytes: 4 << 30,
        }
    }
}

impl LimitPolicy {
    fn default_of(&self, limit: &Limit) -> u64 {
        self.default.get(limit).unwrap_or(limit.default).min(self.ceiling_of(limit))
    }

    fn ceiling_of(&self, limit: &Limit) -> u64 {
        let own = self.ceiling.get(limit);
        // Nothing can be had beyond what the host is made for.
        match limit.name {
            "memory" | "document-bytes" => own.map_or(limit.ceiling, |own| own.min(limit.ceiling)),
            _ => own.unwrap_or(limit.ceiling),
        }
    }

    /// Which limits a manifest's wishes ask the operator for: those over the default, as far as the ceiling
    /// allows, unless the operator has set them.
    pub fn asked(&self, wish: &SomeLimits, set: &SomeLimits) -> SomeLimits {
        let asked = LIMITS.iter().filter(|limit| set.get(limit).is_none()).filter_map(|limit| {
            let wish = wish.get(limit)?.min(self.ceiling_of(limit));
            (wish > self.default_of(limit)).then_some((LimitName(limit.name), wish))
        });
        SomeLimits(asked.collect())
    }

    /// What a plugin may take: what the operator has `set` for it; else what it wishes for, as far as that is
    /// under the default or was granted; else the default. Never more than the ceiling.
    pub fn settle(&self, wish: &SomeLimits, set: &SomeLimits, granted: &SomeLimits) -> Limits {
        let mut limits = Limits::default();
        for limit in LIMITS {
            let default = self.default_of(limit);
            let may = granted.get(limit).map_or(default, |granted| granted.max(default));
            let wished = wish.get(limit).map_or(default, |wish| wish.min(may));
            (limit.set)(&mut limits, set.get(limit).unwrap_or(wished).min(self.ceiling_of(limit)));
        }
        limits
    }

    /// The first of these that is over its ceiling, in words.
    pub fn over_ceiling(&self, set: &SomeLimits) -> Option<String> {
        LIMITS.iter().find_map(|limit| {
            let (set, ceiling) = (set.get(limit)?, self.ceiling_of(limit));
            (set > ceiling).then(|| format!("{}: {set} is over the ceiling, {ceiling}", limit.name))
        })
    }
}

const _: () = assert!(MESSAGE_BYTES == 60 << 10, "the default is this");

impl Limits {
    /// CPU time of one event, command or query.
    pub fn call_cpu(&self) -> Duration {
        Duration::from_millis(self.call_cpu_ms)
    }

    /// CPU time of `start`.
    pub fn start_cpu(&self) -> Duration {
        Duration::from_millis(self.start_cpu_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> SomeLimits {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_wish_is_held_to_the_default_the_grant_and_the_ceiling() {
        let policy = LimitPolicy { ceiling: some(r#"{"timers": 500000}"#), ..LimitPolicy::default() };
        let timers = |wish: &str, set: &str, granted: &str| {
            policy.settle(&some(wish), &some(set), &some(granted)).timers
        };
        assert_eq!(timers("{}", "{}", "{}"), 200_000);
        assert_eq!(timers(r#"{"timers": 7}"#, "{}", "{}"), 7);
        assert_eq!(timers(r#"{"timers": 300000}"#, "{}", "{}"), 200_000);
        assert_eq!(timers(r#"{"timers": 300000}"#, "{}", r#"{"timers": 300000}"#), 300_000);
        assert_eq!(timers(r#"{"timers": 300001}"#, "{}", r#"{"timers": 300000}"#), 300_000);
        assert_eq!(timers(r#"{"timers": 900000}"#, "{}", r#"{"timers": 900000}"#), 500_000);
        assert_eq!(timers(r#"{"timers": 7}"#, r#"{"timers": 8}"#, "{}"), 8);
        // What a default is over the ceiling is held to it, too.
        let low = LimitPolicy { ceiling: some(r#"{"timers": 9}"#), ..LimitPolicy::default() };
        assert_eq!(low.settle(&some("{}"), &some("{}"), &some("{}")).timers, 9);
        assert!(low.over_ceiling(&some(r#"{"timers": 9}"#)).is_none());
        assert!(low.over_ceiling(&some(r#"{"timers": 10}"#)).unwrap().contains("timers"));
    }

    #[test]
    fn what_is_over_the_default_is_asked_for() {
        let policy = LimitPolicy { ceiling: some(r#"{"timers": 500000}"#), ..LimitPolicy::default() };
        let asked = |wish: &str, set: &str| policy.asked(&some(wish), &some(set));
        assert!(asked(r#"{"timers": 200000}"#, "{}").is_empty());
        assert_eq!(asked(r#"{"timers": 200001}"#, "{}"), some(r#"{"timers": 200001}"#));
        assert_eq!(asked(r#"{"timers": 900000}"#, "{}"), some(r#"{"timers": 500000}"#));
        assert!(asked(r#"{"timers": 900000}"#, r#"{"timers": 5}"#).is_empty());
        assert!(
            serde_json::from_str::<SomeLimits>(r#"{"timer": 1}"#).unwrap_err().to_string().contains("timers")
        );
    }
}
