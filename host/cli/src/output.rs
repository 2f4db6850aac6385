//! Owns the output of commands: tables for people, JSON for programs. Receives JSON values; writes results to standard
//! output and notes to standard error.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anstream::AutoStream;
use anstyle::Style;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use crate::table::{self, Table};
pub use crate::table::{BAD, Column, DOUBTFUL, GOOD, word as cell};
use crate::{Format, OK};
use dim_model::escape::escaped;

/// Interval between two refreshes of a watched list.
const EVERY: Duration = Duration::from_secs(1);

/// Writes results to standard output.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
}

/// The option to refresh a list until interrupted.
#[derive(Clone, Copy, Debug, Args)]
pub struct Watch {
    /// Refresh the list each second, until interrupted
    #[arg(long)]
    watch: bool,
}

impl Watch {
    /// Whether the list is refreshed until interrupted.
    pub fn is_set(self) -> bool {
        self.watch
    }
}

impl Output {
    pub fn new(format: Format) -> Self {
        Self { format }
    }

    /// Writes rows: a JSON array, or a table with `columns`.
    pub fn rows(&self, rows: &Value, columns: &'static [Column]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(rows);
        }
        Table::of(rows, columns).iter().try_for_each(|line| styled_line(line))
    }

    /// Writes the rows of `list`, once or each second. A refresh replaces the table on a terminal, and follows it
    /// elsewhere; for programs it is one line of JSON.
    pub async fn list(
        &self,
        watch: Watch,
        columns: &'static [Column],
        list: impl AsyncFn() -> anyhow::Result<Value>,
    ) -> anyhow::Result<()> {
        if !watch.watch {
            return self.rows(&list().await?, columns);
        }
        let is_redrawn = !self.is_json() && io::stdout().is_terminal();
        loop {
            let rows = list().await?;
            if self.is_json() {
                raw_line(&rows.to_string())?;
            } else if is_redrawn {
                bytes(redrawn(&Table::of(&rows, columns)).as_bytes())?;
            } else {
                self.rows(&rows, columns)?;
                line("")?;
            }
            tokio::time::sleep(EVERY).await;
            end_if_unread();
        }
    }

    /// Writes one object: JSON, or one line for each member.
    pub fn object(&self, object: &Value) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(object);
        }
        table::members(object).iter().try_for_each(|line| styled_line(line))
    }

    /// Writes one object as [`Self::object`] does. For people, the items of the members in `lists` follow the other
    /// members, one line for each item.
    pub fn object_with_lists(&self, object: &Value, lists: &[&str]) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(object);
        }
        let mut rest = object.clone();
        let listed: Vec<(&str, Option<Value>)> = match rest.as_object_mut() {
            Some(members) => lists.iter().map(|name| (*name, members.remove(*name))).collect(),
            None => Vec::new(),
        };
        table::members_with_lists(&rest, &listed).iter().try_for_each(|line| styled_line(line))
    }

    /// Whether the format is JSON.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Starts a stream of rows: lines of JSON, or of a table.
    pub fn stream(&self, columns: &'static [Column]) -> Rows {
        Rows { out: *self, table: Table::stream(columns), has_head: false }
    }

    fn json(&self, value: &Value) -> anyhow::Result<()> {
        raw_line(&serde_json::to_string_pretty(value)?)
    }
}

/// A stream of rows that arrive one by one.
#[derive(Debug)]
pub struct Rows {
    out: Output,
    table: Table,
    has_head: bool,
}

impl Rows {
    /// Writes one row, after the head if it is the first.
    pub fn row(&mut self, row: &Value) -> anyhow::Result<()> {
        if self.out.is_json() {
            return raw_line(&row.to_string());
        }
        if !std::mem::replace(&mut self.has_head, true) {
            styled_line(&self.table.head())?;
        }
        styled_line(&self.table.row(row))
    }
}

/// Formats a table that replaces the content of the terminal, cut to the height of the terminal.
fn redrawn(lines: &[String]) -> String {
    let height = rustix::termios::tcgetwinsize(io::stdout()).map_or(24, |size| usize::from(size.ws_row));
    let shown = &lines[..lines.len().min(height.saturating_sub(1).max(1))];
    let colour = AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never;
    let shown = shown.iter().map(|line| match colour {
        true => line.clone(),
        false => anstream::adapter::strip_str(line).to_string(),
    });
    // Cursor home; each line erases the rest of the old line; the last sequence erases everything below.
    let lines: String = shown.map(|line| format!("{line}\u{1b}[K\n")).collect();
    format!("\u{1b}[H{lines}\u{1b}[J")
}

/// Escapes a text and adds a style, for [`styled_line`].
pub fn styled(style: Style, text: &str) -> String {
    format!("{style}{}{style:#}", escaped(text))
}

/// Writes a line to standard output, with colours if the user wants them. The caller has escaped its parts.
pub fn styled_line(text: &str) -> anyhow::Result<()> {
    match AutoStream::choice(&io::stdout()) {
        anstream::ColorChoice::Never => raw_line(&anstream::adapter::strip_str(text).to_string()),
        _ => raw_line(text),
    }
}

/// Escapes a line for people and writes it to standard output.
pub fn line(text: &str) -> anyhow::Result<()> {
    raw_line(&escaped(text))
}

/// Writes a line for programs to standard output unchanged.
pub fn raw_line(text: &str) -> anyhow::Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes bytes to standard output unchanged. Ends the process with success if the reader has closed the pipe.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(OK.into()),
        other => Ok(other?),
    }
}

/// Ends the process with success if the reader of standard output has closed the pipe. For commands that wait and have
/// nothing to write.
pub fn end_if_unread() {
    let out = io::stdout();
    let mut polled = [PollFd::new(&out, PollFlags::empty())];
    let is_closed = poll(&mut polled, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok()
        && polled[0].revents().contains(PollFlags::ERR);
    if is_closed {
        std::process::exit(OK.into());
    }
}

/// Refuses to replace an existing file without `force`, and anything but a regular file in any case.
pub fn check_replaceable(path: &Path, force: bool) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => {
            anyhow::bail!(
                "{} is not a regular file and cannot be replaced: choose another path",
                path.display()
            )
        }
        Ok(_) if !force => anyhow::bail!("{} already exists; --force replaces it", path.display()),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Escapes a line and writes it to standard error, apart from the results. A write error is ignored.
pub fn note(text: &str) {
    note_piece(&format!("{}\n", escaped(text)));
}

/// Escapes each line of a text and writes it to standard error.
pub fn notes(text: &str) {
    text.lines().for_each(note);
}

/// Writes a styled mark, such as `error: `, and then the escaped text to standard error.
pub fn marked_notes(style: Style, mark: &str, text: &str) {
    let mark = format!("{style}{mark}{style:#}");
    let mark = match AutoStream::choice(&io::stderr()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(&mark).to_string(),
        _ => mark,
    };
    note_piece(&mark);
    notes(text);
}

/// Writes text without a line end to standard error, unchanged: a question, or a counter that is overwritten later.
pub fn note_piece(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
