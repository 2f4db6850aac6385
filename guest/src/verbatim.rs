//! JSON that is passed on to the letter: its numbers are not read, and its depth is bounded.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
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

    /// A member of an object, the last one of that name; none if it is no object, or has no such member of that type.
    pub fn member<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        struct Member<'a>(&'a str);

        impl<'de> Visitor<'de> for Member<'_> {
            type Value = Option<&'de RawValue>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
                let mut found = None;
                while let Some(name) = members.next_key::<Cow<'de, str>>()? {
                    if name == self.0 {
                        found = Some(members.next_value()?);
                    } else {
                        members.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(found)
            }
        }

        let mut json = serde_json::Deserializer::from_str(self.get());
        let found = json.deserialize_map(Member(name)).ok()??;
        serde_json::from_str(found.get()).ok()
    }
}

/// One is the other to the letter.
impl PartialEq for Verbatim {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

/// A value of a record that was kept before depth was bounded: none where it is deeper. For `deserialize_with`.
pub fn if_readable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Verbatim>, D::Error> {
    let raw = Option::<Box<RawValue>>::deserialize(deserializer)?;
    Ok(raw.filter(|raw| depth(raw.get()) <= DEPTH).map(Verbatim))
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

    #[test]
    fn a_member_is_found_and_the_last_of_a_name_counts() {
        let read = |json: &str| serde_json::from_str::<Verbatim>(json).unwrap();
        let object = read(r#"{"a": 1, "n\u006fde": "x", "b": {"node": 7}, "c": 1.50}"#);
        assert_eq!(object.member::<String>("node").as_deref(), Some("x"));
        assert_eq!(object.member::<Verbatim>("c").unwrap().get(), "1.50");
        assert_eq!(object.member::<String>("a"), None, "it is of another type");
        assert_eq!(read(r#"{"a": "1", "a": "2"}"#).member::<String>("a").as_deref(), Some("2"));
        for other in ["[1]", "null", "7", "\"a\"", "{}"] {
            assert_eq!(read(other).member::<String>("a"), None);
        }
    }

    #[test]
    fn what_is_kept_and_too_deep_is_nothing() {
        #[derive(Deserialize)]
        struct Kept {
            #[serde(default, deserialize_with = "if_readable")]
            data: Option<Verbatim>,
        }
        let kept = |json: &str| serde_json::from_str::<Kept>(json).unwrap().data;
        assert_eq!(kept(r#"{"data": [1.0]}"#).unwrap().get(), "[1.0]");
        assert_eq!(kept(r#"{"data": null}"#), None);
        assert_eq!(kept("{}"), None);
        assert_eq!(kept(&format!("{{\"data\": {}{}}}", "[".repeat(100), "]".repeat(100))), None);
    }
}
