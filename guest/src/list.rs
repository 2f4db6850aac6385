//! Builds pages of lists: bounds a query's answer in rows and bytes, and merges the records of two
//! prefixes into one list.

use std::iter::Peekable;

use crate::state::{Error, Pages};

/// Maximum and default number of rows of a page.
const ROWS: usize = 1_000;

/// Size in bytes at which a page is full. The limit `border-bytes` bounds the result of a call.
const BYTES: usize = 8 << 20;

/// One page of a list.
#[derive(Debug)]
pub struct Page<T> {
    rows: Vec<T>,
    limit: usize,
    bytes: usize,
}

impl<T> Page<T> {
    /// Creates an empty page for at most `limit` rows. The default and the maximum are 1,000.
    pub fn new(limit: Option<usize>) -> Self {
        Self { rows: Vec::new(), limit: limit.unwrap_or(ROWS).min(ROWS), bytes: 0 }
    }

    /// Returns whether the page accepts another row, of any size.
    pub fn has_room(&self) -> bool {
        self.rows.len() < self.limit && self.bytes < BYTES
    }

    /// Adds a row whose record has `bytes` bytes.
    pub fn push(&mut self, row: T, bytes: usize) {
        self.bytes += bytes;
        self.rows.push(row);
    }

    /// Returns the rows.
    pub fn into_rows(self) -> Vec<T> {
        self.rows
    }
}

/// Iterates over two prefixes together, sorted by id. Each item has the record of an id under one or both prefixes.
#[derive(Debug)]
pub struct SideBySide {
    one: Peekable<Pages>,
    other: Peekable<Pages>,
}

impl SideBySide {
    /// Merges two iterations.
    pub fn new(one: Pages, other: Pages) -> Self {
        Self { one: one.peekable(), other: other.peekable() }
    }
}

/// The stored records of one id under the two prefixes.
#[derive(Debug)]
pub struct Both {
    /// The record under the first prefix.
    pub one: Option<Vec<u8>>,
    /// The record under the second prefix.
    pub other: Option<Vec<u8>>,
}

impl Iterator for SideBySide {
    type Item = Result<Both, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        // An error sorts first, so that the caller receives it.
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
