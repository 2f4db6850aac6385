//! How results are written: tables for people, JSON for programs.

use std::io::{self, Write as _};

use comfy_table::{Table, presets};
use serde_json::Value;

use super::Format;

/// Writes results to standard output.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
}

/// A column: its head, and where its value is in a row, as a JSON pointer.
pub type Column = (&'static str, &'static str);

impl Output {
    pub fn new(format: Format) -> Self {
        Self { format }
    }

    /// Writes rows: a JSON array, or a table with `columns`.
    pub fn rows(&self, rows: &Value, columns: &[Column]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(rows);
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(columns.iter().map(|(head, _)| *head));
        for row in rows.as_array().into_iter().flatten() {
            table.add_row(columns.iter().map(|(_, pointer)| cell(row.pointer(pointer))));
        }
        lines(&table)
    }

    /// Writes one object: JSON, or its members one a line.
    pub fn object(&self, object: &Value) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(object);
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        flatten(&mut table, "", object);
        lines(&table)
    }

    /// The same, with the items of these members one a line, after the others.
    pub fn object_with_lists(&self, object: &Value, lists: &[&str]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(object);
        }
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        let mut rest = object.clone();
        let members = rest.as_object_mut();
        let listed: Vec<(&str, Option<Value>)> = members
            .map(|members| lists.iter().map(|name| (*name, members.remove(*name))).collect())
            .unwrap_or_default();
        flatten(&mut table, "", &rest);
        for (name, items) in listed {
            for (index, item) in items.iter().filter_map(Value::as_array).flatten().enumerate() {
                table.add_row([if index == 0 { name } else { "" }.to_owned(), cell(Some(item))]);
            }
        }
        lines(&table)
    }

    /// Whether programs read this.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes one row of a stream: a line of JSON, or a line of cells.
    pub fn streamed(&self, row: &Value, columns: &[Column]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return line(&row.to_string());
        }
        let cells: Vec<String> = columns.iter().map(|(_, pointer)| cell(row.pointer(pointer))).collect();
        line(&cells.join("  "))
    }

    fn json(&self, value: &Value) -> anyhow::Result<()> {
        line(&serde_json::to_string_pretty(value)?)
    }
}

/// Adds the members of an object, those of objects inside it under both names.
fn flatten(table: &mut Table, prefix: &str, object: &Value) {
    for (name, value) in object.as_object().into_iter().flatten() {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(members) if !members.is_empty() => flatten(table, &format!("{name}."), value),
            value => {
                table.add_row([name, cell(Some(value))]);
            }
        }
    }
}

/// Writes a table without the blanks at the ends of its lines.
fn lines(table: &Table) -> anyhow::Result<()> {
    table.lines().try_for_each(|row| line(row.strip_prefix(' ').unwrap_or(&row).trim_end()))
}

/// A value as a cell; what a plugin or a peer wrote must not steer the terminal.
pub fn cell(value: Option<&Value>) -> String {
    let text = match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
        }
        Some(Value::Object(counts)) if !counts.is_empty() && counts.values().all(Value::is_u64) => {
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
        }
        Some(other) => other.to_string(),
    };
    plain(&text)
}

/// A text that moves no terminal's cursor, whoever has written it.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Writes a line. Whoever reads it may have gone: that is no error worth a word.
pub fn line(text: &str) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes bytes as they are.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    match io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}
