//! Owns the limits of a plugin: how much of the machine it may take. Each is on by default.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What one plugin may take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Linear memory of all memories together, in bytes, the initial size included.
    /// 256 MiB holds a Python component.
    pub memory: usize,
    /// CPU time of one event, command or query, in milliseconds.
    pub call_cpu_ms: u64,
    /// CPU time of `start`, in milliseconds. Interpreters start slowly.
    pub start_cpu_ms: u64,
    /// Bytes that the effects of one entry may hold.
    pub effect_bytes: usize,
    /// Number of effects of one entry.
    pub effects: usize,
    /// The plugin's whole state, in bytes of keys and values.
    pub state_bytes: u64,
    /// One state value, in bytes.
    pub value_bytes: usize,
    /// One published message, in bytes. Kubo never sends what is over 1 MiB and loses much of
    /// what is large; the design keeps messages under 60 KiB.
    pub message_bytes: usize,
    /// One document, in bytes.
    pub document_bytes: usize,
    /// Timers that are set at one time.
    pub timers: usize,
    /// Names followed at one time.
    pub follows: usize,
    /// Topics subscribed to at one time.
    pub topics: usize,
    /// Log lines of one call; more are counted and dropped.
    pub log_lines: usize,
    /// Publishes that wait to be sent; an entry that would add to more is refused the publish.
    pub outbox: usize,
    /// How often an event is tried again before it is set aside.
    pub retries: u32,
}

/// Longest key of state and timers, in bytes.
pub const KEY_BYTES: usize = 512;

/// Largest page of a scan, in bytes.
pub const PAGE_BYTES: usize = 1 << 20;

/// Longest reason that a plugin gives for a failure, in bytes; what is longer is cut.
pub const REASON_BYTES: usize = 4096;

/// Longest line of a plugin's log, in bytes; what is longer is cut.
pub const LINE_BYTES: usize = 4096;

/// Largest document that both backends can hold, in bytes.
pub const DOCUMENT_BYTES: usize = 16 << 20;

/// Largest message that is sent with confidence, in bytes.
pub const MESSAGE_BYTES: usize = 60 << 10;

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: 256 << 20,
            call_cpu_ms: 1_000,
            start_cpu_ms: 10_000,
            effect_bytes: 24 << 20,
            effects: 200_000,
            state_bytes: 1 << 30,
            value_bytes: 1 << 20,
            message_bytes: MESSAGE_BYTES,
            document_bytes: DOCUMENT_BYTES,
            timers: 200_000,
            follows: 64,
            topics: 64,
            log_lines: 100,
            outbox: 10_000,
            retries: 5,
        }
    }
}

impl Limits {
    /// What a plugin asks for, as far as it lies within `ceiling`.
    pub fn within(&self, ceiling: &Self) -> Self {
        Self {
            memory: self.memory.min(ceiling.memory),
            call_cpu_ms: self.call_cpu_ms.min(ceiling.call_cpu_ms),
            start_cpu_ms: self.start_cpu_ms.min(ceiling.start_cpu_ms),
            effect_bytes: self.effect_bytes.min(ceiling.effect_bytes),
            effects: self.effects.min(ceiling.effects),
            state_bytes: self.state_bytes.min(ceiling.state_bytes),
            value_bytes: self.value_bytes.min(ceiling.value_bytes),
            message_bytes: self.message_bytes.min(ceiling.message_bytes),
            document_bytes: self.document_bytes.min(ceiling.document_bytes),
            timers: self.timers.min(ceiling.timers),
            follows: self.follows.min(ceiling.follows),
            topics: self.topics.min(ceiling.topics),
            log_lines: self.log_lines.min(ceiling.log_lines),
            outbox: self.outbox.min(ceiling.outbox),
            retries: self.retries.min(ceiling.retries),
        }
    }

    /// CPU time of one event, command or query.
    pub fn call_cpu(&self) -> Duration {
        Duration::from_millis(self.call_cpu_ms)
    }

    /// CPU time of `start`.
    pub fn start_cpu(&self) -> Duration {
        Duration::from_millis(self.start_cpu_ms)
    }
}
