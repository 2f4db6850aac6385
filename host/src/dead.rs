//! Owns what the operator does with dead letters: each is replayed or dropped once, however many ask.

use crate::commit::{Commit, CommitError};
use crate::entry::{Kind, Offset};
use crate::store::dead;

/// Gives a dead letter's event to its plugin again, in place of the letter.
/// Returns false if there is no such letter.
pub async fn replay(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    let take = move |write: &redb::WriteTransaction| {
        let Some(letter) = dead::take(write, id)? else { return Ok((Vec::new(), false)) };
        let first = Offset(letter.offset);
        let (plugin, by) = (letter.plugin, letter.by);
        let again = Kind::Again { plugin, attempt: 0, first, by, event: letter.event };
        Ok((vec![again], true))
    };
    commit.write_and_append(take).await
}

/// Forgets a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    commit.write(move |write| Ok(dead::take(write, id)?.is_some())).await
}
