//! Owns the limits of a plugin: the maximum of each resource that it may use. Each limit has a default. A
//! manifest's request above the default needs a grant, and no grant exceeds the operator's ceiling.

use std::borrow::Borrow;
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

/// Longest reason that a plugin gives for a failure, in bytes; a longer one is cut.
pub const REASON_BYTES: usize = 4096;

/// Longest line of a plugin's log, in bytes; a longer one is cut.
pub const LINE_BYTES: usize = 4096;

/// Largest document that both backends can store, in bytes; also the largest ceiling.
pub const DOCUMENT_BYTES: usize = 16 << 20;

/// Largest message that reaches its peers reliably, in bytes.
pub const MESSAGE_BYTES: usize = 60 << 10;

/// Largest linear memory that a plugin can be allowed, in bytes.
pub const MEMORY_BYTES: usize = 1 << 30;

/// Declares the limits, each with its name in config and manifest, its default, its default ceiling, and the
/// words for its unit.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $field:ident: $type:ty = $constant:ident $name:literal, $default:expr, $ceiling:expr, $what:literal;)+) => {
        /// The limits of one plugin.
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

        impl LimitName {
            $(#[doc = concat!("The name of `", $name, "`.")]
            pub const $constant: Self = Self($name);)+
        }
    };
}

limits! {
    /// Size of all linear memories and tables together, in bytes, including the initial size. A component in
    /// Python requests 256 MiB.
    memory: usize = MEMORY "memory", 64 << 20, MEMORY_BYTES as u64, "bytes of memory";
    /// CPU time of one event, command or query, in milliseconds.
    call_cpu_ms: u64 = CALL_CPU_MS "call-cpu-ms", 1_000, 10_000, "ms of CPU a call";
    /// CPU time of `start`, in milliseconds. Interpreters start slowly.
    start_cpu_ms: u64 = START_CPU_MS "start-cpu-ms", 10_000, 60_000, "ms of CPU a start";
    /// Calls of host functions in one event, command, query or start. Calls of WASI functions are not counted;
    /// they use CPU time.
    host_calls: u64 = HOST_CALLS "host-calls", 1_000_000, 100_000_000, "host calls a call";
    /// Bytes that cross the border in one call of a host function, or as the result of a call. The host checks
    /// the size before it copies.
    border_bytes: usize = BORDER_BYTES "border-bytes", 24 << 20, 64 << 20, "bytes over the border at once";
    /// Size of the effects of one entry, in bytes. They commit in one transaction, for which all other plugins wait.
    effect_bytes: usize = EFFECT_BYTES "effect-bytes", 4 << 20, 64 << 20, "bytes of effects an entry";
    /// Number of effects of one entry.
    effects: usize = EFFECTS "effects", 200_000, 2_000_000, "effects an entry";
    /// Size of the plugin's whole state, in bytes of keys and values.
    state_bytes: u64 = STATE_BYTES "state-bytes", 1 << 30, 64 << 30, "bytes of state";
    /// Size of one state value, in bytes.
    value_bytes: usize = VALUE_BYTES "value-bytes", 1 << 20, 16 << 20, "bytes a state value";
    /// Size of one published message, in bytes. Kubo never sends messages over 1 MiB and loses many large ones;
    /// the design keeps messages under 60 KiB.
    message_bytes: usize = MESSAGE_BYTES "message-bytes", 60 << 10, 1 << 20, "bytes a message";
    /// Messages that one entry publishes.
    publishes: usize = PUBLISHES "publishes", 10_000, 1_000_000, "publishes an entry";
    /// Bytes of the messages that one entry publishes.
    publish_bytes: usize = PUBLISH_BYTES "publish-bytes", 4 << 20, 64 << 20, "bytes of publishes an entry";
    /// Messages published per second, on average over ten seconds.
    publishes_per_second: u64 = PUBLISHES_PER_SECOND "publishes-per-second", 1_000, 1_000_000, "publishes a second";
    /// Bytes of messages published per second, on average over ten seconds.
    publish_bytes_per_second: u64 = PUBLISH_BYTES_PER_SECOND "publish-bytes-per-second", 4 << 20, 1 << 30, "bytes of publishes a second";
    /// Size of one document, in bytes.
    document_bytes: usize = DOCUMENT_BYTES "document-bytes", 3 << 20, DOCUMENT_BYTES as u64, "bytes a document";
    /// Bytes of documents that the plugin publishes under names per second, on average over ten seconds. The
    /// host writes each to the store and passes it to the backend.
    document_bytes_per_second: u64 = DOCUMENT_BYTES_PER_SECOND "document-bytes-per-second", 8 << 20, 1 << 30, "bytes of documents a second";
    /// Timers that are set at the same time.
    timers: usize = TIMERS "timers", 200_000, 2_000_000, "timers";
    /// Names that the plugin follows at the same time.
    follows: usize = FOLLOWS "follows", 64, 1_024, "followed names";
    /// Topics that the plugin subscribes to at the same time.
    topics: usize = TOPICS "topics", 64, 1_024, "topics subscribed to";
    /// Log lines of one call; more lines are counted and dropped.
    log_lines: usize = LOG_LINES "log-lines", 100, 10_000, "log lines a call";
    /// Log lines per second, on average over ten seconds; more lines are counted and not logged. Dead letters
    /// contain them.
    log_lines_per_second: u64 = LOG_LINES_PER_SECOND "log-lines-per-second", 100, 100_000, "log lines a second";
    /// Publishes that wait to be sent; the host refuses a publish that would exceed the limit.
    outbox: usize = OUTBOX "outbox", 10_000, 1_000_000, "publishes waiting";
    /// Retries of an event before it becomes a dead letter.
    retries: u32 = RETRIES "retries", 5, 100, "retries of an event";
    /// Failed starts in a row before the plugin is quarantined.
    restarts: u32 = RESTARTS "restarts", 8, 100, "failed starts in a row";
}

/// A limit.
pub struct Limit {
    /// The name in config and manifest.
    pub name: &'static str,
    /// The limit of a plugin without a request.
    pub default: u64,
    /// The maximum for any plugin, unless the operator sets another ceiling.
    pub ceiling: u64,
    /// The words for the unit of the limit.
    pub what: &'static str,
    set: fn(&mut Limits, u64),
}

/// The name of a limit. Violations of fixed limits and of grants are counted under names, too, which no config has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LimitName(&'static str);

impl LimitName {
    /// The name under which missing grants are counted.
    pub const GRANTS: Self = Self("grants");
    /// The name under which starts are counted for which the process has no instance.
    pub const INSTANCES: Self = Self("instances");
    /// The name under which keys of state and timers over [`KEY_BYTES`] are counted.
    pub const KEY_BYTES: Self = Self("key-bytes");
    /// The name under which commands and queries are counted that exceed the memory for waiting ones.
    pub const QUEUE_BYTES: Self = Self("queue-bytes");

    /// The text.
    pub fn as_str(self) -> &'static str {
        self.0
    }
}

impl Borrow<str> for LimitName {
    fn borrow(&self) -> &str {
        self.0
    }
}

impl fmt::Debug for LimitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.0, f)
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

/// The error of an unknown name of a limit.
#[derive(Debug, Error)]
#[error("there is no limit {0:?}; there are {known}", known = names())]
pub struct NoLimit(String);

fn names() -> String {
    LIMITS.iter().map(|limit| limit.name).collect::<Vec<_>>().join(", ")
}

/// Values for some of the limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = BTreeMap<String, u64>)]
pub struct SomeLimits(BTreeMap<LimitName, u64>);

impl SomeLimits {
    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, limit: &Limit) -> Option<u64> {
        self.0.get(&LimitName(limit.name)).copied()
    }

    /// The values in `other` that are absent here or larger than here.
    pub fn lacking(&self, other: &Self) -> impl Iterator<Item = (&'static Limit, u64)> {
        LIMITS.iter().filter_map(|limit| {
            let asked = other.get(limit)?;
            (self.get(limit).is_none_or(|granted| granted < asked)).then_some((limit, asked))
        })
    }

    /// Adds the values in `other`; the larger value of each limit counts.
    pub fn add(&mut self, other: &Self) {
        for (limit, value) in &other.0 {
            let own = self.0.entry(*limit).or_default();
            *own = (*own).max(*value);
        }
    }

    /// Removes the limits that `other` contains, whatever their values.
    pub fn take(&mut self, other: &Self) {
        self.0.retain(|limit, _| !other.0.contains_key(limit));
    }
}

/// The operator's policy on the limits of all plugins. The section `limits` of the config.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitPolicy {
    /// Limits of a plugin without a request; absent ones are as in the table of `docs/limits.md`.
    pub default: SomeLimits,
    /// Maxima of any plugin, whatever it requests or is granted; absent ones are as in that table.
    pub ceiling: SomeLimits,
    /// Most plugins, default 200. The host does not load a plugin beyond that. At most 900, because the host
    /// reserves address space for each.
    pub plugins: usize,
    /// Largest component in bytes, default 128 MiB, at most 256 MiB. A larger one is refused before any other check.
    pub component_bytes: usize,
    /// CPU time for compiling one component, default 5 minutes, at most an hour; a bare number is in seconds.
    #[serde(alias = "compile-seconds", with = "dim_model::time::in_seconds")]
    pub compile_time: Duration,
    /// Memory for compiling one component in bytes, default 4 GiB.
    pub compile_memory: u64,
    /// Size of the log that waits for a plugin in bytes, default 4 GiB, and never more than half of the store's
    /// maximum. When the log is too large, it does not wait for a plugin that is further behind.
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
            compile_time: Duration::from_secs(300),
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
        // No config can exceed the maximum that the host is made for.
        match limit.name {
            "memory" | "document-bytes" => own.map_or(limit.ceiling, |own| own.min(limit.ceiling)),
            _ => own.unwrap_or(limit.ceiling),
        }
    }

    /// The limits in a manifest's requests that need a grant: those above the default, up to the ceiling,
    /// unless the operator has set them.
    pub fn asked(&self, wish: &SomeLimits, set: &SomeLimits) -> SomeLimits {
        let asked = LIMITS.iter().filter(|limit| set.get(limit).is_none()).filter_map(|limit| {
            let wish = wish.get(limit)?.min(self.ceiling_of(limit));
            (wish > self.default_of(limit)).then_some((LimitName(limit.name), wish))
        });
        SomeLimits(asked.collect())
    }

    /// Computes the limits of a plugin: the value that the operator has `set`; else the requested value up to
    /// the default or the grant; else the default. Never more than the ceiling.
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

    /// The first value above its ceiling, in words.
    pub fn over_ceiling(&self, set: &SomeLimits) -> Option<String> {
        LIMITS.iter().find_map(|limit| {
            let (set, ceiling) = (set.get(limit)?, self.ceiling_of(limit));
            (set > ceiling).then(|| format!("{}: {set} is over the ceiling, {ceiling}", limit.name))
        })
    }
}

const _: () = assert!(MESSAGE_BYTES == 60 << 10, "the default is this");

impl Limits {
    /// The CPU time of one event, command or query.
    pub fn call_cpu(&self) -> Duration {
        Duration::from_millis(self.call_cpu_ms)
    }

    /// The CPU time of `start`.
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
        // The ceiling also applies to a default above it.
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
