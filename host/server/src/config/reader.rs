//! Owns the deserialization of a config file. It receives the tree and yields the values that serde requests. A null
//! section is an empty section, a scalar keeps its text, and an error carries its key and its place.

use std::fmt;

use dim_model::suggestion::meant;
use serde::de::value::StringDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::findings::{Finding, Severity};
use super::tree::{Entry, Node, Place, Plain, Scalar, Step, Value};

/// An error at a node of the tree.
#[derive(Debug)]
pub struct Wrong {
    /// The path to the node, from the node to the root.
    steps: Vec<Step>,
    at: Option<Place>,
    why: String,
}

impl Wrong {
    /// Returns the path from the root.
    pub fn path(&self) -> Vec<Step> {
        self.steps.iter().rev().cloned().collect()
    }

    /// Returns the error as a finding.
    pub fn finding(&self) -> Finding {
        Finding::new(Severity::Error, in_words(&self.path()), self.at, self.why.clone())
    }

    fn below(mut self, step: Step, at: Place) -> Self {
        self.steps.push(step);
        self.at.get_or_insert(at);
        self
    }
}

/// Formats a path as people write it.
pub fn in_words(path: &[Step]) -> String {
    let mut words = String::new();
    for step in path {
        match step {
            Step::Key(key) if words.is_empty() => words.push_str(key),
            Step::Key(key) => words.extend([".", key]),
            Step::Item(at) => words.push_str(&format!("[{at}]")),
        }
    }
    words
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.finding().fmt(f)
    }
}

impl std::error::Error for Wrong {}

impl de::Error for Wrong {
    fn custom<T: fmt::Display>(why: T) -> Self {
        Self { steps: Vec::new(), at: None, why: why.to_string() }
    }

    // The value might be a secret, so no error repeats it.
    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::custom(format!("expected {}, found {}", wanted(expected), kind(&found)))
    }

    fn invalid_value(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        match found {
            de::Unexpected::Signed(_) | de::Unexpected::Unsigned(_) => {
                Self::custom(format!("{found} is not {}", wanted(expected)))
            }
            _ => Self::invalid_type(found, expected),
        }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let meant = meant(field, expected.iter().copied());
        Self::custom(match meant.is_empty() {
            true => format!("there is no such key; there are {}", expected.join(", ")),
            false => format!("there is no such key{meant}"),
        })
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let meant = meant(variant, expected.iter().copied());
        Self::custom(format!("{variant:?} is none of {}{meant}", expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::custom(format!("`{field}` is missing"))
    }
}

/// Returns the expectation in terms of the file instead of the program.
fn wanted(expected: &dyn de::Expected) -> String {
    let words = expected.to_string();
    match words.as_str() {
        "a string" => "a text".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a section".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i64" => "a whole number".to_owned(),
        "f64" => "a number".to_owned(),
        _ if words.starts_with("struct ") => "a section".to_owned(),
        _ if words.starts_with("enum ") => "a word".to_owned(),
        _ => words,
    }
}

fn kind(found: &de::Unexpected<'_>) -> &'static str {
    match found {
        de::Unexpected::Bool(_) => "true or false",
        de::Unexpected::Unsigned(_) | de::Unexpected::Signed(_) => "a number",
        de::Unexpected::Float(_) => "a number that is not whole",
        de::Unexpected::Unit | de::Unexpected::Option => "nothing",
        de::Unexpected::Seq => "a list",
        de::Unexpected::Map => "a section",
        _ => "a text",
    }
}

/// Reads a boolean of YAML 1.1, quoted or not.
fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" => Some(true),
        "false" | "no" | "off" | "n" => Some(false),
        _ => None,
    }
}

impl<'de> Deserializer<'de> for &Node {
    type Error = Wrong;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match &self.value {
            Value::Null | Value::Skipped => visitor.visit_unit(),
            Value::Scalar(Scalar { text, plain }) => match *plain {
                Plain::Bool(value) => visitor.visit_bool(value),
                Plain::Unsigned(value) => visitor.visit_u64(value),
                Plain::Signed(value) => visitor.visit_i64(value),
                Plain::Float(value) => visitor.visit_f64(value),
                Plain::Text => visitor.visit_str(text),
            },
            Value::List(items) => visitor.visit_seq(Items { items, next: 0 }),
            Value::Map(entries) => visitor.visit_map(Entries { entries, next: 0 }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match &self.value {
            Value::Scalar(Scalar { text, plain: Plain::Text }) => match boolean(text) {
                Some(value) => visitor.visit_bool(value),
                None => self.deserialize_any(visitor),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match &self.value {
            Value::Scalar(Scalar { text, .. }) => visitor.visit_str(text),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.value {
            Value::Null | Value::Skipped => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.value {
            Value::Null => visitor.visit_seq(Items { items: &[], next: 0 }),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        match self.value {
            Value::Null => visitor.visit_map(Entries { entries: &[], next: 0 }),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Wrong> {
        match &self.value {
            Value::Scalar(Scalar { text, .. }) => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Wrong> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct
        identifier
    }
}

struct Items<'a> {
    items: &'a [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Wrong;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Wrong> {
        let left = self.items.iter().enumerate().skip(self.next);
        let mut left = left.filter(|(_, item)| !matches!(item.value, Value::Skipped));
        let Some((at, item)) = left.next() else { return Ok(None) };
        self.next = at + 1;
        let at = Step::Item(at);
        seed.deserialize(item).map(Some).map_err(|wrong| wrong.below(at, item.at))
    }
}

struct Entries<'a> {
    entries: &'a [Entry],
    next: usize,
}

impl Entries<'_> {
    fn wrong(entry: &Entry, wrong: Wrong) -> Wrong {
        wrong.below(Step::Key(entry.key.clone()), entry.at)
    }
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Wrong;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Wrong> {
        let Some(entry) = self.entries.get(self.next) else { return Ok(None) };
        let key: StringDeserializer<Wrong> = entry.key.clone().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|wrong| Self::wrong(entry, wrong))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Wrong> {
        let entry = &self.entries[self.next];
        self.next += 1;
        seed.deserialize(&entry.value).map_err(|wrong| Self::wrong(entry, wrong))
    }
}
