//! Reads the optional members of a JSON object one by one. An unreadable member affects only itself.

use serde::Deserialize;
use serde_json::value::RawValue;

/// Maximum size of a reason, in bytes. An error of the JSON reader repeats its input.
const REASON_BYTES: usize = 160;

/// Reads the optional members of one object and collects the reasons for unreadable ones.
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
    /// Reads a member. Returns none if it is absent, `null` or unreadable, and notes the reason if it is unreadable.
    pub fn read<'a, T: Deserialize<'a>>(&mut self, name: &str, raw: Option<&'a RawValue>) -> Option<T> {
        let text = raw.map(RawValue::get).filter(|text| *text != "null")?;
        match serde_json::from_str(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let why = error.to_string();
                // The position is relative to the member and would mislead the operator.
                let why = why.rsplit_once(" at line ").map_or(why.as_str(), |(why, _)| why);
                self.refuse(name, why);
                None
            }
        }
    }

    /// Notes that a member is ignored, with the reason. A reason of more than 160 bytes is cut.
    pub fn refuse(&mut self, name: &str, why: &str) {
        let cut = &why[..why.floor_char_boundary(REASON_BYTES)];
        let rest = if cut.len() < why.len() { "…" } else { "" };
        self.reasons.push(format!("{name}: {cut}{rest}"));
    }

    /// Returns the reasons, for example `timestamp: …`, in the order of the reads.
    pub fn into_reasons(self) -> Vec<String> {
        self.reasons
    }
}
