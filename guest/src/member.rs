//! Optional members of a JSON object, each read for itself: one that cannot be read costs itself, not the whole object.

use serde::Deserialize;
use serde_json::value::RawValue;

/// Largest reason, in bytes: an error of the reader repeats what it has read.
const REASON_BYTES: usize = 160;

/// Reads the optional members of one object and collects why some of them cannot be read.
///
/// ```
/// use dim_guest::member::Members;
/// use dim_guest::time::Time;
/// use serde_json::value::RawValue;
///
/// let raw = |text: &'static str| serde_json::from_str::<&RawValue>(text).ok();
/// let mut members = Members::default();
/// assert_eq!(members.read::<u64>("every_ms", raw("30")), Some(30));
/// assert_eq!(members.read::<u64>("every_ms", None), None);
/// assert_eq!(members.read::<Time>("timestamp", raw("1767268800000")), None);
/// assert_eq!(members.into_reasons(), ["timestamp: 1767268800000 is not in seconds since 1970: milliseconds?"]);
/// ```
#[derive(Debug, Default)]
pub struct Members {
    reasons: Vec<String>,
}

impl Members {
    /// Reads a member. It is absent if it is not there, `null`, or cannot be read; the last is noted with the reason.
    pub fn read<'a, T: Deserialize<'a>>(&mut self, name: &str, raw: Option<&'a RawValue>) -> Option<T> {
        let text = raw.map(RawValue::get).filter(|text| *text != "null")?;
        match serde_json::from_str(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let why = error.to_string();
                // The position is one within the member.
                let why = why.rsplit_once(" at line ").map_or(why.as_str(), |(why, _)| why);
                self.refuse(name, why);
                None
            }
        }
    }

    /// Notes that a member was read and is not taken.
    pub fn refuse(&mut self, name: &str, why: &str) {
        let cut = &why[..why.floor_char_boundary(REASON_BYTES)];
        let rest = if cut.len() < why.len() { "…" } else { "" };
        self.reasons.push(format!("{name}: {cut}{rest}"));
    }

    /// The reasons, as in `timestamp: …`, in the order of the reads.
    pub fn into_reasons(self) -> Vec<String> {
        self.reasons
    }
}
