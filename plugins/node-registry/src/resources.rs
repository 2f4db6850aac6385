//! The free resources of a node, as it reports them.

use dim_guest::verbatim::Verbatim;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The free resources of a node. The values are usually numbers and are passed on unchanged.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_available: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_available: Option<Verbatim>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_available: Option<Verbatim>,
}

/// Returns a value as a number: the number itself, 1 for `true`, and 0 for anything else.
pub fn amount(figure: Option<&Verbatim>) -> f64 {
    match figure.map(|figure| serde_json::from_str(figure.get())) {
        Some(Ok(Value::Bool(true))) => 1.0,
        Some(Ok(value)) => value.as_f64().unwrap_or(0.0),
        Some(Err(_)) | None => 0.0,
    }
}

/// Number of brackets up to which a record cannot be too deep for JSON readers, which usually accept 128 levels. A
/// document adds three levels.
const BRACKETS: usize = 100;

/// Returns whether a record may be unreadable: too deep, with half of a surrogate pair, or with a reserved name of
/// serde_json. A cheap test without false negatives.
pub fn may_be_unreadable(record: &[u8]) -> bool {
    record.iter().filter(|byte| matches!(byte, b'[' | b'{')).count() > BRACKETS
        || record.windows(2).any(|bytes| matches!(bytes, [b'\\', b'u'] | [b'$', b's']))
}
