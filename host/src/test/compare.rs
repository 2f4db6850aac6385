//! Owns the comparison of two versions of a plugin: the same events, from the same state, and where what they do with
//! them differs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::TestError;
use super::bench::{Bench, Given, Plugin};
use super::events::{Events, EventsError};
use super::matching::{Difference, Match, differences};
use super::player::{Player, State, Totals};
use super::shown::{self, shown, shown_key};
use super::trial::{Cause, Happened};
use crate::effect::NameValue;
use crate::entry::exported::Record;
use crate::time::Timestamp;

/// Records that both handle before what they did is compared: until then it is held, with each document.
const TOGETHER: usize = 128;

/// And how many bytes of them.
const BYTES_TOGETHER: u64 = 8 << 20;

/// Records that differ of which the differences are kept.
const KEPT: usize = 100;

/// Why versions cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The events.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// One of the versions.
    #[error("version {version}")]
    Version {
        /// Which.
        version: String,
        /// Why.
        source: TestError,
    },
    /// There is nothing to compare.
    #[error("there are no records to compare: the last was at {0}")]
    Nothing(Timestamp),
    /// They are of two plugins.
    #[error("these are two plugins, {0} and {1}: compare versions of one")]
    TwoPlugins(String, String),
}

/// How two versions compare.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// How many records both have handled.
    pub records: u64,
    /// How many came before, and made the state that both began with.
    pub before: u64,
    /// With how many of them they did something different.
    pub differing: u64,
    /// The same by what is different.
    pub by_section: BTreeMap<String, u64>,
    /// The first that differ.
    pub first: Vec<Differing>,
    /// How the states differ in the end.
    pub state: StateDifference,
    /// What the old version did.
    pub old: Totals,
    /// What the new version did.
    pub new: Totals,
    /// How long it took.
    pub seconds: f64,
}

/// A record that two versions handled differently.
#[derive(Clone, Debug, Serialize)]
pub struct Differing {
    /// Its place in the log; none of what came of passing time after the last, or of the take-over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// When it was.
    pub time: Timestamp,
    /// What it was.
    pub what: Value,
    /// What is different: `expected` is of the old version, `actual` of the new one.
    pub differences: Vec<Difference>,
}

/// How two states differ.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StateDifference {
    /// Keys that only the old version has.
    pub only_old: u64,
    /// Keys that only the new version has.
    pub only_new: u64,
    /// Keys with different values.
    pub different: u64,
    /// The first of those keys.
    pub keys: Vec<String>,
}

/// Compares two versions of a plugin over recorded events. What came before `since` is handled by the old version, and
/// makes the state that both begin with; the new one then takes over, as in a running host. `tell` hears how many
/// records are done. Blocks, and must not be called from an async thread.
pub fn compare(
    bench: &Bench,
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

/// The next records, of which `first` was read already: those before a time if one is given, and the first one after it
/// if it is reached.
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

type Played = Result<Vec<Vec<Happened>>, TestError>;

/// Both handle the same, each on a thread of its own.
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

/// What was found so far.
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

    /// Compares what came of no record.
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

/// What was done, by sections.
fn told(happened: &[Happened]) -> Value {
    let mut told = shown::sections(happened);
    // How it is told to the operator is no effect.
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
    /// Whether both versions did the same.
    pub fn is_same(&self) -> bool {
        self.differing == 0 && self.state.only_old + self.state.only_new + self.state.different == 0
    }

    /// How many records a second both have handled.
    pub fn rate(&self) -> f64 {
        (self.before + self.records) as f64 / Duration::from_secs_f64(self.seconds.max(1e-9)).as_secs_f64()
    }
}
