//! Owns the format of sizes and times for people. Receives bytes and timestamps; returns short texts. Programs get
//! exact values.

use jiff::Timestamp as Time;

/// Units of sizes, each 1,024 times the one before.
const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Formats a number of bytes, as in `12 B`, `1.5 KiB` or `16 MiB`.
pub fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    // A value that rounds to 1024 is shown as 1 of the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 99.95 && (value.fract() * 10.0).round() % 10.0 != 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Parses a time in RFC 3339. Returns none for any other text.
pub fn read(text: &str) -> Option<Time> {
    // A shorter text, such as a date, is no complete time.
    (text.len() >= 20).then(|| text.parse().ok()).flatten()
}

/// Formats a time in UTC, truncated to the second.
pub fn time(time: Time) -> String {
    format!(
        "{:.0}",
        time.round(jiff::TimestampRound::new().smallest(jiff::Unit::Second).mode(jiff::RoundMode::Trunc))
            .unwrap_or(time)
    )
}

/// Formats a time relative to `now`, as in `5 min ago` or `in 1 h`. A time 30 days or more away is shown as a date.
pub fn ago(time: Time, now: Time) -> String {
    let nanoseconds = (now.as_nanosecond() - time.as_nanosecond()).unsigned_abs();
    let seconds = u64::try_from(nanoseconds / 1_000_000_000).unwrap_or(u64::MAX);
    let amount = match seconds {
        0 => return "now".to_owned(),
        seconds @ ..60 => format!("{seconds} s"),
        seconds @ ..3_600 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3_600),
        seconds @ ..2_592_000 => format!("{} d", seconds / 86_400),
        _ => return time.strftime("%Y-%m-%d").to_string(),
    };
    if time <= now { format!("{amount} ago") } else { format!("in {amount}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_leaves_them_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1_024, "1 KiB"),
            (1_536, "1.5 KiB"),
            (1_048_575, "1 MiB"),
            (16 << 20, "16 MiB"),
            (160 << 20, "160 MiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_are_told_by_their_distance() {
        let now: Time = "2026-03-01T12:00:00Z".parse().unwrap();
        for (then, text) in [
            ("2026-03-01T12:00:00.5Z", "now"),
            ("2026-03-01T11:59:01Z", "59 s ago"),
            ("2026-03-01T11:57:00.9Z", "2 min ago"),
            ("2026-03-01T13:00:00Z", "in 1 h"),
            ("2026-02-27T11:00:00Z", "2 d ago"),
            ("2026-02-27T13:00:00Z", "47 h ago"),
            ("2026-01-01T00:00:00Z", "2026-01-01"),
        ] {
            assert_eq!(ago(then.parse().unwrap(), now), text, "{then}");
        }
        assert_eq!(time("2026-03-01T12:00:00.987654321Z".parse().unwrap()), "2026-03-01T12:00:00Z");
        assert_eq!(read("2026-03-01"), None);
    }
}
