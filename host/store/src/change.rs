//! Owns the changes of plugins' code: the states of each change with their times, its announcement, and its
//! permanent record.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dim_client::masked;
use dim_model::entry::Offset;
use dim_model::feed::Feed;
use dim_model::ident::PluginName;
use dim_model::time::Timestamp;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::plugin_limits::REASON_BYTES;

/// Longest text of the source of a component, and of the requester of a change, in bytes; a longer text is cut.
pub const SOURCE_BYTES: usize = 2_048;

/// The topic on which every host announces changes of its plugins, each as the JSON of a [`Change`].
pub const TOPIC: &str = "dim.plugins.changes";

/// The state of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The host receives the component.
    Fetching,
    /// The host checks the component without running it.
    Judging,
    /// The host compiles the component, or takes its compiled form from the cache.
    Compiling,
    /// The change waits for an earlier change of the same plugin.
    Waiting,
    /// The host runs `start` of the new code on a snapshot, and drops its effects.
    Rehearsing,
    /// The host runs `start` of the new code between two entries.
    TakingOver,
    /// The new code handles entries and is on probation.
    OnProbation,
    /// The new code has proven itself.
    Confirmed,
    /// The probation is over, and the new code had no event that it could have failed at.
    ConfirmedUnproven,
    /// The new code failed on probation, and the code before it has handled its entries again.
    TakenBack,
    /// The operator has rolled back the new code.
    RolledBack,
    /// Other code has taken over before the probation was over.
    Replaced,
    /// The host refuses the component; the code before it continues.
    Refused,
    /// The component runs already.
    Unchanged,
    /// The component requests more than the plugin is granted, and waits for a grant; the code before it continues.
    Pending,
    /// The operator has granted or denied the plugin a permission.
    GrantsChanged,
    /// The plugin is new.
    Installed,
    /// The plugin has failed to start too often. It handles nothing until it is resumed or gets other code.
    Quarantined,
    /// The plugin handles nothing until it is resumed.
    Paused,
    /// The plugin is resumed.
    Resumed,
    /// The plugin is unloaded; the host keeps its state.
    Removed,
    /// The plugin's state is deleted, too.
    Purged,
}

impl State {
    /// The word for the state, as in JSON.
    pub fn as_str(self) -> String {
        let word = serde_json::to_value(self).unwrap_or_default();
        word.as_str().unwrap_or_default().to_owned()
    }

    /// Whether no other state follows.
    pub fn is_final(self) -> bool {
        self > Self::OnProbation
    }
}

/// A state of a change, with the time at which the change reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// The state.
    pub state: State,
    /// The time.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

/// A version of a plugin's component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The version.
    pub version: String,
    /// The digest, in hex.
    pub digest: String,
    /// The state version; absent before the first start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub state_version: Option<u32>,
}

/// A change of a plugin's code, with its history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// The plugin.
    pub plugin: PluginName,
    /// The last state that the change has reached.
    pub state: State,
    /// The requester of the change.
    pub by: String,
    /// The source of the component. A URL is shown without parts that may be secret.
    #[serde(serialize_with = "shown")]
    pub source: String,
    /// The version before the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub before: Option<Version>,
    /// The version after the change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub after: Option<Version>,
    /// The reason why the component was refused or rolled back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// The requested permissions that the plugin is not granted, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// The first entry that the new code handles.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub at: Option<u64>,
    /// The time in which the plugin handled nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pause: Option<Pause>,
    /// The number of bytes of the component that the host has received so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub received: Option<u64>,
    /// The number of log entries that the code before handled again after a rollback.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub replayed: Option<u64>,
    /// The states that the change has reached, with their times.
    pub steps: Vec<Step>,
}

/// Serializes the source of a component with secrets masked. Records of earlier versions contain whole URLs.
pub fn shown<S: serde::Serializer>(source: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&masked(source))
}

/// The time in which a plugin handled nothing during a takeover, in nanoseconds, with its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// The time from the end of the old code's last call to the end of the new code's `start`.
    pub total: u64,
    /// The time for dropping the old instance.
    pub drop: u64,
    /// The time for making the new instance.
    pub instantiate: u64,
    /// The time for `start` of the new code.
    pub start: u64,
}

impl Change {
    /// Creates a change that begins now.
    pub fn new(plugin: PluginName, state: State, by: String, source: String) -> Self {
        let steps = vec![Step { state, at: Timestamp::wall() }];
        Self {
            plugin,
            state,
            by: cut(by, SOURCE_BYTES),
            source: cut(masked(&source), SOURCE_BYTES),
            before: None,
            after: None,
            reason: None,
            missing: Vec::new(),
            at: None,
            pause: None,
            received: None,
            replayed: None,
            steps,
        }
    }

    /// Moves the change to a state now.
    pub fn reach(&mut self, state: State) {
        self.state = state;
        self.steps.push(Step { state, at: Timestamp::wall() });
    }

    /// Records the takeover; the new code is on probation from now on.
    pub fn taken_over(&mut self, before: Version, at: Offset, pause: Pause) {
        self.before = Some(before);
        self.at = Some(at.0);
        self.pause = Some(pause);
        self.reach(State::OnProbation);
    }

    /// The change as it is recorded: the words for missing permissions have at most as many bytes as a reason.
    pub fn for_the_record(&self) -> Cow<'_, Self> {
        let mut bytes = 0;
        let kept = self.missing.iter().take_while(|words| {
            bytes += words.len();
            bytes <= REASON_BYTES
        });
        let kept: Vec<_> = kept.cloned().collect();
        let left = self.missing.len() - kept.len();
        if left == 0 {
            return Cow::Borrowed(self);
        }
        let missing = kept.into_iter().chain([format!("{left} more")]).collect();
        Cow::Owned(Self { missing, ..self.clone() })
    }

    /// Sets the reason; a longer one is cut.
    pub fn because(&mut self, reason: String) {
        self.reason = Some(cut(reason, REASON_BYTES));
    }

    /// Moves the change to a final state.
    pub fn ended(&mut self, state: State, reason: Option<String>, replayed: Option<u64>) {
        if let Some(reason) = reason {
            self.because(reason);
        }
        self.replayed = replayed;
        self.reach(state);
    }
}

/// Cuts a text to at most `most` bytes.
fn cut(mut text: String, most: usize) -> String {
    text.truncate(text.floor_char_boundary(most));
    text
}

/// Most states of changes that the feed keeps for its readers.
const KEPT: usize = 256;

/// The changes that are under way, and the feed of all states.
#[derive(Debug)]
pub struct Changes {
    under_way: Mutex<BTreeMap<u64, Change>>,
    next: AtomicU64,
    feed: Arc<Feed<Change>>,
    /// The counters of finished changes.
    pub counters: Counters,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            under_way: Mutex::default(),
            next: AtomicU64::new(0),
            feed: Arc::new(Feed::new(KEPT)),
            counters: Counters::default(),
        }
    }
}

/// The counters of finished changes.
#[derive(Debug)]
pub struct Counters {
    /// The number of changes by each state from `on-probation` on.
    ends: Mutex<BTreeMap<State, u64>>,
    /// The time in which plugins handled nothing during takeovers, in seconds.
    pub pauses: Histogram,
}

impl Counters {
    /// The number of changes that have reached each state.
    pub fn counts(&self) -> Vec<(String, u64)> {
        let ends = self.ends.lock().expect(UNHURT).clone();
        ends.into_iter().map(|(state, count)| (state.as_str(), count)).collect()
    }
}

impl Default for Counters {
    fn default() -> Self {
        // From 0.05 ms to 1.6 s.
        Self { ends: Mutex::default(), pauses: Histogram::new(exponential_buckets(0.00005, 2.0, 16)) }
    }
}

impl Changes {
    /// Begins a change. It is under way until the returned value is dropped.
    pub fn begin(self: &Arc<Self>, change: Change) -> UnderWay {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let under_way = UnderWay { change, number, changes: self.clone() };
        under_way.show();
        self.tell(&under_way.change);
        under_way
    }

    /// The newest change of each plugin that has one under way.
    pub fn under_way(&self) -> BTreeMap<PluginName, Change> {
        let under_way = self.under_way.lock().expect(UNHURT);
        under_way.values().map(|change| (change.plugin.clone(), change.clone())).collect()
    }

    /// The feed of the states that changes have reached.
    pub fn feed(&self) -> &Arc<Feed<Change>> {
        &self.feed
    }

    /// Announces a state that a change has reached, and counts it.
    pub fn tell(&self, change: &Change) {
        if change.state >= State::OnProbation {
            *self.counters.ends.lock().expect(UNHURT).entry(change.state).or_default() += 1;
        }
        if let (State::OnProbation, Some(pause)) = (change.state, change.pause) {
            self.counters.pauses.observe(Duration::from_nanos(pause.total).as_secs_f64());
        }
        self.feed.tell(change.clone());
    }
}

/// Progress of a download is announced each time this power of two of bytes has arrived.
const TOLD_AGAIN: u32 = 20;

const UNHURT: &str = "no one panics while holding the changes";

/// A change that is under way; dropping it ends the change.
#[derive(Debug)]
pub struct UnderWay {
    /// The current state of the change.
    pub change: Change,
    number: u64,
    changes: Arc<Changes>,
}

impl UnderWay {
    /// Marks the change as refused and returns it. The caller records it, which also announces it.
    pub fn refused(&mut self, why: String) -> Change {
        self.change.ended(State::Refused, Some(why), None);
        self.change.clone()
    }

    /// Marks the change as unchanged: the component runs already.
    pub fn unchanged(&mut self) {
        self.change.after.clone_from(&self.change.before);
        self.reach(State::Unchanged);
    }

    /// Records the number of received bytes, and announces it at intervals.
    pub fn received(&mut self, bytes: u64) {
        let before = self.change.received.replace(bytes).unwrap_or(0);
        self.show();
        if before >> TOLD_AGAIN != bytes >> TOLD_AGAIN {
            self.changes.tell(&self.change);
        }
    }

    /// Moves the change to a state and announces it.
    pub fn reach(&mut self, state: State) {
        self.change.reach(state);
        self.show();
        self.changes.tell(&self.change);
    }

    fn show(&self) {
        self.changes.under_way.lock().expect(UNHURT).insert(self.number, self.change.clone());
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // A change that its requester abandons also ends with an announcement.
        if self.change.state < State::OnProbation && self.change.state != State::TakingOver {
            let told = self.refused("it was broken off".to_owned());
            self.changes.tell(&told);
        }
        self.changes.under_way.lock().expect(UNHURT).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_on_record_of_a_change_is_bounded() {
        let long = || "ö".repeat(50_000);
        let mut change = Change::new("probe".parse().unwrap(), State::Judging, long(), long());
        change.ended(State::Refused, Some(long()), None);
        assert_eq!((change.by.len(), change.source.len()), (SOURCE_BYTES, SOURCE_BYTES));
        assert_eq!(change.reason.as_ref().unwrap().len(), REASON_BYTES);
        change.missing = vec!["x".repeat(1_024); 4];
        assert_eq!(change.for_the_record().missing, change.missing);
        change.missing.extend(vec!["y".to_owned(); 996]);
        let record = change.for_the_record();
        let missing = &record.missing;
        assert_eq!((missing.len(), missing[4].as_str()), (5, "996 more"));
    }
}
