//! Owns how sizes and times look to people. Programs get bytes and nanoseconds.

use jiff::Timestamp as Time;

/// Units of sizes, each 1,024 of the one before.
const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// A number of bytes, as in `12 B`, `1.5 KiB` or `16 MiB`.
pub fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    // What would be rounded to 1024 is one of the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 99.95 && (value.fract() * 10.0).round() % 10.0 != 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A time in RFC 3339, if a text is one.
pub fn read(text: &str) -> Option<Time> {
    // Shorter ones, as dates, say less than a time.
    (text.len() >= 20).then(|| text.parse().ok()).flatten()
}

/// A time to the second, in UTC.
pub fn time(time: Time) -> String {
    format!(
        "{:.0}",
        time.round(jiff::TimestampRound::new().smallest(jiff::Unit::Second).mode(jiff::RoundMode::Trunc))
            .unwrap_or(time)
    )
}

/// How long ago a time was, or in how long it comes; one that is a month away is a date.
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
