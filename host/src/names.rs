//! Owns the publishing of the host's own names: the newest committed value of each, signed anew at
//! half of its lifetime; the backend lets go of what it supersedes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use crate::store::{Store, StoreError, documents, pins};
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
        let mut waits = Waits::new();
        let stopped = stop.clone();
        let work = async {
            loop {
                let pause = match self.publish_due(&mut waits).await {
                    Ok(pause) => pause,
                    Err(CommitError::Closed) => return,
                    Err(error) => {
                        tracing::error!("cannot read the names to publish: {error}");
                        Duration::from_secs(1)
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

    /// Publishes each name that is due once; returns how long there is nothing to do. A name that
    /// fails holds up no other.
    async fn publish_due(&self, waits: &mut Waits) -> Result<Duration, CommitError> {
        let mut pause = Duration::from_secs(3600);
        // A snapshot that lived as long as the loop would keep every page of its time in the database.
        let all = names::all(&self.store.snapshot()?)?;
        for (key, known) in all {
            let waiting = waits.get(&key).map_or(Duration::ZERO, |wait| wait.left());
            let due_in = known.due_at().since(Timestamp::wall()).max(waiting);
            if !due_in.is_zero() {
                pause = pause.min(due_in);
                continue;
            }
            match self.publish(&key, &known).await {
                Ok(published) => {
                    waits.remove(&key);
                    self.accept(key, known, published).await?;
                }
                Err(PublishError::Commit(error)) => return Err(error),
                Err(PublishError::Backend(error)) => {
                    tracing::warn!(%key, "cannot publish the name yet: {error}");
                    pause = pause.min(waits.entry(key).or_default().longer());
                    // However long it is refused: no more than the newest is held for it.
                    self.unpin_superseded().await?;
                }
            }
        }
        Ok(pause.max(Duration::from_millis(10)))
    }

    async fn publish(&self, key: &KeyName, known: &Known) -> Result<Published, PublishError> {
        let held = self.keys.get(key).ok_or_else(|| BackendError::NotFound(format!("key {key}")))?;
        let data = documents::get(&self.store.snapshot()?, &known.path)?;
        if let Prepared::Taken(other) = self.backend.names.prepare(key, &held).await? {
            self.settle_whose_key(key, known, &other)?;
            let message = format!("{key} is taken");
            return Err(BackendError::Refused { call: "key/import", message }.into());
        }
        if let (Some((cid, _)), Some(data)) = (known.path.ipfs(), data) {
            self.note_pin(&cid).await?;
            self.backend.content.put(&cid, data.into()).await?;
        }
        let lifetime = Duration::from_nanos(known.lifetime);
        let last = known.published.as_ref().map(|accepted| accepted.sequence);
        let renewed = known.is_published();
        let publication = Publication {
            key_name: key.clone(),
            key: held,
            path: known.path.clone(),
            // Others must see that it is newer, whatever was published under the name before.
            sequence: match last {
                Some(last) if renewed => last,
                Some(last) => known.sequence.max(last + 1),
                None => known.sequence.max(1),
            },
            last,
            lifetime,
            ttl: TTL.min(lifetime),
        };
        Ok(self.backend.names.publish(&publication).await?)
    }

    /// Notes a file before it is pinned, so that the pin is found again whatever happens then. One
    /// that someone else has pinned stays theirs.
    async fn note_pin(&self, cid: &Cid) -> Result<(), PublishError> {
        let is_noted = pins::is_noted(&self.store.snapshot()?, cid)?;
        if self.backend.network && !is_noted && !self.backend.content.is_pinned(cid).await? {
            let cid = *cid;
            self.commit.write(move |write| pins::note(write, &cid)).await?;
        }
        Ok(())
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

    /// Notes that the backend has a value, and unpins what no name points to any more.
    async fn accept(&self, key: KeyName, sent: Known, published: Published) -> Result<(), CommitError> {
        let now = Timestamp::wall();
        let Some(name) = self.keys.name(&key) else { return Ok(()) };
        let stranger_at = match &published.newer_before {
            Some(path) if !self.is_own(path)? => {
                tracing::error!(%key, %path, "someone else publishes under this key: two hosts on one daemon need keys of their own, see ipfs.ipns_key_name");
                Some(now.0)
            }
            _ => sent.published.as_ref().and_then(|last| last.stranger_at),
        };
        let accepted = Accepted {
            path: sent.path,
            is_held: sent.document.is_some(),
            of: sent.sequence,
            sequence: published.sequence,
            at: now.0,
            lifetime: sent.lifetime,
            record: published.record,
            stranger_at,
        };
        let confirmed = Kind::NameConfirmed(Resolution {
            name,
            path: accepted.path.clone(),
            sequence: accepted.of,
            valid_until: accepted.valid_until(),
            confirmed_at: now,
        });
        self.commit
            .append_and_write_later(vec![confirmed], move |write| names::accept(write, &key, accepted))
            .await?;
        self.unpin_superseded().await
    }

    /// Whether a path is a document that this host has published, as far as it still remembers.
    fn is_own(&self, path: &ContentPath) -> Result<bool, StoreError> {
        let Some((cid, _)) = path.ipfs() else { return Ok(false) };
        let snapshot = self.store.snapshot()?;
        Ok(pins::is_noted(&snapshot, &cid)? || documents::get(&snapshot, path)?.is_some())
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
    async fn unpin_superseded(&self) -> Result<(), CommitError> {
        for cid in self.superseded()? {
            match self.backend.content.unpin(&cid).await {
                Ok(()) => self.commit.write_later(move |write| pins::forget(write, &cid)).await?,
                Err(error) => tracing::warn!(%cid, "cannot unpin a superseded document yet: {error}"),
            }
        }
        Ok(())
    }
}

/// How long each name that failed is left alone.
type Waits = BTreeMap<KeyName, Wait>;

/// A name that could not be published.
#[derive(Debug)]
struct Wait {
    backoff: Backoff,
    until: Instant,
}

impl Default for Wait {
    fn default() -> Self {
        Self { backoff: Backoff::new(), until: Instant::now() }
    }
}

impl Wait {
    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn longer(&mut self) -> Duration {
        let pause = self.backoff.next();
        self.until = Instant::now() + pause;
        pause
    }
}

#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl From<StoreError> for PublishError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}
