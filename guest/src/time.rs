//! Points in time: reads the time of the entry and the timestamps in messages.

use std::fmt;
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::fmt::temporal::Pieces;
use jiff::tz::Offset;
use serde::de::{MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A point in time, in milliseconds since 1970-01-01T00:00:00Z.
///
/// It is written as RFC 3339 in UTC with milliseconds. It is read from RFC 3339, from ISO 8601 without
/// a zone (taken as UTC; Python's `isoformat` writes this) and from seconds as a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(i64);

impl Time {
    /// Returns the time of the current entry. The clock does not advance during a call.
    #[cfg(target_family = "wasm")]
    pub fn now() -> Self {
        use std::time::{SystemTime, UNIX_EPOCH};
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Returns the time of the fake host.
    #[cfg(not(target_family = "wasm"))]
    pub fn now() -> Self {
        crate::fake::now()
    }

    /// Converts a WIT `timestamp`, in nanoseconds. Fractions of a millisecond are dropped.
    pub fn from_timestamp(nanoseconds: u64) -> Self {
        Self(i64::try_from(nanoseconds / 1_000_000).unwrap_or(i64::MAX))
    }

    /// Converts this time to a WIT `timestamp`, in nanoseconds. A time before 1970 becomes 0.
    pub fn timestamp(self) -> u64 {
        u64::try_from(self.0).unwrap_or(0).saturating_mul(1_000_000)
    }

    /// Creates a time from milliseconds since 1970-01-01T00:00:00Z.
    pub fn of_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Returns the milliseconds since 1970-01-01T00:00:00Z.
    pub fn millis(self) -> i64 {
        self.0
    }

    /// Returns the time `duration` after this one, in whole milliseconds.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Returns the time `duration` before this one, in whole milliseconds.
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Returns the duration from `earlier` to this time, or zero if this time is not later.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    fn parse(text: &str) -> Option<Self> {
        let pieces = Pieces::parse(text).ok()?;
        let local = DateTime::from_parts(pieces.date(), pieces.time().unwrap_or_default());
        let offset = match pieces.to_numeric_offset() {
            Some(offset) => offset,
            None if pieces.time_zone_annotation().is_none() => Offset::UTC,
            // A guest has no time zone database.
            None => return None,
        };
        Some(Self(offset.to_timestamp(local).ok()?.as_millisecond()))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(timestamp) => write!(f, "{timestamp:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TimeVisitor)
    }
}

struct TimeVisitor;

/// Largest accepted time in seconds since 1970: the end of the year 9999.
const MAX_SECONDS: f64 = 253_402_300_799.0;

/// The error text of a well-formed time that is out of range.
const OUT_OF_RANGE: &str = "a time must lie between 1970-01-01 and 9999-12-30";

/// Plausible times of messages, in seconds since 1970: the years 2001 to 2099.
const LIKELY: std::ops::Range<f64> = 1e9..4.1e9;

/// Guesses the unit of a number that is not a time in seconds: the unit in which it is a plausible time.
fn unit_of(number: f64) -> Option<&'static str> {
    let units = [("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9)];
    units.into_iter().find(|(_, in_a_second)| LIKELY.contains(&(number / in_a_second))).map(|(unit, _)| unit)
}

impl<'de> Visitor<'de> for TimeVisitor {
    type Value = Time;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an RFC 3339 time or seconds since 1970")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Time, E> {
        let number = || text.parse().ok().filter(|number| unit_of(*number).is_some());
        match (Time::parse(text), number()) {
            (Some(time), _) => Ok(time),
            (None, Some(number)) => self.visit_f64(number),
            (None, None) if Pieces::parse(text).is_ok_and(|pieces| pieces.to_numeric_offset().is_some()) => {
                Err(E::custom(OUT_OF_RANGE))
            }
            (None, None) => Err(E::invalid_value(Unexpected::Str(text), &self)),
        }
    }

    /// Reads a number as serde_json passes it if its feature `arbitrary_precision` is enabled.
    fn visit_map<A: MapAccess<'de>>(self, mut number: A) -> Result<Time, A::Error> {
        use serde::de::Error as _;
        match number.next_entry::<String, String>()? {
            Some((key, text)) if key == "$serde_json::private::Number" => match text.parse() {
                Ok(seconds) => self.visit_f64(seconds),
                Err(_) => Err(A::Error::invalid_value(Unexpected::Str(&text), &self)),
            },
            _ => Err(A::Error::invalid_type(Unexpected::Map, &self)),
        }
    }

    fn visit_u64<E: serde::de::Error>(self, seconds: u64) -> Result<Time, E> {
        self.visit_f64(seconds as f64)
    }

    fn visit_i64<E: serde::de::Error>(self, seconds: i64) -> Result<Time, E> {
        self.visit_f64(seconds as f64)
    }

    fn visit_f64<E: serde::de::Error>(self, seconds: f64) -> Result<Time, E> {
        if !(0.0..=MAX_SECONDS).contains(&seconds) {
            return Err(E::custom(match unit_of(seconds) {
                Some(unit) => format!("{seconds} is not in seconds since 1970: {unit}?"),
                None => OUT_OF_RANGE.to_owned(),
            }));
        }
        Ok(Time((seconds * 1000.0).round() as i64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_in_another_unit_is_refused_with_the_unit() {
        for (text, unit) in [
            ("1767268800000", "milliseconds"),
            ("\"1767268800000\"", "milliseconds"),
            ("1767268800000.5", "milliseconds"),
            ("1767268800000000", "microseconds"),
            ("1767268800000000000", "nanoseconds"),
        ] {
            let why = serde_json::from_str::<Time>(text).unwrap_err().to_string();
            assert!(why.contains(&format!("is not in seconds since 1970: {unit}?")), "{why}");
        }
        for text in ["1e30", "\"9999-12-31T23:59:59Z\""] {
            let why = serde_json::from_str::<Time>(text).unwrap_err().to_string();
            assert!(why.contains("must lie between 1970-01-01 and 9999-12-30"), "{why}");
        }
    }

    #[test]
    fn times_are_read_in_each_form_that_fleets_send() {
        let noon = Time(1_767_268_800_000);
        for text in [
            "\"2026-01-01T12:00:00Z\"",
            "\"2026-01-01T14:00:00+02:00\"",
            // The format of Python's `isoformat`.
            "\"2026-01-01T12:00:00.000000\"",
            "\"2026-01-01 12:00:00\"",
            "1767268800",
            "1767268800.0004",
        ] {
            assert_eq!(serde_json::from_str::<Time>(text).expect(text), noon, "{text}");
        }
        assert_eq!(noon.to_string(), "2026-01-01T12:00:00.000Z");
        for text in ["\"soon\"", "\"\"", "\"2026-01-01T12:00:00[Europe/Paris]\"", "-1", "1e18", "null", "[]"]
        {
            assert!(serde_json::from_str::<Time>(text).is_err(), "{text}");
        }
    }
}
