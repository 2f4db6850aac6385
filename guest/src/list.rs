//! Lists in pages: what a query answers is bounded in number and in bytes, and records that lie under
//! two prefixes are one list.

use std::iter::Peekable;

use crate::state::{Error, Pages};

/// Rows of one page, unless a caller asks for fewer.
const ROWS: usize = 1_000;

/// Bytes of one page: what goes over the border in one call is limited.
const BYTES: usize = 8 << 20;

/// One page of a list.
#[derive(Debug)]
pub struct Page<T> {
    rows: Vec<T>,
    limit: usize,
    bytes: usize,
}

impl<T> Page<T> {
    /// An empty page for at most `limit` rows, and never more than 1,000.
    pub fn new(limit: Option<usize>) -> Self {
        Self { rows: Vec::new(), limit: limit.unwrap_or(ROWS).min(ROWS), bytes: 0 }
    }

    /// Whether there is room for another row, whatever its size.
    pub fn has_room(&self) -> bool {
        self.rows.len() < self.limit && self.bytes < BYTES
    }

    /// Adds a row whose record has so many bytes.
    pub fn push(&mut self, row: T, bytes: usize) {
        self.bytes += bytes;
        self.rows.push(row);
    }

    /// The rows.
    pub fn into_rows(self) -> Vec<T> {
        self.rows
    }
}

/// Walks through two prefixes at once, by id: each item has the record of one or of both.
#[derive(Debug)]
pub struct SideBySide {
    one: Peekable<Pages>,
    other: Peekable<Pages>,
}

impl SideBySide {
    /// Begins where both begin.
    pub fn new(one: Pages, other: Pages) -> Self {
        Self { one: one.peekable(), other: other.peekable() }
    }
}

/// The records of one id, as they stand in the state.
#[derive(Debug)]
pub struct Both {
    /// Under the first prefix.
    pub one: Option<Vec<u8>>,
    /// Under the second.
    pub other: Option<Vec<u8>>,
}

impl Iterator for SideBySide {
    type Item = Result<Both, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        // What cannot be read comes first, so that it is told.
        let id = |row: Option<&Result<(String, Vec<u8>), Error>>| {
            row.map(|row| row.as_ref().map_or_else(|_| String::new(), |(id, _)| id.clone()))
        };
        let (first, second) = (id(self.one.peek()), id(self.other.peek()));
        if first.is_none() && second.is_none() {
            return None;
        }
        let take_one = first.is_some() && (second.is_none() || first <= second);
        let take_other = second.is_some() && (first.is_none() || second <= first);
        let record = |row: Option<Result<(String, Vec<u8>), Error>>| {
            row.map(|row| row.map(|(_, record)| record)).transpose()
        };
        let one = if take_one { record(self.one.next()) } else { Ok(None) };
        let other = if take_other { record(self.other.next()) } else { Ok(None) };
        Some(one.and_then(|one| Ok(Both { one, other: other? })))
    }
}
