//! Owns the layout of tables and objects for people. Receives JSON values and columns; returns escaped, aligned lines.

use anstyle::{AnsiColor, Style};
use dim_model::escape::{escaped, escaped_word};
use jiff::Timestamp as Time;
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr as _;

use crate::human;

/// The style of column heads.
pub const HEAD: Style = Style::new().bold();
/// The style of good states.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// The style of states that need attention.
pub const DOUBTFUL: Style = AnsiColor::Yellow.on_default();
/// The style of failures.
pub const BAD: Style = AnsiColor::Red.on_default();

/// Maximum width to which one cell of a stream widens its column for the later rows, in terminal columns.
const WIDEST: usize = 48;

/// A column: its head, the place of its value in a row, and the kind of the value.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    head: &'static str,
    /// The JSON pointer to the value in a row.
    at: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Word,
    Text,
    State,
    Time,
    Ago,
}

impl Column {
    /// A column of ids, names or numbers.
    pub const fn word(head: &'static str, at: &'static str) -> Self {
        Self { head, at, kind: Kind::Word }
    }

    /// A column of sentences, which may begin with blanks.
    pub const fn text(head: &'static str, at: &'static str) -> Self {
        Self { head, at, kind: Kind::Text }
    }

    /// A column of states, coloured by [`style_of`].
    pub const fn state(head: &'static str, at: &'static str) -> Self {
        Self { head, at, kind: Kind::State }
    }

    /// A column of times, to the second.
    pub const fn time(head: &'static str, at: &'static str) -> Self {
        Self { head, at, kind: Kind::Time }
    }

    /// A column of times, as the duration until now.
    pub const fn ago(head: &'static str, at: &'static str) -> Self {
        Self { head, at, kind: Kind::Ago }
    }

    fn cell(&self, row: &Value) -> Cell {
        // An empty list or object is shown as an absent value.
        let is_empty = |value: &Value| *value == json!([]) || *value == json!({});
        let value = row.pointer(self.at).filter(|value| !is_empty(value));
        let time = || human::read(value?.as_str()?);
        let text = match self.kind {
            Kind::Text => value.and_then(Value::as_str).map(|text| escaped(text).into_owned()),
            Kind::Time => time().map(human::time),
            Kind::Ago => time().map(|time| human::ago(time, Time::now())),
            Kind::Word | Kind::State => None,
        };
        let text = text.unwrap_or_else(|| word(value));
        let style = if self.kind == Kind::State { style_of(&text) } else { Style::new() };
        Cell { text, style }
    }

    /// The width of the column in a stream before its first row.
    fn usual_width(&self) -> usize {
        let usual = match self.kind {
            Kind::Time => "2026-01-31T12:00:00Z".len(),
            Kind::State | Kind::Ago => 9,
            Kind::Word | Kind::Text => 12,
        };
        usual.max(self.head.len())
    }
}

/// The escaped text of one cell, and its style.
struct Cell {
    text: String,
    style: Style,
}

/// A table with the widths of its columns so far.
#[derive(Debug)]
pub struct Table {
    columns: &'static [Column],
    widths: Vec<usize>,
}

impl Table {
    /// Formats a whole table: one line for the head, and one for each row.
    pub fn of(rows: &Value, columns: &'static [Column]) -> Vec<String> {
        let mut table = Self { columns, widths: columns.iter().map(|column| column.head.len()).collect() };
        let rows: Vec<_> = rows.as_array().into_iter().flatten().map(|row| table.cells(row)).collect();
        rows.iter().for_each(|row| table.fit(row, usize::MAX));
        std::iter::once(table.head()).chain(rows.iter().map(|row| table.drawn(row))).collect()
    }

    /// Creates a table whose rows arrive one by one.
    pub fn stream(columns: &'static [Column]) -> Self {
        Self { columns, widths: columns.iter().map(Column::usual_width).collect() }
    }

    /// Formats the head.
    pub fn head(&self) -> String {
        let head = |column: &Column| Cell { text: column.head.to_owned(), style: HEAD };
        self.drawn(&self.columns.iter().map(head).collect::<Vec<_>>())
    }

    /// Formats a row, and widens the columns for later rows if needed.
    pub fn row(&mut self, row: &Value) -> String {
        let cells = self.cells(row);
        self.fit(&cells, WIDEST);
        self.drawn(&cells)
    }

    fn cells(&self, row: &Value) -> Vec<Cell> {
        self.columns.iter().map(|column| column.cell(row)).collect()
    }

    fn fit(&mut self, cells: &[Cell], most: usize) {
        for (width, cell) in self.widths.iter_mut().zip(cells) {
            *width = cell.text.width().min(most).max(*width);
        }
    }

    fn drawn(&self, cells: &[Cell]) -> String {
        let mut line = String::new();
        for (at, (Cell { text, style }, width)) in cells.iter().zip(&self.widths).enumerate() {
            line.push_str(&format!("{style}{text}{style:#}"));
            if at + 1 < cells.len() {
                line.push_str(&" ".repeat(width.saturating_sub(text.width()) + 2));
            }
        }
        line.truncate(line.trim_end_matches(' ').len());
        line
    }
}

/// Formats a value as one escaped word. Text of a plugin or a peer must not control the terminal.
pub fn word(value: Option<&Value>) -> String {
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

/// The style of a state.
fn style_of(state: &str) -> Style {
    match state {
        "online" | "running" | "completed" | "confirmed" | "INFO" | "info" => GOOD,
        "suspect" | "cancelled" | "loading" | "paused" | "pending" | "on-probation" | "WARN" | "warn" => {
            DOUBTFUL
        }
        "dead" | "failed" | "failing" | "refused" | "quarantined" | "rolled-back" | "taken-back"
        | "ERROR" | "error" => BAD,
        _ => Style::new(),
    }
}

/// Formats an object, one line for each member. A member of an inner object has the path of names, such as `data.at`.
pub fn members(object: &Value) -> Vec<String> {
    members_with_lists(object, &[])
}

/// Formats an object as [`members`] does, followed by the members of `lists` with one line for each item.
pub fn members_with_lists(object: &Value, lists: &[(&str, Option<Value>)]) -> Vec<String> {
    let mut members = Vec::new();
    flatten(&mut members, "", object);
    for (name, items) in lists {
        let items = items.iter().filter_map(Value::as_array).flatten().enumerate();
        members.extend(items.map(|(index, item)| {
            let name = if index == 0 { (*name).to_owned() } else { String::new() };
            (name, word(Some(item)))
        }));
    }
    let width = members.iter().map(|(name, _)| name.width()).max().unwrap_or(0);
    let line = |(name, value): &(String, String)| {
        let blanks = " ".repeat(width - name.width() + 2);
        format!("{HEAD}{name}{HEAD:#}{blanks}{value}").trim_end_matches(' ').to_owned()
    };
    members.iter().map(line).collect()
}

/// Members with data that somebody else has sent. Their times and sizes are shown unchanged.
const SENT: [&str; 3] = ["data", "result", "event"];

fn flatten(members: &mut Vec<(String, String)>, prefix: &str, object: &Value) {
    for (name, value) in object.as_object().into_iter().flatten() {
        let is_sent = prefix.split('.').next().is_some_and(|first| SENT.contains(&first));
        let path = format!("{prefix}{}", escaped_word(name));
        match value {
            Value::Object(inner) if !inner.is_empty() => flatten(members, &format!("{path}."), value),
            value if is_sent => members.push((path, word(Some(value)))),
            value => members.push((path, member(name, value))),
        }
    }
}

/// Formats the value of a member: sizes and times for people, everything else as a word.
fn member(name: &str, value: &Value) -> String {
    let is_size = ["bytes", "size"].contains(&name) || name.ends_with("_bytes") || name.ends_with("-bytes");
    match value {
        Value::Number(bytes) if is_size && bytes.is_u64() => human::size(bytes.as_u64().unwrap_or(0)),
        Value::String(text) => human::read(text).map_or_else(|| word(Some(value)), human::time),
        value => word(Some(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] =
        [Column::word("ID", "/id"), Column::state("STATE", "/state"), Column::text("TEXT", "/text")];

    #[test]
    fn rows_stand_below_their_heads() {
        let rows = json!([{ "id": "日本", "state": "running", "text": "  at x" }, { "id": " a\u{202e}", "text": null }]);
        let lines: Vec<_> = Table::of(&rows, &COLUMNS)
            .iter()
            .map(|line| anstream::adapter::strip_str(line).to_string())
            .collect();
        assert_eq!(
            lines,
            [
                "ID               STATE    TEXT",
                "日本             running    at x",
                "\\u{20}a\\u{202e}  -        -",
            ]
        );
    }

    #[test]
    fn a_stream_stays_aligned_whatever_comes() {
        let mut table = Table::stream(&COLUMNS);
        let at = |line: &str| anstream::adapter::strip_str(line).to_string().find("end");
        let row = |id: &str| json!({ "id": id, "state": "dead", "text": "end" });
        let (first, second) = (table.row(&row("a")), table.row(&row("b")));
        assert_eq!(at(&first), at(&second));
        let long = "x".repeat(200);
        table.row(&row(&long));
        assert_eq!(at(&table.row(&row("c"))), Some(WIDEST + 2 + 9 + 2), "one long id is no reason for all");
    }

    #[test]
    fn members_are_shown_for_people_but_as_they_came_if_they_were_sent() {
        let time = "2026-01-31T12:00:00.123456789Z";
        let object = json!({ "at": time, "bytes": 2048, "data": { "at": time, "bytes": 2048 } });
        let lines: Vec<_> =
            members(&object).iter().map(|line| anstream::adapter::strip_str(line).to_string()).collect();
        assert_eq!(
            lines,
            [
                "at          2026-01-31T12:00:00Z".to_owned(),
                "bytes       2 KiB".to_owned(),
                format!("data.at     {time}"),
                "data.bytes  2048".to_owned(),
            ]
        );
    }
}
