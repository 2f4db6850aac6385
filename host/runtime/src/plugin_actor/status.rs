//! Owns the status of a plugin, as the operator sees it.

use std::collections::BTreeMap;

use dim_model::ident::KeyName;
use dim_model::time::{Timestamp, nanoseconds};
use dim_store::batch::Batch;
use dim_store::plugin_limits::LimitName;
use dim_store::probation::Probation;

use super::{Actor, InstanceSlot};
use crate::instance::thread_cpu;

/// The status of a plugin.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, utoipa::ToSchema)]
pub struct PluginStatus {
    /// `starting`, `running`, `failing`, `quarantined` or `paused`.
    pub state: &'static str,
    /// The reason why it is failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// The time since which it is failing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub failing_since: Option<Timestamp>,
    /// The probation so far, if the code is on probation.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub probation: Option<Probation>,
    /// The next entry that it will read.
    pub cursor: u64,
    /// The time of the last entry that it handled.
    #[schema(value_type = String, format = DateTime)]
    pub reached: Timestamp,
    /// The number of events, commands and timers that it handled.
    pub handled: u64,
    /// The number of rejected events, retries and traps.
    pub failures: u64,
    /// The number of its dead letters.
    pub dead_letters: u64,
    /// The number of instances that were made.
    pub instances: u64,
    /// Its effects that were submitted to the commit.
    pub effects: EffectCounts,
    /// The CPU time in nanoseconds.
    pub cpu: u64,
    /// The memory of the instance in bytes.
    pub memory: usize,
    /// The size of its state in bytes.
    pub state_bytes: u64,
    /// The number of timers that are set.
    pub timers: usize,
    /// The exceeded limits with their counts; `grants` counts requests without a grant.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, u64>)]
    pub met: BTreeMap<LimitName, u64>,
    /// The last request without a grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_denied: Option<String>,
    /// The keys whose last document was too large to be published, each with its limit in bytes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, usize>)]
    pub too_large: BTreeMap<KeyName, usize>,
}

/// The number of effects by kind. Effects that replace each other within a batch count once.
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
        self.state += batch.requested.state.len() as u64;
        self.publishes += batch.requested.publishes.len() as u64;
        self.names += batch.requested.names.len() as u64;
        self.timers += batch.requested.timers.len() as u64;
    }
}

impl Actor {
    /// Publishes the status.
    pub(super) fn show(&mut self) {
        self.counters.cursor = self.cursor().0;
        self.counters.reached = self.session().context.time();
        self.counters.state_bytes = self.session().effects.state_size;
        self.counters.timers = self.session().effects.timers.count();
        self.counters.memory = match &self.running.body {
            InstanceSlot::Live(instance) => instance.memory(),
            _ => 0,
        };
        self.counters.cpu = nanoseconds(thread_cpu());
        self.counters.probation = self.watch.probation;
        if self.counters.too_large != self.session().violations.too_large {
            self.counters.too_large = self.session().violations.too_large.clone();
        }
        if self.counters.met != self.session().violations.counts {
            self.counters.met = self.session().violations.counts.clone();
            self.counters.last_denied = self.session().violations.last_denied.clone();
        }
        let state =
            if self.inbox.is_paused() && !self.is_quarantined() { "paused" } else { self.counters.state };
        self.inbox.show_fallback(self.watch.fallback.as_ref().map(|fallback| &fallback.run));
        self.inbox.show(&PluginStatus { state, ..self.counters.clone() });
    }

    /// Publishes that the plugin runs.
    pub(super) fn show_running(&mut self) {
        self.counters.state = "running";
        self.counters.reason = None;
        self.counters.failing_since = None;
        self.show();
    }

    /// Publishes that the plugin does not start, with the reason.
    pub(super) fn show_failing(&mut self, state: &'static str, reason: String) {
        self.counters.state = state;
        self.counters.reason = Some(reason);
        self.counters.failing_since.get_or_insert_with(Timestamp::wall);
        self.show();
    }
}
