//! Owns how a plugin is doing, as the operator sees it.

use std::collections::BTreeMap;

use super::{Actor, Body};
use crate::ident::KeyName;
use crate::plugin::Batch;
use crate::plugin::instance::thread_cpu;
use crate::plugin::probation::Probation;
use crate::time::{Timestamp, nanoseconds};

/// How a plugin is doing.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct PluginStatus {
    /// `starting`, `running`, `failing`, `quarantined` or `paused`.
    pub state: &'static str,
    /// Why it is failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// Since when it is failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub failing_since: Option<Timestamp>,
    /// How its code does on probation, if it is on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub probation: Option<Probation>,
    /// The next entry that it will read.
    pub cursor: u64,
    /// The time of the last entry that it handled.
    #[schema(value_type = String, format = DateTime)]
    pub reached: Timestamp,
    /// Events, commands and timers that it handled.
    pub handled: u64,
    /// Events that it rejected or put off, and traps.
    pub failures: u64,
    /// Events that were set aside.
    pub dead_letters: u64,
    /// Instances that were made.
    pub instances: u64,
    /// What it asked for, as far as it was handed to the commit.
    pub effects: EffectCounts,
    /// CPU time, in nanoseconds.
    pub cpu: u64,
    /// Bytes of memory of the instance.
    pub memory: usize,
    /// Bytes of its state.
    pub state_bytes: u64,
    /// Timers that are set.
    pub timers: usize,
    /// What it has met, and how often: `grants`, for what it is not granted, or the name of a limit.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, u64>)]
    pub met: BTreeMap<&'static str, u64>,
    /// What it asked for last that it is not granted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_denied: Option<String>,
    /// The keys whose last document was too large to be published, each with its limit in bytes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, usize>)]
    pub too_large: BTreeMap<KeyName, usize>,
}

/// Effects by their kind. What overwrites each other within a batch counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct EffectCounts {
    /// Keys of the state that were written or deleted.
    pub state: u64,
    /// Publishes.
    pub publishes: u64,
    /// New values of names.
    pub names: u64,
    /// Timers that were set or cleared.
    pub timers: u64,
}

impl EffectCounts {
    pub(super) fn add(&mut self, batch: &Batch) {
        self.state += batch.state.len() as u64;
        self.publishes += batch.publishes.len() as u64;
        self.names += batch.names.len() as u64;
        self.timers += batch.timers.len() as u64;
    }
}

impl Actor {
    /// Shows how the plugin is doing.
    pub(super) fn show(&mut self) {
        self.tally.cursor = self.cursor().0;
        self.tally.reached = self.session().world.time();
        self.tally.state_bytes = self.session().effects.state_size;
        self.tally.timers = self.session().effects.timers.count();
        self.tally.memory = match &self.body {
            Body::Live(instance) => instance.memory(),
            _ => 0,
        };
        self.tally.cpu = nanoseconds(thread_cpu());
        self.tally.probation = self.probation;
        if self.tally.too_large != self.session().too_large {
            self.tally.too_large = self.session().too_large.clone();
        }
        if self.tally.met != self.session().met {
            self.tally.met = self.session().met.clone();
            self.tally.last_denied = self.session().last_denied.clone();
        }
        let state =
            if self.inbox.is_paused() && !self.is_quarantined() { "paused" } else { self.tally.state };
        self.inbox.show_fallback(self.fallback.as_ref().map(|fallback| &fallback.run));
        self.inbox.show(&PluginStatus { state, ..self.tally.clone() });
    }

    /// Shows that the plugin runs.
    pub(super) fn show_running(&mut self) {
        self.tally.state = "running";
        self.tally.reason = None;
        self.tally.failing_since = None;
        self.show();
    }

    /// Shows that the plugin does not start, and why.
    pub(super) fn show_failing(&mut self, state: &'static str, reason: String) {
        self.tally.state = state;
        self.tally.reason = Some(reason);
        self.tally.failing_since.get_or_insert_with(Timestamp::wall);
        self.show();
    }
}
