//! Owns time: timestamps, durations as users write them, and the clock of the log, which never goes back.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Nanoseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Returns the time of the wall clock.
    pub fn wall() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(nanoseconds(since))
    }

    /// Returns this time plus `duration`. It saturates.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanoseconds(duration)))
    }

    /// Returns the duration from `earlier` to this time, or zero if `earlier` is not earlier.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Returns the duration since 1970-01-01T00:00:00Z.
    pub fn since_epoch(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = i128::from(self.0);
        match jiff::Timestamp::from_nanosecond(nanoseconds) {
            Ok(time) => match f.precision() {
                Some(precision) => write!(f, "{time:.precision$}"),
                None => write!(f, "{time}"),
            },
            Err(_) => write!(f, "{nanoseconds}ns"),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time: jiff::Timestamp = text.parse().map_err(serde::de::Error::custom)?;
        time.try_into().map_err(serde::de::Error::custom)
    }
}

impl TryFrom<jiff::Timestamp> for Timestamp {
    type Error = String;

    fn try_from(time: jiff::Timestamp) -> Result<Self, String> {
        let nanoseconds = u64::try_from(time.as_nanosecond());
        nanoseconds.map(Self).map_err(|_| "the time must be between 1970 and 2554".to_owned())
    }
}

/// The start of a span of time, as users and programs write it: a time in RFC 3339, a duration before now as in
/// `10m`, `2h` or `1d`, or seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// From this time on.
    At(Timestamp),
    /// From this long ago on.
    For(Duration),
}

impl Since {
    /// Returns the start of the span if the time is `now`.
    pub fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(time) => time,
            Self::For(duration) => Timestamp(now.0.saturating_sub(nanoseconds(duration))),
        }
    }
}

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(seconds) = unix_seconds(text) {
            return Ok(Self::At(Timestamp(nanoseconds(seconds))));
        }
        if let Ok(duration) = duration_of(text) {
            return Ok(Self::For(duration));
        }
        let how = "write it like 2026-01-31T12:00:00Z, like 10m, 2h or 1d, or in seconds since 1970";
        let time: jiff::Timestamp = text.parse().map_err(|_| how.to_owned())?;
        Ok(Self::At(time.try_into()?))
    }
}

impl<'de> Deserialize<'de> for Since {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Returns the seconds since 1970, if a text consists of digits and at most one point.
fn unix_seconds(text: &str) -> Option<Duration> {
    let is_number = text.starts_with(|c: char| c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if !is_number {
        return None;
    }
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

/// Returns a duration in nanoseconds. It saturates at 64 bits (584 years).
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Parses a duration as users write it, as in `90s` or `24h`.
///
/// # Errors
/// The text says how to write a duration.
pub fn duration_of(text: &str) -> Result<Duration, String> {
    let no_time = || "write it like 30s, 5m, 1h30m or 2d".to_owned();
    let span: jiff::Span = text.parse().map_err(|_| no_time())?;
    let time = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| no_time())?;
    Duration::try_from(time).map_err(|_| "the time must not be negative".to_owned())
}

/// The serde form of a duration in the config: text as in `30s`, `1h30m` or `7d`, or a whole number of seconds.
pub mod in_seconds {
    pub use super::write_duration as serialize;
    use super::{ConfigDuration, Deserializer, Duration};

    /// Reads a duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        deserializer.deserialize_any(ConfigDuration { unit: "seconds", seconds: 1 })
    }
}

/// The serde form of a duration in the config: text as in `30s`, `1h30m` or `7d`, or a whole number of hours.
pub mod in_hours {
    pub use super::write_duration as serialize;
    use super::{ConfigDuration, Deserializer, Duration};

    /// Reads a duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        deserializer.deserialize_any(ConfigDuration { unit: "hours", seconds: 3_600 })
    }
}

/// Writes a duration of the config as text.
pub fn write_duration<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}

/// Reads a duration of the config. A number without a unit has the unit of the key's first form.
struct ConfigDuration {
    unit: &'static str,
    seconds: u64,
}

impl Visitor<'_> for ConfigDuration {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a duration as in 30s, 5m or 2d, or a whole number of {}", self.unit)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Duration, E> {
        Ok(Duration::from_secs(number.saturating_mul(self.seconds)))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Duration, E> {
        match text.parse() {
            Ok(number) => self.visit_u64(number),
            Err(_) => duration_of(text).map_err(E::custom),
        }
    }
}

/// A source of time: the machine, or the replacement in a test.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the time of day, which may jump in either direction.
    fn wall(&self) -> Timestamp;

    /// Returns the monotonic time, which measures how much time passed.
    fn monotonic(&self) -> Instant {
        Instant::now()
    }

    /// Returns the real time in which `duration` of monotonic time passes: `duration` itself, unless the clock of a
    /// test runs faster. Waits last this long.
    fn real(&self, duration: Duration) -> Duration {
        duration
    }
}

impl dyn Clock {
    /// Waits until `duration` of monotonic time has passed. Cancel safe.
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(self.real(duration)).await;
    }
}

/// The machine's clock.
#[derive(Clone, Copy, Debug)]
pub struct MachineClock;

impl Clock for MachineClock {
    fn wall(&self) -> Timestamp {
        Timestamp::wall()
    }
}

/// The clock of the log.
///
/// It shows the time of the wall clock but never goes back. After the wall clock is set back, the log clock runs at
/// half speed until the wall clock reaches it, so that timers still become due.
#[derive(Debug)]
pub struct LogClock {
    clock: Arc<dyn Clock>,
    last: Timestamp,
    read_at: Instant,
}

impl LogClock {
    /// Makes a clock that shows no time before `floor`, the time of the last entry.
    pub fn starting_at(floor: Timestamp, clock: Arc<dyn Clock>) -> Self {
        Self { last: floor, read_at: clock.monotonic(), clock }
    }

    /// Returns the current log time. It is not earlier than the time returned before.
    pub fn now(&mut self) -> Timestamp {
        self.advance(self.clock.wall(), self.clock.monotonic())
    }

    fn advance(&mut self, wall: Timestamp, now: Instant) -> Timestamp {
        let elapsed = now.saturating_duration_since(self.read_at);
        self.read_at = now;
        self.last = wall.max(self.last.after(elapsed / 2));
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_set_back_by_an_hour_goes_on_at_half_speed() {
        let start = Instant::now();
        let mut clock = LogClock { clock: Arc::new(MachineClock), last: Timestamp(0), read_at: start };
        let hour = Duration::from_secs(3600);
        let noon = Timestamp(nanoseconds(12 * hour));
        assert_eq!(clock.advance(noon, start), noon);
        let back = Timestamp(nanoseconds(11 * hour));
        let later = start + Duration::from_secs(10);
        assert_eq!(
            clock.advance(back.after(Duration::from_secs(10)), later),
            noon.after(Duration::from_secs(5))
        );
    }

    #[test]
    fn since_has_three_forms() {
        let now = Timestamp(nanoseconds(Duration::from_secs(1_800_000_000)));
        let before = |text: &str| text.parse::<Since>().map(|since| since.before(now).to_string());
        for (text, time) in [
            ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
            ("2026-01-31T12:00:00.5+01:00", "2026-01-31T11:00:00.5Z"),
            ("10m", "2027-01-15T07:50:00Z"),
            ("2h", "2027-01-15T06:00:00Z"),
            ("1d", "2027-01-14T08:00:00Z"),
            ("1h30m", "2027-01-15T06:30:00Z"),
            ("1700000000", "2023-11-14T22:13:20Z"),
            ("1700000000.5", "2023-11-14T22:13:20.5Z"),
            ("0", "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(before(text).as_deref(), Ok(time), "{text}");
        }
        for text in ["", "yesterday", "-1h", "-1", "1.2.3", "1e9", "2026-01-31", "1960-01-01T00:00:00Z"] {
            assert!(before(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_clock_set_ahead_is_believed() {
        let start = Instant::now();
        let mut clock = LogClock { clock: Arc::new(MachineClock), last: Timestamp(5), read_at: start };
        let ahead = Timestamp(nanoseconds(Duration::from_secs(86_400)));
        assert_eq!(clock.advance(ahead, start), ahead);
        assert_eq!(clock.advance(Timestamp(7), start), ahead);
    }
}
