//! What a node has to spare, as the node says it.

use dim_guest::verbatim::Verbatim;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a node has to spare: numbers as a rule, passed on to the letter.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_available: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_available: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_available: Option<Verbatim>,
}

/// The amount that a figure stands for: its number, or one if it is `true`.
pub fn amount(figure: Option<&Verbatim>) -> f64 {
    match figure.map(|figure| serde_json::from_str(figure.get())) {
        Some(Ok(Value::Bool(true))) => 1.0,
        Some(Ok(value)) => value.as_f64().unwrap_or(0.0),
        Some(Err(_)) | None => 0.0,
    }
}

/// Brackets of a record from which on it may lie too deep for a reader of JSON, which takes 128 levels as a rule. A
/// document adds three levels.
const BRACKETS: usize = 100;

/// Whether a record may lie too deep to be read again, or hold half of a surrogate pair. None does that has few brackets
/// no escapes of
/// that kind and no reserved words.
pub fn may_be_unreadable(record: &[u8]) -> bool {
    record.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() > BRACKETS
        || record.windows(2).any(|bytes| matches!(bytes, [b'\\', b'u'] | [b'$', b's']))
}
