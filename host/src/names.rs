//! Owns the publishing of the host's own names: the newest committed value of each, signed anew at
//! half of its lifetime; the backend lets go of what it supersedes.

use std::sync::Arc;
use std::time::Duration;

use cid::Cid;
use tokio_util::sync::CancellationToken;

use crate::backend::{Backend, BackendError, Prepared, Publication, Published};
use crate::backoff::Backoff;
use crate::cause::chain;
use crate::commit::{Commit, CommitError};
use crate::entry::{Kind, Resolution};
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::keys::Keyring;
use crate::store::names::{self, Accepted, Known};
use crate::store::{Store, documents};
use crate::time::Timestamp;

/// How long others may keep a record before they ask again.
const TTL: Duration = Duration::from_secs(60);

/// Shortest time between two publishes of one name: a daemon publishes one name at a time.
const PACE: Duration = Duration::from_millis(200);

/// The task that publishes names.
#[derive(Debug)]
pub struct Publisher {
    /// Where names are committed.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Where they are published.
    pub backend: Backend,
    /// The keys behind them.
    pub keys: Arc<Keyring>,
}

impl Publisher {
    /// Publishes until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::new();
        let stopped = stop.clone();
        let work = async {
            loop {
                let pause = match self.publish_due(&mut backoff).await {
                    Ok(pause) => pause,
                    Err(CommitError::Closed) => return,
                    Err(error) => {
                        tracing::error!("cannot read the names to publish: {error}");
                        backoff.next()
                    }
                };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.commit.names.notified() => tokio::time::sleep(PACE).await,
                }
            }
        };
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = work => {}
        }
    }

    /// Publishes each name that is due once; returns how long there is nothing to do.
    async fn publish_due(&self, backoff: &mut Backoff) -> Result<Duration, CommitError> {
        let mut pause = Duration::from_secs(3600);
        for (key, known) in names::all(&self.store.snapshot()?)? {
            let now = Timestamp::wall();
            if !known.is_due(now) {
                pause = pause.min(known.due_at().since(now));
                continue;
            }
            match self.publish(&key, &known).await {
                Ok(published) => {
                    backoff.reset();
                    self.accept(key, known, published).await?;
                }
                Err(error) => {
                    tracing::warn!(%key, "cannot publish the name yet: {error}");
                    pause = pause.min(backoff.next());
                }
            }
        }
        Ok(pause.max(Duration::from_millis(10)))
    }

    async fn publish(&self, key: &KeyName, known: &Known) -> Result<Published, BackendError> {
        let held = self.keys.get(key).ok_or_else(|| BackendError::NotFound(format!("key {key}")))?;
        let snapshot = self.store.snapshot().map_err(|error| BackendError::Store(error.to_string()))?;
        let data =
            documents::get(&snapshot, &known.path).map_err(|error| BackendError::Store(error.to_string()))?;
        drop(snapshot);
        if let Prepared::Taken(other) = self.backend.names.prepare(key, &held).await? {
            self.settle_whose_key(key, known, &other)?;
            return Err(BackendError::Refused { call: "key/import", message: format!("{key} is taken") });
        }
        if let (Some((cid, _)), Some(data)) = (known.path.ipfs(), data) {
            self.backend.content.put(&cid, data.into()).await?;
        }
        let lifetime = Duration::from_nanos(known.lifetime);
        let last = known.published.as_ref().map_or(0, |accepted| accepted.sequence);
        let renewed = known.is_published();
        let publication = Publication {
            key_name: key.clone(),
            key: held,
            path: known.path.clone(),
            // Others must see that it is newer, whatever was published under the name before.
            sequence: if renewed { last } else { known.sequence.max(last + 1) },
            lifetime,
            ttl: TTL.min(lifetime),
        };
        self.backend.names.publish(&publication).await
    }

    /// The daemon has another key of this name. If nothing was ever published under the host's own,
    /// which was made while the daemon was away, the daemon's is adopted.
    fn settle_whose_key(&self, key: &KeyName, known: &Known, other: &IpnsName) -> Result<(), BackendError> {
        if known.published.is_some() {
            tracing::error!(%key, "the daemon has another key of this name ({other}): rename one of the two");
            return Ok(());
        }
        tracing::info!(%key, name = %other, "adopted the key that the daemon has under this name");
        self.keys.adopt(key, other).map_err(|error| BackendError::Store(chain(&error)))
    }

    /// Notes that the backend has a value, and unpins the one before.
    async fn accept(&self, key: KeyName, sent: Known, published: Published) -> Result<(), CommitError> {
        let now = Timestamp::wall();
        let Some(name) = self.keys.name(&key) else { return Ok(()) };
        let before = sent.published.as_ref().and_then(Accepted::document);
        let accepted = Accepted {
            path: sent.path,
            is_held: sent.document.is_some(),
            of: sent.sequence,
            sequence: published.sequence,
            at: now.0,
            valid_until: now.0.saturating_add(sent.lifetime),
            record: published.record,
        };
        let confirmed = Kind::NameConfirmed(Resolution {
            name,
            path: accepted.path.clone(),
            sequence: accepted.of,
            valid_until: Timestamp(accepted.valid_until),
            confirmed_at: now,
        });
        self.commit
            .append_and_write_later(vec![confirmed], move |write| names::accept(write, &key, accepted))
            .await?;
        match before {
            Some(cid) => self.unpin(&cid).await,
            None => Ok(()),
        }
    }

    /// Unpins what no name of the host points to; two may have the same bytes, which have one pin.
    async fn unpin(&self, cid: &Cid) -> Result<(), CommitError> {
        let path = ContentPath::of(cid);
        let all = names::all(&self.store.snapshot()?)?;
        let is_accepted = |known: &Known| known.published.as_ref().is_some_and(|last| last.path == path);
        if all.iter().any(|(_, known)| known.path == path || is_accepted(known)) {
            return Ok(());
        }
        if let Err(error) = self.backend.content.unpin(cid).await {
            tracing::warn!(%cid, "cannot unpin a superseded document: {error}");
        }
        Ok(())
    }
}
