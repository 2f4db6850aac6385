//! Owns how bytes and what happened are written in scenarios: JSON where they are JSON, and both ways the same.

use multibase::Base;
use serde_json::{Map, Value, json};

use super::Happened;
use crate::effect::{DeadLetter, NameValue, Publish};
use crate::plugin::{Reply, ReplyError};

/// The member that holds a text that is no JSON.
const TEXT: &str = "$text";

/// The member that holds bytes that are no text.
const BASE64: &str = "$base64";

/// Bytes as they are written: the JSON that they are, else `{ $text: … }`, else `{ $base64: … }`.
pub fn shown(bytes: &[u8]) -> Value {
    if let Ok(value) = serde_json::from_slice(bytes) {
        return value;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => json!({ TEXT: text }),
        Err(_) => json!({ BASE64: Base::Base64Pad.encode(bytes) }),
    }
}

/// The bytes that are written so; the error says what is wrong with it.
pub fn bytes_of(value: &Value) -> Result<Vec<u8>, String> {
    let only = |member: &str| {
        let members = value.as_object().filter(|members| members.len() == 1)?;
        members.get(member)?.as_str()
    };
    match (only(TEXT), only(BASE64)) {
        (Some(text), _) => Ok(text.as_bytes().to_vec()),
        (_, Some(text)) => Base::Base64Pad.decode(text).map_err(|error| format!("{BASE64}: {error}")),
        _ => Ok(value.to_string().into_bytes()),
    }
}

/// A key as it is written: one that is no text in base64.
pub fn shown_key(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) => text.to_owned(),
        Err(_) => format!("{BASE64}:{}", Base::Base64Pad.encode(key)),
    }
}

/// A publish.
pub fn publish(publish: &Publish) -> Value {
    json!({ "topic": publish.topic, "data": shown(&publish.data) })
}

/// A dead letter.
pub fn dead_letter(letter: &DeadLetter) -> Value {
    let (kind, mut event) = letter.event.describe();
    if let (Some(members), crate::entry::Event::Message { data, .. }) = (event.as_object_mut(), &letter.event)
    {
        members.remove("bytes");
        members.insert("data".to_owned(), shown(data));
    }
    let mut shown = json!({ "reason": letter.reason, "attempts": letter.attempts, kind: event });
    if !letter.log.is_empty() {
        shown["log"] = json!(letter.log);
    }
    shown
}

/// What a name points to from now on.
pub fn name_value(value: &NameValue) -> Value {
    match value {
        NameValue::Path(path) => json!({ "$path": path }),
        NameValue::Document { data, .. } => shown(data),
    }
}

/// A reply: under `reply`, or what was refused under `error`.
pub fn reply(reply: &Reply) -> (&'static str, Value) {
    match reply {
        Ok(body) => ("reply", shown(body.as_bytes())),
        Err(ReplyError::Refused(why)) => ("error", json!(why)),
        Err(error) => ("error", json!(error.to_string())),
    }
}

/// What happened, by its sections, but for the state and the timers, which are not of one moment.
pub fn sections(happened: &[Happened]) -> Map<String, Value> {
    let mut sections = Map::new();
    let list = |values: Vec<Value>| Value::Array(values);
    let all = || happened.iter();
    let publishes = all().flat_map(|it| &it.asked.publishes).map(publish).collect();
    sections.insert("publishes".to_owned(), list(publishes));
    let names = all().flat_map(|it| &it.asked.names);
    let names = names.map(|(key, update)| (key.to_string(), name_value(&update.value)));
    sections.insert("names".to_owned(), Value::Object(names.collect()));
    let dead = all().flat_map(|it| &it.dead).map(dead_letter).collect();
    sections.insert("dead".to_owned(), list(dead));
    let retries = all().flat_map(|it| &it.retries);
    let retries = retries.map(|retry| json!({ "at": retry.at, "attempt": retry.attempt })).collect();
    sections.insert("retries".to_owned(), list(retries));
    let lines = all().flat_map(|it| &it.lines).map(|line| json!(line)).collect();
    sections.insert("log".to_owned(), list(lines));
    if let Some(answer) = all().filter_map(|it| it.reply.as_ref()).next_back() {
        let (section, value) = reply(answer);
        sections.insert(section.to_owned(), value);
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_and_read_the_same() {
        for bytes in [&b"{\"a\":1}"[..], b"3", b"\"text\"", b"text", b"", b"\xff\x00", b"[1,2]"] {
            assert_eq!(bytes_of(&shown(bytes)).unwrap(), bytes, "{}", shown(bytes));
        }
        assert_eq!(shown(b"hello"), json!({ "$text": "hello" }));
        assert!(bytes_of(&json!({ "$base64": "?" })).is_err());
    }
}
