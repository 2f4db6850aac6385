//! Owns the orders of the operator about dead letters. It receives the ids or a filter, and replays or drops each
//! letter once, also if several callers request it.

use std::ops::ControlFlow;

use dim_model::entry::{Kind, Offset};
use dim_model::ident::PluginName;
use dim_store::commit::{Commit, CommitError};
use dim_store::dead_letters::{self, Filter};
use dim_store::effect::DeadLetter;
use dim_store::{Store, StoreError};
use redb::WriteTransaction;

use crate::host::Host;

/// Replays a dead letter: its event goes to its plugin again and the letter is removed. Returns false if there is no
/// such letter.
pub async fn replay(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    Ok(each(commit, vec![id], Fate::Replay).await? > 0)
}

/// Drops a dead letter. Returns false if there is no such letter.
pub async fn drop_letter(commit: &Commit, id: u64) -> Result<bool, CommitError> {
    Ok(each(commit, vec![id], Fate::Drop).await? > 0)
}

/// Applies `fate` to each of these letters that still exists, in one transaction. Returns their number.
async fn each(commit: &Commit, ids: Vec<u64>, fate: Fate) -> Result<u64, CommitError> {
    let take = move |write: &WriteTransaction| {
        let (mut again, mut done) = (Vec::new(), 0);
        for id in ids {
            let Some(DeadLetter { plugin, by, offset, event, .. }) = dead_letters::take(write, id)? else {
                continue;
            };
            done += 1;
            if fate == Fate::Replay {
                again.push(Kind::Again { plugin, attempt: 0, first: Offset(offset), by, event });
            }
        }
        Ok((again, done))
    };
    commit.write_and_append(take).await
}

/// An order about dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The events go to their plugins again.
    Replay,
    /// The letters are removed.
    Drop,
}

/// The maximum number of letters in one transaction.
const PAGE: usize = 100;

/// Applies `fate` to all letters that match the filter and exist now. Returns their number. Letters of plugins that
/// do not run are not replayed and stay.
pub async fn all(host: &Host, filter: Filter, fate: Fate) -> Result<u64, CommitError> {
    let last = dead_letters::last(&host.storage.store)?;
    let (mut after, mut done) = (None, 0);
    loop {
        let (store, filter) = (host.storage.store.clone(), filter.clone());
        let page = tokio::task::spawn_blocking(move || page(&store, &filter, after)).await;
        let page = page.expect("reading does not panic")?;
        let Some((end, _)) = page.last() else { return Ok(done) };
        after = Some(*end);
        // An event that failed again has a new letter, which is not part of the order.
        let is_old = |id: u64| last.is_some_and(|last| id <= last);
        let is_over = !is_old(*end);
        let runs = |plugin| fate == Fate::Drop || host.plugins.get(plugin).is_some();
        let meant = page.iter().filter(|(id, plugin)| is_old(*id) && runs(plugin));
        done += each(&host.storage.commit, meant.map(|(id, _)| *id).collect(), fate).await?;
        if is_over {
            return Ok(done);
        }
    }
}

/// Returns the next letters after `after`, by number, each with its plugin.
fn page(store: &Store, filter: &Filter, after: Option<u64>) -> Result<Vec<(u64, PluginName)>, StoreError> {
    let mut page = Vec::new();
    dead_letters::walk(store, filter, after, |id, letter| {
        page.push((id, letter.plugin));
        if page.len() < PAGE { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(page)
}
