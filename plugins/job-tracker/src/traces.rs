//! Stores traces of jobs that the tracker does not hold: removed jobs, so that a repeated event does not add them
//! again, and results that arrived before their job. Traces are bounded in age and number; the oldest are removed
//! first.

use dim_guest::state::{Error, Map, Value};
use dim_guest::time::Time;
use serde::{Deserialize, Serialize};

use crate::store::Left;

/// Maximum number of traces.
const MOST: u64 = 100_000;

/// Maximum number of traces that one entry removes, because the effects of an entry are limited.
const TOGETHER: u64 = 5_000;

const TRACES: Map<str, Trace> = Map::new("trace/");
/// The index of traces by age, oldest first.
const BY_AGE: Map<str, String> = Map::new("trace-age/");
/// The index of jobs removed by command, newest first: the key contains the inverted time.
const REMOVED: Map<str, String> = Map::new("removed/");
const COUNT: Value<u64> = Value::new("traces");

/// The trace of a job that the tracker does not hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The time of the removal, or the time at which the result was ready.
    pub at: Time,
    /// The kind of the trace.
    #[serde(flatten)]
    pub known: Known,
}

/// The kind of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Known {
    /// The job was removed by command, here or on another host of the fleet.
    Removed {},
    /// The finished job was pruned.
    Pruned {},
    /// The result arrived before any event of the job. The payload is its CID.
    ResultCid(String),
}

/// Returns the trace of a job, if any.
pub fn of(id: &str) -> Result<Option<Trace>, Error> {
    TRACES.get(id)
}

/// Stores the trace of a job, and replaces an earlier one.
pub fn leave(id: &str, trace: &Trace) -> Result<(), Error> {
    take(id)?;
    TRACES.set(id, trace)?;
    BY_AGE.set(&age(id, trace), &id.to_owned())?;
    if trace.known == (Known::Removed {}) {
        REMOVED.set(&newest(id, trace), &id.to_owned())?;
    }
    COUNT.set(&(count()? + 1))
}

/// Removes and returns the trace of a job, if any.
pub fn take(id: &str) -> Result<Option<Trace>, Error> {
    let Some(trace) = TRACES.get(id)? else { return Ok(None) };
    TRACES.delete(id)?;
    BY_AGE.delete(&age(id, &trace))?;
    if trace.known == (Known::Removed {}) {
        REMOVED.delete(&newest(id, &trace))?;
    }
    COUNT.set(&count()?.saturating_sub(1))?;
    Ok(Some(trace))
}

/// Iterates over the jobs that were removed by command, with the times, newest first.
pub fn removed() -> impl Iterator<Item = Result<(String, Time), Error>> {
    REMOVED.iter(None).filter_map(|row| match row {
        Ok((key, id)) => {
            let counted_down = i64::from_str_radix(key.split_once('/')?.0, 16).ok()?;
            Some(Ok((id, Time::of_millis(i64::MAX - counted_down))))
        }
        Err(error) => Some(Err(error)),
    })
}

/// Removes the traces from before `oldest`, and the oldest ones beyond the maximum number; at most 5,000 at a time.
pub fn prune(oldest: Time) -> Result<Left, Error> {
    let (mut surplus, mut left) = (count()?.saturating_sub(MOST), Left::Nothing);
    let mut gone = Vec::new();
    for row in BY_AGE.iter(None) {
        let (key, id) = row?;
        let is_old = key < format!("{:016x}", oldest.millis());
        if !is_old && surplus == 0 {
            left = Left::Kept;
            break;
        }
        if gone.len() as u64 == TOGETHER {
            left = Left::More;
            break;
        }
        surplus = surplus.saturating_sub(1);
        gone.push(id);
    }
    for id in gone {
        take(&id)?;
    }
    Ok(left)
}

fn age(id: &str, trace: &Trace) -> String {
    format!("{:016x}/{id}", trace.at.millis())
}

fn newest(id: &str, trace: &Trace) -> String {
    format!("{:016x}/{id}", i64::MAX - trace.at.millis())
}

fn count() -> Result<u64, Error> {
    Ok(COUNT.get()?.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dim_guest::fake::Host;

    fn at(millis: i64) -> Trace {
        Trace { at: Time::of_millis(millis), known: Known::Removed {} }
    }

    #[test]
    fn traces_are_forgotten_by_age_and_one_stands_for_each_job() {
        let _host = Host::new();
        for (id, millis) in [("a", 1_000), ("b", 2_000), ("a", 3_000)] {
            leave(id, &at(millis)).unwrap();
        }
        assert_eq!(count().unwrap(), 2);
        leave("c", &Trace { known: Known::Pruned {}, ..at(1_500) }).unwrap();
        let listed = || removed().collect::<Result<Vec<_>, _>>().unwrap();
        let removed = |id: &str, millis| (id.to_owned(), Time::of_millis(millis));
        assert_eq!(listed(), [removed("a", 3_000), removed("b", 2_000)]);
        assert_eq!(prune(Time::of_millis(2_500)).unwrap(), Left::Kept);
        assert_eq!((of("a").unwrap(), of("b").unwrap()), (Some(at(3_000)), None));
        assert_eq!(prune(Time::of_millis(3_001)).unwrap(), Left::Nothing);
        assert_eq!((of("a").unwrap(), count().unwrap(), listed()), (None, 0, Vec::new()));
        let written =
            serde_json::to_string(&Trace { known: Known::ResultCid("c".to_owned()), ..at(0) }).unwrap();
        assert_eq!(written, r#"{"at":"1970-01-01T00:00:00.000Z","result_cid":"c"}"#);
    }
}
