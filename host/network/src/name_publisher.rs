//! Owns the publication of the host's own names. It receives committed values and publishes the newest value of each
//! name, and signs it again after half of its lifetime. A name that points to an unknown value is put on hold
//! (`store/names/ownership.rs`). Documents are encrypted where the config requires it (`encryption`). Values that the
//! backend lost are published again (`audit`), and superseded documents are unpinned (`pins`).

mod audit;
mod checked;
mod encryption;
mod failures;
mod pins;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dim_ipfs::keys::Keyring;
use dim_ipfs::{Backend, BackendError, Current, Keeper, Prepared, Publication, Published};
use dim_model::backoff::Backoff;
use dim_model::entry::{Kind, Resolution};
use dim_model::error_chain::chain;
use dim_model::ident::{ContentPath, IpnsName, KeyName};
use dim_model::time::{Clock, Timestamp};
use dim_store::commit::{Commit, CommitError};
use dim_store::names::{self, Accepted, Finding, Known};
use dim_store::{Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::encrypted_documents::{CipherError, DocumentCipher};
use crate::subscription::ListeningRecords;
use audit::Audit;
use encryption::{Recognized, Sent};

pub use checked::CheckedNames;
pub use failures::{Failure, Failures, Lasting};

/// The duration for which readers may cache a record.
const TTL: Duration = Duration::from_secs(60);

/// The pause after a notification of new values, and so the shortest time between two publishes of one name. A daemon
/// publishes one name at a time.
const PACE: Duration = Duration::from_millis(200);

/// The longest pause of a document that waits for a key. A new key ends the pause.
const KEY_PAUSE: Duration = Duration::from_secs(10);

/// The task that publishes names.
#[derive(Clone, Debug)]
pub struct Publisher {
    /// The store with the committed names.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// The backend that publishes them.
    pub backend: Backend,
    /// The keys of the names.
    pub keys: Arc<Keyring>,
    /// The listening records. A new subscription shows that the daemon was away.
    pub listening_records: Arc<ListeningRecords>,
    /// The last failure of each name.
    pub failures: Arc<Failures>,
    /// The names that were checked against the daemon.
    pub looks: Arc<CheckedNames>,
    /// The encryption of documents.
    pub cipher: DocumentCipher,
    /// The clock that measures pauses.
    pub clock: Arc<dyn Clock>,
}

impl Publisher {
    /// Publishes names and audits published ones, until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let audit = Audit::new(self.clone());
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            // Both end by themselves only after the writer ended.
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
                () = self.clock.sleep(pause) => {}
                () = self.commit.names.notified() => tokio::time::sleep(PACE).await,
            }
        }
    }

    /// Publishes each name that is due, once. Returns the time until the next one is due. A name that fails does not
    /// delay others.
    async fn publish_due(&self, waits: &mut Waits) -> Result<Duration, CommitError> {
        let mut pause = Duration::from_secs(3600);
        // The snapshot ends before the loop. During the loop it would keep all old pages in the database.
        let all = names::all(&self.store.snapshot()?)?;
        let keys = self.document_keys().await;
        for (key, known) in all {
            let waiting = waits.get(&key).map_or(Duration::ZERO, |wait| wait.left(self.clock.monotonic()));
            let due_at =
                if self.is_encrypted_otherwise(&key, &known, &keys) { Timestamp(0) } else { known.due_at() };
            let due_in = due_at.since(Timestamp::wall()).max(waiting);
            if !due_in.is_zero() {
                if waiting.is_zero() {
                    self.failures.clear(&key);
                }
                pause = pause.min(due_in);
                continue;
            }
            if let Some(why) = self.awaits_key(&key, &known, &keys) {
                self.note_failure(&key, &PublishError::Cipher(why.into()));
                pause = pause.min(KEY_PAUSE);
                if !known.is_record_due(Timestamp::wall()) {
                    continue;
                }
            }
            match self.publish(&key, &known).await {
                Ok(Some((published, by, sent))) => {
                    waits.remove(&key);
                    if sent.of == known.sequence {
                        self.failures.clear(&key);
                    }
                    self.accept(key, known, sent, published, by).await?;
                }
                Ok(None) => {
                    waits.remove(&key);
                    self.failures.clear(&key);
                }
                Err(PublishError::Commit(error)) => return Err(error),
                Err(error) => {
                    self.note_failure(&key, &error);
                    let now = self.clock.monotonic();
                    let wait =
                        waits.entry(key).or_insert_with(|| Wait { backoff: Backoff::new(), until: now });
                    pause = pause.min(wait.longer(now));
                    // Superseded documents are unpinned although the name fails, so that a long failure keeps only
                    // the newest.
                    self.unpin_superseded().await?;
                }
            }
        }
        Ok(pause.max(Duration::from_millis(10)))
    }

    fn note_failure(&self, key: &KeyName, error: &PublishError) {
        if self.failures.note(key, error.to_string(), error.lasting()) {
            tracing::warn!(%key, "cannot publish the name yet: {error}");
        } else {
            tracing::debug!(%key, "still cannot publish the name: {error}");
        }
    }

    /// Publishes a name. If it points to an unknown value, the name is put on hold and the result is `None`.
    async fn publish(
        &self,
        key: &KeyName,
        known: &Known,
    ) -> Result<Option<(Published, Keeper, Sent)>, PublishError> {
        let held = self.keys.get(key).ok_or_else(|| PublishError::NoKey(key.clone()))?;
        let by = self.backend.keeper().await?;
        match self.backend.names.prepare(key, &held).await? {
            Prepared::Ready => {}
            Prepared::Gone => return Err(PublishError::Gone(key.clone())),
            Prepared::Taken(other) => return Err(self.settle_whose_key(key, known, other)?),
        }
        let current = match self.backend.names.current(&held.name()).await {
            // The daemon searches the whole network for a name without a record, until the timeout of the call.
            Err(error) if error.is_deadline_of_daemon() => None,
            current => current?,
        };
        if let Some(current) = &current
            && let Finding::Unknown(_) = known.compare(current)
            && !matches!(self.recognize_document(key, known, &held.name(), current).await?, Recognized::Own)
        {
            self.hold(key, current.clone()).await?;
            return Ok(None);
        }
        if current.is_none() && self.keys.is_foreign(key) && known.awaits_record() {
            self.hold_without_record(key, held.name()).await?;
            return Ok(None);
        }
        let sent = self.sent(key, known, &held.name()).await?;
        self.note_attempt(key, known, &sent).await?;
        if let (Some((cid, _)), Some(file)) = (sent.path.ipfs(), &sent.file) {
            self.backend.content.put(&cid, file.clone()).await?;
        }
        let lifetime = Duration::from_nanos(known.lifetime);
        let published = known.published.as_ref();
        let is_same = published.is_some_and(|it| it.of == sent.of && it.path == sent.path);
        let last = published.map(|accepted| accepted.sequence);
        let publication = Publication {
            key_name: key.clone(),
            key: held,
            path: sent.path.clone(),
            // Readers must see that the record is newer than all records before.
            sequence: match last {
                Some(last) if is_same => last,
                Some(last) => known.sequence.max(last + 1),
                None => known.sequence.max(1),
            },
            current,
            lifetime,
            ttl: TTL.min(lifetime),
        };
        Ok(Some((self.backend.names.publish(&publication).await?, by, sent)))
    }

    /// Puts a name on hold, unless the host knows the found value by now.
    async fn hold(&self, key: &KeyName, current: Current) -> Result<(), CommitError> {
        let (held, found) = (key.clone(), current.clone());
        let now = Timestamp::wall();
        let is_news = self.commit.write(move |write| names::hold(write, &held, &found, now)).await?;
        if is_news {
            tracing::error!(%key, path = %current.path, sequence = current.sequence, "the name points to a value that this host has not published: the host publishes nothing under it until the operator decides with `dim ipns adopt`");
        }
        Ok(())
    }

    /// Puts an adopted key without a record on hold, until there is a record or the operator decides.
    async fn hold_without_record(&self, key: &KeyName, name: IpnsName) -> Result<(), CommitError> {
        let (held, now) = (key.clone(), Timestamp::wall());
        let hold = move |write: &redb::WriteTransaction| names::hold_without_record(write, &held, &name, now);
        if self.commit.write(hold).await? {
            tracing::error!(%key, "the daemon has this key but no record of it: the host publishes nothing under it until there is a record, or until `dim ipns adopt {key} replace`");
        }
        Ok(())
    }

    /// Handles another key with this key name in the daemon. If nothing was published under the host's own key, which
    /// was made while the daemon was away, the host adopts the daemon's key. Returns the reason why nothing is
    /// published this time.
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

    /// Records that the backend accepted a value, and unpins documents that no name points to.
    async fn accept(
        &self,
        key: KeyName,
        value: Known,
        sent: Sent,
        published: Published,
        by: Keeper,
    ) -> Result<(), CommitError> {
        let now = Timestamp::wall();
        let Some(name) = self.keys.name(&key) else { return Ok(()) };
        let accepted = Accepted {
            path: sent.path,
            is_held: value.document.is_some(),
            of: sent.of,
            sequence: published.sequence,
            at: now.0,
            lifetime: value.lifetime,
            record: published.record,
            by: Some(by),
            backed_up: None,
            encryption: sent.encryption,
        };
        let confirmed = (sent.of == value.sequence).then(|| {
            Kind::NameConfirmed(Resolution {
                name,
                path: value.path,
                sequence: accepted.of,
                valid_until: accepted.valid_until(),
                confirmed_at: now,
            })
        });
        self.commit
            .append_and_write_later(confirmed.into_iter().collect(), move |write| {
                names::accept(write, &key, accepted)
            })
            .await?;
        self.unpin_superseded().await
    }
}

/// The pause of each name that failed.
type Waits = BTreeMap<KeyName, Wait>;

/// The pause of a name that could not be published.
#[derive(Debug)]
struct Wait {
    backoff: Backoff,
    until: Instant,
}

impl Wait {
    fn left(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }

    fn longer(&mut self, now: Instant) -> Duration {
        let pause = self.backoff.next_pause();
        self.until = now + pause;
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
        "key {0} was adopted from a daemon, the host has no private key for it, and this daemon does not have the key: restore it with `ipfs key import {0} FILE`, and keep a copy in the host with `dim ipns import-key {0} FILE`"
    )]
    Gone(KeyName),
    #[error(
        "the daemon has another key of the name {key} ({other}): rename one of the two, as with `ipfs key rename`"
    )]
    Taken { key: KeyName, other: IpnsName },
    #[error(
        "the daemon has lost the encrypted document {0}, and this host has lost the key with which it can be made again: ask an admin to add this host to the group, or publish another document"
    )]
    FileLost(ContentPath),
    #[error("the store has lost the document {0}: publish another one, or restore the host from a backup")]
    DocumentLost(ContentPath),
    #[error("the key {0} of the daemon was adopted just now")]
    Adopted(KeyName),
    #[error(transparent)]
    Cipher(#[from] CipherError),
}

impl PublishError {
    fn lasting(&self) -> Lasting {
        match self {
            Self::NoKey(_)
            | Self::Gone(_)
            | Self::Taken { .. }
            | Self::FileLost(_)
            | Self::DocumentLost(_) => Lasting::UntilMended,
            Self::Cipher(CipherError::NoKey(why)) if why.needs_operator() => Lasting::UntilMended,
            Self::Commit(_) | Self::Backend(_) | Self::Adopted(_) | Self::Cipher(_) => Lasting::ForNow,
        }
    }
}

impl From<StoreError> for PublishError {
    fn from(error: StoreError) -> Self {
        Self::Commit(error.into())
    }
}
