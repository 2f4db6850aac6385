//! Owns what is told of a change of a plugin's code: the states that it goes through, with times, and the
//! record that stays of it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dim_client::masked;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::entry::Offset;
use crate::feed::Feed;
use crate::ident::PluginName;
use crate::plugin::REASON_BYTES;
use crate::time::Timestamp;

/// Longest text of where a component came from, and of who asked for a change, in bytes; what is longer is cut.
pub const SOURCE_BYTES: usize = 2_048;

/// The topic on which every host tells of changes of its plugins, as JSON of a [`Change`].
pub const TOPIC: &str = "dim.plugins.changes";

/// How far a change has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The component is on its way to the host.
    Fetching,
    /// It is looked at, without running it.
    Judging,
    /// It is compiled, or its compiled form is taken from the cache.
    Compiling,
    /// It waits for an earlier change of the same plugin.
    Waiting,
    /// Its `start` runs on a snapshot, and what it does is thrown away.
    Rehearsing,
    /// Its `start` runs between two entries.
    TakingOver,
    /// It handles entries and is watched.
    OnProbation,
    /// It has proven itself.
    Confirmed,
    /// Its probation is over, and nothing came that it could have failed at.
    ConfirmedUnproven,
    /// It failed on probation, and what came since was handled by the code before it.
    TakenBack,
    /// An operator has taken it back.
    RolledBack,
    /// Other code has taken over before its probation was over.
    Replaced,
    /// It is not fit to run here, and what ran before goes on.
    Refused,
    /// It runs already.
    Unchanged,
    /// It asks for more than the plugin is granted, and waits for that; what ran before goes on.
    Pending,
    /// The operator has granted or denied the plugin something.
    GrantsChanged,
    /// The plugin is new.
    Installed,
    /// The plugin did not start too often: it handles nothing until it is resumed or has other code.
    Quarantined,
    /// The plugin handles nothing until it is resumed.
    Paused,
    /// The plugin goes on.
    Resumed,
    /// The plugin is unloaded; its state is kept.
    Removed,
    /// The plugin's state is gone, too.
    Purged,
}

impl State {
    /// The word for it.
    pub fn as_str(self) -> String {
        let word = serde_json::to_value(self).unwrap_or_default();
        word.as_str().unwrap_or_default().to_owned()
    }

    /// Whether nothing comes after it.
    pub fn is_final(self) -> bool {
        self > Self::OnProbation
    }
}

/// When a change came to a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    /// Which.
    pub state: State,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

/// A version of a plugin's component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Its version.
    pub version: String,
    /// Its digest, in hex.
    pub digest: String,
    /// The version of its state's layout; none before its first start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub state_version: Option<u32>,
}

/// A change of a plugin's code: what becomes of it, and what stays on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// The plugin.
    pub plugin: PluginName,
    /// The last state that it came to.
    pub state: State,
    /// Who asked for it.
    pub by: String,
    /// Where the component came from; of a URL without what may be a secret.
    #[serde(serialize_with = "shown")]
    pub source: String,
    /// What ran before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub before: Option<Version>,
    /// What is to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub after: Option<Version>,
    /// Why it was refused or taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// What it asks for that the plugin is not granted, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// The first entry that the new code handles.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub at: Option<u64>,
    /// For how long the plugin handled nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub pause: Option<Pause>,
    /// Bytes of the component that have come, while it is on its way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub received: Option<u64>,
    /// How many entries of the log the code before it had to go over again, when it was taken back.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub replayed: Option<u64>,
    /// When it came to each state.
    pub steps: Vec<Step>,
}

/// Writes where a component came from. What earlier versions have on record holds whole URLs.
pub fn shown<S: serde::Serializer>(source: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&masked(source))
}

/// For how long a plugin handled nothing when other code took over, in nanoseconds, and what took so long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pause {
    /// From the end of the old code's last call to the end of the new code's `start`.
    pub total: u64,
    /// Ending the old instance.
    pub drop: u64,
    /// Making the new one.
    pub instantiate: u64,
    /// The new code's `start`.
    pub start: u64,
}

impl Change {
    /// A change that begins now.
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

    /// Comes to a state now.
    pub fn reach(&mut self, state: State) {
        self.state = state;
        self.steps.push(Step { state, at: Timestamp::wall() });
    }

    /// The new code has taken over, and is watched from now on.
    pub fn taken_over(&mut self, before: Version, at: Offset, pause: Pause) {
        self.before = Some(before);
        self.at = Some(at.0);
        self.pause = Some(pause);
        self.reach(State::OnProbation);
    }

    /// The same as it stays on record: with no more words for what is missing than a reason may have bytes.
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

    /// Notes why; what is too long is cut.
    pub fn because(&mut self, reason: String) {
        self.reason = Some(cut(reason, REASON_BYTES));
    }

    /// The code comes to its end for a reason.
    pub fn ended(&mut self, state: State, reason: Option<String>, replayed: Option<u64>) {
        if let Some(reason) = reason {
            self.because(reason);
        }
        self.replayed = replayed;
        self.reach(state);
    }
}

/// A text of at most so many bytes.
fn cut(mut text: String, most: usize) -> String {
    text.truncate(text.floor_char_boundary(most));
    text
}

/// States of changes that are kept for those who listen.
const KEPT: usize = 256;

/// The changes that are under way, and whoever wants to hear of each.
#[derive(Debug)]
pub struct Changes {
    under_way: Mutex<BTreeMap<u64, Change>>,
    next: AtomicU64,
    feed: Arc<Feed<Change>>,
    /// Counts of what has become of changes.
    pub tally: Tally,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            under_way: Mutex::default(),
            next: AtomicU64::new(0),
            feed: Arc::new(Feed::new(KEPT)),
            tally: Tally::default(),
        }
    }
}

/// Counts of what has become of changes.
#[derive(Debug)]
pub struct Tally {
    /// By a state that they came to.
    ends: Mutex<BTreeMap<State, u64>>,
    /// Seconds for which a plugin handled nothing.
    pub pauses: Histogram,
}

impl Tally {
    /// How many changes have come to each state.
    pub fn counts(&self) -> Vec<(String, u64)> {
        let ends = self.ends.lock().expect(UNHURT).clone();
        ends.into_iter().map(|(state, count)| (state.as_str(), count)).collect()
    }
}

impl Default for Tally {
    fn default() -> Self {
        // From 0.05 ms to 1.6 s.
        Self { ends: Mutex::default(), pauses: Histogram::new(exponential_buckets(0.00005, 2.0, 16)) }
    }
}

impl Changes {
    /// Begins a change, which is under way until the value goes.
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

    /// The newest states that changes have come to, and those to come.
    pub fn feed(&self) -> &Arc<Feed<Change>> {
        &self.feed
    }

    /// Tells of a state that a change has come to.
    pub fn tell(&self, change: &Change) {
        if change.state >= State::OnProbation {
            *self.tally.ends.lock().expect(UNHURT).entry(change.state).or_default() += 1;
        }
        if let (State::OnProbation, Some(pause)) = (change.state, change.pause) {
            self.tally.pauses.observe(Duration::from_nanos(pause.total).as_secs_f64());
        }
        self.feed.tell(change.clone());
    }
}

/// Each time so many bytes more have come, a power of two, it is told.
const TOLD_AGAIN: u32 = 20;

const UNHURT: &str = "no one panics while holding the changes";

/// A change that is under way.
#[derive(Debug)]
pub struct UnderWay {
    /// How far it has come.
    pub change: Change,
    number: u64,
    changes: Arc<Changes>,
}

impl UnderWay {
    /// It was refused, which is told by whoever puts it on record; returns how the change ends.
    pub fn refused(&mut self, why: String) -> Change {
        self.change.ended(State::Refused, Some(why), None);
        self.change.clone()
    }

    /// It turns out that it runs already.
    pub fn unchanged(&mut self) {
        self.change.after.clone_from(&self.change.before);
        self.reach(State::Unchanged);
    }

    /// So much of the component has come; that is told now and then.
    pub fn received(&mut self, bytes: u64) {
        let before = self.change.received.replace(bytes).unwrap_or(0);
        self.show();
        if before >> TOLD_AGAIN != bytes >> TOLD_AGAIN {
            self.changes.tell(&self.change);
        }
    }

    /// Comes to a state, which is told.
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
        // Who sent it went away: whoever listens hears the end of every change.
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
