//! Owns what becomes of dead letters: the operator has each replayed or dropped once, however many ask, and those
//! that are too old go.

use std::ops::ControlFlow;

use redb::WriteTransaction;

use crate::commit::{Commit, CommitError};
use crate::effect::DeadLetter;
use crate::entry::{Kind, Offset};
use crate::host::Host;
use crate::ident::PluginName;
use crate::store::dead::{self, Filter};
use crate::store::{Store, StoreError};

/// Gives a dead letter's event to its plugin again, in place of the letter.
/// Returns false if there is no such letter.
pub async fn replay(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    Ok(each(commit, vec![id], Fate::Replay).await? > 0)
}

/// Forgets a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    Ok(each(commit, vec![id], Fate::Drop).await? > 0)
}

/// Does the same with each of these letters that is there still, in one transaction; returns with how many.
async fn each(commit: &Commit, ids: Vec<u64>, fate: Fate) -> Result<u64, CommitError> {
    let take = move |write: &WriteTransaction| {
        let (mut again, mut done) = (Vec::new(), 0);
        for id in ids {
            let Some(DeadLetter { plugin, by, offset, event, .. }) = dead::take(write, id)? else { continue };
            done += 1;
            if fate == Fate::Replay {
                again.push(Kind::Again { plugin, attempt: 0, first: Offset(offset), by, event });
            }
        }
        Ok((again, done))
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

/// Letters that are taken together.
const PAGE: usize = 100;

/// Does the same with all letters that are meant and are there by now; returns with how many. Those of plugins that
/// do not run are not replayed: they stay.
pub async fn all(host: &Host, filter: Filter, fate: Fate) -> Result<u64, CommitError> {
    let last = dead::last(&host.store)?;
    let (mut after, mut done) = (None, 0);
    loop {
        let (store, filter) = (host.store.clone(), filter.clone());
        let page = tokio::task::spawn_blocking(move || page(&store, &filter, after)).await;
        let page = page.expect("reading does not panic")?;
        let Some((end, _)) = page.last() else { return Ok(done) };
        after = Some(*end);
        // What failed again is another letter.
        let is_old = |id: u64| last.is_some_and(|last| id <= last);
        let is_over = !is_old(*end);
        let runs = |plugin| fate == Fate::Drop || host.plugins.get(plugin).is_some();
        let meant = page.iter().filter(|(id, plugin)| is_old(*id) && runs(plugin));
        done += each(&host.commit, meant.map(|(id, _)| *id).collect(), fate).await?;
        if is_over {
            return Ok(done);
        }
    }
}

/// The next letters after one, by number, each with its plugin.
fn page(store: &Store, filter: &Filter, after: Option<u64>) -> Result<Vec<(u64, PluginName)>, StoreError> {
    let mut page = Vec::new();
    dead::walk(store, filter, after, |id, letter| {
        page.push((id, letter.plugin));
        if page.len() < PAGE { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(page)
}
