//! Owns lists whose rows are read from the store: they are made on a thread that may block, and are bounded in bytes.

use std::ops::ControlFlow;

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;

use super::ApiError;

/// Bytes of a list, which the last row may go beyond: as many as a page of jobs or nodes has.
pub const LIST_BYTES: usize = 8 << 20;

/// A list that is being written as JSON.
#[derive(Debug)]
pub struct Rows {
    json: Vec<u8>,
    /// How many there may be yet.
    left: usize,
}

impl Rows {
    /// An empty list for at most `limit` rows.
    fn new(limit: usize) -> Self {
        Self { json: b"[".to_vec(), left: limit }
    }

    /// Whether there is room for another row.
    pub fn room(&self) -> ControlFlow<()> {
        let has_room = self.left > 0 && self.json.len() < LIST_BYTES;
        if has_room { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// Adds a row, if there is room for it; returns whether there is room for another one.
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

/// A list of at most `limit` rows, which `read` adds.
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
