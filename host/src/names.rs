//! Owns the publishing of the host's own names: the newest committed value of each, signed anew at
//! half of its lifetime. A name that points to what the host does not know is put on hold
//! (`store/names/ownership.rs`), what the backend has lost is published again (`audit`), what is superseded is unpinned
//! (`pins`).

mod audit;
mod failures;
mod looks;
mod pins;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::backend::{Backend, BackendError, Current, Keeper, Prepared, Publication, Published};
use crate::backoff::Backoff;
use crate::cause::chain;
use crate::commit::{Commit, CommitError};
use crate::effect::NameValue;
use crate::entry::{Kind, Resolution};
use crate::ident::{IpnsName, KeyName};
use crate::keys::Keyring;
use crate::plugin::DOCUMENT_BYTES;
use crate::store::names::{self, Accepted, Finding, Known};
use crate::store::{Store, StoreError, documents};
use crate::subscription::Hearings;
use crate::time::Timestamp;

use audit::Audit;

pub use failures::{Failure, Failures, Lasting};
pub use looks::Looks;

/// How long others may keep a record before they ask again.
const TTL: Duration = Duration::from_secs(60);

/// Shortest time between two publishes of one name: a daemon publishes one name at a time.
const PACE: Duration = Duration::from_millis(200);

/// The task that publishes names.
#[derive(Clone, Debug)]
pub struct Publisher {
    /// Where names are committed.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Where they are published.
    pub backend: Backend,
    /// The keys behind them.
    pub keys: Arc<Keyring>,
    /// What is listened to: when a topic was subscribed to anew, the daemon was away.
    pub hearings: Arc<Hearings>,
    /// Why names could not be published.
    pub failures: Arc<Failures>,
    /// Which names the daemon was asked about.
    pub looks: Arc<Looks>,
}

impl Publisher {
    /// Publishes, and looks after what was published, until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let audit = Audit::new(self.clone());
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            // Both end by themselves only once the writer is gone.
            _ = async { tokio::join!(self.publish_all(), audit.run()) } => {}
        }
    }

    async fn publish_all(&self) {
        let mut waits = Waits::new();
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
                Ok(Some((published, by))) => {
                    waits.remove(&key);
                    self.failures.clear(&key);
                    self.accept(key, known, published, by).await?;
                }
                Ok(None) => {
                    waits.remove(&key);
                    self.failures.clear(&key);
                }
                Err(PublishError::Commit(error)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%key, "cannot publish the name yet: {error}");
                    self.failures.note(&key, error.to_string(), error.lasting());
                    pause = pause.min(waits.entry(key).or_default().longer());
                    // However long it is refused: no more than the newest is held for it.
                    self.unpin_superseded().await?;
                }
            }
        }
        Ok(pause.max(Duration::from_millis(10)))
    }

    /// Publishes a name, unless it points to what the host does not know: then it is on hold.
    async fn publish(
        &self,
        key: &KeyName,
        known: &Known,
    ) -> Result<Option<(Published, Keeper)>, PublishError> {
        let held = self.keys.get(key).ok_or_else(|| PublishError::NoKey(key.clone()))?;
        let data = documents::get(&self.store.snapshot()?, &known.path)?;
        let by = self.backend.keeper().await?;
        match self.backend.names.prepare(key, &held).await? {
            Prepared::Ready => {}
            Prepared::Gone => return Err(PublishError::Gone(key.clone())),
            Prepared::Taken(other) => return Err(self.settle_whose_key(key, known, other)?),
        }
        let current = match self.backend.names.current(&held.name()).await {
            // A name without a record is looked for on the whole network, for as long as the call may take.
            Err(error) if error.is_deadline_of_daemon() => None,
            current => current?,
        };
        if let Some(current) = &current
            && let Finding::Unknown(_) = known.compare(current)
        {
            self.hold(key, current.clone()).await?;
            return Ok(None);
        }
        if current.is_none() && self.keys.is_foreign(key) && known.awaits_record() {
            self.hold_without_record(key, held.name()).await?;
            return Ok(None);
        }
        self.note_attempt(key, known).await?;
        if let (Some((cid, _)), Some(data)) = (known.path.ipfs(), data) {
            self.backend.content.put(&cid, data.into()).await?;
        }
        let lifetime = Duration::from_nanos(known.lifetime);
        let last = known.published.as_ref().map(|accepted| accepted.sequence);
        let publication = Publication {
            key_name: key.clone(),
            key: held,
            path: known.path.clone(),
            // Others must see that it is newer, whatever was published under the name before.
            sequence: match last {
                Some(last) if known.is_published() => last,
                Some(last) => known.sequence.max(last + 1),
                None => known.sequence.max(1),
            },
            current,
            lifetime,
            ttl: TTL.min(lifetime),
        };
        Ok(Some((self.backend.names.publish(&publication).await?, by)))
    }

    /// Stops publishing under a name, unless the host has come to know what it points to.
    async fn hold(&self, key: &KeyName, current: Current) -> Result<(), CommitError> {
        let (held, found) = (key.clone(), current.clone());
        let now = Timestamp::wall();
        let is_news = self.commit.write(move |write| names::hold(write, &held, &found, now)).await?;
        if is_news {
            tracing::error!(%key, path = %current.path, sequence = current.sequence, "the name points to what this host has not published: it publishes nothing under it until `dim ipns adopt` says what is meant");
        }
        Ok(())
    }

    /// Publishes nothing under an adopted key of which there is no record, until there is one or the operator decides.
    async fn hold_without_record(&self, key: &KeyName, name: IpnsName) -> Result<(), CommitError> {
        let (held, now) = (key.clone(), Timestamp::wall());
        let hold = move |write: &redb::WriteTransaction| names::hold_without_record(write, &held, &name, now);
        if self.commit.write(hold).await? {
            tracing::error!(%key, "the daemon holds this key and shows no record of it: nothing is published under it until there is one, or `dim ipns adopt {key} replace`");
        }
        Ok(())
    }

    /// The daemon has another key of this name. If nothing was ever published under the host's own,
    /// which was made while the daemon was away, the daemon's is adopted.
    /// Returns why nothing is published this time.
    fn settle_whose_key(
        &self,
        key: &KeyName,
        known: &Known,
        other: IpnsName,
    ) -> Result<PublishError, BackendError> {
        if known.published.is_some() {
            return Ok(PublishError::Taken { key: key.clone(), other });
        }
        tracing::info!(%key, name = %other, "adopted the key that the daemon has under this name");
        self.keys.adopt(key, &other).map_err(|error| BackendError::Store(chain(&error)))?;
        Ok(PublishError::Adopted(key.clone()))
    }

    /// Notes that the backend has a value, and unpins what no name points to any more.
    async fn accept(
        &self,
        key: KeyName,
        sent: Known,
        published: Published,
        by: Keeper,
    ) -> Result<(), CommitError> {
        let now = Timestamp::wall();
        let Some(name) = self.keys.name(&key) else { return Ok(()) };
        let accepted = Accepted {
            path: sent.path,
            is_held: sent.document.is_some(),
            of: sent.sequence,
            sequence: published.sequence,
            at: now.0,
            lifetime: sent.lifetime,
            record: published.record,
            by: Some(by),
            backed_up: None,
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
}

/// Reads the file that is published under a name, at most [`DOCUMENT_BYTES`] of it.
pub async fn published_file(backend: &Backend, current: &Current) -> Result<NameValue, BackendError> {
    let path = backend.end_of_chain(current.path.clone()).await?;
    let (cid, data) = backend.content.file(&path, DOCUMENT_BYTES).await?;
    Ok(NameValue::Document { cid, data })
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
    #[error("the host has no key {0}: stop the host and restore the file keys/{0} from a backup")]
    NoKey(KeyName),
    #[error(
        "key {0} was adopted from a daemon, which alone has its private half, and this daemon does not have it: put it back with `ipfs key import {0} FILE`, and keep a copy in the host with `dim ipns import-key {0} FILE`"
    )]
    Gone(KeyName),
    #[error(
        "the daemon has another key of the name {key} ({other}): rename one of the two, as with `ipfs key rename`"
    )]
    Taken { key: KeyName, other: IpnsName },
    #[error("the key {0} of the daemon was adopted just now")]
    Adopted(KeyName),
}

impl PublishError {
    fn lasting(&self) -> Lasting {
        match self {
            Self::NoKey(_) | Self::Gone(_) | Self::Taken { .. } => Lasting::UntilMended,
            Self::Commit(_) | Self::Backend(_) | Self::Adopted(_) => Lasting::ForNow,
        }
    }
}

impl From<StoreError> for PublishError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}
