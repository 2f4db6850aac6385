//! Owns the pins of documents in the backend. It records each document before it is sent, and unpins documents that
//! no name points to.

use cid::Cid;
use dim_model::ident::{ContentPath, KeyName};
use dim_store::commit::CommitError;
use dim_store::names::{self, Known};
use dim_store::{StoreError, pins};

use super::encryption::Sent;
use super::{PublishError, Publisher};

impl Publisher {
    /// Records a publication before it is sent, so that its pin and its record are recognised as the host's own after
    /// any failure. A file that another program pinned is not recorded.
    pub(super) async fn note_attempt(
        &self,
        key: &KeyName,
        known: &Known,
        sent: &Sent,
    ) -> Result<(), PublishError> {
        if !self.backend.network {
            return Ok(());
        }
        let Sent { path, file, .. } = sent;
        let pin = match path.ipfs() {
            Some((cid, _)) if known.document.is_some() && file.is_some() => {
                let is_noted = pins::is_noted(&self.store.snapshot()?, &cid)?;
                (!is_noted && !self.backend.content.is_pinned(&cid).await?).then_some(cid)
            }
            _ => None,
        };
        let published = known.published.as_ref();
        let is_published = published.is_some_and(|it| it.of == sent.of && it.path == *path);
        let is_noted = is_published || known.attempts.last() == Some(path);
        if pin.is_none() && is_noted {
            return Ok(());
        }
        let (key, path) = (key.clone(), path.clone());
        let note = move |write: &redb::WriteTransaction| {
            pin.map_or(Ok(()), |cid| pins::note(write, &cid))?;
            names::attempt(write, &key, &path)
        };
        Ok(self.commit.write(note).await?)
    }

    /// Returns the files that are pinned for this host and that no name points to. It drops the snapshot before the
    /// daemon is called, because a snapshot keeps all old pages in the database.
    fn superseded(&self) -> Result<Vec<Cid>, StoreError> {
        let snapshot = self.store.snapshot()?;
        let mut pinned = pins::all(&snapshot)?;
        if pinned.is_empty() {
            return Ok(pinned);
        }
        let names = names::all(&snapshot)?;
        // The path of a document that is encrypted before it is published is not that of the file.
        let is_of = |(key, known): &(KeyName, Known), path: &ContentPath| {
            known.published.as_ref().is_some_and(|last| last.path == *path)
                || known.attempts.last() == Some(path)
                || known.path == *path && self.cipher.group(key).is_none()
        };
        pinned.retain(|cid| {
            let path = ContentPath::of(cid);
            !names.iter().any(|name| is_of(name, &path))
        });
        Ok(pinned)
    }

    /// Unpins documents that no name points to: superseded ones, and ones whose publication never succeeded. The embedded
    /// backend has no pins; the recorded ones are those of a daemon, which the host may use again.
    pub(super) async fn unpin_superseded(&self) -> Result<(), CommitError> {
        if !self.backend.network {
            return Ok(());
        }
        for cid in self.superseded()? {
            match self.backend.content.unpin(&cid).await {
                Ok(()) => self.commit.write_later(move |write| pins::forget(write, &cid)).await?,
                Err(error) => tracing::warn!(%cid, "cannot unpin a superseded document yet: {error}"),
            }
        }
        Ok(())
    }
}
