//! Passes JSON on unchanged: numbers are not parsed, the depth is bounded, and strings are valid Unicode.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// Maximum nesting of arrays and objects. Most JSON readers accept 128 levels; documents and lists add a few.
const DEPTH: usize = 64;

/// A JSON value as it was received, which every JSON reader accepts, also inside a document or list.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Verbatim(Box<RawValue>);

impl Verbatim {
    /// Returns the JSON text.
    pub fn get(&self) -> &str {
        self.0.get()
    }

    /// Reads a member of an object, the last one if the name occurs twice. Returns none if the value is not an object,
    /// or if it has no such member of the type `T`.
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

/// Compares the JSON texts byte by byte.
impl PartialEq for Verbatim {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

/// Reads a stored value, and returns none if [`check`] refuses it: older versions stored values unchecked. For
/// `deserialize_with`.
pub fn if_readable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Verbatim>, D::Error> {
    let raw = Option::<Box<RawValue>>::deserialize(deserializer)?;
    Ok(raw.filter(|raw| check(raw.get()).is_ok()).map(Verbatim))
}

impl<'de> Deserialize<'de> for Verbatim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        check(raw.get()).map_err(D::Error::custom)?;
        Ok(Self(raw))
    }
}

/// Checks that other JSON readers accept a JSON value, also inside a document or list.
///
/// # Errors
///
/// Returns a text for the operator if the value is too deep, contains half of a surrogate pair, or contains a string
/// that begins with a reserved prefix of serde_json.
pub fn check(json: &str) -> Result<(), String> {
    let Look { depth, is_unicode, is_reserved } = look(json);
    if depth > DEPTH {
        return Err(format!("it has more than {DEPTH} levels"));
    }
    if is_reserved {
        return Err(format!(
            "a string in it begins with {RESERVED}, which is reserved by the JSON reader serde_json"
        ));
    }
    if !is_unicode {
        return Err("a string in it contains half of a surrogate pair, which is not a character".to_owned());
    }
    Ok(())
}

/// The prefix of the reserved names of serde_json. It reads an object with such a member as another value, or refuses
/// it.
const RESERVED: &str = "$serde_json::private::";

/// The result of a scan of a JSON value.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    /// The nesting of arrays and objects.
    depth: usize,
    /// Whether all strings are Unicode. Half of a surrogate pair has no UTF-8 encoding, and readers refuse it.
    is_unicode: bool,
    /// Whether a string begins with [`RESERVED`].
    is_reserved: bool,
}

/// Scans a JSON value without parsing it.
fn look(json: &str) -> Look {
    let (mut is_unicode, mut is_reserved) = (true, false);

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
                // Whether the previous character was the first half of a pair; the second must follow immediately.
                let mut half = false;
                // Number of characters that match `RESERVED` so far; none after a mismatch.
                let mut alike = Some(0);
                while let Some(byte) = bytes.next().filter(|byte| *byte != b'"') {
                    let escape = if byte == b'\\' { bytes.next() } else { None };
                    let unit = escape.filter(|escape| *escape == b'u').and_then(|_| unit(&mut bytes));
                    let character = match escape {
                        None => Some(byte),
                        Some(_) => unit.and_then(|unit| u8::try_from(unit).ok()),
                    };
                    let reserved = alike.and_then(|alike| RESERVED.as_bytes().get(alike));
                    alike = alike.filter(|_| character.as_ref() == reserved).map(|alike| alike + 1);
                    if alike == Some(RESERVED.len()) {
                        (is_reserved, alike) = (true, None);
                    }
                    let is_second = matches!(unit, Some(0xdc00..=0xdfff));
                    is_unicode &= half == is_second;
                    half = matches!(unit, Some(0xd800..=0xdbff));
                }
                is_unicode &= !half;
            }
            _ => {}
        }
    }
    Look { depth: deepest, is_unicode, is_reserved }
}

/// Reads the four hexadecimal digits of a `\u` escape.
fn unit(bytes: &mut impl Iterator<Item = u8>) -> Option<u16> {
    let mut digits = bytes.take(4).map(|digit| (digit as char).to_digit(16));
    let unit = digits.try_fold(0, |unit, digit| Some(unit << 4 | digit?))?;
    u16::try_from(unit).ok()
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
        assert_eq!(look("\"[[\\\"[\""), Look { depth: 0, is_unicode: true, is_reserved: false });
    }

    #[test]
    fn half_of_a_surrogate_pair_is_refused_wherever_it_stands() {
        for json in
            [r#""\ud83d\ude00""#, r#"{"a\u0000":["\\ud800","\uD83D\uDE00 \n\uffff"]}"#, r#""\\\\ud800""#]
        {
            assert_eq!(check(json), Ok(()), "{json}");
            assert!(serde_json::from_str::<serde_json::Value>(json).is_ok(), "{json}");
        }
        for json in [
            r#""\ud800""#,
            r#"{"\udfff":1}"#,
            r#"["\ud83d \ude00"]"#,
            r#""\ude00\ud83d""#,
            r#""\ud83d\ud83d\ude00""#,
            r#""\ud83d\n""#,
            r#""\ud83dx""#,
        ] {
            assert!(check(json).unwrap_err().contains("surrogate"), "{json}");
            assert!(serde_json::from_str::<serde_json::Value>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn what_readers_take_for_something_else_is_refused() {
        for json in [
            r#"{"$serde_json::private::Number":"xyz"}"#,
            r#"[{"a":{"\u0024serde\u005fjson::private::RawValue":"]]"}}]"#,
        ] {
            assert!(check(json).unwrap_err().contains("begins with $serde_json"), "{json}");
        }
        for json in
            [r#"{"serde_json":"private"}"#, r#""$serde_json::""#, r#"{"a $serde_json::private::Number":1}"#]
        {
            assert_eq!(check(json), Ok(()), "{json}");
        }
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
