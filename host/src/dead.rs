//! Owns what the operator does with dead letters: each is replayed or dropped once.

use crate::commit::{Commit, CommitError};
use crate::entry::{Kind, Offset};
use crate::store::{Store, dead};

/// Held while a letter is replayed or dropped: each is taken once, however many ask.
static TAKING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Gives a dead letter's event to its plugin again, in place of the letter.
/// Returns false if there is no such letter.
pub async fn replay(store: &Store, commit: &Commit, id: u64) -> Result<bool, CommitError> {
    let _turn = TAKING.lock().await;
    let Some(letter) = dead::get(store, id)? else { return Ok(false) };
    let first = Offset(letter.offset);
    let again = Kind::Again { plugin: letter.plugin, attempt: 0, first, event: letter.event };
    commit.append_and_write(vec![again], move |write| dead::remove(write, id)).await
}

/// Forgets a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    let _turn = TAKING.lock().await;
    commit.write(move |write| dead::remove(write, id)).await
}
