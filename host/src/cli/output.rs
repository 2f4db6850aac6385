//! How results are written: tables for people, JSON for programs.

use std::io::{self, Write as _};

use comfy_table::{Table, presets};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use super::{Format, OK};
use crate::escape::{escaped, escaped_word};

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

    /// Whether programs read this.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes one row of a stream: a line of JSON, or a line of cells.
    pub fn streamed(&self, row: &Value, columns: &[Column]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return raw_line(&row.to_string());
        }
        let cells: Vec<String> = columns.iter().map(|(_, pointer)| cell(row.pointer(pointer))).collect();
        line(&cells.join("  "))
    }

    fn json(&self, value: &Value) -> anyhow::Result<()> {
        raw_line(&serde_json::to_string_pretty(value)?)
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
    table.lines().try_for_each(|row| line(row.trim_matches(' ')))
}

/// A value as a cell; what a plugin or a peer wrote must not steer the terminal.
pub fn cell(value: Option<&Value>) -> String {
    let word = |text: &str| escaped_word(text).into_owned();
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => word(text),
        Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).map(word).collect::<Vec<_>>().join(", ")
        }
        Some(Value::Object(counts)) if !counts.is_empty() && counts.values().all(Value::is_u64) => counts
            .iter()
            .map(|(name, count)| format!("{} {count}", word(name)))
            .collect::<Vec<_>>()
            .join(", "),
        Some(other) => word(&other.to_string()),
    }
}

/// Writes a line for people to standard output, escaped.
pub fn line(text: &str) -> anyhow::Result<()> {
    raw_line(&escaped(text))
}

/// Writes a line for programs to standard output as it is.
pub fn raw_line(text: &str) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes bytes to standard output as they are. Ends the program without a word once nobody reads them any more.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(OK.into()),
        other => Ok(other?),
    }
}

/// Ends the program without a word if nobody reads standard output any more, for one that has nothing to write yet.
pub fn end_if_unread() {
    let out = io::stdout();
    let mut polled = [PollFd::new(&out, PollFlags::empty())];
    let is_closed = poll(&mut polled, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
        && polled[0].revents().contains(PollFlags::ERR);
    if is_closed {
        std::process::exit(OK.into());
    }
}

/// Writes a line to standard error, beside the results, escaped. It is lost if nobody reads there.
pub fn note(text: &str) {
    note_piece(&format!("{}\n", escaped(text)));
}

/// Writes the lines of a text to standard error, each escaped.
pub fn notes(text: &str) {
    text.lines().for_each(note);
}

/// Writes to standard error what does not end a line: a question, or a count that is written over.
pub fn note_piece(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
