//! Owns what becomes of dead letters: the operator has each replayed or dropped once, however many ask, and those
//! that are too old go.

use crate::commit::{Commit, CommitError};
use crate::entry::{Kind, Offset};
use crate::host::Host;
use crate::store::dead::{self, Filter};

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

/// What is done with letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Their events are given to their plugins again.
    Replay,
    /// They are forgotten.
    Drop,
}

/// Letters that are looked at together.
const PAGE: usize = 1_000;

/// Does the same with all letters that are meant and are there by now; returns with how many. Those of plugins that
/// do not run are not replayed: they stay.
pub async fn all(host: &Host, filter: Filter, fate: Fate) -> Result<u64, CommitError> {
    let last = dead::last(&host.store)?;
    let (mut after, mut done) = (None, 0);
    loop {
        let (store, filter) = (host.store.clone(), filter.clone());
        let page = tokio::task::spawn_blocking(move || dead::list(&store, &filter, after, PAGE)).await;
        let page = page.expect("reading does not panic")?;
        let Some((end, _)) = page.last() else { return Ok(done) };
        after = Some(*end);
        for (id, letter) in page {
            // What failed again is another letter.
            if last.is_none_or(|last| id > last) {
                return Ok(done);
            }
            let is_done = match fate {
                Fate::Replay if host.plugins.get(&letter.plugin).is_none() => false,
                Fate::Replay => replay(&host.commit, id).await?,
                Fate::Drop => drop_letter(&host.commit, id).await?,
            };
            done += u64::from(is_done);
        }
    }
}

/// Forgets a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    commit.write(move |write| Ok(dead::take(write, id)?.is_some())).await
}
