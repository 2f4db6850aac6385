//! Owns the comparison of expected with actual values. Receives two JSON values; returns differences that a person can
//! read.

use std::fmt;

use serde::Serialize;
use serde_json::{Number, Value};

/// The expected value that matches any present value.
pub const ANY: &str = "<any>";

/// The strictness of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Everything must be equal. `ANY` matches any value, and numbers and times are compared by their value.
    Exact,
    /// The expected part must be present: members of objects, items of lists in their order, parts of log lines and
    /// reasons. A member that is `null` must be absent.
    Partial,
    /// Everything must be equal, character by character: `ANY` is an ordinary text.
    Same,
}

/// A place where the actual value differs from the expected one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The place, as in `publishes[0].data.status`.
    pub place: String,
    /// The expected value; none if the place must be absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Value>,
    /// The actual value; none if the place is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.place)?;
        for (sign, value) in [("-", &self.expected), ("+", &self.actual)] {
            if let Some(value) = value {
                writeln!(f, "  {sign} {}", cut(&value.to_string()))?;
            }
        }
        Ok(())
    }
}

/// Maximum length of a shown value, in bytes.
const LONGEST: usize = 2_000;

fn cut(text: &str) -> String {
    if text.len() <= LONGEST {
        return text.to_owned();
    }
    format!("{}… ({} bytes)", &text[..text.floor_char_boundary(LONGEST)], text.len())
}

/// Compares `actual` with `expected`. Returns all differences; `place` is the prefix of their places.
pub fn differences(place: &str, expected: &Value, actual: Option<&Value>, how: Match) -> Vec<Difference> {
    let mut found = Vec::new();
    compare(place, expected, actual, how, &mut found);
    found
}

fn compare(place: &str, expected: &Value, actual: Option<&Value>, how: Match, found: &mut Vec<Difference>) {
    if expected.is_null() && how == Match::Partial {
        if let Some(actual) = actual.filter(|actual| !actual.is_null()) {
            found.push(Difference { place: place.to_owned(), expected: None, actual: Some(actual.clone()) });
        }
        return;
    }
    let Some(actual) = actual else {
        found.push(Difference { place: place.to_owned(), expected: Some(expected.clone()), actual: None });
        return;
    };
    match (expected, actual) {
        (Value::String(any), _) if any == ANY && how != Match::Same => {}
        (Value::Object(expected), Value::Object(members)) => {
            for (name, value) in expected {
                compare(&below(place, name), value, members.get(name), how, found);
            }
            if how != Match::Partial {
                for (name, value) in members.iter().filter(|(name, _)| !expected.contains_key(*name)) {
                    let (place, actual) = (below(place, name), Some(value.clone()));
                    found.push(Difference { place, expected: None, actual });
                }
            }
        }
        (Value::Array(expected), Value::Array(items)) if how != Match::Partial => {
            for (number, value) in expected.iter().enumerate() {
                compare(&format!("{place}[{number}]"), value, items.get(number), how, found);
            }
            for (number, value) in items.iter().enumerate().skip(expected.len()) {
                let (place, actual) = (format!("{place}[{number}]"), Some(value.clone()));
                found.push(Difference { place, expected: None, actual });
            }
        }
        (Value::Array(expected), Value::Array(items)) => in_order(place, expected, items, found),
        (Value::Number(one), Value::Number(other)) if how != Match::Same && is_same_number(one, other) => {}
        (Value::String(part), Value::String(text))
            if how == Match::Partial && is_prose(place) && text.contains(part) => {}
        (Value::String(one), Value::String(other)) if how != Match::Same && is_same_time(one, other) => {}
        (expected, actual) if expected == actual => {}
        _ => {
            let (expected, actual) = (Some(expected.clone()), Some(actual.clone()));
            found.push(Difference { place: place.to_owned(), expected, actual });
        }
    }
}

/// Compares lists: each expected item must match an item after the match of the previous one.
fn in_order(place: &str, expected: &[Value], items: &[Value], found: &mut Vec<Difference>) {
    let mut rest = items.iter();
    for (number, value) in expected.iter().enumerate() {
        let place = format!("{place}[{number}]");
        let before = rest.clone();
        let is_found = rest.any(|item| differences(&place, value, Some(item), Match::Partial).is_empty());
        if !is_found {
            // If only one item is left, a detailed difference to it helps most.
            let left: Vec<&Value> = before.collect();
            match left.as_slice() {
                [only] => compare(&place, value, Some(only), Match::Partial, found),
                [] => found.push(Difference { place, expected: Some(value.clone()), actual: None }),
                many => {
                    let actual = Some(Value::Array(many.iter().map(|item| (*item).clone()).collect()));
                    found.push(Difference { place, expected: Some(value.clone()), actual });
                }
            }
            return;
        }
    }
}

/// Whether both are the same number, such as 2 and 2.0. Two whole numbers are compared without rounding.
fn is_same_number(one: &Number, other: &Number) -> bool {
    let is_whole = |number: &Number| number.is_i64() || number.is_u64();
    if is_whole(one) && is_whole(other) { one == other } else { one.as_f64() == other.as_f64() }
}

/// Whether both texts are the same time, possibly in different formats.
fn is_same_time(one: &str, other: &str) -> bool {
    let time = |text: &str| {
        let looks_like_one = text.len() >= 20 && text.as_bytes().get(10) == Some(&b'T');
        looks_like_one.then(|| text.parse::<jiff::Timestamp>().ok()).flatten()
    };
    time(one).is_some_and(|one| time(other) == Some(one))
}

/// Whether a place contains prose: log lines, errors, and reasons and log lines of dead letters.
fn is_prose(place: &str) -> bool {
    let section = place.split(['.', '[']).next().unwrap_or_default();
    let of_a_letter = section == "dead" && (place.ends_with(".reason") || place.contains(".log["));
    ["log", "error"].contains(&section) || of_a_letter
}

fn below(place: &str, name: &str) -> String {
    if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn places(expected: &Value, actual: &Value, how: Match) -> Vec<String> {
        differences("", expected, Some(actual), how).into_iter().map(|it| it.place).collect()
    }

    #[test]
    fn exact_is_all_of_it_and_partial_what_is_told() {
        let actual =
            json!({ "publishes": [{ "data": { "a": 1, "b": 2.0 } }, { "data": 3 }], "log": ["it is well"] });
        assert!(places(&actual, &actual, Match::Exact).is_empty());
        let any = json!({ "publishes": "<any>", "log": ["<any>"] });
        assert!(places(&any, &actual, Match::Exact).is_empty());
        let part = json!({ "publishes": [{ "data": { "b": 2 } }], "log": ["well"] });
        assert!(places(&part, &actual, Match::Partial).is_empty());
        assert_eq!(places(&part, &actual, Match::Exact), ["log[0]", "publishes[0].data.a", "publishes[1]"]);
        let second = json!({ "publishes": [{ "data": 3 }, { "data": { "a": 1 } }] });
        assert_eq!(places(&second, &actual, Match::Partial), ["publishes[1]"], "the order counts");
        let gone = json!({ "publishes": null, "state": null });
        assert_eq!(places(&gone, &actual, Match::Partial), ["publishes"]);
        assert_eq!(places(&json!("a"), &json!("ab"), Match::Partial), [""], "only prose is told in part");
        let large = [json!(1_767_225_600_000_000_001_u64), json!(1_767_225_600_000_000_002_u64)];
        assert_eq!(places(&large[0], &large[1], Match::Exact), [""]);
        assert_eq!(places(&json!("<any>"), &json!(1), Match::Same), [""]);
        let (one, other) = (json!("2026-01-01T00:00:00Z"), json!("2026-01-01T01:00:00.000+01:00"));
        assert!(places(&one, &other, Match::Exact).is_empty());
    }
}
