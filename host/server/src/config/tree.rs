//! Owns the YAML of a config file as a tree. It receives the text and returns nodes with their places in the file; a
//! scalar has its text and the type that YAML assigns to it. `reader` makes the config from the tree.

use dim_model::error_chain::in_yaml;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, NonFiniteFloatPolicy, Spanned};

use super::examined::SECTIONS;
use super::findings::{Finding, Severity};

/// A place in a file; line and column count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column, in characters.
    pub column: u64,
}

/// A value and its place.
#[derive(Clone, Debug)]
pub struct Node {
    pub at: Place,
    pub value: Value,
}

/// A value of YAML.
#[derive(Clone, Debug)]
pub enum Value {
    /// No value, for example a key that only comments follow.
    Null,
    /// A text, a number or a boolean.
    Scalar(Scalar),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<Entry>),
    /// A value that is not read: it belongs to another program, or its error is already reported.
    Skipped,
}

/// A scalar: its text in the file, and its type in YAML.
#[derive(Clone, Debug)]
pub struct Scalar {
    pub text: String,
    pub plain: Plain,
}

/// The type that YAML 1.2 assigns to a scalar.
#[derive(Clone, Copy, Debug)]
pub enum Plain {
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text,
}

/// A key of a mapping, and its value.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub at: Place,
    pub value: Node,
}

/// One step from a node to a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// To the value of a key.
    Key(String),
    /// To an item of a list.
    Item(usize),
}

impl Node {
    /// Parses a config file. Sections of other programs are skipped.
    pub fn parse(text: &str) -> Result<Self, Finding> {
        // A snippet of the file might contain a secret. In YAML 1.2 `no` is a text.
        let options = serde_saphyr::options! {
            with_snippet: false,
            strict_booleans: true,
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        };
        let start = Place { line: 1, column: 1 };
        if text.trim().is_empty() {
            return Ok(Self { at: start, value: Value::Null });
        }
        let root = serde_saphyr::from_str_with_options::<Root>(text, options);
        let Root(entries) = root.map_err(|error| unreadable(&error))?;
        let entries = entries.into_iter().map(|(key, value)| entry(key, value, text)).collect();
        Ok(Self { at: start, value: Value::Map(entries) })
    }

    /// Returns the node at a path, and the place of its key or of the item.
    pub fn find(&self, path: &[Step]) -> Option<(&Node, Place)> {
        let mut found = (self, self.at);
        for step in path {
            found = match (&found.0.value, step) {
                (Value::Map(entries), Step::Key(key)) => {
                    let entry = entries.iter().find(|entry| entry.key == *key)?;
                    (&entry.value, entry.at)
                }
                (Value::List(items), Step::Item(at)) => {
                    let item = items.get(*at)?;
                    (item, item.at)
                }
                _ => return None,
            };
        }
        Some(found)
    }

    /// Removes the node at a path; returns false if there is none.
    pub fn remove(&mut self, path: &[Step]) -> bool {
        let Some((last, path)) = path.split_last() else { return false };
        let mut node = self;
        for step in path {
            let below = match (&mut node.value, step) {
                (Value::Map(entries), Step::Key(key)) => {
                    entries.iter_mut().find(|entry| entry.key == *key).map(|entry| &mut entry.value)
                }
                (Value::List(items), Step::Item(at)) => items.get_mut(*at),
                _ => None,
            };
            let Some(below) = below else { return false };
            node = below;
        }
        match (&mut node.value, last) {
            (Value::Map(entries), Step::Key(key)) => {
                let before = entries.len();
                entries.retain(|entry| entry.key != *key);
                entries.len() < before
            }
            // The items after it must keep their numbers.
            (Value::List(items), Step::Item(at)) => items.get_mut(*at).is_some_and(|item| {
                !matches!(std::mem::replace(&mut item.value, Value::Skipped), Value::Skipped)
            }),
            _ => false,
        }
    }

    /// Returns the entries of a mapping; an empty slice for any other node.
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }
}

fn unreadable(error: &serde_saphyr::Error) -> Finding {
    let at = error.location().as_ref().map(place);
    Finding::new(Severity::Error, String::new(), at, in_yaml(error))
}

/// A value before its place in the text is known.
enum Raw {
    Null,
    Plain(Plain),
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
    Skipped,
}

/// The sections of a file, each with its key.
struct Root(Vec<(Spanned<String>, Spanned<Raw>)>);

fn entry(key: Spanned<String>, value: Spanned<Raw>, text: &str) -> Entry {
    Entry { at: place(&key.referenced), key: key.value, value: node(value, text) }
}

fn node(raw: Spanned<Raw>, text: &str) -> Node {
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Text(text) => Value::Scalar(Scalar { text, plain: Plain::Text }),
        Raw::Plain(plain) => {
            let text = as_written(text, &raw.defined).unwrap_or_else(|| plain.to_string());
            Value::Scalar(Scalar { text, plain })
        }
        Raw::List(items) => Value::List(items.into_iter().map(|item| node(item, text)).collect()),
        Raw::Map(entries) => {
            Value::Map(entries.into_iter().map(|(key, value)| entry(key, value, text)).collect())
        }
        Raw::Skipped => Value::Skipped,
    };
    Node { at: place(&raw.referenced), value }
}

fn place(location: &Location) -> Place {
    Place { line: location.line(), column: location.column() }
}

/// Returns a plain scalar as the file has it, because `0x10` and `1.0` are texts where a text is expected.
fn as_written(text: &str, at: &Location) -> Option<String> {
    let (from, length) = (at.span().byte_offset()?, at.span().byte_len()?);
    let (from, length) = (usize::try_from(from).ok()?, usize::try_from(length).ok()?);
    let written = text.get(from..from.checked_add(length)?)?.trim();
    (!written.is_empty() && !written.contains('\n')).then(|| written.to_owned())
}

impl std::fmt::Display for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Unsigned(value) => value.fmt(f),
            Self::Signed(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Plain(Plain::Bool(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Plain(Plain::Unsigned(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Plain(Plain::Signed(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Plain(Plain::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_owned()))
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<Raw, E> {
        Ok(Raw::Skipped)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Raw::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Raw, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key()? {
            map.push((key, entries.next_value()?));
        }
        Ok(Raw::Map(map))
    }
}

impl<'de> Deserialize<'de> for Root {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RootVisitor)
    }
}

struct RootVisitor;

impl<'de> Visitor<'de> for RootVisitor {
    type Value = Root;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sections, as in `ipfs:`")
    }

    fn visit_unit<E>(self) -> Result<Root, E> {
        Ok(Root(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Root, A::Error> {
        let mut sections = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let value = if SECTIONS.contains(&key.value.as_str()) {
                entries.next_value()?
            } else {
                let at = key.referenced;
                entries.next_value::<IgnoredAny>().map(|_| Spanned::new(Raw::Skipped, at, at))?
            };
            sections.push((key, value));
        }
        Ok(Root(sections))
    }
}
