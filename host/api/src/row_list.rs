//! Owns lists whose rows come from the store. It reads the rows on a thread that may block, and returns JSON that is
//! limited in rows and bytes.

use std::ops::ControlFlow;

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;

use crate::ApiError;

/// The maximum size of a list, in bytes, as for a page of jobs or nodes. The last row may exceed it.
pub const LIST_BYTES: usize = 8 << 20;

/// A list that is being written as JSON.
#[derive(Debug)]
pub struct Rows {
    json: Vec<u8>,
    /// The number of rows that may still be added.
    left: usize,
}

impl Rows {
    /// Makes an empty list for at most `limit` rows.
    fn new(limit: usize) -> Self {
        Self { json: b"[".to_vec(), left: limit }
    }

    /// Returns whether another row fits.
    pub fn room(&self) -> ControlFlow<()> {
        let has_room = self.left > 0 && self.json.len() < LIST_BYTES;
        if has_room { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// Adds a row if it fits. Returns whether another one fits.
    pub fn push(&mut self, row: &impl Serialize) -> ControlFlow<()> {
        self.room()?;
        if self.json.len() > 1 {
            self.json.push(b',');
        }
        serde_json::to_writer(&mut self.json, row).expect("a row is plain data");
        self.left -= 1;
        self.room()
    }
}

/// Returns a list of at most `limit` rows, which `read` adds.
pub async fn list(
    limit: usize,
    read: impl FnOnce(&mut Rows) -> Result<(), ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let reading = tokio::task::spawn_blocking(move || {
        let mut rows = Rows::new(limit);
        read(&mut rows)?;
        rows.json.push(b']');
        Ok(([(header::CONTENT_TYPE, "application/json")], rows.json).into_response())
    });
    reading.await.expect("reading does not panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_bounded_in_rows_and_in_bytes() {
        let mut rows = Rows::new(3);
        while rows.push(&1).is_continue() {}
        assert_eq!(rows.push(&2), ControlFlow::Break(()));
        assert_eq!(rows.json, b"[1,1,1");
        let (mut rows, large) = (Rows::new(100), "x".repeat(LIST_BYTES / 4));
        while rows.push(&large).is_continue() {}
        assert_eq!(rows.left, 96);
        assert_eq!(Rows::new(0).push(&1), ControlFlow::Break(()));
    }
}
