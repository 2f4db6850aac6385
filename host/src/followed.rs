//! Owns the names of others: each followed name is asked for at a bounded rate, its record and its
//! content are checked, and a change becomes an event.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cid::Cid;
use redb::WriteTransaction;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::backend::record::Record;
use crate::backend::{Backend, BackendError};
use crate::commit::{Commit, CommitError};
use crate::documents;
use crate::ident::{ContentPath, IpnsName};
use crate::interest::Interest;
use crate::keys::Keyring;
use crate::log::{Event, Kind};
use crate::names;
use crate::plugin::DOCUMENT_BYTES;
use crate::store::{FOLLOWED, Store, StoreError};
use crate::time::Timestamp;

/// How long one name may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How often it is noted that a name still has its value.
const CONFIRM_EVERY: Duration = Duration::from_secs(60);

/// How often a name may point to another name.
const MAX_HOPS: usize = 4;

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// The name.
    pub name: IpnsName,
    /// What it points to.
    pub path: ContentPath,
    /// The record's sequence.
    pub sequence: u64,
    /// When the record stops being valid.
    pub valid_until: Timestamp,
    /// When the backend last had this record.
    pub confirmed_at: Timestamp,
}

/// The task that follows names.
#[derive(Debug)]
pub struct Follower {
    /// What is known is kept here.
    pub store: Arc<Store>,
    /// The writer.
    pub commit: Arc<Commit>,
    /// Where names are asked for.
    pub backend: Backend,
    /// Who follows which.
    pub interest: Arc<Interest>,
    /// The host's own names are known without asking.
    pub keys: Arc<Keyring>,
    /// How long to wait between two rounds.
    pub every: Duration,
}

impl Follower {
    /// Follows until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            loop {
                if let Err(CommitError::Closed) = self.round().await {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(self.every) => {}
                    () = self.interest.names_changed() => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Asks for each followed name once.
    async fn round(&self) -> Result<(), CommitError> {
        let fresh = self.interest.take_fresh();
        for name in self.interest.names() {
            let known = self.known(&name)?;
            if let Some(known) = &known
                && fresh.contains(&name)
            {
                self.tell(known.clone()).await?;
            }
            if self.own(&name).is_some() {
                continue;
            }
            match tokio::time::timeout(TIMEOUT, self.ask(&name, known.as_ref())).await {
                Ok(Ok(())) => {}
                Ok(Err(FollowError::Commit(error))) => return Err(error),
                Ok(Err(FollowError::Backend(error))) => tracing::debug!(%name, "not resolved: {error}"),
                Err(_) => tracing::debug!(%name, "not resolved in {TIMEOUT:?}"),
            }
        }
        Ok(())
    }

    fn own(&self, name: &IpnsName) -> Option<crate::ident::KeyName> {
        self.keys.all().into_iter().find(|(_, key)| key.name() == *name).map(|(key, _)| key)
    }

    fn known(&self, name: &IpnsName) -> Result<Option<Resolution>, StoreError> {
        if let Some(key) = self.own(name) {
            let known = names::known(&self.store.snapshot()?, &key)?;
            return Ok(known.map(|known| known.resolution(name.clone())));
        }
        known(&self.store, name)
    }

    async fn tell(&self, known: Resolution) -> Result<(), CommitError> {
        let event = Kind::Event(Event::NameChanged(known));
        self.commit.append_and_write(vec![event], |_| Ok(())).await
    }

    async fn ask(&self, name: &IpnsName, known: Option<&Resolution>) -> Result<(), FollowError> {
        let record = self.record(name).await?;
        let older = known.is_some_and(|known| record.sequence < known.sequence);
        if older {
            return Ok(());
        }
        let now = Timestamp::wall();
        let resolution = Resolution {
            name: name.clone(),
            path: record.path.clone(),
            sequence: record.sequence,
            valid_until: record.validity,
            confirmed_at: now,
        };
        // The path of a name that points to another name is where that one ends.
        if let Some(known) = known
            && record.path.ipns().is_none()
            && known.path == record.path
        {
            let fresh = known.valid_until == record.validity && now.since(known.confirmed_at) < CONFIRM_EVERY;
            return if fresh { Ok(()) } else { Ok(self.confirm(resolution).await?) };
        }
        let path = self.follow_path(record.path).await?;
        let (cid, data) = self.backend.content.file(&path, DOCUMENT_BYTES).await?;
        let resolution = Resolution { path: ContentPath::of(&cid), ..resolution };
        if known.is_some_and(|known| known.path == resolution.path) {
            return Ok(self.confirm(resolution).await?);
        }
        let old = known.and_then(|known| known.path.ipfs()).map(|(cid, _)| cid);
        Ok(self.change(resolution, (cid, data), old).await?)
    }

    async fn record(&self, name: &IpnsName) -> Result<Record, BackendError> {
        let bytes = self.backend.names.record(name).await?;
        Record::verify(&bytes, name, Timestamp::wall())
            .map_err(|error| BackendError::Unbelievable { call: "name/get", why: error.to_string() })
    }

    /// A name may point to a name.
    async fn follow_path(&self, mut path: ContentPath) -> Result<ContentPath, BackendError> {
        for _ in 0..MAX_HOPS {
            let Some(name) = path.ipns() else { return Ok(path) };
            path = self.record(&name).await?.path;
        }
        Err(BackendError::NotFound(format!("the end of a chain of more than {MAX_HOPS} names")))
    }

    /// Notes that a name still has its value, for those who judge how stale it is.
    async fn confirm(&self, resolution: Resolution) -> Result<(), CommitError> {
        let entry = Kind::NameConfirmed(resolution.clone());
        self.commit.append_and_write(vec![entry], move |write| put(write, &resolution)).await
    }

    /// Keeps a new value with its document, and tells the followers.
    async fn change(
        &self,
        resolution: Resolution,
        document: (Cid, Bytes),
        old: Option<Cid>,
    ) -> Result<(), CommitError> {
        let event = Kind::Event(Event::NameChanged(resolution.clone()));
        let write = move |write: &WriteTransaction| {
            documents::keep(write, &document.0, &document.1)?;
            if let Some(old) = &old {
                documents::release(write, old)?;
            }
            put(write, &resolution)
        };
        self.commit.append_and_write(vec![event], write).await
    }
}

fn put(write: &WriteTransaction, resolution: &Resolution) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(resolution).expect("a resolution is plain data");
    write.open_table(FOLLOWED)?.insert(resolution.name.as_str(), bytes.as_slice())?;
    Ok(())
}

/// What is known of a name of someone else.
pub fn known(store: &Store, name: &IpnsName) -> Result<Option<Resolution>, StoreError> {
    let table = store.snapshot()?.table(FOLLOWED)?;
    let Some(row) = table.get(name.as_str())? else { return Ok(None) };
    serde_json::from_slice(row.value()).map(Some).map_err(|error| StoreError::corrupt("followed", error))
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}
