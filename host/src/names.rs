//! Owns the host's own names: their values as they were committed, and the task that publishes the
//! newest value of each, signs it anew at half of its lifetime and lets go of what it supersedes.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use cid::Cid;
use redb::{ReadableTable, WriteTransaction};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::backend::{Backend, BackendError, Prepared, Publication, Published};
use crate::backoff::Backoff;
use crate::commit::{Commit, CommitError};
use crate::documents;
use crate::followed::Resolution;
use crate::ident::{ContentPath, IpnsName, KeyName};
use crate::keys::Keyring;
use crate::log::Kind;
use crate::plugin::{NameUpdate, NameValue};
use crate::store::{NAMES, Snapshot, Store, StoreError};
use crate::time::{Timestamp, nanoseconds};

/// How long a record is valid unless the plugin says otherwise.
pub const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The lifetimes that may be asked for.
pub const LIFETIMES: RangeInclusive<Duration> =
    Duration::from_secs(60)..=Duration::from_secs(365 * 24 * 3600);

/// How long others may keep a record before they ask again.
const TTL: Duration = Duration::from_secs(60);

/// Superseded documents that are kept, for those who read the old record.
const KEPT: usize = 4;

/// Shortest time between two publishes of one name: a daemon publishes one name at a time.
const PACE: Duration = Duration::from_millis(200);

/// One of the host's names, as it was committed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// What it points to.
    pub path: ContentPath,
    /// Counts the values.
    pub sequence: u64,
    /// Nanoseconds.
    lifetime: u64,
    /// The CID of the document, if the host holds it.
    document: Option<String>,
    /// Documents that it pointed to before, oldest first.
    superseded: Vec<String>,
    /// What the backend last accepted.
    published: Option<Accepted>,
}

/// What the backend accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Accepted {
    path: ContentPath,
    document: Option<String>,
    /// The committed value's count.
    of: u64,
    /// The record's sequence.
    sequence: u64,
    /// Nanoseconds since 1970.
    at: u64,
    valid_until: u64,
    /// The signed record, where the host signs it.
    #[serde(default)]
    record: Option<Vec<u8>>,
}

impl Known {
    /// What plugins and the API are told.
    pub fn resolution(&self, name: IpnsName) -> Resolution {
        let published = self.published.as_ref();
        Resolution {
            name,
            path: self.path.clone(),
            sequence: self.sequence,
            valid_until: Timestamp(published.map_or(0, |accepted| accepted.valid_until)),
            confirmed_at: Timestamp(published.map_or(0, |accepted| accepted.at)),
        }
    }

    /// Whether the backend has the newest value.
    pub fn is_published(&self) -> bool {
        self.published.as_ref().is_some_and(|accepted| accepted.of == self.sequence)
    }

    /// The record that the host signed.
    pub fn record(&self) -> Option<&[u8]> {
        self.published.as_ref()?.record.as_deref()
    }

    fn is_due(&self, now: Timestamp) -> bool {
        let Some(accepted) = &self.published else { return true };
        accepted.of != self.sequence || now.0 >= accepted.at.saturating_add(self.lifetime / 2)
    }

    /// When it must be signed anew.
    fn due_at(&self) -> Timestamp {
        Timestamp(self.published.as_ref().map_or(0, |accepted| accepted.at.saturating_add(self.lifetime / 2)))
    }
}

/// Gives a name a new value, in the transaction of the commit. Returns what followers are told if
/// the value has changed.
pub fn set(
    write: &WriteTransaction,
    key: &KeyName,
    update: &NameUpdate,
) -> Result<Option<Resolution>, StoreError> {
    let before = read(&write.open_table(NAMES)?, key)?;
    let path = update.value.path();
    let lifetime = nanoseconds(update.lifetime);
    if let Some(known) = before.as_ref().filter(|known| known.path == path) {
        put(write, key, &Known { lifetime, ..known.clone() })?;
        return Ok(None);
    }
    let mut superseded = before.as_ref().map(|known| known.superseded.clone()).unwrap_or_default();
    superseded.extend(before.as_ref().and_then(|known| known.document.clone()));
    while superseded.len() > KEPT {
        documents::release(write, &stored_cid(&superseded.remove(0))?)?;
    }
    let document = match &update.value {
        NameValue::Document { cid, data } => {
            documents::keep(write, cid, data)?;
            Some(cid.to_string())
        }
        NameValue::Path(_) => None,
    };
    let sequence = before.as_ref().map_or(1, |known| known.sequence + 1);
    let published = before.and_then(|known| known.published);
    let known = Known { path, sequence, lifetime, document, superseded, published };
    put(write, key, &known)?;
    Ok(Some(known.resolution(update.name.clone())))
}

/// What is committed under a key.
pub fn known(snapshot: &Snapshot, key: &KeyName) -> Result<Option<Known>, StoreError> {
    read(&snapshot.table(NAMES)?, key)
}

/// Everything that is committed under keys.
pub fn all(snapshot: &Snapshot) -> Result<Vec<(KeyName, Known)>, StoreError> {
    let table = snapshot.table(NAMES)?;
    table
        .iter()?
        .map(|row| {
            let (key, known) = row?;
            let key = key.value().parse().map_err(|error| StoreError::corrupt("names", error))?;
            Ok((key, decode(known.value())?))
        })
        .collect()
}

fn read(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &KeyName,
) -> Result<Option<Known>, StoreError> {
    table.get(key.as_str())?.map(|row| decode(row.value())).transpose()
}

fn decode(bytes: &[u8]) -> Result<Known, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::corrupt("names", error))
}

fn put(write: &WriteTransaction, key: &KeyName, known: &Known) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(known).expect("a name is plain data");
    write.open_table(NAMES)?.insert(key.as_str(), bytes.as_slice())?;
    Ok(())
}

fn stored_cid(text: &str) -> Result<Cid, StoreError> {
    Cid::try_from(text).map_err(|error| StoreError::corrupt("names", error))
}

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
        for (key, known) in all(&self.store.snapshot()?)? {
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
        self.keys.adopt(key, other).map_err(|error| BackendError::Store(crate::host::chain(&error)))
    }

    /// Notes that the backend has a value, and unpins the one before.
    async fn accept(&self, key: KeyName, sent: Known, published: Published) -> Result<(), CommitError> {
        let now = Timestamp::wall();
        let before = sent.published.as_ref().and_then(|accepted| accepted.document.clone());
        let Some(sent_name) = self.keys.name(&key) else { return Ok(()) };
        let accepted = Accepted {
            path: sent.path,
            document: sent.document.clone(),
            of: sent.sequence,
            sequence: published.sequence,
            at: now.0,
            valid_until: now.0.saturating_add(sent.lifetime),
            record: published.record,
        };
        let confirmed = Kind::NameConfirmed(Resolution {
            name: sent_name,
            path: accepted.path.clone(),
            sequence: accepted.of,
            valid_until: Timestamp(accepted.valid_until),
            confirmed_at: now,
        });
        let written = self.commit.append_and_write_later(vec![confirmed], move |write| {
            let Some(known) = read(&write.open_table(NAMES)?, &key)? else { return Ok(()) };
            put(write, &key, &Known { published: Some(accepted), ..known })
        });
        written.await?;
        // Two keys may have published the same bytes, which have one pin.
        let snapshot = self.store.snapshot()?;
        let in_use = |old: &String| {
            let names = all(&snapshot)?;
            Ok::<_, StoreError>(names.iter().any(|(_, known)| known.document.as_ref() == Some(old)))
        };
        if let Some(old) = before.filter(|old| Some(old) != sent.document.as_ref())
            && !in_use(&old)?
            && let Ok(cid) = Cid::try_from(old.as_str())
            && let Err(error) = self.backend.content.unpin(&cid).await
        {
            tracing::warn!(%cid, "cannot unpin a superseded document: {error}");
        }
        Ok(())
    }
}
