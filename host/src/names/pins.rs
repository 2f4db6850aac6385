//! Owns what the backend holds for the host's names: notes each file before it is sent, and unpins what no name points
//! to any more.

use cid::Cid;

use super::{PublishError, Publisher};
use crate::commit::CommitError;
use crate::ident::{ContentPath, KeyName};
use crate::store::names::{self, Known};
use crate::store::{StoreError, pins};

impl Publisher {
    /// Notes what is about to be sent, so that its pin and its record are known for the host's own whatever happens
    /// then. A file that someone else has pinned stays theirs.
    pub(super) async fn note_attempt(&self, key: &KeyName, known: &Known) -> Result<(), PublishError> {
        if !self.backend.network {
            return Ok(());
        }
        let pin = match known.path.ipfs() {
            Some((cid, _)) if known.document.is_some() => {
                let is_noted = pins::is_noted(&self.store.snapshot()?, &cid)?;
                (!is_noted && !self.backend.content.is_pinned(&cid).await?).then_some(cid)
            }
            _ => None,
        };
        let is_noted = known.is_published() || known.attempts.contains(&known.path);
        if pin.is_none() && is_noted {
            return Ok(());
        }
        let (key, path) = (key.clone(), known.path.clone());
        let note = move |write: &redb::WriteTransaction| {
            pin.map_or(Ok(()), |cid| pins::note(write, &cid))?;
            names::attempt(write, &key, &path)
        };
        Ok(self.commit.write(note).await?)
    }

    /// The files that are pinned for this host and that no name points to. (No snapshot is held while
    /// the daemon is asked: the database would keep every page of its time.)
    fn superseded(&self) -> Result<Vec<Cid>, StoreError> {
        let snapshot = self.store.snapshot()?;
        let mut pinned = pins::all(&snapshot)?;
        if pinned.is_empty() {
            return Ok(pinned);
        }
        let names = names::all(&snapshot)?;
        pinned.retain(|cid| {
            let path = ContentPath::of(cid);
            let accepted = |known: &Known| known.published.as_ref().is_some_and(|last| last.path == path);
            !names.iter().any(|(_, known)| known.path == path || accepted(known))
        });
        Ok(pinned)
    }

    /// Unpins what no name points to: what was accepted before, and what never came to that.
    pub(super) async fn unpin_superseded(&self) -> Result<(), CommitError> {
        for cid in self.superseded()? {
            match self.backend.content.unpin(&cid).await {
                Ok(()) => self.commit.write_later(move |write| pins::forget(write, &cid)).await?,
                Err(error) => tracing::warn!(%cid, "cannot unpin a superseded document yet: {error}"),
            }
        }
        Ok(())
    }
}
