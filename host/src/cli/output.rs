//! How results are written: tables for people, JSON for programs.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anstream::AutoStream;
use anstyle::Style;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use super::table::{self, Table};
pub use super::table::{BAD, Column, DOUBTFUL, GOOD, word as cell};
use super::{Format, OK};
use crate::escape::escaped;

/// How often a list that is watched is shown.
const EVERY: Duration = Duration::from_secs(1);

/// Writes results to standard output.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
}

/// Whether a list is shown once or over and over.
#[derive(Clone, Copy, Debug, Args)]
pub struct Watch {
    /// Refresh the list each second, until interrupted
    #[arg(long)]
    watch: bool,
}

impl Watch {
    /// Whether it is shown over and over.
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

    /// Writes the rows that `list` gives, once or each second: in the place of those before them on a terminal, below
    /// them elsewhere, as a line of JSON for programs.
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

    /// Writes one object: JSON, or its members one a line.
    pub fn object(&self, object: &Value) -> anyhow::Result<()> {
        if self.format == Format::Json {
            return self.json(object);
        }
        table::members(object).iter().try_for_each(|line| styled_line(line))
    }

    /// The same, with the items of these members one a line, after the others.
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

    /// Whether programs read this.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Begins a stream of rows: lines of JSON, or of a table.
    pub fn stream(&self, columns: &'static [Column]) -> Rows {
        Rows { out: *self, table: Table::stream(columns), has_head: false }
    }

    fn json(&self, value: &Value) -> anyhow::Result<()> {
        raw_line(&serde_json::to_string_pretty(value)?)
    }
}

/// Rows that come one by one.
#[derive(Debug)]
pub struct Rows {
    out: Output,
    table: Table,
    has_head: bool,
}

impl Rows {
    /// Writes one.
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

/// A table for a terminal, in the place of what is there, as far as there is room.
fn redrawn(lines: &[String]) -> String {
    let height = rustix::termios::tcgetwinsize(io::stdout()).map_or(24, |size| usize::from(size.ws_row));
    let shown = &lines[..lines.len().min(height.saturating_sub(1).max(1))];
    let colour = AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never;
    let shown = shown.iter().map(|line| match colour {
        true => line.clone(),
        false => anstream::adapter::strip_str(line).to_string(),
    });
    // Home; each line ends what was there; and what is below goes.
    let lines: String = shown.map(|line| format!("{line}\u{1b}[K\n")).collect();
    format!("\u{1b}[H{lines}\u{1b}[J")
}

/// A text in a style, escaped; for [`styled_line`].
pub fn styled(style: Style, text: &str) -> String {
    format!("{style}{}{style:#}", escaped(text))
}

/// Writes a line whose parts are escaped to standard output, in colour if that is wanted.
pub fn styled_line(text: &str) -> anyhow::Result<()> {
    match AutoStream::choice(&io::stdout()) {
        anstream::ColorChoice::Never => raw_line(&anstream::adapter::strip_str(text).to_string()),
        _ => raw_line(text),
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

/// Refuses to write a file in the place of what is there: without `force` at all, and with it what is no regular file.
pub fn check_replaceable(path: &Path, force: bool) -> anyhow::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => {
            anyhow::bail!("{} is no regular file, and is not replaced: name another", path.display())
        }
        Ok(_) if !force => anyhow::bail!("{} is there already; --force replaces it", path.display()),
        Ok(_) | Err(_) => Ok(()),
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

/// Writes a text to standard error after the word for what it is, which has a style.
pub fn marked_notes(style: Style, mark: &str, text: &str) {
    let mark = format!("{style}{mark}{style:#}");
    let mark = match AutoStream::choice(&io::stderr()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(&mark).to_string(),
        _ => mark,
    };
    note_piece(&mark);
    notes(text);
}

/// Writes to standard error what does not end a line: a question, or a count that is written over.
pub fn note_piece(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
