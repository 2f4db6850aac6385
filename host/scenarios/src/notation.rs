//! Owns the notation of bytes and effects in scenarios. Receives effects of a plugin; returns JSON, and reads bytes
//! back from it without loss.

use dim_store::batch::{Reply, ReplyError};
use dim_store::effect::{DeadLetter, NameValue, Publish};
use multibase::Base;
use serde_json::{Map, Value, json};

use crate::Happened;

/// The member with a text that is not JSON.
const TEXT: &str = "$text";

/// The member with bytes that are not UTF-8.
const BASE64: &str = "$base64";

/// The notation of bytes: the JSON value that they contain, else `{ $text: … }`, else `{ $base64: … }`.
pub fn shown(bytes: &[u8]) -> Value {
    if let Ok(value) = serde_json::from_slice(bytes) {
        return value;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => json!({ TEXT: text }),
        Err(_) => json!({ BASE64: Base::Base64Pad.encode(bytes) }),
    }
}

/// Reads bytes from their notation. The error describes invalid base64.
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

/// The notation of a key: its text, or base64 if it is not UTF-8.
pub fn shown_key(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) => text.to_owned(),
        Err(_) => format!("{BASE64}:{}", Base::Base64Pad.encode(key)),
    }
}

/// The notation of a publish.
pub fn publish(publish: &Publish) -> Value {
    json!({ "topic": publish.topic, "data": shown(&publish.data) })
}

/// The notation of a dead letter.
pub fn dead_letter(letter: &DeadLetter) -> Value {
    let (kind, mut event) = letter.event.describe();
    if let (Some(members), dim_model::entry::Event::Message { data, .. }) =
        (event.as_object_mut(), &letter.event)
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

/// The notation of a new value of a name.
pub fn name_value(value: &NameValue) -> Value {
    match value {
        NameValue::Path(path) => json!({ "$path": path }),
        NameValue::Document { data, .. } => shown(data),
    }
}

/// The section and the notation of a reply: `reply`, or `error` with the reason of a refusal.
pub fn reply(reply: &Reply) -> (&'static str, Value) {
    match reply {
        Ok(body) => ("reply", shown(body.as_bytes())),
        Err(ReplyError::Refused(why)) => ("error", json!(why)),
        Err(error) => ("error", json!(error.to_string())),
    }
}

/// The effects by sections. State and timers are not among them, because they describe a moment and not a span.
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
