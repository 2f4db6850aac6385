//! Owns the comparison of two versions of a plugin on the same events, from the same state. Receives two plugins and
//! recorded events; returns the records with different effects.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dim_model::entry::export::Record;
use dim_model::time::Timestamp;
use dim_store::effect::NameValue;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::TrialError;
use crate::events::{Events, EventsError};
use crate::matching::{Difference, Match, differences};
use crate::notation::{self, shown, shown_key};
use crate::player::{Player, State, Totals};
use crate::test_bench::{Given, Plugin, TestBench};
use crate::trial::{Cause, Happened};

/// Maximum number of records between two comparisons. The effects of these records, with all documents, are held in
/// memory.
const TOGETHER: usize = 128;

/// Maximum size of the records between two comparisons, in bytes.
const BYTES_TOGETHER: u64 = 8 << 20;

/// Maximum number of records whose differences are kept, and of keys that are listed.
const KEPT: usize = 100;

/// The reason why versions cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The events cannot be read.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// The trial of a version failed.
    #[error("version {version}")]
    Version {
        /// The version.
        version: String,
        /// The error of the trial.
        source: TrialError,
    },
    /// There are no records in the compared span. Contains the end of the export.
    #[error("there are no records to compare: the export ends at {0}")]
    Nothing(Timestamp),
    /// The components are two different plugins.
    #[error("the components are two plugins, {0} and {1}: compare versions of one plugin")]
    TwoPlugins(String, String),
}

/// The result of a comparison.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The number of compared records.
    pub records: u64,
    /// The number of earlier records, which produced the initial state of both versions.
    pub before: u64,
    /// The number of records with different effects.
    pub differing: u64,
    /// The number of records with different effects, by section.
    pub by_section: BTreeMap<String, u64>,
    /// The first records with different effects, at most 100.
    pub first: Vec<Differing>,
    /// The differences of the final states.
    pub state: StateDifference,
    /// The totals of the old version.
    pub old: Totals,
    /// The totals of the new version.
    pub new: Totals,
    /// The duration of the comparison, in seconds.
    pub seconds: f64,
}

/// A record with different effects in the two versions.
#[derive(Clone, Debug, Serialize)]
pub struct Differing {
    /// The offset of the record; none for the time after the last record, and for the takeover.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The time of the record.
    pub time: Timestamp,
    /// The content of the record, or a description if there is no record.
    pub what: Value,
    /// The differences: `expected` is from the old version, `actual` from the new one.
    pub differences: Vec<Difference>,
}

/// The differences between two states.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StateDifference {
    /// The number of keys that only the old version has.
    pub only_old: u64,
    /// The number of keys that only the new version has.
    pub only_new: u64,
    /// The number of keys with different values.
    pub different: u64,
    /// The first of all these keys, at most 100.
    pub keys: Vec<String>,
}

/// Compares two versions of a plugin on recorded events. The old version handles the records before `since` and
/// produces the initial state of both; then the new version takes over, as in a running host. `tell` receives the
/// number of handled records. Blocks, and must not be called from an async thread.
pub fn compare(
    bench: &TestBench,
    (old, new): (&Plugin, &Plugin),
    (old_given, new_given): (&Given, &Given),
    mut events: Events,
    since: Option<Timestamp>,
    mut tell: impl FnMut(u64),
) -> Result<Comparison, CompareError> {
    if old.name() != new.name() {
        return Err(CompareError::TwoPlugins(old.name().to_string(), new.name().to_string()));
    }
    let begun = Instant::now();
    let version = |plugin: &Plugin| plugin.inspection().manifest.version.clone();
    let of_old = |source| CompareError::Version { version: version(old), source };
    let of_new = |source| CompareError::Version { version: version(new), source };
    let until = events.header.until;
    let mut comparison = Compared::default();
    let mut held: Option<Record> = None;
    let mut one = Player::new(bench, old, old_given).map_err(of_old)?;
    let mut other = match since {
        None => Player::new(bench, new, new_given).map_err(of_new)?,
        Some(since) => {
            let mut other = Player::new(bench, old, old_given).map_err(of_old)?;
            while held.is_none() {
                let (chunk, next) = chunk_of(&mut events, None, Some(since))?;
                held = next;
                if chunk.is_empty() {
                    break;
                }
                comparison.before += chunk.len() as u64;
                let (a, b) = both(&mut one, &mut other, &chunk);
                a.map_err(of_old)?;
                b.map_err(of_old)?;
                tell(comparison.before);
            }
            one.begin(old);
            let taking_over = other.replace(new, new_given).map_err(of_new)?;
            comparison.compare_untold(since, "the take-over", &[], &taking_over);
            other
        }
    };
    loop {
        let (chunk, _) = chunk_of(&mut events, held.take(), None)?;
        if chunk.is_empty() {
            break;
        }
        let (a, b) = both(&mut one, &mut other, &chunk);
        let (a, b) = (a.map_err(of_old)?, b.map_err(of_new)?);
        for ((record, was), is) in chunk.iter().zip(&a).zip(&b) {
            comparison.compare(record, was, is);
        }
        tell(comparison.before + comparison.records);
    }
    let (old_totals, was, old_state) = one.end(until).map_err(of_old)?;
    let (new_totals, is, new_state) = other.end(until).map_err(of_new)?;
    if comparison.records == 0 {
        return Err(CompareError::Nothing(until));
    }
    comparison.compare_untold(until, "the time after the last record", &was, &is);
    let Compared { records, before, differing, by_section, first } = comparison;
    Ok(Comparison {
        records,
        before,
        differing,
        by_section,
        first,
        state: StateDifference::of(&old_state, &new_state),
        old: old_totals,
        new: new_totals,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Reads the next records, after `first`, which was read before. With a time in `before` it stops there, and returns
/// the first record at or after that time separately.
fn chunk_of(
    events: &mut Events,
    first: Option<Record>,
    before: Option<Timestamp>,
) -> Result<(Vec<Record>, Option<Record>), EventsError> {
    let mut chunk: Vec<Record> = first.into_iter().collect();
    let begun = events.bytes();
    while chunk.len() < TOGETHER && events.bytes() - begun < BYTES_TOGETHER {
        let Some(record) = events.next().transpose()? else { break };
        if before.is_some_and(|before| record.time >= before) {
            return Ok((chunk, Some(record)));
        }
        chunk.push(record);
    }
    Ok((chunk, None))
}

type Played = Result<Vec<Vec<Happened>>, TrialError>;

/// Both players handle the same records in parallel, each on its own thread.
fn both(one: &mut Player, other: &mut Player, records: &[Record]) -> (Played, Played) {
    std::thread::scope(|scope| {
        let first = scope.spawn(|| one.play(records));
        let second = scope.spawn(|| other.play(records));
        let end = |thread: std::thread::ScopedJoinHandle<'_, Played>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        (end(first), end(second))
    })
}

/// The intermediate result of a comparison.
#[derive(Default)]
struct Compared {
    records: u64,
    before: u64,
    differing: u64,
    by_section: BTreeMap<String, u64>,
    first: Vec<Differing>,
}

impl Compared {
    fn compare(&mut self, record: &Record, was: &[Happened], is: &[Happened]) {
        self.records += 1;
        if is_same(was, is) {
            return;
        }
        let what = json!(record.what);
        self.note(Some(record.offset), record.time, what, was, is);
    }

    /// Compares effects that belong to no record.
    fn compare_untold(&mut self, time: Timestamp, what: &str, was: &[Happened], is: &[Happened]) {
        if !is_same(was, is) {
            self.note(None, time, json!(what), was, is);
        }
    }

    fn note(&mut self, offset: Option<u64>, time: Timestamp, what: Value, was: &[Happened], is: &[Happened]) {
        let (was, is) = (told(was), told(is));
        let mut found = differences("", &was, Some(&is), Match::Same);
        if found.is_empty() {
            let place = "bytes that mean the same".to_owned();
            found.push(Difference { place, expected: None, actual: None });
        }
        self.differing += 1;
        let section = |it: &Difference| {
            let end = it.place.find(['.', '[']).unwrap_or(it.place.len());
            it.place[..end].to_owned()
        };
        let mut sections: Vec<String> = found.iter().map(section).collect();
        sections.sort();
        sections.dedup();
        for section in sections {
            *self.by_section.entry(section).or_default() += 1;
        }
        if self.first.len() < KEPT {
            self.first.push(Differing { offset, time, what, differences: found });
        }
    }
}

fn is_same(was: &[Happened], is: &[Happened]) -> bool {
    let same = |one: &Happened, other: &Happened| {
        let letters =
            |it: &Happened| it.dead.iter().map(|it| (it.reason.clone(), it.attempts)).collect::<Vec<_>>();
        let retries = |it: &Happened| it.retries.iter().map(|it| (it.at, it.attempt)).collect::<Vec<_>>();
        one.time == other.time
            && timer(one) == timer(other)
            && one.asked == other.asked
            && one.reply == other.reply
            && letters(one) == letters(other)
            && retries(one) == retries(other)
    };
    was.len() == is.len() && was.iter().zip(is).all(|(one, other)| same(one, other))
}

fn timer(happened: &Happened) -> Option<&str> {
    match &happened.cause {
        Cause::Timer(key) => Some(key),
        Cause::Start | Cause::Entry(_) => None,
    }
}

/// The notation of the effects of one record, by sections.
fn told(happened: &[Happened]) -> Value {
    let mut told = notation::sections(happened);
    // Log lines are no effect.
    told.remove("log");
    let mut state = Map::new();
    let mut timers = Map::new();
    for it in happened {
        let written = it.asked.state.iter();
        state.extend(written.map(|(key, value)| {
            (shown_key(key), value.as_deref().map_or_else(|| json!({ "$deleted": true }), shown))
        }));
        timers.extend(it.asked.timers.iter().map(|(key, at)| (key.clone(), json!(at))));
    }
    told.insert("state".to_owned(), Value::Object(state));
    told.insert("timers".to_owned(), Value::Object(timers));
    let names = happened.iter().flat_map(|it| &it.asked.names);
    let lifetimes = names.map(|(key, update)| (key.to_string(), json!(update.lifetime.as_secs())));
    told.insert("lifetimes".to_owned(), Value::Object(lifetimes.collect()));
    let fired: Vec<_> =
        happened.iter().filter_map(|it| Some(json!({ "key": timer(it)?, "at": it.time }))).collect();
    told.insert("fired".to_owned(), Value::Array(fired));
    let subscriptions = happened.iter().flat_map(|it| &it.asked.subscriptions);
    told.insert("subscriptions".to_owned(), subscriptions.map(|it| json!(it)).collect());
    let follows = happened.iter().flat_map(|it| &it.asked.follows);
    told.insert("follows".to_owned(), follows.map(|it| json!(it)).collect());
    let paths =
        happened.iter().flat_map(|it| &it.asked.names).filter_map(|(key, update)| match &update.value {
            NameValue::Path(path) => Some((key.to_string(), json!(path))),
            NameValue::Document { .. } => None,
        });
    told.insert("paths".to_owned(), Value::Object(paths.collect()));
    Value::Object(told)
}

impl StateDifference {
    fn of(old: &State, new: &State) -> Self {
        let mut found = Self::default();
        let mut note = |key: &[u8]| {
            if found.keys.len() < KEPT {
                found.keys.push(shown_key(key));
            }
        };
        let (mut only_old, mut different) = (0, 0);
        for (key, value) in old {
            match new.get(key) {
                None => only_old += 1,
                Some(other) if other != value => different += 1,
                Some(_) => continue,
            }
            note(key);
        }
        let only_new =
            new.keys().filter(|key| !old.contains_key(*key)).inspect(|key| note(key)).count() as u64;
        Self { only_old, only_new, different, ..found }
    }
}

impl Comparison {
    /// Whether both versions had the same effects and the same final state.
    pub fn is_same(&self) -> bool {
        self.differing == 0 && self.state.only_old + self.state.only_new + self.state.different == 0
    }

    /// The number of records that both versions handled per second.
    pub fn rate(&self) -> f64 {
        (self.before + self.records) as f64 / Duration::from_secs_f64(self.seconds.max(1e-9)).as_secs_f64()
    }
}
