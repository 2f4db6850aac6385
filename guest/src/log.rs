//! Writes structured log lines for the operator.

pub use crate::bindings::dim::coordination::log::{Field, Level};
pub use crate::host::log::write;

/// Writes a log line with named values: `log::line(Level::Info, "recovered", &[("node_id", id)])`.
pub fn line(level: Level, message: &str, fields: &[(&str, &str)]) {
    let fields: Vec<Field> = fields
        .iter()
        .map(|(name, value)| Field { name: (*name).to_owned(), value: (*value).to_owned() })
        .collect();
    write(level, message, &fields);
}
