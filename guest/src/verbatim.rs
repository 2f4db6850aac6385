//! JSON that is passed on to the letter: its numbers are not read, and its depth is bounded.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// Most levels of arrays and objects. Readers of JSON take 128 as a rule, and documents and lists add a few.
const DEPTH: usize = 64;

/// A JSON value as it came, not deeper than any reader takes wherever it will stand.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Verbatim(Box<RawValue>);

impl Verbatim {
    /// The JSON.
    pub fn get(&self) -> &str {
        self.0.get()
    }
}

impl<'de> Deserialize<'de> for Verbatim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        if depth(raw.get()) > DEPTH {
            return Err(D::Error::custom(format!("it has more than {DEPTH} levels")));
        }
        Ok(Self(raw))
    }
}

/// The levels of a value that is JSON.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut bytes = json.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                while let Some(byte) = bytes.next().filter(|byte| *byte != b'"') {
                    if byte == b'\\' {
                        bytes.next();
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_passed_on_to_the_letter_up_to_a_depth() {
        for json in [
            "31.245270191439438",
            "9007199254740991.0",
            "{\"a\": [1, \"[\\\"[\"]}",
            "123456789012345678901234567890",
        ] {
            let read: Verbatim = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), json);
        }
        let nested = |levels: usize| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        assert!(serde_json::from_str::<Verbatim>(&nested(DEPTH)).is_ok());
        assert!(serde_json::from_str::<Verbatim>(&nested(DEPTH + 1)).is_err());
        assert_eq!(depth("\"[[\\\"[\""), 0);
    }
}
